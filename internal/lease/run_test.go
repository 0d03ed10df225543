package lease_test

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

func TestErrorsAreShown(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	a.hold(t)
	a.clock.Advance(time.Second)
	contact := a.View().LastContact
	a.share.set(func(fsx.Op, string) error { return syscall.EIO }, nil)
	want(t, a.Step(testContext(t)), syscall.EIO)
	v := a.View()
	if !errors.Is(v.Err, syscall.EIO) || v.Unknown || v.LastContact != contact || !v.Holding {
		t.Errorf("with a broken share: %+v", v)
	}
	a.share.set(nil, nil)
	if v = a.step(t); v.Err != nil || v.LastContact != a.clock.Now() {
		t.Errorf("with a healthy share: %+v", v)
	}
	// Rule 14: an unmounted share is an error like another, not a new cluster.
	must(t, os.Rename(share.Share, share.Share+".unmounted"))
	must(t, os.Mkdir(share.Share, 0o700))
	want(t, a.Step(testContext(t)), lease.ErrNotInitialised)
	a.clock.Advance(time.Hour)
	want(t, a.Refresh(testContext(t)), lease.ErrNotInitialised)
	if err := a.Acquire(testContext(t), nil); err == nil {
		t.Error("acquired on an unmounted share")
	}
	if left := names(t, share.Share); len(left) > 0 {
		t.Errorf("written into the mount point: %v", left)
	}
}

// running starts Run; the test waits for its end.
func running(t *testing.T, n *node) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
	})
}

func TestRunRenewsAndPolls(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	running(t, a)
	eventually(t, "a looks", func() bool { return a.View().Loaded })
	must(t, a.Acquire(testContext(t), nil))
	running(t, b)
	eventually(t, "b sees it", func() bool { return b.View().Record.Term == 1 })
	for range 30 { // a minute
		v := a.View().Record.Version
		eventually(t, "everybody waits", func() bool { return a.clock.Waiters() == 2 && b.clock.Waiters() == 1 })
		a.clock.Advance(2 * time.Second)
		b.clock.Advance(2 * time.Second)
		eventually(t, "a renews", func() bool { return a.View().Record.Version > v })
	}
	if v := a.View(); !v.Holding {
		t.Errorf("a: %+v", v)
	}
	eventually(t, "b waits", func() bool { return b.clock.Waiters() == 1 })
	if b.View().Record.Version < a.View().Record.Version-1 {
		t.Errorf("b does not follow: %d, %d", b.View().Record.Version, a.View().Record.Version)
	}
	if v := b.View(); b.clock.Now() >= v.ChallengeAt {
		t.Errorf("b could have taken the lease: %+v", v)
	}
}

func TestRunPrunes(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	r := mustOpen(t, share)
	grow(t, r, mustLoad(t, r), 100)
	dir := registerDir(t, share.Share)
	running(t, a)
	eventually(t, "a looks", func() bool { return a.View().Loaded })
	if n := len(versionsIn(t, dir)); n != 101 {
		t.Fatalf("%d records: somebody pruned who does not hold", n)
	}
	must(t, a.Acquire(testContext(t), nil))
	eventually(t, "everybody waits", func() bool { return a.clock.Waiters() == 2 })
	a.clock.Advance(2 * time.Second)
	eventually(t, "the holder prunes", func() bool { return len(versionsIn(t, dir)) == 64 })
}

// Rule 3: a renewal that hangs must not hide that the deadline has come.
func TestHungRenewalDoesNotHideExpiry(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a", func(c *lease.Config) {
		c.TTL, c.RenewInterval, c.OpTimeout = 200*time.Second, 50*time.Second, 50*time.Second
	})
	running(t, a)
	eventually(t, "a looks", func() bool { return a.View().Loaded })
	must(t, a.Acquire(testContext(t), nil))
	eventually(t, "everybody waits", func() bool { return a.clock.Waiters() == 2 })
	hung := make(chan struct{}, 1)
	a.share.mu.Lock()
	gate := a.share.gate
	a.share.mu.Unlock()
	a.share.set(func(fsx.Op, string) error {
		select {
		case hung <- struct{}{}:
		default:
		}
		<-gate
		return nil
	}, nil)
	t.Cleanup(a.share.Heal)
	a.clock.Advance(50 * time.Second)
	<-hung
	for drained := false; !drained; {
		select {
		case <-a.Changed():
		default:
			drained = true
		}
	}
	if v := a.View(); !v.Holding {
		t.Errorf("before the deadline: %+v", v)
	}
	eventually(t, "the watchdog waits", func() bool { return a.clock.Waiters() == 1 })
	a.clock.Advance(150 * time.Second)
	select {
	case <-a.Changed():
	case <-time.After(20 * time.Second):
		t.Error("nobody was told about the deadline")
	}
	if v := a.View(); v.Holding || !v.Expired {
		t.Errorf("after the deadline: %+v", v)
	}
}

// Every operation has its own time-out, whatever its caller allows.
func TestOperationsTimeOut(t *testing.T) {
	for _, what := range []string{"swap", "load"} {
		a := newNode(t, newShare(t, quickFS{}), "a", func(c *lease.Config) { c.OpTimeout = 50 * time.Millisecond })
		if what == "swap" {
			a.hold(t)
		}
		a.share.HangAll()
		ctx := testContext(t)
		want(t, a.Step(ctx), context.DeadlineExceeded)
		if ctx.Err() != nil {
			t.Errorf("a hung %s lasted as long as its caller", what)
		}
	}
}
