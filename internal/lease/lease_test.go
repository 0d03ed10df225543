package lease_test

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

func TestConfigIsChecked(t *testing.T) {
	share := newShare(t, quickFS{})
	good := newNode(t, share, "a").cfg
	good.RunFile = ""
	for _, c := range []struct {
		name string
		edit func(*lease.Config)
		hint string
	}{
		{"no register", func(c *lease.Config) { c.Register = nil }, "required"},
		{"no clock", func(c *lease.Config) { c.Clock = nil }, "required"},
		{"no name", func(c *lease.Config) { c.Self.Instance = "" }, "instance name"},
		{"no ttl", func(c *lease.Config) { c.TTL = 0 }, "positive"},
		{"no margin", func(c *lease.Config) { c.Margin = 0 }, "positive"},
		{"renewal too slow", func(c *lease.Config) { c.RenewInterval = c.TTL / 2 }, "half"},
		{"operations too slow", func(c *lease.Config) { c.OpTimeout = c.RenewInterval + 1 }, "renew interval"},
		{"margin too large", func(c *lease.Config) { c.Margin = 6 * time.Second }, "less than the ttl"},
		{"run file without boot id", func(c *lease.Config) { c.RunFile, c.BootID = "x", "" }, "boot id"},
	} {
		cfg := good
		c.edit(&cfg)
		if _, err := lease.New(cfg); err == nil || !strings.Contains(err.Error(), c.hint) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	l, err := lease.New(good)
	must(t, err)
	must(t, l.Close())
	want(t, l.Refresh(testContext(t)), lease.ErrClosed)
}

func TestFreeLeaseIsTakenAtOnce(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	want(t, a.Acquire(testContext(t), nil), lease.ErrNotYet) // never looked
	v := a.refresh(t)
	if !v.Loaded || v.ChallengeAt != 0 || v.Holding || v.Record.Term != 0 {
		t.Errorf("before: %+v", v)
	}
	v = a.hold(t)
	r := v.Record
	if r.Term != 1 || r.Holder.Instance != "a" || r.Holder.VolumeID != "vol-a" || r.Holder.Incarnation != a.Incarnation() || r.By != a.Incarnation() {
		t.Errorf("record is %+v", r)
	}
	if w := a.clock.Now().Add(ttl - margin); v.Deadline != w {
		t.Errorf("deadline %d, want %d", v.Deadline, w)
	}
	want(t, a.Acquire(testContext(t), nil), lease.ErrHeld)
	want(t, a.Resume(testContext(t)), lease.ErrHeld)
}

// Rule 2: the wait is the TTL written in the version, from when that version was first seen,
// on the challenger's own clock.
func TestChallengerWaitsForTheWrittenTTL(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a", func(c *lease.Config) { c.TTL = 30 * time.Second })
	b := newNode(t, share, "b") // its own TTL is 10 s
	a.hold(t)
	seen := b.clock.Now()
	v := b.refresh(t)
	if v.SeenSince != seen || v.ChallengeAt != seen.Add(30*time.Second) {
		t.Errorf("seen since %d, challenge at %d", v.SeenSince, v.ChallengeAt)
	}
	b.clock.Advance(29 * time.Second)
	b.refresh(t) // looking again does not restart the wait
	want(t, b.Acquire(testContext(t), nil), lease.ErrNotYet)
	// A renewal does.
	a.step(t)
	b.clock.Advance(time.Second)
	b.refresh(t)
	want(t, b.Acquire(testContext(t), nil), lease.ErrNotYet)
	b.clock.Advance(30*time.Second - 1)
	want(t, b.Acquire(testContext(t), nil), lease.ErrNotYet)
	b.clock.Advance(1)
	must(t, b.Acquire(testContext(t), nil))
	if r := b.View().Record; r.Term != 2 || r.Holder.Instance != "b" || time.Duration(r.TTL) != ttl {
		t.Errorf("record is %+v", r)
	}
}

// Rule 2: the swap is done on the version that was watched. A holder that renewed in the last
// moment, unseen, is not robbed.
func TestAcquireNeverUsesARereadVersion(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	b.refresh(t)
	b.clock.Advance(ttl)
	a.step(t)
	want(t, b.Acquire(testContext(t), nil), lease.ErrConflict)
	if v := a.refresh(t); !v.Holding || v.Record.Term != 1 {
		t.Errorf("holder's view: %+v", v)
	}
	// What the conflict showed is watched from now on.
	want(t, b.Acquire(testContext(t), nil), lease.ErrNotYet)
}

// An unknown outcome must not lead to another version either.
func TestUnknownAcquireNeverUsesARereadVersion(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	b.refresh(t)
	b.clock.Advance(ttl)
	b.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink { // refused without effect, which nobody can know, and then:
			a.step(t)
			b.share.set(nil, nil)
			return syscall.EIO
		}
		return nil
	}, nil)
	if err := b.Acquire(testContext(t), nil); err == nil {
		t.Error("acquired from a living holder")
	}
	if v := a.refresh(t); !v.Holding || v.Record.Term != 1 {
		t.Errorf("holder's view: %+v", v)
	}
}

func TestTakeoverKeepsTheData(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	basis := a.hold(t).Record
	rec, err := a.Commit(testContext(t), basis, func(r *lease.Record) {
		r.Head, r.ImageDigest = headOf(1, 1), "sha256:7"
		r.Catalog, r.CatalogHash, r.GCSeq = "catalogs/1", "aa", 1
	})
	must(t, err)
	must(t, a.PutOrder(testContext(t), lease.Order{ID: "o", Kind: lease.OrderFailover, Term: 1}))
	b.refresh(t)
	b.clock.Advance(ttl)
	must(t, b.Acquire(testContext(t), func(r *lease.Record) {
		r.Head.Seq, r.GCSeq, r.Catalog, r.CatalogHash, r.ImageDigest = 99, 99, "x", "x", "x"
		r.Term, r.Released, r.Holder.Instance, r.Holder.Incarnation, r.ClusterID = 99, true, "x", "x", "x"
		r.Holder.VolumeID, r.Holder.Address, r.Holder.HTTP, r.Holder.Zone = "v", "a", "h", "z"
	}))
	got := b.refresh(t).Record
	if got.Term != 2 || !got.SameData(rec) || got.ImageDigest != rec.ImageDigest || got.Order != nil || got.Released {
		t.Errorf("after the takeover: %+v", got)
	}
	if h := (lease.Holder{Instance: "b", Incarnation: b.Incarnation(), VolumeID: "v", Address: "a", HTTP: "h", Zone: "z"}); got.Holder != h {
		t.Errorf("holder is %+v", got.Holder)
	}
}

// Rule 3: validity counts from before the swap was sent, however slow it is.
func TestDeadlineCountsFromBeforeTheSwap(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	slow := func(d time.Duration) {
		a.share.set(func(op fsx.Op, _ string) error {
			if op == fsx.OpSymlink {
				a.clock.Advance(d)
			}
			return nil
		}, nil)
	}
	a.refresh(t)
	slow(3 * time.Second)
	sent := a.clock.Now()
	must(t, a.Acquire(testContext(t), nil))
	if v := a.View(); v.Deadline != sent.Add(ttl-margin) || !v.Holding {
		t.Errorf("acquired: deadline %d, want %d", v.Deadline, sent.Add(ttl-margin))
	}
	sent = a.clock.Now()
	if v := a.step(t); v.Deadline != sent.Add(ttl-margin) {
		t.Errorf("renewed: deadline %d, want %d", v.Deadline, sent.Add(ttl-margin))
	}
	sent = a.clock.Now()
	_, err := a.Commit(testContext(t), a.View().Record, func(r *lease.Record) { r.Head = headOf(1, 1) })
	must(t, err)
	if v := a.View(); v.Deadline != sent.Add(ttl-margin) {
		t.Errorf("committed: deadline %d, want %d", v.Deadline, sent.Add(ttl-margin))
	}
	if len(a.fence) != 3 || a.fence[2] != a.View().Deadline {
		t.Errorf("the fence was told %v", a.fence)
	}
	// Answered after the deadline: the database is dead, and the tenure is over for good.
	slow(ttl)
	want(t, a.Step(testContext(t)), nil)
	a.share.set(nil, nil)
	v := a.View()
	if v.Holding || !v.Expired || len(a.fence) != 3 {
		t.Errorf("renewed too late: %+v, fence %v", v, a.fence)
	}
	if v = a.step(t); v.Holding {
		t.Error("an expired tenure was revived")
	}
	// It may come back as any challenger, in a new term.
	a.clock.Advance(ttl)
	must(t, a.Acquire(testContext(t), nil))
	if v = a.View(); !v.Holding || v.Expired || v.Record.Term != 2 {
		t.Errorf("acquired again: %+v", v)
	}
}

func TestAcquireAnsweredTooLateDoesNotHold(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.refresh(t)
	a.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink {
			a.clock.Advance(ttl - margin)
		}
		return nil
	}, nil)
	want(t, a.Acquire(testContext(t), nil), lease.ErrNotHeld)
	if v := a.View(); v.Holding || len(a.fence) > 0 {
		t.Errorf("holding %v, fence %v", v.Holding, a.fence)
	}
}

// A machine that was suspended does not hold any more at the first look at its clock, with
// nothing of the lease running.
func TestHoldingEndsByTheClockAlone(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.hold(t)
	a.clock.Advance(ttl - margin - 1)
	if v := a.View(); !v.Holding || v.Expired {
		t.Errorf("before the deadline: %+v", v)
	}
	a.clock.Advance(1)
	if v := a.View(); v.Holding || !v.Expired {
		t.Errorf("at the deadline: %+v", v)
	}
	_, err := a.Commit(testContext(t), a.View().Record, func(*lease.Record) {})
	want(t, err, lease.ErrNotHeld)
	want(t, a.Release(testContext(t), ""), lease.ErrNotHeld)
}

// Rule 3: the fence is asked before an extension counts; without it the old deadline stays.
func TestExtensionNeedsTheFence(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	broken := errors.New("no answer from the guard")
	v := a.hold(t)
	old := v.Deadline
	a.fenceE = broken
	a.clock.Advance(time.Second)
	want(t, a.Step(testContext(t)), broken)
	v = a.View()
	if v.Deadline != old || !errors.Is(v.FenceErr, broken) || !v.Holding || v.Record.Version != 3 {
		t.Errorf("without the fence: %+v", v)
	}
	a.fenceE = nil
	if v = a.step(t); v.Deadline != old.Add(time.Second) || v.FenceErr != nil {
		t.Errorf("with the fence again: %+v", v)
	}
	a.fenceE = broken
	a.clock.Advance(ttl - margin)
	if v = a.step(t); v.Holding || !v.Expired {
		t.Errorf("after the deadline that the fence knows: %+v", v)
	}
}

func TestExtendSeesTheDeadlineFirst(t *testing.T) {
	var n *node
	early := false
	n = newNode(t, newShare(t, quickFS{}), "a", func(c *lease.Config) {
		c.Extend = func(_ context.Context, term uint64, at boottime.Instant) error {
			early = early || n.View().Deadline >= at || term != 1
			return nil
		}
	})
	n.hold(t)
	n.clock.Advance(time.Second)
	n.step(t)
	if early {
		t.Error("a deadline was reported before the fence had it")
	}
}

func TestReplacedHolderExpiresAtOnce(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	b.refresh(t)
	b.clock.Advance(ttl)
	b.hold(t)
	v := a.step(t) // on its own slow clock it still had time
	if v.Holding || !v.Expired || v.Record.Holder.Instance != "b" {
		t.Errorf("the replaced holder's view: %+v", v)
	}
	want(t, a.Acquire(testContext(t), nil), lease.ErrNotYet)
}
