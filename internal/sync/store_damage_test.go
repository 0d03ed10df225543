package sync

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
)

// storeBadFS shows one file flipped at a place, or cut there.
type storeBadFS struct {
	fsx.OS
	path string
	at   int64
	cut  bool
	bit  byte
}

type storeBadFile struct {
	fsx.File
	b   *storeBadFS
	pos int64
}

func (b *storeBadFS) Open(p string) (fsx.File, error) {
	f, err := b.OS.Open(p)
	if err != nil || p != b.path {
		return f, err
	}
	return &storeBadFile{File: f, b: b}, nil
}

func (f *storeBadFile) Read(buf []byte) (int, error) {
	n, err := f.ReadAt(buf, f.pos)
	f.pos += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

func (f *storeBadFile) ReadAt(buf []byte, off int64) (int, error) {
	want := len(buf)
	if f.b.cut {
		buf = buf[:max(0, min(int64(len(buf)), f.b.at-off))]
	}
	n, err := f.File.ReadAt(buf, off)
	if !f.b.cut && off <= f.b.at && f.b.at < off+int64(n) {
		buf[f.b.at-off] ^= f.b.bit
	}
	if err == nil && n < want {
		err = io.EOF
	}
	return n, err
}

// storeSmall is a history of few bytes, with raw and compressed frames and several packs.
func storeSmall(t *testing.T, dir string) *storeHistory {
	h := newStoreHistory(t, newTestStore(t, nil, dir), 31)
	h.s.cfg.frameBlocks, h.s.cfg.packBlocks = 2, 4
	for i := range 4 {
		id := h.model.add("f"+string(rune('a'+i)), Inode{Type: TypeRegular, Mode: 0o600, Size: 6 * BlockSize})
		for k := range 6 {
			row := strings.Repeat("row "+string(rune('a'+i))+string(rune('a'+k)), BlockSize)[:BlockSize]
			h.model.inodes[id].blocks = append(h.model.inodes[id].blocks, storeBlock{ExtentData, row})
		}
		h.step(t, 0, time.Minute)
		if i == 2 {
			cat, _, err := h.s.Condemn(context.Background(), h.head.Ref, CatalogRef{}, Policy{All: time.Hour}, h.now, 1)
			if err != nil {
				t.Fatal(err)
			}
			h.cat = cat
		}
	}
	return h
}

// TestStoreDamage flips bits in every file, and cuts it. It must be detected and named, and nothing wrong may be served.
func TestStoreDamage(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := storeSmall(t, dir)
	storeAllWhole(t, h)
	list, err := h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil || len(list) != 4 {
		t.Fatalf("list has %d snapshots: %v", len(list), err)
	}
	files, _, err := h.s.listFiles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	bad := &storeBadFS{}
	s := newTestStore(t, bad, dir)
	check := func(name objectName, what string) {
		if _, err := s.List(ctx, h.head.Ref, h.cat); err != nil {
			// A catalog, or a manifest on the way to it.
			var o *ObjectError
			if !errors.As(err, &o) || o.Path != name.path() || !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s %s: List says %v", name.path(), what, err)
			}
			if name.kind == kindCatalog {
				return
			}
		} else if name.kind == kindCatalog {
			t.Fatalf("%s %s: List saw nothing", name.path(), what)
		}
		rep, err := s.Verify(ctx, list, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(rep.Problems) == 0 {
			t.Fatalf("%s %s: Verify saw nothing", name.path(), what)
		}
		for _, p := range rep.Problems {
			if p.Path != name.path() || p.What == "" {
				t.Fatalf("%s %s: Verify says %+v", name.path(), what, p)
			}
		}
		// The newest whole snapshot is the newest one that no problem names, and it is whole.
		hit := rep.Problems[0].Snapshots
		var whole *SnapshotInfo
		for i := range list {
			if !slices.Contains(hit, list[i].ID) {
				whole = &list[i]
				break
			}
		}
		if (whole == nil) != (rep.NewestWhole == nil) || whole != nil && whole.ID != rep.NewestWhole.ID {
			t.Fatalf("%s %s: newest whole is %+v, hit are %v", name.path(), what, rep.NewestWhole, hit)
		}
		for _, info := range list {
			tree, err := s.LoadTree(ctx, info.SnapshotRef)
			if err == nil {
				err = h.models[info.ID].same(s, tree)
			}
			switch {
			case err == nil:
				// The header of a pack is not needed to read it.
				if slices.Contains(hit, info.ID) {
					t.Fatalf("%s %s: %s is read although it is said to be hit", name.path(), what, info.ID)
				}
			case !errors.Is(err, ErrDamaged):
				t.Fatalf("%s %s: reading %s says %v", name.path(), what, info.ID, err)
			case !slices.Contains(hit, info.ID):
				t.Fatalf("%s %s: %s can't be read but is not said to be hit", name.path(), what, info.ID)
			}
		}
	}
	for _, name := range files {
		bad.path = filepath.Join(dir, name.path())
		st, err := os.Stat(bad.path)
		if err != nil {
			t.Fatal(err)
		}
		// A few places of each part; TestStoreEveryByte does the rest.
		by := max(1, st.Size()/8)
		for at := int64(0); at < st.Size(); at += by {
			bad.at, bad.cut, bad.bit = at, false, 1<<(at%8)
			check(name, "flipped")
			if at%3 == 0 {
				bad.cut = true
				check(name, "cut")
			}
		}
		bad.at, bad.cut, bad.bit = st.Size()-1, false, 0x80
		check(name, "flipped")
		bad.cut = true
		check(name, "cut")
	}
}

// TestStoreEveryByte: every byte of every file, only with the readers of that file.
func TestStoreEveryByte(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := storeSmall(t, dir)
	list, err := h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil {
		t.Fatal(err)
	}
	refs := map[string]string{h.cat.Name: h.cat.Hash}
	for _, i := range list {
		refs[i.Manifest] = i.Hash
	}
	packs := map[string]PackRef{}
	for _, p := range h.head.Packs {
		packs[p.Path] = p
	}
	files, _, err := h.s.listFiles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	bad := &storeBadFS{}
	s := newTestStore(t, bad, dir)
	raw := make([]byte, 0, frameMaxBytes)
	read := func(name objectName) error {
		switch name.kind {
		case kindManifest:
			_, err := s.readManifest(ctx, name.path(), refs[name.path()], false)
			// A scan doesn't know the hash and must see it all the same.
			if _, e := s.readManifest(ctx, name.path(), "", true); (e == nil) != (err == nil) {
				return e
			}
			return err
		case kindCatalog:
			_, err := s.readCatalog(ctx, CatalogRef{name.path(), refs[name.path()]})
			if _, e := s.readCatalog(ctx, CatalogRef{Name: name.path()}); (e == nil) != (err == nil) {
				return e
			}
			return err
		}
		p, err := s.openPack(packs[name.path()])
		if err != nil {
			return err
		}
		defer p.file.Close()
		for i := range p.foot.frames {
			if _, _, err := s.readFrame(p, i, raw, nil); err != nil {
				return err
			}
		}
		return checkEnds(p, packs[name.path()].Size)
	}
	for _, name := range files {
		bad.path = ""
		if err := read(name); err != nil {
			t.Fatal(err)
		}
		bad.path = filepath.Join(dir, name.path())
		st, err := os.Stat(bad.path)
		if err != nil {
			t.Fatal(err)
		}
		for at := range st.Size() {
			bad.at, bad.cut, bad.bit = at, false, 1<<(at*5%8)
			if err := read(name); !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s with a bit of byte %d flipped: %v", name.path(), at, err)
			}
			bad.cut = true
			if err := read(name); !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s cut at %d: %v", name.path(), at, err)
			}
		}
		// And one byte too many.
		b, err := os.ReadFile(bad.path)
		if err != nil {
			t.Fatal(err)
		}
		bad.path = ""
		if err := os.WriteFile(filepath.Join(dir, name.path()), append(b, 0), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := read(name); !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s with a byte more: %v", name.path(), err)
		}
		if err := os.WriteFile(filepath.Join(dir, name.path()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStoreVerifyNamesMissing(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 32)
	h.s.cfg.maxChain = 1
	var packs []string
	for range 4 {
		for p := range h.model.names { // nothing is shared between the snapshots
			if p != "" {
				delete(h.model.names, p)
			}
		}
		h.model.prune()
		id := h.model.add("f", Inode{Type: TypeRegular})
		h.model.resize(h.r, h.model.inodes[id], 20*BlockSize)
		h.model.inodes[id].blocks[0] = storeBlock{ExtentData, strings.Repeat("x", BlockSize)}
		h.step(t, 0, time.Minute)
		packs = append(packs, h.head.Packs[len(h.head.Packs)-1].Path)
	}
	list, err := h.s.List(ctx, h.head.Ref, CatalogRef{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, packs[3])); err != nil {
		t.Fatal(err)
	}
	rep, err := h.s.Verify(ctx, list, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Problems) != 1 || rep.Problems[0].Path != packs[3] || rep.Problems[0].What != "missing" ||
		!slices.Equal(rep.Problems[0].Snapshots, []string{list[0].ID}) || rep.NewestWhole == nil || rep.NewestWhole.ID != list[1].ID {
		t.Errorf("report is %+v", rep)
	}
	// A missing base takes the deltas above along.
	full := slices.IndexFunc(list, func(i SnapshotInfo) bool { return i.Full })
	if full < 1 {
		t.Fatalf("the newest full manifest is number %d", full)
	}
	if err := os.Remove(filepath.Join(dir, list[full].Manifest)); err != nil {
		t.Fatal(err)
	}
	rep, err = h.s.Verify(ctx, list, nil)
	if err != nil || rep.NewestWhole == nil || rep.NewestWhole.ID != list[full+1].ID {
		t.Errorf("report is %+v, %v", rep, err)
	}
}

// storeDeath makes the process die at operation number n: nothing happens any more. With
// late, that operation still takes effect.
func storeDeath(n int, late bool) (*fsx.Hooked, func() bool) {
	var ops atomic.Int64
	h := &fsx.Hooked{FS: fsx.OS{}}
	h.Before = func(op fsx.Op, _ string) error {
		switch op {
		case fsx.OpOpen, fsx.OpRead, fsx.OpReadDir, fsx.OpStat:
			// Dying here leaves the same as dying at the next change.
			if int(ops.Load()) > n {
				return fsx.ErrCrash
			}
			return nil
		}
		k := int(ops.Add(1)) - 1
		if k > n || k == n && !late {
			return fsx.ErrCrash
		}
		return nil
	}
	h.After = func(_ fsx.Op, _ string, err error) error {
		if int(ops.Load()) > n && err == nil {
			return fsx.ErrCrash // the reply finds nobody
		}
		return err
	}
	return h, func() bool { return int(ops.Load()) > n }
}

// TestStoreCrash dies at every operation of a Write, a Condemn and a Sweep, and looks at
// what is left with a new store.
func TestStoreCrash(t *testing.T) {
	ctx := context.Background()
	policy := Policy{All: 2 * time.Minute}
	for _, late := range []bool{false, true} {
		dir := storeMemDir(t)
		h := newStoreHistory(t, newTestStore(t, nil, dir), 33)
		for range 4 {
			h.step(t, 10, time.Minute)
		}
		alive := h.s
		die := func(what string, f func(s *Store) error) (deaths int) {
			for n := 0; ; n++ {
				fsys, died := storeDeath(n, late)
				h.s = newTestStore(t, fsys, dir)
				err := f(h.s)
				h.s = alive
				if !died() {
					if err != nil {
						t.Fatalf("%s: %v", what, err)
					}
					return n
				}
				if err != nil && !errors.Is(err, fsx.ErrCrash) {
					t.Fatalf("%s, death at operation %d: %v", what, n, err)
				}
				list, err := h.s.List(ctx, h.headRef(), h.cat)
				if err != nil {
					t.Fatal(err)
				}
				rep, err := h.s.Verify(ctx, list, nil)
				if err != nil || len(rep.Problems) > 0 {
					t.Fatalf("%s, death at operation %d: report is %+v, %v", what, n, rep, err)
				}
				h.term++ // somebody takes over
			}
		}
		for range 1 {
			h.now = h.now.Add(time.Minute)
			h.model.mutate(h.r, 10)
			var tree *Tree
			if n := die("write", func(*Store) (err error) { tree, _, err = h.write(); return err }); n < 11 {
				t.Errorf("write has only %d operations", n)
			}
			h.commit(tree)
			storeAllWhole(t, h)

			var cat CatalogRef
			if n := die("condemn", func(s *Store) (err error) {
				cat, _, err = s.Condemn(ctx, h.head.Ref, h.cat, policy, h.now, h.term)
				return err
			}); n < 5 {
				t.Errorf("condemn has only %d operations", n)
			}
			h.cat = cat
			storeAllWhole(t, h)
			if n := die("sweep", func(s *Store) error { _, err := s.Sweep(ctx, h.cat); return err }); n < 3 {
				t.Errorf("sweep has only %d operations", n)
			}
			storeAllWhole(t, h)
		}
		for range 2 {
			h.term++
			cat, _, err := h.s.Condemn(ctx, h.head.Ref, h.cat, policy, h.now, h.term)
			if err != nil {
				t.Fatal(err)
			}
			h.cat = cat
			if _, err := h.s.Sweep(ctx, h.cat); err != nil {
				t.Fatal(err)
			}
		}
		storeAllWhole(t, h)
		storeNoLitter(t, h)
	}
}

// TestStoreReplaced puts whole files of the right name in the place of others, as a restored
// backup or a second writer would: only the hash that refers to them tells.
func TestStoreReplaced(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := storeSmall(t, dir)
	other := storeSmall(t, t.TempDir())
	replace := func(name, with string) {
		b, err := os.ReadFile(filepath.Join(other.s.cfg.Dir, with))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The same name in both: a manifest, a catalog and a pack of the other history.
	name, _ := parseName(h.head.Ref.Manifest)
	m := &manifest{info: SnapshotInfo{SnapshotRef: SnapshotRef{Term: name.term, Seq: name.seq}}, names: 1}
	m.change = treeChange{nextID: 1, names: map[string]FileID{"": 0}, inodes: map[FileID]*inodeChange{0: {meta: Inode{Type: TypeDir}}}}
	m.info.Files = 1
	if err := other.s.writeManifest(m, name, &createdFiles{}); err != nil {
		t.Fatal(err)
	}
	if _, err := other.s.LoadTree(ctx, m.info.SnapshotRef); err != nil {
		t.Fatal(err) // it is a proper one
	}
	replace(h.head.Ref.Manifest, m.info.Manifest)
	if _, err := h.s.LoadTree(ctx, h.head.Ref); !errors.Is(err, ErrDamaged) {
		t.Errorf("LoadTree says %v", err)
	}
	ms, err := other.s.walk(ctx, other.head.Ref, SnapshotRef{}, true)
	if err != nil {
		t.Fatal(err)
	}
	cname, _ := parseName(h.cat.Name)
	c := &catalog{name: cname, head: other.head.Ref}
	if err := c.follow(&catalog{}, ms); err != nil {
		t.Fatal(err)
	}
	ref, err := other.s.writeCatalog(c, 0, &createdFiles{})
	if err != nil {
		t.Fatal(err)
	}
	replace(h.cat.Name, ref.Name)
	if _, err := h.s.Sweep(ctx, h.cat); !errors.Is(err, ErrDamaged) {
		t.Errorf("Sweep says %v", err)
	}
	// The other history's second pack has other content in the same layout.
	p, q := h.head.Packs[0], other.head.Packs[2]
	replace(p.Path, q.Path)
	p.Size = q.Size
	if _, err := h.s.openPack(p); !errors.Is(err, ErrDamaged) {
		t.Errorf("opening the pack says %v", err)
	}
	p.Hash = q.Hash
	r, err := h.s.openPack(p)
	if err != nil {
		t.Fatal(err) // it is a proper one
	}
	_ = r.file.Close()
}

// TestStoreVerifyReferences: a tree that refers to blocks which its pack doesn't have.
func TestStoreVerifyReferences(t *testing.T) {
	ctx := context.Background()
	h := storeSmall(t, t.TempDir())
	good := h.head
	target := *h.head
	target.Inodes = map[FileID]*Inode{}
	for id, in := range h.head.Inodes {
		n := *in
		n.Extents = slices.Clone(in.Extents)
		for i := range n.Extents {
			n.Extents[i].PackBlock++
		}
		target.Inodes[id] = &n
	}
	wrong, _, err := h.s.WriteRollback(ctx, RollbackRequest{Head: h.head.Ref, Catalog: h.cat, Target: &target, Term: 1, Seq: h.seq()})
	if err != nil {
		t.Fatal(err)
	}
	list, err := h.s.List(ctx, wrong.Ref, h.cat)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := h.s.Verify(ctx, list, nil)
	if err != nil || len(rep.Problems) == 0 || rep.NewestWhole == nil || rep.NewestWhole.ID != good.Ref.ID {
		t.Errorf("report is %+v, %v", rep, err)
	}
	for _, p := range rep.Problems {
		if !slices.Equal(p.Snapshots, []string{wrong.Ref.ID}) {
			t.Errorf("problem is %+v", p)
		}
	}
	last := wrong.Inodes[h.model.names["fa"]].Extents
	e := last[len(last)-1]
	err = h.s.Read(ctx, wrong, []Want{{Pack: e.Pack, Block: e.PackBlock, Count: e.Count}}, func(Want, []byte) error { return nil }, nil)
	if !errors.Is(err, ErrDamaged) {
		t.Errorf("Read says %v", err)
	}
}
