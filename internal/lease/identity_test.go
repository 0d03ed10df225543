package lease_test

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

func TestRegisterThatWentBackIsRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(t *testing.T, share lease.FileConfig, backup string)
		err  error
	}{
		{"behind", func(t *testing.T, share lease.FileConfig, backup string) { restore(t, share, backup) }, lease.ErrWentBack},
		{"behind and then used until it was ahead", func(t *testing.T, share lease.FileConfig, backup string) {
			restore(t, share, backup)
			r := mustOpen(t, share)
			rec := mustLoad(t, r)
			rec.Term = 9
			grow(t, r, rec, 5)
		}, lease.ErrWentBack},
		{"same version, another record", func(t *testing.T, share lease.FileConfig, backup string) {
			restore(t, share, backup)
			r := mustOpen(t, share)
			rec := mustLoad(t, r)
			rec.Term = 9
			grow(t, r, rec, 2)
		}, lease.ErrWentBack},
		{"lower term, higher version", func(t *testing.T, share lease.FileConfig, backup string) {
			restore(t, share, backup)
			r := mustOpen(t, share)
			grow(t, r, mustLoad(t, r), 100)
			must(t, r.Prune(testContext(t)))
		}, lease.ErrWentBack},
		{"untouched", func(*testing.T, lease.FileConfig, string) {}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			share := newShare(t, quickFS{})
			backup := t.TempDir()
			must(t, os.CopyFS(filepath.Join(backup, "register"), os.DirFS(filepath.Join(share.Share, "register"))))
			n := newNode(t, share, "b")
			n.hold(t)    // version 2, term 1
			n.step(t)    // version 3
			n.restart(t) // forgets what is not on its disk
			c.edit(t, share, backup)
			err := n.Refresh(testContext(t))
			if c.err == nil {
				must(t, err)
				return
			}
			want(t, err, c.err)
			want(t, n.View().Err, c.err)
			if v := n.View(); v.Loaded {
				t.Errorf("took over %+v", v.Record)
			}
			if err := n.Acquire(testContext(t), nil); err == nil {
				t.Error("acquired")
			}
			if err := n.SetPaused(testContext(t), true); err == nil {
				t.Error("wrote")
			}
		})
	}
}

func restore(t testing.TB, share lease.FileConfig, backup string) {
	t.Helper()
	must(t, os.RemoveAll(filepath.Join(share.Share, "register")))
	must(t, os.CopyFS(filepath.Join(share.Share, "register"), os.DirFS(filepath.Join(backup, "register"))))
}

// While an agent runs it notices as well, and the holder stops at its deadline.
func TestRegisterGoesBackUnderTheHolder(t *testing.T) {
	share := newShare(t, quickFS{})
	backup := t.TempDir()
	must(t, os.CopyFS(filepath.Join(backup, "register"), os.DirFS(filepath.Join(share.Share, "register"))))
	a := newNode(t, share, "a")
	deadline := a.hold(t).Deadline
	restore(t, share, backup)
	want(t, a.Step(testContext(t)), lease.ErrWentBack)
	v := a.View()
	if !v.Holding || v.Deadline != deadline || v.Record.Version != 2 {
		t.Errorf("view: %+v", v)
	}
	if got := versionsIn(t, registerDir(t, share.Share)); len(got) != 1 {
		t.Errorf("a record was written above a register that went back: %v", got)
	}
	a.clock.Advance(ttl)
	if v = a.View(); v.Holding {
		t.Error("still holding")
	}
	want(t, a.Refresh(testContext(t)), lease.ErrWentBack)
	want(t, a.Acquire(testContext(t), nil), lease.ErrWentBack)
}

func TestAnotherClusterIsRefused(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.refresh(t)
	must(t, a.Close())
	cfg := a.cfg
	cfg.Register = mustOpen(t, newShare(t, quickFS{}))
	l, err := lease.New(cfg)
	must(t, err)
	want(t, l.Refresh(testContext(t)), lease.ErrWrongCluster)
	must(t, l.Close())
	must(t, os.WriteFile(cfg.SeenFile, []byte("?"), 0o600))
	_, err = lease.New(cfg)
	want(t, err, lease.ErrCorrupt)
}

// The memory must be on disk before an acquisition builds on what was seen, and a slow local
// disk must not hold up a renewal.
func TestMemory(t *testing.T) {
	share := newShare(t, quickFS{})
	disk := newFaultFS(quickFS{})
	a := newNode(t, share, "a", func(c *lease.Config) { c.FS = disk; c.RunFile = "" })
	a.hold(t)
	seen := func() string {
		b, err := os.ReadFile(a.cfg.SeenFile)
		must(t, err)
		return string(b)
	}
	eventually(t, "the acquisition is remembered", func() bool { return strings.Contains(seen(), `"version":2,"term":1`) })
	disk.HangAll()
	for range 3 {
		a.step(t)
	}
	_, err := a.Commit(testContext(t), a.View().Record, func(r *lease.Record) { r.Head = headOf(1, 1) })
	must(t, err)
	disk.Heal()
	eventually(t, "the commit is remembered", func() bool { return strings.Contains(seen(), `"version":6`) })
	for range 15 {
		a.step(t)
	}
	if !strings.Contains(seen(), `"version":6`) {
		t.Errorf("plain renewals are written one by one: %s", seen())
	}
	a.step(t)
	eventually(t, "renewals are remembered now and then", func() bool { return strings.Contains(seen(), `"version":22`) })
	must(t, a.Release(testContext(t), ""))
	disk.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpCreate {
			return syscall.ENOSPC
		}
		return nil
	}, nil)
	// Written by the release in the background; whether that was before the disk filled up or
	// not, the next acquisition has to have it there.
	must(t, a.SetPaused(testContext(t), true))
	want(t, a.Acquire(testContext(t), nil), syscall.ENOSPC)
	disk.set(nil, nil)
	must(t, a.Acquire(testContext(t), nil))
}

func TestSecondAgentOnThisMachineIsRefused(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	_, err := lease.New(a.cfg)
	want(t, err, lease.ErrInstanceInUse)
	if !strings.Contains(err.Error(), a.cfg.RunFile) {
		t.Errorf("the message does not say where to look: %v", err)
	}
	must(t, a.Close())
	l, err := lease.New(a.cfg)
	must(t, err)
	must(t, l.Close())
}

// Two machines with one instance name: the second sees its own name renewed by somebody else.
func TestSecondAgentOnAnotherMachineIsRefused(t *testing.T) {
	share := newShare(t, quickFS{})
	a, twin := newNode(t, share, "a"), newNode(t, share, "a")
	a.hold(t)
	twin.refresh(t)
	want(t, twin.Resume(testContext(t)), lease.ErrNotYet)
	want(t, twin.Acquire(testContext(t), nil), lease.ErrNotYet)
	a.step(t)
	twin.refresh(t) // may be what our own dead predecessor sent last
	a.step(t)
	want(t, twin.Refresh(testContext(t)), lease.ErrInstanceInUse)
	want(t, twin.View().Err, lease.ErrInstanceInUse)
	twin.clock.Advance(ttl - 1)
	want(t, twin.Acquire(testContext(t), nil), lease.ErrInstanceInUse)
	want(t, twin.PutOrder(testContext(t), lease.Order{ID: "o", Term: 1}), lease.ErrInstanceInUse)
	// Run says so and ends.
	a.step(t)
	want(t, twin.Run(testContext(t)), lease.ErrInstanceInUse)
	// When the first one is gone for a TTL, the name is free.
	twin.refresh2(t)
	twin.clock.Advance(ttl)
	twin.refresh(t)
	must(t, twin.Acquire(testContext(t), nil))
	if v := a.step(t); v.Holding || !v.Expired {
		t.Errorf("the first one's view: %+v", v)
	}
}

// refresh2 looks without minding the result.
func (n *node) refresh2(t testing.TB) { _ = n.Refresh(testContext(t)) }

// sameRand gives two agents the same incarnation, as a machine cloned with its memory has.
type sameRand struct{}

func (sameRand) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 7
	}
	return len(b), nil
}

var _ io.Reader = sameRand{}

func TestClonedIncarnationIsNoticed(t *testing.T) {
	share := newShare(t, quickFS{})
	same := func(c *lease.Config) { c.Rand = sameRand{} }
	a, clone := newNode(t, share, "a", same), newNode(t, share, "a", same)
	if a.Incarnation() != clone.Incarnation() {
		t.Fatal("the incarnations differ")
	}
	clone.refresh(t)
	a.hold(t)
	want(t, clone.Refresh(testContext(t)), lease.ErrInstanceInUse)
	if v := clone.View(); v.Holding {
		t.Errorf("the clone holds: %+v", v)
	}
	want(t, clone.Acquire(testContext(t), nil), lease.ErrInstanceInUse)
	if v := a.step(t); !v.Holding {
		t.Errorf("the original lost: %+v", v)
	}
}

// The original's own writes are not mistaken for a clone's, whatever their outcome was.
func TestOwnUnknownWritesAreNotAClones(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	a.hold(t)
	a.share.Hang()
	_, err := a.Commit(shortly(t), a.View().Record, func(r *lease.Record) { r.Head = headOf(1, 1) })
	want(t, err, lease.ErrUnknown)
	a.share.Heal()
	eventually(t, "the commit takes effect", func() bool { return mustLoad(t, mustOpen(t, share)).Head != nil })
	if v := a.step(t); !v.Holding || v.Err != nil || v.Record.Head == nil || v.Record.Version != 4 {
		t.Errorf("view: %+v", v)
	}
}

func TestRandomnessFails(t *testing.T) {
	cfg := newNode(t, newShare(t, quickFS{}), "a").cfg
	cfg.RunFile, cfg.Rand = "", strings.NewReader("short")
	_, err := lease.New(cfg)
	want(t, err, io.ErrUnexpectedEOF)
}
