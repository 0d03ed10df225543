package lease_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

const (
	ttl    = 10 * time.Second
	margin = 2 * time.Second
)

// quickFS is the real file system without the waiting for the disk: these tests simulate
// crashes of processes, not of the machine.
type quickFS struct{ fsx.OS }

type quickFile struct{ fsx.File }

func (quickFile) Sync() error { return nil }

func (quickFS) SyncDir(string) error { return nil }

func (q quickFS) Create(path string) (fsx.File, error) {
	f, err := q.OS.Create(path)
	if err != nil {
		return nil, err
	}
	return quickFile{f}, nil
}

// faultFS is one instance's connection to the share. Exactly one fault may be set at a time.
type faultFS struct {
	*fsx.Hooked
	mu     sync.Mutex
	before fsx.Hook
	after  fsx.After
	gate   chan struct{} // what hangs waits for it
}

func newFaultFS(base fsx.FS) *faultFS {
	f := &faultFS{gate: make(chan struct{})}
	f.Hooked = &fsx.Hooked{
		FS: base,
		Before: func(op fsx.Op, path string) error {
			f.mu.Lock()
			h := f.before
			f.mu.Unlock()
			if h == nil {
				return nil
			}
			return h(op, path)
		},
		After: func(op fsx.Op, path string, err error) error {
			f.mu.Lock()
			h := f.after
			f.mu.Unlock()
			if h == nil {
				return err
			}
			return h(op, path, err)
		},
	}
	return f
}

func (f *faultFS) set(before fsx.Hook, after fsx.After) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.after = before, after
}

// once makes an outcome replacement that happens only the first time.
func once(op fsx.Op, instead error) fsx.After {
	var done sync.Once
	return func(o fsx.Op, _ string, err error) error {
		if o == op && err == nil {
			done.Do(func() { err = instead })
		}
		return err
	}
}

// LoseReply implements leasetest.Faults.
func (f *faultFS) LoseReply() { f.set(nil, once(fsx.OpSymlink, syscall.EIO)) }

// RepeatRequest implements leasetest.Faults.
func (f *faultFS) RepeatRequest() {
	f.set(nil, once(fsx.OpSymlink, &os.LinkError{Op: "link", Err: syscall.EEXIST}))
}

// Hang implements leasetest.Faults.
func (f *faultFS) Hang() { f.hang(func(op fsx.Op) bool { return op == fsx.OpSymlink }) }

// HangAll implements leasetest.Faults.
func (f *faultFS) HangAll() { f.hang(func(fsx.Op) bool { return true }) }

func (f *faultFS) hang(which func(fsx.Op) bool) {
	f.mu.Lock()
	gate := f.gate
	f.mu.Unlock()
	f.set(func(op fsx.Op, _ string) error {
		if which(op) {
			<-gate
		}
		return nil
	}, nil)
}

// Heal implements leasetest.Faults.
func (f *faultFS) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.after = nil, nil
	close(f.gate)
	f.gate = make(chan struct{})
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// newShare is an initialised cluster in a directory of its own.
func newShare(t testing.TB, fsys fsx.FS) lease.FileConfig {
	t.Helper()
	cfg := lease.FileConfig{FS: fsys, Share: t.TempDir(), Rand: rand.Reader}
	id, err := lease.InitFile(testContext(t), cfg, lease.Record{TTL: lease.Duration(ttl)})
	if err != nil {
		t.Fatalf("init: %v", err)
	}
	cfg.ClusterID = id
	return cfg
}

func mustOpen(t testing.TB, cfg lease.FileConfig) *lease.FileRegister {
	t.Helper()
	r, err := lease.OpenFile(testContext(t), cfg)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return r
}

func mustLoad(t testing.TB, r lease.Register) lease.Record {
	t.Helper()
	rec, err := r.Load(testContext(t))
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return rec
}

func mustSwap(t testing.TB, r lease.Register, prev, next lease.Record) lease.Record {
	t.Helper()
	rec, err := r.CompareAndSwap(testContext(t), prev, next)
	if err != nil {
		t.Fatalf("swap: %v", err)
	}
	return rec
}

func want(t testing.TB, err, sentinel error) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error is %v, want %v", err, sentinel)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls a condition that another goroutine brings about.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// registerDir is where the share's records are.
func registerDir(t testing.TB, share string) string {
	t.Helper()
	m, err := filepath.Glob(filepath.Join(share, "register", "*"))
	if err != nil || len(m) != 1 {
		t.Fatalf("register directories: %v %v", m, err)
	}
	return m[0]
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != dir {
			out = append(out, p[len(dir)+1:])
		}
		return err
	})
	must(t, err)
	return out
}

// node is one instance with its own connection, disk and clock.
type node struct {
	*lease.Lease
	cfg    lease.Config
	clock  *boottime.Fake
	share  *faultFS
	dir    string
	mu     sync.Mutex
	fence  []boottime.Instant // deadlines that the fence took
	fenceE error
}

// newNode starts an agent named name on a machine of its own.
func newNode(t testing.TB, share lease.FileConfig, name string, edits ...func(*lease.Config)) *node {
	t.Helper()
	n := &node{clock: boottime.NewFake(), dir: t.TempDir(), share: newFaultFS(quickFS{})}
	share.FS = n.share
	n.cfg = lease.Config{
		Register: mustOpen(t, share),
		Clock:    n.clock, Rand: rand.Reader, FS: quickFS{},
		Self: lease.Holder{Instance: name, VolumeID: "vol-" + name, Address: name + ":5432"},
		TTL:  ttl, RenewInterval: 2 * time.Second, Margin: margin, OpTimeout: 2 * time.Second,
		SeenFile: filepath.Join(n.dir, "lib", "seen.json"),
		RunFile:  filepath.Join(n.dir, "run", "lease.json"),
		BootID:   "boot-" + name,
		Extend: func(_ context.Context, _ uint64, at boottime.Instant) error {
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.fenceE != nil {
				return n.fenceE
			}
			n.fence = append(n.fence, at)
			return nil
		},
	}
	for _, e := range edits {
		e(&n.cfg)
	}
	n.restart(t)
	t.Cleanup(func() {
		n.share.Heal()
		must(t, n.Close())
		n.cfg.Register.(*lease.FileRegister).Drain()
	})
	return n
}

// restart replaces the agent's process by a new one.
func (n *node) restart(t testing.TB) {
	t.Helper()
	if n.Lease != nil {
		must(t, n.Close())
	}
	var err error
	n.Lease, err = lease.New(n.cfg)
	must(t, err)
}

func (n *node) refresh(t testing.TB) lease.View {
	t.Helper()
	must(t, n.Refresh(testContext(t)))
	return n.View()
}

func (n *node) step(t testing.TB) lease.View {
	t.Helper()
	must(t, n.Step(testContext(t)))
	return n.View()
}

// hold makes the node the holder of a register whose lease is free.
func (n *node) hold(t testing.TB) lease.View {
	t.Helper()
	n.refresh(t)
	must(t, n.Acquire(testContext(t), nil))
	v := n.View()
	if !v.Holding {
		t.Fatalf("acquired but not holding: %+v", v)
	}
	return v
}

// shortly is the context of an operation that is meant to hang.
func shortly(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func headOf(term, seq uint64) *lease.Head {
	id := fmt.Sprintf("%d-%d-%s", term, seq, rand.Text()[:6])
	return &lease.Head{ID: id, Manifest: "manifests/" + id, Hash: "ff", Term: term, Seq: seq}
}
