package sync

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	mrand "math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	stdsync "sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// crashEnv has the directory and the number of the operation before which a child dies.
const crashEnv = "SYNC_TEST_CRASH"

// crashTruth is what a register would hold.
type crashTruth struct {
	Head SnapshotRef
	Cat  CatalogRef
	Term uint64
}

// crashWorld is a store, a volume and a register in one directory. What a snapshot holds
// follows from its sequence alone.
type crashWorld struct {
	dir   string
	fs    fsx.FS
	truth crashTruth
	s     *Store
	k     *Keeper
	head  *Tree
}

func openCrashWorld(dir string, fsys fsx.FS) (*crashWorld, error) {
	w := &crashWorld{dir: dir, fs: fsys}
	b, err := os.ReadFile(filepath.Join(dir, "truth"))
	if err == nil {
		err = json.Unmarshal(b, &w.truth)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	w.s, err = OpenStore(StoreConfig{FS: fsys, Dir: filepath.Join(dir, "share"), Workers: 1, packBlocks: 64, frameBlocks: 16, maxChain: 6})
	if err != nil {
		return nil, err
	}
	w.truth.Term++
	w.k = w.s.NewKeeper()
	if w.truth.Head.ID != "" {
		if w.head, err = w.s.LoadTree(context.Background(), w.truth.Head); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// crashModel is the volume as of a snapshot's sequence.
func crashModel(seq uint64) *storeModel {
	m := newStoreModel()
	for k := range 3 {
		f := m.inodes[m.add(fmt.Sprint("f", k), Inode{Type: TypeRegular, Mode: 0o600, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), //nolint:gosec // IDs fit
			Size: 24*BlockSize - int64(k)})]
		for i := range 24 {
			last := uint64(1)
			for s := seq; s > 1; s-- {
				if (s*31+uint64(i*7+k))%3 != 0 && i%23 != 0 { //nolint:gosec // small
					last = s
					break
				}
			}
			b := make([]byte, BlockSize)
			mrand.New(mrand.NewSource(int64(last*1000) + int64(k*100+i))).Read(b[:BlockSize-8]) //nolint:gosec // a pattern
			f.blocks = append(f.blocks, storeBlock{kind: ExtentData, data: string(b)})
		}
	}
	m.inodes[0].meta.UID, m.inodes[0].meta.GID = uint32(os.Getuid()), uint32(os.Getgid()) //nolint:gosec // IDs fit
	return m
}

// commit is the register's swap: atomic, and the process may die before or after.
func (w *crashWorld) commit() error {
	if err := w.fs.At("commit", w.dir); err != nil {
		return err
	}
	b, err := json.Marshal(w.truth)
	if err != nil {
		return err
	}
	tmp := filepath.Join(w.dir, "truth.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(w.dir, "truth")); err != nil {
		return err
	}
	return w.fs.At("committed", w.dir)
}

func (w *crashWorld) snapshot() error {
	ctx := context.Background()
	seq := w.truth.Head.Seq + 1
	var old *storeModel
	if w.head != nil {
		old = crashModel(w.truth.Head.Seq)
	}
	d, src := crashModel(seq).diff(old, w.truth.Head, mrand.New(mrand.NewSource(1)))
	m := w.k.Moves()
	tree, _, err := w.s.Write(ctx, WriteRequest{Base: w.head, Delta: d, Blocks: src, Term: w.truth.Term, Seq: seq,
		Frozen: time.Unix(int64(seq)*60, 0), Moves: m}) //nolint:gosec // small
	if err != nil {
		return err
	}
	if err := w.s.CheckNotCondemned(ctx, tree, w.truth.Cat); err != nil {
		return err
	}
	w.truth.Head = tree.Ref
	if err := w.commit(); err != nil {
		return err
	}
	w.head = tree
	w.k.Took(m)
	return nil
}

func (w *crashWorld) condemn() error {
	ctx := context.Background()
	cat, _, err := w.k.Condemn(ctx, CondemnRequest{Head: w.truth.Head, Catalog: w.truth.Cat, Policy: Policy{All: 2 * time.Minute}, Now: time.Unix(0, 0), Term: w.truth.Term})
	if err != nil {
		return err
	}
	w.truth.Cat = cat
	if err := w.commit(); err != nil {
		return err
	}
	return w.k.Follow(ctx, cat)
}

// run does everything that changes a store or is built from it, once.
func (w *crashWorld) run(restoreTo string) error {
	ctx := context.Background()
	look := func(context.Context) (SnapshotRef, CatalogRef, error) { return w.truth.Head, w.truth.Cat, nil }
	for _, step := range []func() error{
		w.snapshot, w.snapshot, w.condemn,
		func() error {
			_, err := w.k.Compact(ctx, CompactRequest{Head: w.head, Catalog: w.truth.Cat, Term: w.truth.Term, Below: 95})
			fmt.Println("compacted:", w.k.Moves() != nil)
			return err
		},
		w.snapshot, w.condemn,
		func() error { _, err := w.k.Sweep(ctx, w.truth.Cat, 0); return err },
		w.snapshot,
		func() error {
			return w.s.WithPin(ctx, PinRequest{Snapshots: []SnapshotRef{w.truth.Head}, Look: look}, func(ctx context.Context, _ SnapshotRef) error {
				return Restore(ctx, w.s, w.truth.Head, restoreTo, RestoreOptions{FS: w.fs, Workers: 1})
			})
		},
		func() error {
			v, err := OpenVolume(VolumeConfig{Dir: filepath.Join(w.dir, "volume"), FS: w.fs, BootID: "boot", Rand: rand.Reader, Workers: 1})
			if err != nil {
				return err
			}
			_, err = v.Hydrate(ctx, w.s, w.truth.Head, nil)
			return errors.Join(err, v.Close())
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// check is what must hold whatever happened: everything that is retained is whole, and what
// it was.
func (w *crashWorld) check() error {
	ctx := context.Background()
	list, err := w.s.List(ctx, w.truth.Head, w.truth.Cat)
	if err != nil {
		return err
	}
	rep, err := w.s.Verify(ctx, list, nil)
	if err != nil {
		return err
	}
	if len(rep.Problems) > 0 {
		return fmt.Errorf("%+v", rep.Problems)
	}
	for _, i := range list {
		t, err := w.s.LoadTree(ctx, i.SnapshotRef)
		if err != nil {
			return err
		}
		if err := crashModel(i.Seq).same(w.s, t); err != nil {
			return fmt.Errorf("snapshot %s: %w", i.ID, err)
		}
	}
	return nil
}

func sameDir(dir string, m *storeModel) error {
	for name, id := range m.names {
		f := m.inodes[id]
		if f.meta.Type != TypeRegular {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		var want bytes.Buffer
		for _, x := range f.blocks {
			want.WriteString(x.data)
		}
		if !bytes.Equal(b, want.Bytes()[:f.meta.Size]) {
			return fmt.Errorf("%s differs", name)
		}
	}
	return nil
}

// TestCrashChild is the process that dies.
func TestCrashChild(t *testing.T) {
	dir, at, ok := strings.Cut(os.Getenv(crashEnv), " ")
	if !ok {
		t.Skip("only as a child of TestStoreKilled")
	}
	n, err := strconv.ParseInt(at, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	var mu stdsync.Mutex
	var done int64
	hooked := &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		if op == fsx.OpReadDir || op == fsx.OpRead {
			return nil // dying there is dying before the next one
		}
		mu.Lock()
		defer mu.Unlock()
		if done++; done > n {
			fmt.Println("dies before", op, filepath.Base(path))
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return nil
	}}
	w, err := openCrashWorld(dir, hooked)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.run(filepath.Join(dir, "restored")); err != nil {
		t.Fatal(err)
	}
	fmt.Println("operations:", done)
}

// TestStoreKilled kills a process before each of its operations on the file system (with
// -short or by default: before some of them; with TEST_LONG or CRASH_EVERY=1 before all) while it ships, commits,
// condemns, compacts, deletes, pins, restores and hydrates. Then everything that is committed
// must be whole, and the next process must get through and leave no litter.
func TestStoreKilled(t *testing.T) {
	if os.Getenv(crashEnv) != "" {
		t.Skip("this is a child")
	}
	shm := storeMemDir(t)
	base := filepath.Join(shm, "base")
	if err := os.MkdirAll(filepath.Join(base, "share"), 0o700); err != nil {
		t.Fatal(err)
	}
	w, err := openCrashWorld(base, fsx.OS{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.s.Init(context.Background()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := w.snapshot(); err != nil {
			t.Fatal(err)
		}
	}
	child := func(dir string, n int64) (string, error) {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestCrashChild$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", crashEnv, dir, n))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	world := func(name string) string {
		dir := filepath.Join(shm, name)
		if out, err := exec.Command("cp", "-a", base, dir).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		return dir
	}
	whole := world("whole")
	out, err := child(whole, math.MaxInt64)
	_, count, ok := strings.Cut(out, "operations: ")
	if err != nil || !ok {
		t.Fatalf("%s: %v", out, err)
	}
	total, err := strconv.ParseInt(strings.Fields(count)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "compacted: true") {
		t.Errorf("nothing is compacted: %s", out)
	}
	every := int64(13)
	if volLong() {
		every = 1
	}
	if s := os.Getenv("CRASH_EVERY"); s != "" {
		if every, err = strconv.ParseInt(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d operations", total)
	for n := time.Now().UnixNano() % every; n < total; n += every {
		dir := world(fmt.Sprint("at-", n))
		out, err := child(dir, n)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("operation %d: the child was to be killed: %v: %s", n, err, out)
		}
		died := strings.TrimSpace(strings.SplitN(out, "\n", 2)[0])
		fail := func(what string, err error) {
			if err != nil {
				t.Errorf("operation %d, %s: %s: %v", n, died, what, err)
			}
		}
		w, err := openCrashWorld(dir, fsx.OS{})
		if err != nil {
			t.Fatalf("operation %d, %s: %v", n, died, err)
		}
		fail("after the crash", w.check())
		fail("remove the half restored directory", os.RemoveAll(filepath.Join(dir, "restored")))
		if out, err := child(dir, math.MaxInt64); err != nil {
			fail("the next process: "+out, err)
			continue
		}
		w, err = openCrashWorld(dir, fsx.OS{})
		if err != nil {
			t.Fatalf("operation %d, %s: %v", n, died, err)
		}
		fail("after the next process", w.check())
		fail("restored", sameDir(filepath.Join(dir, "restored"), crashModel(w.truth.Head.Seq)))
		fail("hydrated", sameDir(filepath.Join(dir, "volume", "volume"), crashModel(w.truth.Head.Seq)))
		// A new holder finds all that the dead one left. Its pin dies of silence.
		for range 3 {
			fail("condemn", w.condemn())
			_, err := w.s.sweep(context.Background(), w.truth.Cat, &PinWatch{}, func(string) bool { return true }, func(string) {})
			fail("sweep", err)
			pins, err := filepath.Glob(filepath.Join(dir, "share", pinDir, "*.pin"))
			fail("list pins", err)
			for _, p := range pins {
				fail("remove pin", os.Remove(p))
			}
			w.k = w.s.NewKeeper() // lists again
		}
		storeNoLitter(failer(func(format string, args ...any) { fail("litter", fmt.Errorf(format, args...)) }),
			&storeHistory{s: w.s, head: w.head, cat: w.truth.Cat})
		fail("clean up", os.RemoveAll(dir))
	}
}

type failer func(format string, args ...any)

func (f failer) Fatalf(format string, args ...any) { f(format, args...) }
