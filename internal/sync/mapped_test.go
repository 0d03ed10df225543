package sync

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"pgregory.net/rapid"
)

// TestMapped: memory is zero, stays where it is, and is not the heap's.
func TestMapped(t *testing.T) {
	m := &mapped{}
	before := heapNow()
	var got [][]code
	for i := range 40 {
		c := m.codes(16 << 10)
		for k := range c {
			if c[k] != 0 {
				t.Fatalf("piece %d is not zero", i)
			}
			c[k] = code(i)<<32 | code(k)
		}
		got = append(got, c)
	}
	if used := heapNow() - before; used > 1<<20 {
		t.Errorf("%d bytes of heap", used)
	}
	for i, c := range got {
		for k := range c {
			if c[k] != code(i)<<32|code(k) {
				t.Fatalf("piece %d has changed", i)
			}
		}
	}
	if n := m.taken(); n < 40*16<<13 || n > 60*16<<13 {
		t.Errorf("%d bytes", n)
	}
	m.close()
	m.close()
	var none *mapped
	if len(none.codes(3)) != 3 || none.taken() != 0 {
		t.Fatal("no memory from the heap")
	}
	none.close()
}

// TestChangedBlocks compares the overlay with a map.
func TestChangedBlocks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type entry struct {
			c    code
			slot uint32
		}
		pool := &groupPool{mem: &mapped{}}
		defer pool.close()
		if rapid.Bool().Draw(t, "heap") {
			pool = nil
		}
		o := changedBlocks{pool: pool}
		other := changedBlocks{pool: pool} // has what o gives back
		want := map[uint64]entry{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			b := rapid.Uint64Range(0, 300).Draw(t, "block")
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0:
				o.drop(b)
				delete(want, b)
			case 1:
				if b > 100 {
					o.cut(b)
					for k := range want {
						if k >= b {
							delete(want, k)
						}
					}
				}
			case 2:
				other.put(b, codeUnknown, 7)
			default:
				e := entry{code(rapid.Uint64().Draw(t, "code")), rapid.Uint32().Draw(t, "slot")}
				o.put(b, e.c, e.slot)
				want[b] = e
			}
		}
		n, last := 0, int64(-1)
		_ = o.each(func(b uint64, c code, slot uint32) error {
			if e, ok := want[b]; !ok || e.c != c || e.slot != slot || int64(b) <= last {
				t.Fatalf("block %d: %v %v after %d, want %v %v", b, c, slot, last, e, ok)
			}
			last = int64(b)
			n++
			return nil
		})
		if n != len(want) {
			t.Fatalf("%d blocks instead of %d", n, len(want))
		}
		for b := range uint64(301) {
			e, ok := want[b]
			if c, slot, got := o.get(b); got != ok || got && (c != e.c || slot != e.slot) {
				t.Fatalf("block %d: %v %v %v, want %v %v", b, c, slot, got, e, ok)
			}
		}
	})
}

// TestVolumeIndexInParts: what doesn't fit into one record is in several, which count only
// when all are there.
func TestVolumeIndexInParts(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	volWrite(t, filepath.Join(v.Path(), "f"), 0, volData(1, 3*BlockSize))
	_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	big := func(seed code) []code {
		c := make([]code, 3*indexPart+5)
		for i := range c {
			c[i] = seed<<32 + code(i)
		}
		return c
	}
	const id = 1000
	v.idx.set(id, &indexed{typ: TypeRegular, codes: v.idx.take(big(7))})
	v.idx.logged = 0
	v.logIndex(v.State().Copy, v.idx, "", ref.Hash).end() // anew
	records := func() (starts []int64) {
		b, err := os.ReadFile(v.indexPath())
		volOK(t, err)
		for at := int64(0); at < int64(len(b)); {
			starts = append(starts, at)
			at += indexHeader + int64(binary.LittleEndian.Uint64(b[at:]))
		}
		return starts
	}
	if n := len(records()); n < 3 {
		t.Fatalf("%d records", n)
	}
	same := func(when string, want []code) {
		t.Helper()
		x := v.loadIndex(ref)
		if x == nil || x.logged != v.idx.logged || len(x.files) != len(v.idx.files) {
			t.Fatalf("%s: it can't be read", when)
		}
		for i, c := range x.files[id].codes {
			if c != want[i] {
				t.Fatalf("%s: code %d is %x", when, i, c)
			}
		}
	}
	same("anew", big(7))
	// What follows is in parts, too.
	ref2 := ref
	ref2.Hash = "another"
	before := len(records())
	l := v.logIndex(v.State().Copy, v.idx, ref.Hash, ref2.Hash)
	w := &work{blocks: 3*indexPart + 5, valid: 0}
	for i, c := range big(8) {
		w.over.put(uint64(i), c, 0)
	}
	v.idx.update(id, TypeRegular, w, l.file)
	l.end()
	starts := records()
	if len(starts) < before+3 {
		t.Fatalf("%d records after %d", len(starts), before)
	}
	ref = ref2
	same("appended", big(8))
	volOK(t, os.Truncate(v.indexPath(), starts[len(starts)-1]))
	if v.loadIndex(ref) != nil {
		t.Fatal("an index without its last record is believed")
	}
}

// TestIndexMemory: a block of the volume costs nothing on the heap, also after files have
// grown and gone.
func TestIndexMemory(t *testing.T) {
	const blocks = 1 << 20 // 8 GiB
	before := heapNow()
	x := newIndex()
	for id := range FileID(64) {
		x.set(id, &indexed{typ: TypeRegular, codes: x.resize(nil, blocks/64)})
	}
	for id, f := range x.files { // all grow
		f.codes = x.resize(f.codes, blocks/64+1)
		f.codes[blocks/64] = code(id)
	}
	for id := range FileID(56) { // and most go
		x.remove(id)
	}
	taken := x.mem.taken()
	x.tidy()
	if now := x.mem.taken(); now*4 > taken {
		t.Errorf("%d of %d bytes are kept for an eighth of the files", now, taken)
	}
	for id, f := range x.files {
		if len(f.codes) != blocks/64+1 || f.codes[blocks/64] != code(id) || f.codes[0] != codeHole {
			t.Fatalf("file %d is not what it was", id)
		}
	}
	// Far less than a byte for each of a million blocks.
	if used := heapNow() - before; used > blocks/4 {
		t.Errorf("%d bytes of heap for %d blocks", used, blocks)
	}
	runtime.KeepAlive(x)
}

func heapNow() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
