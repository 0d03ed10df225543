package sync

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// applier turns a directory into what a tree says. plan only reads; the other steps change
// the directory and may be interrupted anywhere: planning again finds what is left to do.
type applier struct {
	fs       fsx.FS
	root     string // the directory
	stage    string // where files wait on their way from one name to another; same file system
	tree     *Tree
	workers  int
	progress Progress
	verb     string // what progress says is going on
	forget   bool   // nobody wants to know afterwards what the blocks are

	// idx says what the directory's files have, as far as their stat is as in it. May be nil.
	idx   *index
	idxAt string // hash of the snapshot that idx describes
	// base is a tree whose blocks' codes are known, from baseIdx: where the tree refers to
	// the same blocks, the store need not be asked. Both or neither are nil.
	base    *Tree
	baseIdx *index
	// store and foots say what the tree's other blocks are. No store: nothing is compared.
	store *Store
	foots *footers
	// sources are other directories on this disk that may have blocks of the tree, best first.
	sources []*source

	found   *scanned
	targets map[FileID]*target
	order   []*target          // by first name
	keep    map[uint64]*target // local inodes that stay
	links   []link             // further names of files that are to be created

	total  int64        // bytes to write
	done   atomic.Int64 // of them written
	reused atomic.Int64 // bytes that were found elsewhere on this disk
}

// target is an inode of the tree.
type target struct {
	id    FileID
	in    *Inode
	names []string // sorted

	handle  string // absolute path under which the local inode is now; "" = to be created
	staged  bool   // handle is in the stage
	trust   bool   // codes are known without reading
	fresh   bool   // created by this run: all holes
	touched bool   // its content is being changed
	clone   string // a file that it is cloned from when it is created; "" = none
	size    int64  // of the local file
	alloc   int64
	had     []code   // of the local file when the plan was made
	codes   []code   // of the local file now; nil while it has no block
	want    []code   // of the tree's blocks, where they had to be found out
	todo    []Extent // where the local content differs
	slots   []uint64 // per entry of todo: where the spool has it
}

type link struct {
	t    *target
	name string
}

// plan looks at the directory and decides what has to be done.
func (a *applier) plan(ctx context.Context) error {
	if !a.tree.meta.known { // else the store has checked it
		if err := validateTree(a.tree); err != nil { // a name could lead out of the directory
			return fmt.Errorf("snapshot %q: %w", a.tree.Ref.ID, err)
		}
	}
	found, err := scan(ctx, a.root, scanConfig{})
	if err != nil {
		return err
	}
	a.found = found
	a.targets = make(map[FileID]*target, len(a.tree.Inodes))
	for name, id := range a.tree.Names {
		t := a.targets[id]
		if t == nil {
			t = &target{id: id, in: a.tree.Inodes[id]}
			a.targets[id] = t
			a.order = append(a.order, t)
		}
		t.names = append(t.names, name)
	}
	for _, t := range a.order {
		sort.Strings(t.names)
	}
	sort.Slice(a.order, func(i, j int) bool { return a.order[i].names[0] < a.order[j].names[0] })
	a.match()
	if err := a.matchStage(); err != nil {
		return err
	}
	return a.compare(ctx)
}

// match finds the local inode for each target: the one that had its number in the base, or
// the one that has its name.
func (a *applier) match() {
	a.keep = map[uint64]*target{}
	claim := func(n *node, t *target) bool {
		if t == nil || t.handle != "" || t.in.Type != n.typ || a.keep[n.key.Ino] != nil {
			return false
		}
		if n.typ == TypeSymlink && string(t.in.Target) != string(n.meta.Target) {
			return false
		}
		a.keep[n.key.Ino] = t
		t.handle, t.size, t.alloc = filepath.Join(a.root, n.names[0]), n.key.Size, n.alloc
		for _, name := range n.names {
			if a.at(name) == t {
				t.handle = filepath.Join(a.root, name)
			}
		}
		return true
	}
	var rest []*node
	for _, n := range a.found.nodes {
		if n.typ == TypeDir {
			claim(n, a.at(n.names[0]))
			continue
		}
		if id, ok := a.known(n); ok {
			if t := a.targets[id]; claim(n, t) {
				t.trust = true
				continue
			}
		}
		rest = append(rest, n)
	}
	for _, n := range rest {
		for _, name := range n.names {
			if claim(n, a.at(name)) {
				break
			}
		}
	}
}

// at is the target that has a name in the tree, or nil.
func (a *applier) at(name string) *target {
	if id, ok := a.tree.Names[name]; ok {
		return a.targets[id]
	}
	return nil
}

// known says which inode of the index a local file still is.
func (a *applier) known(n *node) (FileID, bool) {
	if a.idx == nil {
		return 0, false
	}
	id, ok := a.idx.byIno[n.key.Ino]
	if !ok {
		return 0, false
	}
	f := a.idx.files[id]
	return id, f.key == n.key && f.typ == n.typ
}

// matchStage takes up files that an interrupted run had on their way.
func (a *applier) matchStage() error {
	if a.stage == "" {
		return nil
	}
	es, err := os.ReadDir(a.stage)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", a.stage, err)
	}
	for _, e := range es {
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		p := filepath.Join(a.stage, e.Name())
		var st unix.Stat_t
		if err != nil || unix.Lstat(p, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || a.keep[st.Ino] != nil {
			continue
		}
		if t := a.targets[FileID(id)]; t != nil && t.handle == "" && t.in.Type == TypeRegular {
			t.handle, t.staged, t.size, t.alloc = p, true, st.Size, st.Blocks*512
			a.keep[st.Ino] = t
		}
	}
	return nil
}

// growth is how many bytes more the directory will take, roughly.
func (a *applier) growth() int64 {
	var n int64
	for _, t := range a.order {
		for _, e := range t.in.Extents {
			if e.Kind != ExtentHole {
				n += int64(e.Count) * BlockSize
			}
		}
	}
	for _, l := range a.found.nodes {
		if l.typ == TypeRegular {
			n -= l.alloc
		}
	}
	return max(n, 0)
}

// nothing says that the directory is already as it should be.
func (a *applier) nothing() bool {
	if len(a.found.names) != len(a.tree.Names) || len(a.found.skipped) > 0 {
		return false
	}
	for name, n := range a.found.names {
		t := a.at(name)
		if t == nil || a.keep[n.key.Ino] != t || len(t.todo) > 0 || !sameMeta(metaOf(t.in), n.meta) {
			return false
		}
	}
	return true
}

func (a *applier) abs(name string) string { return filepath.Join(a.root, name) }

// step passes a labelled point before a change.
func (a *applier) step(label, path string) error { return a.fs.At(label, path) }
