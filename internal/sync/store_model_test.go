package sync

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand"
	"slices"
	"strings"
	stdsync "sync"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
)

// storeBlock is a block of a model file.
type storeBlock struct {
	kind ExtentKind
	data string // ExtentData: BlockSize bytes
}

type storeFile struct {
	meta   Inode
	blocks []storeBlock
}

// storeModel is a volume that a test knows everything about.
type storeModel struct {
	inodes map[FileID]*storeFile
	names  map[string]FileID
	next   FileID
}

func newStoreModel() *storeModel {
	m := &storeModel{inodes: map[FileID]*storeFile{}, names: map[string]FileID{}}
	m.add("", Inode{Type: TypeDir, Mode: 0o755})
	return m
}

func (m *storeModel) add(path string, meta Inode) FileID {
	id := m.next
	m.next++
	m.inodes[id] = &storeFile{meta: meta}
	m.names[path] = id
	return id
}

func (m *storeModel) clone() *storeModel {
	c := &storeModel{inodes: map[FileID]*storeFile{}, names: maps.Clone(m.names), next: m.next}
	for id, f := range m.inodes {
		n := *f
		n.blocks = slices.Clone(f.blocks)
		n.meta.XAttrs = maps.Clone(f.meta.XAttrs)
		c.inodes[id] = &n
	}
	return c
}

// prune drops inodes without names.
func (m *storeModel) prune() {
	used := map[FileID]bool{}
	for _, id := range m.names {
		used[id] = true
	}
	for id := range m.inodes {
		if !used[id] {
			delete(m.inodes, id)
		}
	}
}

// storeSource is a BlockSource in memory.
type storeSource struct{ blocks []string }

func (s *storeSource) Blocks() uint64 { return uint64(len(s.blocks)) }
func (s *storeSource) ReadBlocks(first uint64, buf []byte) error {
	for i := range len(buf) / BlockSize {
		copy(buf[i*BlockSize:], s.blocks[first+uint64(i)])
	}
	return nil
}

// diff is the delta from old (nil: nothing) to m. With noise, the source also holds blocks
// that nothing refers to, as after pre-copy rounds.
func (m *storeModel) diff(old *storeModel, base SnapshotRef, r *rand.Rand) (*Delta, *storeSource) {
	src := &storeSource{}
	d := &Delta{Base: base, Inodes: map[FileID]*InodeDelta{}, Names: map[string]FileID{}, NextID: m.next}
	if old == nil {
		old = &storeModel{}
	}
	for id := range old.inodes {
		if m.inodes[id] == nil {
			d.Removed = append(d.Removed, id)
		}
	}
	for p := range old.names {
		if _, ok := m.names[p]; !ok {
			d.Unnamed = append(d.Unnamed, p)
		}
	}
	for p, id := range m.names {
		if o, ok := old.names[p]; !ok || o != id {
			d.Names[p] = id
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.inodes)) {
		f, o := m.inodes[id], old.inodes[id]
		in := &InodeDelta{Meta: f.meta}
		for i, b := range f.blocks {
			if o != nil && i < len(o.blocks) && o.blocks[i] == b {
				continue
			}
			e := SpoolExtent{Kind: b.kind, Start: uint64(i), Count: 1}
			if b.kind == ExtentData {
				if r.Intn(8) == 0 {
					src.blocks = append(src.blocks, strings.Repeat("stale", BlockSize)[:BlockSize])
				}
				e.SpoolBlock = src.Blocks()
				src.blocks = append(src.blocks, b.data)
			}
			if n := len(in.Changed); n > 0 && r.Intn(4) > 0 {
				l := &in.Changed[n-1]
				if l.Kind == e.Kind && l.Start+l.Count == e.Start && (e.Kind != ExtentData || l.SpoolBlock+l.Count == e.SpoolBlock) {
					l.Count++
					continue
				}
			}
			in.Changed = append(in.Changed, e)
		}
		if o == nil || len(in.Changed) > 0 || !storeSameMeta(&o.meta, &f.meta) {
			d.Inodes[id] = in
		}
	}
	return d, src
}

func storeSameMeta(a, b *Inode) bool {
	return a.Type == b.Type && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.MTime == b.MTime &&
		a.Size == b.Size && bytes.Equal(a.Target, b.Target) &&
		maps.EqualFunc(a.XAttrs, b.XAttrs, bytes.Equal)
}

// mutate makes up to n random changes.
func (m *storeModel) mutate(r *rand.Rand, n int) {
	for range n {
		var files, dirs, all []string
		for _, p := range slices.Sorted(maps.Keys(m.names)) {
			switch m.inodes[m.names[p]].meta.Type {
			case TypeRegular:
				files = append(files, p)
			case TypeDir:
				dirs = append(dirs, p)
			}
			if p != "" {
				all = append(all, p)
			}
		}
		fresh := func() string {
			p := fmt.Sprintf("f%d-\xff%d", m.next, r.Intn(1000))
			if d := dirs[r.Intn(len(dirs))]; d != "" {
				p = d + "/" + p
			}
			return p
		}
		meta := func(t FileType) Inode {
			in := Inode{Type: t, Mode: uint32(r.Intn(0o10000)), UID: r.Uint32(), GID: r.Uint32(), MTime: r.Int63() - r.Int63()}
			if r.Intn(3) == 0 {
				in.XAttrs = map[string][]byte{"user.a": {1, 2, 0xff}, "user.\xfe": {}}
			}
			return in
		}
		switch op := r.Intn(10); {
		case op == 0:
			m.add(fresh(), meta(TypeDir))
		case op == 1:
			in := meta(TypeSymlink)
			in.Target = []byte("to/\xff")
			m.add(fresh(), in)
		case op <= 3 || len(files) == 0:
			id := m.add(fresh(), meta(TypeRegular))
			m.resize(r, m.inodes[id], r.Int63n(40*BlockSize))
		case op == 4:
			m.names[fresh()] = m.names[files[r.Intn(len(files))]] // hard link
		case op == 5:
			p := all[r.Intn(len(all))]
			if m.inodes[m.names[p]].meta.Type != TypeDir {
				delete(m.names, p)
				m.prune()
			}
		case op == 6:
			p := files[r.Intn(len(files))]
			to := files[r.Intn(len(files))] // rename, perhaps over another
			if p != to {
				m.names[to] = m.names[p]
				delete(m.names, p)
				m.prune()
			}
		case op == 7:
			m.resize(r, m.inodes[m.names[files[r.Intn(len(files))]]], r.Int63n(40*BlockSize))
		case op == 8 && len(all) > 0:
			f := m.inodes[m.names[all[r.Intn(len(all))]]]
			f.meta.Mode = uint32(r.Intn(0o10000))
		default:
			f := m.inodes[m.names[files[r.Intn(len(files))]]]
			for range 1 + r.Intn(6) {
				if len(f.blocks) > 0 {
					m.put(r, f, r.Intn(len(f.blocks)))
				}
			}
		}
	}
}

func (m *storeModel) put(r *rand.Rand, f *storeFile, i int) {
	switch r.Intn(6) {
	case 0:
		f.blocks[i] = storeBlock{kind: ExtentHole}
		return
	case 1:
		f.blocks[i] = storeBlock{kind: ExtentZero}
		return
	}
	b := make([]byte, BlockSize)
	n := min(int64(BlockSize), f.meta.Size-int64(i)*BlockSize)
	if r.Intn(2) == 0 {
		r.Read(b[:n])
	} else {
		copy(b[:n], strings.Repeat(fmt.Sprint("row ", r.Int()), 1000))
	}
	f.blocks[i] = storeBlock{kind: ExtentData, data: string(b)}
}

func (m *storeModel) resize(r *rand.Rand, f *storeFile, size int64) {
	old := f.meta.Size
	f.meta.Size = size
	n := int(blocksOf(size))
	if n < len(f.blocks) {
		f.blocks = f.blocks[:n]
	}
	if size < old && n > 0 && f.blocks[n-1].kind == ExtentData && size%BlockSize != 0 {
		f.blocks[n-1].data = f.blocks[n-1].data[:size%BlockSize] + strings.Repeat("\x00", BlockSize)[:BlockSize-size%BlockSize]
	}
	for i := len(f.blocks); i < n; i++ {
		f.blocks = append(f.blocks, storeBlock{})
		m.put(r, f, i)
	}
}

// same compares a tree and its content with the model.
func (m *storeModel) same(s *Store, t *Tree) error {
	if !maps.Equal(m.names, t.Names) {
		return fmt.Errorf("names are %v instead of %v", t.Names, m.names)
	}
	if len(m.inodes) != len(t.Inodes) || m.next != t.NextID {
		return fmt.Errorf("%d inodes, next %d instead of %d, %d", len(t.Inodes), t.NextID, len(m.inodes), m.next)
	}
	type place struct {
		id FileID
	}
	var wants []Want
	got := map[FileID][]storeBlock{}
	for id, f := range m.inodes {
		in := t.Inodes[id]
		if in == nil || !storeSameMeta(in, &f.meta) {
			return fmt.Errorf("inode %d is %+v instead of %+v", id, in, f.meta)
		}
		blocks := make([]storeBlock, len(f.blocks))
		for _, e := range in.Extents {
			for i := range e.Count {
				blocks[e.Start+i].kind = e.Kind
			}
			if e.Kind == ExtentData {
				wants = append(wants, Want{Pack: e.Pack, Block: e.PackBlock, Count: e.Count, At: e.Start, Tag: place{id}})
			}
		}
		got[id] = blocks
	}
	var mu stdsync.Mutex
	err := s.Read(context.Background(), t, wants, func(w Want, data []byte) error {
		mu.Lock()
		defer mu.Unlock()
		for i := range w.Count {
			b := &got[w.Tag.(place).id][w.At+i]
			if b.data != "" {
				return fmt.Errorf("block %d delivered twice", w.At+i)
			}
			b.data = string(data[i*BlockSize : (i+1)*BlockSize])
		}
		return nil
	}, nil)
	if err != nil {
		return err
	}
	for id, f := range m.inodes {
		for i, b := range f.blocks {
			if got[id][i] != b {
				return fmt.Errorf("inode %d block %d differs (kind %d, want %d)", id, i, got[id][i].kind, b.kind)
			}
		}
	}
	return nil
}

// storeSameTrees compares two trees by content, not by pack numbers.
func storeSameTrees(a, b *Tree) error {
	if a.Ref != b.Ref {
		return fmt.Errorf("ref %+v instead of %+v", a.Ref, b.Ref)
	}
	if !maps.Equal(a.Names, b.Names) || a.NextID != b.NextID || len(a.Inodes) != len(b.Inodes) {
		return fmt.Errorf("names or inodes differ")
	}
	for id, x := range a.Inodes {
		y := b.Inodes[id]
		if y == nil || !storeSameMeta(x, y) || !slices.EqualFunc(x.Extents, y.Extents, func(e, f Extent) bool {
			if e.Kind == ExtentData && a.Packs[e.Pack] != b.Packs[f.Pack] {
				return false
			}
			e.Pack, f.Pack = 0, 0
			return e == f
		}) {
			return fmt.Errorf("inode %d differs: %+v, %+v", id, x, y)
		}
	}
	if a.meta.chain != b.meta.chain || a.meta.fullBytes != b.meta.fullBytes || a.meta.deltaBytes != b.meta.deltaBytes {
		return fmt.Errorf("chain differs: %+v, %+v", a.meta, b.meta)
	}
	live := func(t *Tree) map[string]uint64 {
		m := map[string]uint64{}
		for i, n := range t.meta.live {
			if n > 0 {
				m[t.Packs[i].Path] = n
			}
		}
		return m
	}
	if !maps.Equal(live(a), live(b)) {
		return fmt.Errorf("live blocks differ: %v, %v", live(a), live(b))
	}
	return nil
}

func newTestStore(t testing.TB, fsys fsx.FS, dir string) *Store {
	t.Helper()
	if fsys == nil {
		fsys = fsx.OS{}
	}
	s, err := OpenStore(StoreConfig{FS: fsys, Dir: dir, Workers: 2, packBlocks: 32, frameBlocks: 8, maxChain: 6})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// storeHistory is a store with a register's worth of truth beside it.
type storeHistory struct {
	s      *Store
	r      *rand.Rand
	now    time.Time
	head   *Tree
	cat    CatalogRef
	model  *storeModel
	models map[string]*storeModel // by snapshot ID
	term   uint64
	moves  *Moves // what compaction has ready
}

func newStoreHistory(t testing.TB, s *Store, seed int64) *storeHistory {
	t.Helper()
	if err := s.Init(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &storeHistory{s: s, r: rand.New(rand.NewSource(seed)), now: time.Date(2024, 3, 1, 11, 0, 0, 0, time.UTC),
		model: newStoreModel(), models: map[string]*storeModel{}, term: 1}
}

func (h *storeHistory) seq() uint64 {
	if h.head == nil {
		return 1
	}
	return h.head.Ref.Seq + 1
}

func (h *storeHistory) headRef() SnapshotRef {
	if h.head == nil {
		return SnapshotRef{}
	}
	return h.head.Ref
}

// write writes the model's state as a snapshot without committing it.
func (h *storeHistory) write() (*Tree, WriteStats, error) {
	var old *storeModel
	if h.head != nil {
		old = h.models[h.head.Ref.ID]
	}
	d, src := h.model.diff(old, h.headRef(), h.r)
	return h.s.Write(context.Background(), WriteRequest{Base: h.head, Delta: d, Blocks: src, Term: h.term,
		Seq: h.seq(), Frozen: h.now, Writer: "alpha", Moves: h.moves})
}

func (h *storeHistory) commit(t *Tree) {
	h.head = t
	h.models[t.Ref.ID] = h.model.clone()
}

// step changes the model, writes and commits.
func (h *storeHistory) step(t testing.TB, changes int, later time.Duration) {
	t.Helper()
	h.now = h.now.Add(later)
	h.model.mutate(h.r, changes)
	tree, _, err := h.write()
	if err != nil {
		t.Fatal(err)
	}
	h.commit(tree)
}
