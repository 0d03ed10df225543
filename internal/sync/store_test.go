package sync

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	stdsync "sync"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

func TestStoreRoundTrip(t *testing.T) {
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 1)
	full := 0
	for i := range 30 {
		h.step(t, 12, time.Minute)
		got, err := h.s.LoadTree(context.Background(), h.head.Ref)
		if err != nil {
			t.Fatal(err)
		}
		if err := storeSameTrees(got, h.head); err != nil {
			t.Fatalf("step %d: what Write returned and what LoadTree returns differ: %v", i, err)
		}
		if err := h.model.same(h.s, got); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if got.meta.chain > h.s.cfg.maxChain {
			t.Fatalf("step %d: chain of %d deltas", i, got.meta.chain)
		}
		if got.meta.chain == 0 {
			full++
		}
	}
	if full < 2 || full > 25 {
		t.Errorf("%d of 30 manifests are full", full)
	}
	list, err := h.s.List(context.Background(), h.head.Ref, CatalogRef{})
	if err != nil || len(list) != 30 {
		t.Fatalf("list has %d snapshots: %v", len(list), err)
	}
	for i, info := range list {
		if info.Seq != uint64(30-i) || info.Writer != "alpha" {
			t.Errorf("entry %d: %+v", i, info)
		}
		tree, err := h.s.LoadTree(context.Background(), info.SnapshotRef)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.models[info.ID].same(h.s, tree); err != nil {
			t.Errorf("snapshot %s: %v", info.ID, err)
		}
	}
}

// TestStoreFormatSizes writes with the real sizes of frames and packs.
func TestStoreFormatSizes(t *testing.T) {
	ctx := context.Background()
	s, err := OpenStore(StoreConfig{Dir: t.TempDir(), Workers: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Init(ctx); err != nil {
		t.Fatal(err)
	}
	// More blocks than a pack holds; most of them are alike, to be quick.
	n := uint64(packMaxBlocks + 1000)
	src := storeFunc{n: n, f: func(first uint64, buf []byte) error {
		for i := range len(buf) / BlockSize {
			binary.LittleEndian.PutUint64(buf[i*BlockSize:], first+uint64(i))
			clear(buf[i*BlockSize+8 : (i+1)*BlockSize])
		}
		return nil
	}}
	d := &Delta{NextID: 2, Names: map[string]FileID{"": 0, "big": 1}, Inodes: map[FileID]*InodeDelta{
		0: {Meta: Inode{Type: TypeDir, Mode: 0o700}},
		1: {Meta: Inode{Type: TypeRegular, Size: int64(n) * BlockSize}, Changed: []SpoolExtent{{Kind: ExtentData, Count: n}}}}}
	tree, stats, err := s.Write(ctx, WriteRequest{Delta: d, Blocks: src, Term: 1, Seq: 1})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Packs != 2 || stats.Blocks != n || !stats.Full {
		t.Errorf("stats are %+v", stats)
	}
	got, err := s.LoadTree(ctx, tree.Ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := storeSameTrees(got, tree); err != nil {
		t.Error(err)
	}
	var mu stdsync.Mutex
	var blocks uint64
	want := []Want{{Pack: 0, Block: 500, Count: 1000, At: 500}, {Pack: 1, Block: 990, Count: 10, At: packMaxBlocks + 990}}
	err = s.Read(ctx, got, want, func(w Want, data []byte) error {
		expect := make([]byte, len(data))
		_ = src.ReadBlocks(w.At, expect)
		if string(expect) != string(data) {
			t.Errorf("blocks at %d differ", w.At)
		}
		mu.Lock()
		defer mu.Unlock()
		blocks += w.Count
		return nil
	}, nil)
	if err != nil || blocks != 1010 {
		t.Errorf("read %d blocks: %v", blocks, err)
	}
	infos, err := s.List(ctx, tree.Ref, CatalogRef{})
	if err != nil {
		t.Fatal(err)
	}
	rep, err := s.Verify(ctx, infos, nil)
	if err != nil || len(rep.Problems) > 0 || rep.NewestWhole == nil {
		t.Errorf("report is %+v, %v", rep, err)
	}
}

type storeFunc struct {
	n uint64
	f func(first uint64, buf []byte) error
}

func (s storeFunc) Blocks() uint64                            { return s.n }
func (s storeFunc) ReadBlocks(first uint64, buf []byte) error { return s.f(first, buf) }

// TestStoreOperations counts what a snapshot costs the share: always the same.
func TestStoreOperations(t *testing.T) {
	var mu stdsync.Mutex
	var ops []string
	hooked := &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		mu.Lock()
		defer mu.Unlock()
		ops = append(ops, string(op))
		return nil
	}}
	h := newStoreHistory(t, newTestStore(t, hooked, t.TempDir()), 2)
	h.step(t, 200, time.Minute)
	const want = "create write sync close syncdir create write sync close syncdir"
	for i := range 10 {
		// One block of one file, with new content each time.
		for _, id := range h.model.names {
			if f := h.model.inodes[id]; len(f.blocks) > 0 {
				f.blocks[0] = storeBlock{kind: ExtentData, data: strings.Repeat(string(rune('a'+i)), BlockSize)}
				break
			}
		}
		mu.Lock()
		ops = nil
		mu.Unlock()
		h.step(t, 0, time.Minute)
		mu.Lock()
		got := strings.Join(ops, " ")
		mu.Unlock()
		if got != want {
			t.Fatalf("snapshot %d took %q instead of %q", i, got, want)
		}
	}
}

// TestStoreDurable loses everything that was not fsynced after each Write and Condemn.
func TestStoreDurable(t *testing.T) {
	lossy := &storeLossyFS{OS: fsx.OS{}, dirty: map[string]bool{}, unlinked: map[string]bool{}}
	h := newStoreHistory(t, newTestStore(t, lossy, t.TempDir()), 3)
	if n := lossy.crash(t); n > 0 {
		t.Errorf("Init left %d things not durable", n)
	}
	ctx := context.Background()
	for range 6 {
		h.step(t, 30, time.Hour)
		if n := lossy.crash(t); n > 0 {
			t.Errorf("Write left %d things not durable", n)
		}
		cat, _, err := h.s.Condemn(ctx, h.head.Ref, h.cat, Policy{All: 2 * time.Hour}, h.now, h.term)
		if err != nil {
			t.Fatal(err)
		}
		h.cat = cat
		if n := lossy.crash(t); n > 0 {
			t.Errorf("Condemn left %d things not durable", n)
		}
	}
	storeAllWhole(t, h)
}

// storeLossyFS forgets what was not fsynced.
type storeLossyFS struct {
	fsx.OS
	mu       stdsync.Mutex
	dirty    map[string]bool // files written and not synced
	unlinked map[string]bool // names made in directories that were not synced
}

type storeLossyFile struct {
	fsx.File
	l *storeLossyFS
}

func (l *storeLossyFS) Create(p string) (fsx.File, error) {
	f, err := l.OS.Create(p)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unlinked[p] = true
	return &storeLossyFile{f, l}, nil
}

func (l *storeLossyFS) Mkdir(p string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unlinked[p] = true
	return l.OS.Mkdir(p)
}

func (l *storeLossyFS) SyncDir(p string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name := range l.unlinked {
		if filepath.Dir(name) == p {
			delete(l.unlinked, name)
		}
	}
	return l.OS.SyncDir(p)
}

func (f *storeLossyFile) mark(dirty bool) {
	f.l.mu.Lock()
	defer f.l.mu.Unlock()
	f.l.dirty[f.Name()] = dirty
}

func (f *storeLossyFile) Write(b []byte) (int, error) {
	f.mark(true)
	return f.File.Write(b)
}

func (f *storeLossyFile) WriteAt(b []byte, off int64) (int, error) {
	f.mark(true)
	return f.File.WriteAt(b, off)
}

func (f *storeLossyFile) Sync() error {
	f.mark(false)
	return f.File.Sync()
}

// crash makes what was not synced vanish, and says how much that was.
func (l *storeLossyFS) crash(t *testing.T) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for p, dirty := range l.dirty {
		if dirty {
			n++
			if err := os.Truncate(p, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	for p := range l.unlinked {
		n++
		if err := os.RemoveAll(p); err != nil {
			t.Fatal(err)
		}
	}
	l.dirty, l.unlinked = map[string]bool{}, map[string]bool{}
	return n
}

// storeAllWhole checks that everything listed is whole and is what it was.
func storeAllWhole(t testing.TB, h *storeHistory) {
	t.Helper()
	ctx := context.Background()
	list, err := h.s.List(ctx, h.headRef(), h.cat)
	if err != nil {
		t.Fatal(err)
	}
	if h.head != nil && (len(list) == 0 || list[0].SnapshotRef != h.head.Ref) {
		t.Fatalf("list does not begin with the head")
	}
	rep, err := h.s.Verify(ctx, list, nil)
	if err != nil || len(rep.Problems) > 0 {
		t.Fatalf("report is %+v, %v", rep, err)
	}
	for _, info := range list {
		tree, err := h.s.LoadTree(ctx, info.SnapshotRef)
		if err != nil {
			t.Fatal(err)
		}
		m := h.models[info.ID]
		if m == nil {
			t.Fatalf("%s is listed but was never committed", info.ID)
		}
		if err := m.same(h.s, tree); err != nil {
			t.Fatalf("snapshot %s: %v", info.ID, err)
		}
	}
}

func TestStoreWriteErrorsCount(t *testing.T) {
	boom := errors.New("boom")
	for _, tc := range []struct {
		op   fsx.Op
		late bool // the operation happens and its reply is an error
	}{{fsx.OpClose, true}, {fsx.OpSync, true}, {fsx.OpSync, false}, {fsx.OpSyncDir, false}, {fsx.OpWrite, false}, {fsx.OpCreate, false}} {
		for _, part := range []string{"/packs/", "/manifests"} {
			var on bool
			fail := func(op fsx.Op, path string, err error) error {
				if on && op == tc.op && strings.Contains(path+"/", part) {
					return boom
				}
				return err
			}
			hooked := &fsx.Hooked{FS: fsx.OS{}}
			if tc.late {
				hooked.After = fail
			} else {
				hooked.Before = func(op fsx.Op, path string) error { return fail(op, path, nil) }
			}
			dir := storeMemDir(t)
			h := newStoreHistory(t, newTestStore(t, hooked, dir), 4)
			h.step(t, 30, time.Minute)
			h.model.mutate(h.r, 30)
			on = true
			if _, _, err := h.write(); !errors.Is(err, boom) {
				t.Errorf("%s of %s fails, Write says %v", tc.op, part, err)
			}
			on = false
			// What the failed write made is gone, so that a full share doesn't get fuller.
			files, _, err := h.s.listFiles(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				if f.seq == 2 {
					t.Errorf("%s of %s: %s was left", tc.op, part, f.path())
				}
			}
			storeAllWhole(t, h)
		}
	}
}

// TestStoreCreateExists: over NFS a create may say "exists" although it made the file.
func TestStoreCreateExists(t *testing.T) {
	var on bool
	last := map[string]bool{}
	hooked := &fsx.Hooked{FS: fsx.OS{}, After: func(op fsx.Op, path string, err error) error {
		if dir := filepath.Dir(path); on && op == fsx.OpCreate && !last[filepath.Base(filepath.Dir(dir))] {
			last[filepath.Base(filepath.Dir(dir))] = true
			return &fs.PathError{Op: "open", Path: path, Err: fs.ErrExist}
		}
		return err
	}}
	h := newStoreHistory(t, newTestStore(t, hooked, t.TempDir()), 5)
	on = true
	h.step(t, 30, time.Minute)
	if len(last) != 2 {
		t.Fatalf("hook saw %v", last)
	}
	storeAllWhole(t, h)
}

func TestStoreRefusesBadDeltas(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 6)
	f := h.model.add("f", Inode{Type: TypeRegular})
	h.model.resize(h.r, h.model.inodes[f], 3*BlockSize)
	h.model.inodes[f].blocks[1] = storeBlock{kind: ExtentData, data: strings.Repeat("x", BlockSize)}
	h.step(t, 0, 0)
	reg := func(size int64) Inode { return Inode{Type: TypeRegular, Size: size} }
	data := func(start, n, at uint64) SpoolExtent {
		return SpoolExtent{Kind: ExtentData, Start: start, Count: n, SpoolBlock: at}
	}
	for name, d := range map[string]*Delta{
		"another base": {Base: SnapshotRef{ID: "1-9-0123456789abcdef"}},
		"uncovered growth": {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(5 * BlockSize),
			Changed: []SpoolExtent{data(3, 1, 0)}}}},
		"uncovered new file": {Inodes: map[FileID]*InodeDelta{2: {Meta: reg(BlockSize)}}, Names: map[string]FileID{"g": 2}, NextID: 3},
		"overlap": {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(3 * BlockSize),
			Changed: []SpoolExtent{data(0, 2, 0), data(1, 1, 0)}}}},
		"beyond the end":  {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(3 * BlockSize), Changed: []SpoolExtent{data(3, 1, 0)}}}},
		"empty extent":    {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(3 * BlockSize), Changed: []SpoolExtent{data(0, 0, 0)}}}},
		"not captured":    {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(3 * BlockSize), Changed: []SpoolExtent{data(0, 2, 1)}}}},
		"nameless inode":  {Inodes: map[FileID]*InodeDelta{2: {Meta: reg(0)}}, NextID: 3},
		"name to nothing": {Names: map[string]FileID{"g": 7}},
		"no directory":    {Names: map[string]FileID{"d/g": f}},
		"file as parent":  {Names: map[string]FileID{"f/g": f}},
		"dot dot":         {Names: map[string]FileID{"../g": f}},
		"dot":             {Names: map[string]FileID{"./g": f}},
		"absolute":        {Names: map[string]FileID{"/g": f}},
		"zero byte":       {Names: map[string]FileID{"g\x00": f}},
		"root gone":       {Unnamed: []string{""}, Removed: []FileID{0}},
		"second root":     {Names: map[string]FileID{"d": 0}},
		"recycled number": {Removed: []FileID{f}, Unnamed: []string{"f"}, Inodes: map[FileID]*InodeDelta{1: {Meta: Inode{Type: TypeDir}}}, Names: map[string]FileID{"g": 1}},
		"unknown removed": {Removed: []FileID{9}},
		"unknown name":    {Unnamed: []string{"h"}},
		"type changed":    {Inodes: map[FileID]*InodeDelta{f: {Meta: Inode{Type: TypeDir}}}},
		"mode":            {Inodes: map[FileID]*InodeDelta{f: {Meta: Inode{Type: TypeRegular, Mode: 0o100644, Size: 3 * BlockSize}}}},
		"negative size":   {Inodes: map[FileID]*InodeDelta{f: {Meta: reg(-1)}}},
		"future number":   {Inodes: map[FileID]*InodeDelta{9: {Meta: reg(0)}}, Names: map[string]FileID{"g": 9}},
	} {
		if d.Base.ID == "" {
			d.Base = h.head.Ref
		}
		if d.NextID == 0 {
			d.NextID = h.model.next
		}
		_, _, err := h.s.Write(ctx, WriteRequest{Base: h.head, Delta: d, Blocks: &storeSource{blocks: []string{"a", "b"}}, Term: 1, Seq: 2})
		if !errors.Is(err, ErrBadDelta) {
			t.Errorf("%s: Write says %v", name, err)
		}
	}
	files, _, err := h.s.listFiles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.seq != 1 {
			t.Errorf("%s was written", f.path())
		}
	}
	for _, tc := range [][2]uint64{{1, 1}, {0, 2}, {1, 0}} {
		if _, _, err := h.s.Write(ctx, WriteRequest{Base: h.head, Delta: &Delta{Base: h.head.Ref, NextID: h.model.next}, Term: tc[0], Seq: tc[1]}); err == nil {
			t.Errorf("term %d, sequence %d was written", tc[0], tc[1])
		}
	}
}

// TestStoreNeedsShare: an unmounted share must not look like an empty store.
func TestStoreNeedsShare(t *testing.T) {
	ctx := context.Background()
	s := newTestStore(t, nil, filepath.Join(t.TempDir(), "gone"))
	if err := s.Init(ctx); err == nil {
		t.Error("Init made the share's own directory")
	}
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 7)
	h.step(t, 20, 0)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(dir+".away", dir) //nolint:errcheck // for the clean-up of TempDir
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h.model.mutate(h.r, 20)
	if _, _, err := h.write(); err == nil {
		t.Error("Write wrote into an empty directory")
	}
	if _, _, err := s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{}, h.now, 1); err == nil {
		t.Error("Condemn took an empty directory for a store")
	}
	if _, err := h.s.Scan(ctx); err == nil {
		t.Error("Scan took an empty directory for a store")
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) > 0 {
		t.Errorf("something was made in the empty directory: %v, %v", es, err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
}

// TestStoreMissingShard: a copy of the store may lack directories that were empty.
func TestStoreMissingShard(t *testing.T) {
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 8)
	shards, err := filepath.Glob(filepath.Join(dir, "packs", "*"))
	if err != nil || len(shards) != 256 {
		t.Fatalf("%d shards, %v", len(shards), err)
	}
	for _, d := range shards {
		if err := os.Remove(d); err != nil {
			t.Fatal(err)
		}
	}
	h.step(t, 30, 0)
	storeAllWhole(t, h)
}

// TestStoreLimit looks at the pace on a clock that only the test moves.
func TestStoreLimit(t *testing.T) {
	clock := boottime.NewFake()
	p := &pacer{clock: clock, rate: 1000}
	ctx, cancel := context.WithCancel(context.Background())
	if err := p.wait(ctx, 3000); err != nil { // the first passes at once
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- p.wait(ctx, 1000) }()
	for clock.Waiters() == 0 {
		select {
		case err := <-done:
			t.Fatalf("3000 bytes of 1000 a second did not take 3 s: %v", err)
		default:
			runtime.Gosched()
		}
	}
	clock.Advance(2999 * time.Millisecond)
	if clock.Waiters() != 1 {
		t.Fatal("woke too early")
	}
	clock.Advance(time.Millisecond)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	go func() { done <- p.wait(ctx, 1) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("wait says %v", err)
	}
}

// TestStoreLimitIsUsed: a throttled Write waits for the clock.
func TestStoreLimitIsUsed(t *testing.T) {
	clock := boottime.NewFake()
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 9)
	h.s.cfg.Clock = clock
	f := h.model.add("f", Inode{Type: TypeRegular})
	file := h.model.inodes[f]
	file.meta.Size = 64 * BlockSize
	for range 64 {
		b := make([]byte, BlockSize)
		h.r.Read(b)
		file.blocks = append(file.blocks, storeBlock{kind: ExtentData, data: string(b)})
	}
	d, src := h.model.diff(nil, SnapshotRef{}, rand.New(rand.NewSource(1)))
	start := clock.Now()
	done := make(chan error, 1)
	go func() {
		_, _, err := h.s.Write(context.Background(), WriteRequest{Delta: d, Blocks: src, Term: 1, Seq: 1, Limit: BlockSize})
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			// All but the last frame must have been paid for: 8 blocks each, a second a block.
			if took := clock.Now().Sub(start); took < 50*time.Second {
				t.Errorf("64 blocks at one a second took %v", took)
			}
			return
		default:
			if clock.Waiters() > 0 {
				clock.Advance(time.Second)
			} else {
				runtime.Gosched()
			}
		}
	}
}

func TestStoreRollback(t *testing.T) {
	ctx := context.Background()
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 10)
	for range 8 {
		h.step(t, 20, time.Minute)
	}
	list, err := h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil {
		t.Fatal(err)
	}
	target, err := h.s.LoadTree(ctx, list[5].SnapshotRef)
	if err != nil {
		t.Fatal(err)
	}
	before := h.head
	tree, stats, err := h.s.WriteRollback(ctx, RollbackRequest{Head: h.head.Ref, Catalog: h.cat, Target: target, Term: 2,
		Seq: h.seq(), Frozen: h.now, Writer: "beta"})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Packs != 0 || !stats.Full || tree.Ref.Seq != 9 || tree.Ref.Term != 2 {
		t.Errorf("rollback is %+v, %+v", tree.Ref, stats)
	}
	if tree.NextID < before.NextID {
		t.Errorf("file numbers of the snapshots in between would be used again")
	}
	h.term = 2
	h.model = h.models[list[5].ID].clone()
	h.model.next = tree.NextID
	h.commit(tree)
	got, err := h.s.LoadTree(ctx, tree.Ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := storeSameTrees(got, tree); err != nil {
		t.Error(err)
	}
	// Life goes on from there, and nothing of the past is gone.
	h.step(t, 20, time.Minute)
	storeAllWhole(t, h)
	list, err = h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil || len(list) != 10 || list[1].Parent != before.Ref.ID {
		t.Errorf("list has %d entries: %v", len(list), err)
	}
}

func TestStoreRollbackToCondemned(t *testing.T) {
	ctx := context.Background()
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 11)
	h.step(t, 20, 0)
	target := h.head
	// Every block of the target goes.
	for p := range h.model.names {
		if p != "" {
			delete(h.model.names, p)
		}
	}
	h.model.prune()
	h.step(t, 0, 3*time.Hour)
	req := RollbackRequest{Head: h.head.Ref, Target: target, Term: 1, Seq: h.seq()}
	if _, _, err := h.s.WriteRollback(ctx, req); err != nil {
		t.Fatal(err)
	}
	cat, sum, err := h.s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{All: time.Hour}, h.now, 1)
	if err != nil || sum.Packs == 0 {
		t.Fatalf("condemned %+v: %v", sum, err)
	}
	req.Catalog = cat
	if _, _, err := h.s.WriteRollback(ctx, req); !errors.Is(err, ErrCondemned) {
		t.Errorf("rollback to condemned packs says %v", err)
	}
}

func TestStoreNames(t *testing.T) {
	for _, o := range []objectName{
		{kind: kindPack, term: 1, seq: 2, rand: "00ff00ff00ff00ff", n: 300},
		{kind: kindManifest, term: maxNameNumber, seq: 0, rand: "0123456789abcdef"},
		{kind: kindCatalog, term: 0, seq: 7, rand: "0123456789abcdef"},
	} {
		if got, ok := parseName(o.path()); !ok || got != o {
			t.Errorf("%s is parsed as %+v, %v", o.path(), got, ok)
		}
	}
	for _, p := range []string{"", "packs", "packs/00/x", "packs/01/1-2-00ff00ff00ff00ff-0.pack", "packs/00/../1-2-00ff00ff00ff00ff-0.pack",
		"manifests/01-2-00ff00ff00ff00ff.manifest", "manifests/1-2-00ff00ff00ff00fg.manifest", "manifests/1-2-00FF00ff00ff00ff.manifest",
		"manifests/1-2-00ff00ff00ff00ff-1.manifest", "manifests/../catalogs/1-2-00ff00ff00ff00ff.catalog",
		"/manifests/1-2-00ff00ff00ff00ff.manifest", "manifests/1-2-00ff00ff00ff00ff.manifest/", "manifests/+1-2-00ff00ff00ff00ff.manifest",
		"manifests/1-9223372036854775808-00ff00ff00ff00ff.manifest"} {
		if o, ok := parseName(p); ok {
			t.Errorf("%q is parsed as %+v", p, o)
		}
	}
}

func TestStoreReadReportsMissing(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 12)
	h.step(t, 30, 0)
	pack := h.head.Packs[0].Path
	if err := os.Remove(filepath.Join(dir, pack)); err != nil {
		t.Fatal(err)
	}
	var o *ObjectError
	err := h.s.Read(ctx, h.head, []Want{{Pack: 0, Count: 1}}, func(Want, []byte) error { return nil }, nil)
	if !errors.Is(err, ErrMissing) || !errors.As(err, &o) || o.Path != pack {
		t.Errorf("Read says %v", err)
	}
	if _, err := h.s.BlockHashes(ctx, h.head); !errors.Is(err, ErrMissing) {
		t.Errorf("BlockHashes says %v", err)
	}
	if err := os.Remove(filepath.Join(dir, h.head.Ref.Manifest)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.s.LoadTree(ctx, h.head.Ref); !errors.Is(err, ErrMissing) || !errors.As(err, &o) || o.Path != h.head.Ref.Manifest {
		t.Errorf("LoadTree says %v", err)
	}
	// An error of the file system is neither missing nor damaged.
	eio := &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, _ string) error {
		if op == fsx.OpRead {
			return errors.New("input/output error")
		}
		return nil
	}}
	h2 := newStoreHistory(t, newTestStore(t, nil, dir), 13)
	h2.step(t, 30, 0)
	s := newTestStore(t, eio, dir)
	if _, err := s.LoadTree(ctx, h2.head.Ref); err == nil || errors.Is(err, ErrMissing) || errors.Is(err, ErrDamaged) {
		t.Errorf("LoadTree says %v", err)
	}
	if _, err := s.BlockHashes(ctx, h2.head); err == nil || errors.Is(err, ErrMissing) || errors.Is(err, ErrDamaged) {
		t.Errorf("BlockHashes says %v", err)
	}
}
