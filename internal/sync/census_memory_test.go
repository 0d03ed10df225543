package sync

import (
	"fmt"
	"maps"
	"runtime"
	"testing"
)

// manyScanned is what a scan of n files of two blocks in directories of a thousand finds.
func manyScanned(n int) *scanned {
	s := &scanned{names: map[string]*node{}}
	ino := uint64(100)
	add := func(name string, typ FileType) {
		ino++
		nd := &node{typ: typ, mapped: -1, alloc: 2 * BlockSize, id: FileID(ino), names: []string{name},
			key:  statKey{Ino: ino, Birth: int64(ino), Size: 2 * BlockSize, MTime: int64(ino), CTime: int64(ino)},
			meta: &Inode{Type: typ, Mode: 0o600, MTime: int64(ino), Size: 2 * BlockSize}}
		s.nodes = append(s.nodes, nd)
		s.names[name] = nd
	}
	add("", TypeDir)
	for i := range n {
		if i%1000 == 0 {
			add(fmt.Sprintf("d%d", i/1000), TypeDir)
		}
		add(fmt.Sprintf("d%d/f%d", i/1000, i), TypeRegular)
	}
	return s
}

// manyCensus keeps nothing of what it was made from.
func manyCensus(t *testing.T, files int) *census {
	c, err := newCensus(manyScanned(files))
	volOK(t, err)
	return c
}

// TestCensusMemory bounds what is kept of each file between two captures, as the tier
// "tracked" keeps it.
func TestCensusMemory(t *testing.T) {
	const files = 200_000
	before := heapNow()
	last := before
	step := func(what string, most int64) {
		t.Helper()
		now := heapNow()
		each := (now - last) / files
		last = now
		t.Logf("%s: %d bytes for each file", what, each)
		if each > most {
			t.Errorf("%s: %d bytes for each file are more than %d", what, each, most)
		}
	}
	tree := emptyTree()
	c := manyCensus(t, files)
	for id, n := range c.byID {
		tree.Names[n.names[0]] = id
		in := *n.meta
		in.Extents = []Extent{{Kind: ExtentData, Count: 2}}
		tree.Inodes[id] = &in
	}
	c.clear() // as after a capture
	c.share(tree, maps.Keys(tree.Inodes))
	x := newIndex()
	for id, n := range c.byID {
		x.set(id, &indexed{typ: n.typ, key: n.key, codes: x.resize(nil, 2)})
	}
	step("all", 800)
	runtime.KeepAlive(x)
	step("index", 0)
	runtime.KeepAlive(c)
	step("census", 0)
	runtime.KeepAlive(tree)
	step("tree", 0)
}
