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

	"golang.org/x/sync/errgroup"
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

	// What is known of the directory's present content: files whose stat is as in idx have
	// the content of base. May be nil.
	base *Tree
	idx  *index
	// hashes returns the block hashes of tree's packs; asked for at most once, when local
	// content has to be compared.
	hashes func(ctx context.Context) (map[PackID][]uint64, error)
	// donors are directories with files that may have blocks in common, best first.
	donors []string

	found   *scanned
	targets map[FileID]*target
	order   []*target          // by first name
	keep    map[uint64]*target // local inodes that stay

	total  int64        // bytes to write
	done   atomic.Int64 // of them written
	reused atomic.Int64 // bytes that were found on this disk
}

// target is an inode of the tree.
type target struct {
	id    FileID
	in    *Inode
	names []string // sorted

	handle string // absolute path under which the local inode is now; "" = to be created
	staged bool   // handle is in the stage
	trust  bool   // codes are known without reading
	fresh  bool   // created by this run: all holes
	size   int64  // of the local file
	alloc  int64
	codes  []code   // of the tree's blocks; filled in while they are written
	todo   []Extent // where the local content differs
	slots  []uint64 // per entry of todo: where the spool has it
}

// plan looks at the directory and decides what has to be done.
func (a *applier) plan(ctx context.Context) error {
	if err := validateTree(a.tree); err != nil { // a name could lead out of the directory
		return fmt.Errorf("snapshot %q: %w", a.tree.Ref.ID, err)
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

// known says which inode of the base a local file still is.
func (a *applier) known(n *node) (FileID, bool) {
	if a.base == nil || a.idx == nil {
		return 0, false
	}
	id, ok := a.idx.byIno[n.key.Ino]
	if !ok || a.base.Inodes[id] == nil {
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

// compare finds out which blocks of every file have to be written.
func (a *applier) compare(ctx context.Context) error {
	packs := map[PackRef]PackID{}
	for i, p := range a.tree.Packs {
		packs[p] = PackID(i)
	}
	same := map[PackID]PackID{} // of the base's packs, in the tree
	if a.base != nil {
		for i, p := range a.base.Packs {
			if id, ok := packs[p]; ok {
				same[PackID(i)] = id
			}
		}
	}
	needHashes := len(a.donors) > 0
	for _, t := range a.order {
		needHashes = needHashes || t.in.Type == TypeRegular && t.handle != "" && !t.trust && t.in.Size > 0
	}
	var hashes map[PackID][]uint64
	if needHashes && a.hashes != nil {
		var err error
		if hashes, err = a.hashes(ctx); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(a.workers, 1))
	var read atomic.Int64
	for _, t := range a.order {
		if t.in.Type != TypeRegular {
			continue
		}
		if t.trust {
			old := a.base.Inodes[t.id]
			t.todo = diffExtents(old, same, t.in)
			t.codes = resizeCodes(a.idx.files[t.id].codes, blocksOf(t.in.Size))
			continue
		}
		if t.handle == "" || t.in.Size == 0 {
			// New: everything but the holes.
			t.codes = make([]code, blocksOf(t.in.Size))
			if hashes != nil {
				var err error
				if t.codes, err = codesOf(t.in, hashes); err != nil {
					return fmt.Errorf("snapshot %q: %q: %w", a.tree.Ref.ID, t.names[0], err)
				}
			}
			t.todo = diffExtents(&Inode{}, nil, t.in)
			continue
		}
		g.Go(func() error {
			want, err := codesOf(t.in, hashes)
			if err != nil {
				return fmt.Errorf("snapshot %q: %q: %w", a.tree.Ref.ID, t.names[0], err)
			}
			have, err := readCodes(gctx, t)
			if err != nil {
				return err
			}
			t.todo, t.codes = diffCodes(have, want, t.in), want
			if a.progress != nil {
				a.progress.Set("comparing", read.Add(t.size), 0)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, t := range a.order {
		for _, e := range t.todo {
			if e.Kind == ExtentData {
				a.total += int64(e.Count) * BlockSize
			}
		}
	}
	return nil
}

// readCodes reads a local file.
func readCodes(ctx context.Context, t *target) ([]code, error) {
	f, err := os.OpenFile(t.handle, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	codes := make([]code, blocksOf(t.size))
	err = readBlocks(ctx, f, t.size, t.alloc, 0, uint64(len(codes)), func(first uint64, c []code, _ []byte) error {
		copy(codes[first:], c)
		return nil
	})
	return codes, err
}

func resizeCodes(old []code, n uint64) []code {
	out := make([]code, n) // holes
	copy(out, old)
	return out
}

// diffExtents lists the extents of new that a file with the content of old, truncated to
// new's size, doesn't have. packs translates old's packs; those it lacks are not in new.
func diffExtents(old *Inode, packs map[PackID]PackID, new *Inode) []Extent {
	var out []Extent
	i := 0
	for _, e := range new.Extents {
		end := e.Start + e.Count
		for at := e.Start; at < end; {
			for i < len(old.Extents) && old.Extents[i].Start+old.Extents[i].Count <= at {
				i++
			}
			n, same := end-at, e.Kind == ExtentHole // behind the old end there is nothing
			if i < len(old.Extents) {
				o := old.Extents[i]
				n = min(n, o.Start+o.Count-at)
				same = o.Kind == e.Kind
				if same && e.Kind == ExtentData {
					p, ok := packs[o.Pack]
					same = ok && p == e.Pack && o.PackBlock+(at-o.Start) == e.PackBlock+(at-e.Start)
				}
			}
			if !same {
				out = append(out, part(e, at, n))
			}
			at += n
		}
	}
	return out
}

// diffCodes lists the extents of in whose blocks are not as a local file has them.
func diffCodes(have, want []code, in *Inode) []Extent {
	var out []Extent
	same := func(b uint64) bool {
		if b < uint64(len(have)) {
			return have[b] == want[b]
		}
		return want[b] == codeHole
	}
	for _, e := range in.Extents {
		end := e.Start + e.Count
		for at := e.Start; at < end; {
			n := uint64(1)
			for at+n < end && same(at+n) == same(at) {
				n++
			}
			if !same(at) {
				out = append(out, part(e, at, n))
			}
			at += n
		}
	}
	return out
}

func part(e Extent, at, n uint64) Extent {
	return Extent{Kind: e.Kind, Start: at, Count: n, Pack: e.Pack, PackBlock: e.PackBlock + at - e.Start}
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

// applyMeta corrects metadata wherever it is not as it should be; directories' times too,
// so it has to be the last change.
func (a *applier) applyMeta(ctx context.Context) error {
	now, err := scan(ctx, a.root, scanConfig{})
	if err != nil {
		return err
	}
	if len(now.names) != len(a.tree.Names) {
		return fmt.Errorf("%s has %d names instead of %d: something else writes it", a.root, len(now.names), len(a.tree.Names))
	}
	for _, n := range now.nodes {
		if err := ctx.Err(); err != nil {
			return err
		}
		t := a.at(n.names[0])
		if t == nil || t.in.Type != n.typ || n.typ == TypeRegular && n.key.Size != t.in.Size {
			return fmt.Errorf("%s is not what was just written: something else writes it", a.abs(n.names[0]))
		}
		if sameMeta(metaOf(t.in), n.meta) {
			continue
		}
		p := a.abs(n.names[0])
		if err := a.step("apply-meta", p); err != nil {
			return err
		}
		if err := setMeta(p, n.meta, t.in); err != nil {
			return fmt.Errorf("set attributes of %s: %w", p, noRoom(err))
		}
	}
	return nil
}

// setMeta changes an inode's metadata from have to want.
func setMeta(p string, have, want *Inode) error {
	chowned := have.UID != want.UID || have.GID != want.GID
	if chowned {
		if err := unix.Lchown(p, int(want.UID), int(want.GID)); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	for name := range have.XAttrs {
		if _, ok := want.XAttrs[name]; ok {
			continue
		}
		if err := unix.Lremovexattr(p, name); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove xattr %s: %w", name, err)
		}
	}
	// chown clears setuid, setgid and file capabilities.
	if want.Type != TypeSymlink && (chowned || have.Mode != want.Mode) {
		if err := unix.Chmod(p, want.Mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	// Access control lists go behind chmod, which would change them.
	for name, val := range want.XAttrs {
		if old, ok := have.XAttrs[name]; ok && !chowned && have.Mode == want.Mode && string(old) == string(val) {
			continue
		}
		if err := unix.Lsetxattr(p, name, val, 0); err != nil {
			return fmt.Errorf("set xattr %s: %w", name, err)
		}
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(want.MTime)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}
