package lease_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
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
		if op == fsx.OpLink { // refused without effect, which nobody can know, and then:
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
			if op == fsx.OpLink {
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
		if op == fsx.OpLink {
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

func TestReleaseToSuccessor(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b, c := newNode(t, share, "a"), newNode(t, share, "b"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.PutOrder(testContext(t), lease.Order{ID: "o", Kind: lease.OrderSwitchover, Term: 1}))
	must(t, a.Release(testContext(t), "b"))
	v := a.View()
	if v.Holding || v.Expired || !v.Record.Released || v.Record.Successor != "b" || v.Record.Order != nil {
		t.Errorf("after the release: %+v", v)
	}
	if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run file after the release: %v", err)
	}
	if v = a.step(t); v.Record.Version != 4 {
		t.Errorf("a released term was renewed: %+v", v.Record)
	}
	want(t, a.Acquire(testContext(t), nil), lease.ErrNotYet)
	c.refresh(t)
	want(t, c.Acquire(testContext(t), nil), lease.ErrNotYet)
	if v = b.refresh(t); v.ChallengeAt != 0 {
		t.Errorf("the successor has to wait until %d", v.ChallengeAt)
	}
	b.hold(t)
}

func TestSilentSuccessorIsReplacedAfterTTL(t *testing.T) {
	share := newShare(t, quickFS{})
	a, c := newNode(t, share, "a"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.Release(testContext(t), "b"))
	c.refresh(t)
	c.clock.Advance(ttl - 1)
	want(t, c.Acquire(testContext(t), nil), lease.ErrNotYet)
	c.clock.Advance(1)
	c.hold(t)
}

func TestReleaseToAnybody(t *testing.T) {
	share := newShare(t, quickFS{})
	a, c := newNode(t, share, "a"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.Release(testContext(t), ""))
	c.hold(t)
}

// Rule 10: once a release was sent, nothing but an own later swap makes the lease held again,
// whatever became of the release.
func TestReleaseOfUnknownOutcomeDoesNotHold(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	a.share.Hang()
	want(t, a.Release(shortly(t), "b"), lease.ErrUnknown)
	v := a.View()
	if v.Holding || !v.Unknown || len(a.Offered()) != 1 || !a.Offered()[0].Released {
		t.Errorf("while the release hangs: %+v, offered %+v", v, a.Offered())
	}
	if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run file after the release: %v", err)
	}
	// It has no effect yet. The register still names a as the holder; a does not go on.
	a.share.set(nil, nil)
	if v = a.step(t); v.Holding || !v.Unknown || v.Record.Version != 2 {
		t.Errorf("after a look: %+v", v)
	}
	// It takes effect late.
	a.share.Heal()
	eventually(t, "the release takes effect", func() bool { return b.refresh(t).Record.Released })
	if v = a.step(t); v.Holding || v.Unknown || len(a.Offered()) > 0 {
		t.Errorf("after the release took effect: %+v", v)
	}
	b.hold(t)
}

func TestReleaseSettlesItself(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	a.hold(t)
	a.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpLink {
			a.share.set(nil, nil)
			return syscall.EIO // without effect
		}
		return nil
	}, nil)
	must(t, a.Release(testContext(t), ""))
	if v := a.refresh(t); !v.Record.Released || v.Unknown || v.Holding {
		t.Errorf("after the release: %+v", v)
	}
}

func TestRelinquish(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	a.Relinquish()
	v := a.step(t)
	if v.Holding || v.Expired || v.Record.Version != 2 {
		t.Errorf("after relinquishing: %+v", v)
	}
	a.restart(t)
	want(t, a.Resume(testContext(t)), lease.ErrNotYet)
	b.refresh(t)
	b.clock.Advance(ttl)
	b.hold(t)
}

// What is under way when the lease is relinquished does not count when it ends.
func TestRelinquishDuringSwap(t *testing.T) {
	for _, op := range []string{"renew", "acquire"} {
		t.Run(op, func(t *testing.T) {
			a := newNode(t, newShare(t, quickFS{}), "a")
			a.refresh(t)
			if op == "renew" {
				a.hold(t)
			}
			a.share.set(func(op fsx.Op, _ string) error {
				if op == fsx.OpLink {
					a.Relinquish()
				}
				return nil
			}, nil)
			if op == "renew" {
				must(t, a.Step(testContext(t)))
			} else {
				want(t, a.Acquire(testContext(t), nil), lease.ErrNotHeld)
			}
			a.share.set(nil, nil)
			if v := a.step(t); v.Holding {
				t.Errorf("holding after relinquishing: %+v", v)
			}
			if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("run file is left: %v", err)
			}
		})
	}
}

func TestAcquireSettlesUnknownOutcome(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.refresh(t)
	// The reply is lost, and so is the look that would have shown it.
	lost := false
	a.share.set(func(op fsx.Op, _ string) error {
		if lost && op == fsx.OpOpen {
			lost = false
			return syscall.EIO
		}
		return nil
	}, func(op fsx.Op, _ string, err error) error {
		if op == fsx.OpLink {
			lost = true
			return syscall.EIO
		}
		return err
	})
	sent := a.clock.Now()
	must(t, a.Acquire(testContext(t), nil))
	v := a.View()
	if !v.Holding || v.Unknown || v.Record.Version != 2 || v.Deadline != sent.Add(ttl-margin) {
		t.Errorf("settled: %+v", v)
	}
}

// An acquisition that takes effect after its caller gave up is found and used by Run, through
// a swap of its own, and not before.
func TestLateAcquisitionIsClaimed(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	a.refresh(t)
	a.share.Hang()
	want(t, a.Acquire(shortly(t), nil), lease.ErrUnknown)
	if v := a.View(); v.Holding || !v.Unknown {
		t.Errorf("while it hangs: %+v", v)
	}
	a.clock.Advance(time.Minute)
	a.share.Heal()
	eventually(t, "the acquisition takes effect", func() bool { return mustLoad(t, mustOpen(t, share)).Term == 1 })
	v := a.refresh(t)
	if v.Holding || v.Unknown {
		t.Errorf("seeing it is not enough: %+v", v)
	}
	sent := a.clock.Now()
	if v = a.step(t); !v.Holding || v.Record.Version != 3 || v.Deadline != sent.Add(ttl-margin) {
		t.Errorf("claimed: %+v", v)
	}
}

// Rule 8: a commit is retried on a newer version only while what it was computed from holds.
func TestCommitBasis(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	first := a.hold(t).Record
	commit := func(basis lease.Record, edit func(*lease.Record)) (lease.Record, error) {
		return a.Commit(testContext(t), basis, edit)
	}
	h := headOf(1, 1)
	rec, err := commit(first, func(r *lease.Record) {
		r.Head = h
		r.Term, r.ClusterID, r.Released, r.Holder.Instance, r.Holder.Incarnation, r.TTL = 9, "x", true, "x", "x", 1
		r.Holder.VolumeID = "v2"
	})
	must(t, err)
	if got := a.refresh(t).Record; got.Head.ID != h.ID || got.Term != 1 || got.Released || got.Holder.Instance != "a" ||
		got.Holder.VolumeID != "v2" || time.Duration(got.TTL) != ttl || got.Version != rec.Version {
		t.Errorf("committed: %+v", got)
	}
	for _, c := range []struct {
		name string
		edit func(*lease.Record)
	}{
		{"head", func(r *lease.Record) { r.Head = nil }},
		{"other head", func(r *lease.Record) { r.Head.ID = "x" }},
		{"gcseq", func(r *lease.Record) { r.GCSeq++ }},
		{"term", func(r *lease.Record) { r.Term++ }},
		{"incarnation", func(r *lease.Record) { r.Holder.Incarnation = "x" }},
	} {
		basis := rec.Clone()
		c.edit(&basis)
		if _, err := commit(basis, func(r *lease.Record) { r.Head = headOf(1, 2) }); !errors.Is(err, lease.ErrStale) {
			t.Errorf("other %s: %v, want ErrStale", c.name, err)
		}
	}
	// Renewals and orders move the version, and do no harm.
	a.step(t)
	_, err = commit(rec, func(r *lease.Record) { r.GCSeq, r.Catalog = 1, "catalogs/1" })
	must(t, err)
	if _, err = commit(rec, func(r *lease.Record) { r.Head = headOf(1, 2) }); !errors.Is(err, lease.ErrStale) {
		t.Errorf("a snapshot computed before a condemnation: %v, want ErrStale", err)
	}
}

func TestCommitGoesOnAfterForeignOrder(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	basis := a.hold(t).Record
	must(t, b.PutOrder(testContext(t), lease.Order{ID: "o", Kind: lease.OrderSwitchover, Term: 1, To: "b"}))
	calls := 0
	rec, err := a.Commit(testContext(t), basis, func(r *lease.Record) { calls++; r.Head = headOf(1, 1) })
	must(t, err)
	if rec.Order == nil || rec.Order.ID != "o" || rec.Head == nil || rec.Version != 4 {
		t.Errorf("committed %+v after %d calls", rec, calls)
	}
}

func TestCommitOfUnknownOutcome(t *testing.T) {
	for _, c := range []struct {
		name     string
		effect   bool // of the swap whose reply is lost
		meddle   bool // another instance moves the version before the next look
		versions uint64
	}{
		{"took effect", true, false, 3},
		{"took effect and was built on", true, true, 4},
		{"had no effect", false, false, 3},
		{"had no effect and was overtaken", false, true, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			share := newShare(t, quickFS{})
			a, b := newNode(t, share, "a"), newNode(t, share, "b")
			basis := a.hold(t).Record
			h := headOf(1, 1)
			blind := false // the look after the link fails, so that it can't settle
			a.share.set(func(op fsx.Op, _ string) error {
				if blind && op == fsx.OpOpen {
					a.share.set(nil, nil)
					if c.meddle {
						must(t, b.SetPaused(testContext(t), true))
					}
					return syscall.EIO
				}
				if op == fsx.OpLink && !c.effect {
					blind = true
					return syscall.EIO
				}
				return nil
			}, func(op fsx.Op, _ string, err error) error {
				if op == fsx.OpLink && c.effect {
					blind = true
					return syscall.EIO
				}
				return err
			})
			rec, err := a.Commit(testContext(t), basis, func(r *lease.Record) { r.Head = h })
			must(t, err)
			got := a.refresh(t)
			if rec.Head == nil || rec.Head.ID != h.ID || got.Record.Version != c.versions || got.Unknown || !got.Holding {
				t.Errorf("committed %+v, register %+v", rec, got)
			}
		})
	}
}

// A commit that hangs is unknown; its names stay offered until a higher version is seen.
func TestHungCommitStaysOffered(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	basis := a.hold(t).Record
	h := headOf(1, 1)
	a.share.Hang()
	_, err := a.Commit(shortly(t), basis, func(r *lease.Record) { r.Head = h })
	want(t, err, lease.ErrUnknown)
	v := a.View()
	if !v.Unknown || !errors.Is(v.Err, lease.ErrUnknown) || len(a.Offered()) != 1 || a.Offered()[0].Head.ID != h.ID {
		t.Errorf("while it hangs: %+v, offered %+v", v, a.Offered())
	}
	// A look that shows the old version settles nothing.
	a.share.set(nil, nil)
	if v = a.refresh(t); !v.Unknown {
		t.Error("settled by an old version")
	}
	// The next renewal takes the number; now what hangs can't take effect any more.
	if v = a.step(t); v.Unknown || v.Record.Head != nil || !v.Holding || v.Err != nil {
		t.Errorf("after a renewal: %+v", v)
	}
	a.share.Heal()
	a.step(t)
	if v = a.step(t); v.Record.Head != nil {
		t.Errorf("the hung commit took effect after it was settled: %+v", v.Record)
	}
}

func TestResume(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*testing.T, *node)
		err  error
	}{
		{"same boot", func(*testing.T, *node) {}, nil},
		{"just in time", func(_ *testing.T, n *node) { n.clock.Advance(ttl - margin - 1) }, nil},
		{"deadline passed", func(_ *testing.T, n *node) { n.clock.Advance(ttl - margin) }, lease.ErrNotYet},
		{"other boot", func(_ *testing.T, n *node) { n.cfg.BootID = "another" }, lease.ErrNotYet},
		{"other name", func(_ *testing.T, n *node) { n.cfg.Self.Instance = "z" }, lease.ErrNotYet},
		{"released, but the run file is still there", func(t *testing.T, n *node) {
			b, err := os.ReadFile(n.cfg.RunFile)
			must(t, err)
			must(t, n.Release(testContext(t), "a"))
			must(t, os.WriteFile(n.cfg.RunFile, b, 0o600))
		}, lease.ErrNotYet},
		{"other term", func(t *testing.T, n *node) { changeRunFile(t, n, `"term":1`, `"term":2`) }, lease.ErrNotYet},
		{"other incarnation", func(t *testing.T, n *node) { changeRunFile(t, n, n.Incarnation(), "x") }, lease.ErrNotYet},
		{"other cluster", func(t *testing.T, n *node) { changeRunFile(t, n, `"cluster_id":"`, `"cluster_id":"x`) }, lease.ErrNotYet},
		{"no run file", func(t *testing.T, n *node) { must(t, os.Remove(n.cfg.RunFile)) }, lease.ErrNotYet},
		{"run file damaged", func(t *testing.T, n *node) { must(t, os.WriteFile(n.cfg.RunFile, []byte("{"), 0o600)) }, lease.ErrNotYet},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, newShare(t, quickFS{}), "a")
			old := n.hold(t)
			c.edit(t, n)
			n.cfg.Self.Address = "new:1"
			n.restart(t)
			sent := n.clock.Now()
			err := n.Resume(testContext(t))
			v := n.View()
			if c.err != nil {
				want(t, err, c.err)
				if v.Holding {
					t.Errorf("holding: %+v", v)
				}
				return
			}
			must(t, err)
			if !v.Holding || v.Record.Term != 1 || v.Record.Holder.Incarnation != n.Incarnation() || v.Record.Holder.Incarnation == old.Record.Holder.Incarnation ||
				v.Record.Holder.VolumeID != "vol-a" || v.Record.Holder.Address != "new:1" || v.Deadline != sent.Add(ttl-margin) {
				t.Errorf("resumed: %+v", v)
			}
			n.restart(t) // and once more
			must(t, n.Resume(testContext(t)))
		})
	}
}

func changeRunFile(t *testing.T, n *node, from, to string) {
	t.Helper()
	b, err := os.ReadFile(n.cfg.RunFile)
	must(t, err)
	changed := strings.Replace(string(b), from, to, 1)
	if changed == string(b) {
		t.Fatalf("no %s in %s", from, b)
	}
	must(t, os.WriteFile(n.cfg.RunFile, []byte(changed), 0o600))
}

func TestResumeOfEndedTerm(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	b.refresh(t)
	b.clock.Advance(ttl) // b's clock runs far ahead, which nothing but this test's power allows
	b.hold(t)
	a.restart(t)
	want(t, a.Resume(testContext(t)), lease.ErrNotYet)
	if v := a.View(); v.Holding || v.Record.Holder.Instance != "b" {
		t.Errorf("view: %+v", v)
	}
}

// The TTL in the record may shrink only when the fence's deadline has followed: a challenger
// waits for what is written, and the fence of the earlier start still runs on the old TTL.
func TestShorterTTLAfterRestart(t *testing.T) {
	share := newShare(t, quickFS{})
	long := func(c *lease.Config) { c.TTL = time.Minute }
	a, b := newNode(t, share, "a", long), newNode(t, share, "b")
	armed := a.hold(t).Deadline
	a.cfg.TTL = ttl
	a.restart(t)
	ctx, cancel := context.WithCancel(testContext(t))
	a.share.set(nil, func(op fsx.Op, _ string, err error) error {
		if op == fsx.OpLink {
			cancel() // the agent dies here, with the container running until the old deadline
		}
		return err
	})
	if err := a.Resume(ctx); err == nil {
		t.Fatal("resumed")
	}
	a.share.set(nil, nil)
	eventually(t, "the resumption takes effect", func() bool { return b.refresh(t).Record.Version == 3 })
	v := b.View()
	if waits := v.ChallengeAt.Sub(v.SeenSince); waits < armed.Sub(a.clock.Now()) {
		t.Errorf("a challenger waits %s, the old database lives for %s", waits, armed.Sub(a.clock.Now()))
	}
}

func TestResumeTakesTheShorterTTL(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a", func(c *lease.Config) { c.TTL = time.Minute })
	a.hold(t)
	a.cfg.TTL = ttl
	a.restart(t)
	must(t, a.Resume(testContext(t)))
	v := a.View()
	if time.Duration(v.Record.TTL) != time.Minute || v.Deadline != a.clock.Now().Add(ttl-margin) {
		t.Errorf("resumed: ttl %s, deadline in %s", time.Duration(v.Record.TTL), v.Deadline.Sub(a.clock.Now()))
	}
	if v = a.step(t); time.Duration(v.Record.TTL) != ttl {
		t.Errorf("renewed: ttl %s", time.Duration(v.Record.TTL))
	}
}

func TestOrderAndPauseKeepTheHolder(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b", func(c *lease.Config) { c.TTL = time.Minute })
	a.hold(t)
	deadline := a.View().Deadline
	a.clock.Advance(time.Second)
	must(t, b.PutOrder(testContext(t), lease.Order{ID: "o1", Kind: lease.OrderSwitchover, Term: 1, To: "b"}))
	must(t, b.SetPaused(testContext(t), true))
	v := a.refresh(t)
	r := v.Record
	if !v.Holding || v.Deadline != deadline || r.Term != 1 || r.Holder.Instance != "a" || time.Duration(r.TTL) != ttl || r.By != b.Incarnation() {
		t.Errorf("holder's view: %+v", v)
	}
	if r.Order == nil || r.Order.To != "b" || !r.Paused {
		t.Errorf("record: %+v", r)
	}
	// The holder's own order neither extends anything.
	must(t, a.SetPaused(testContext(t), false))
	if v = a.View(); v.Deadline != deadline || v.Record.Paused {
		t.Errorf("after its own change: %+v", v)
	}
	// The holder renews on the version that somebody else wrote.
	if v = a.step(t); !v.Holding || v.Record.Order == nil {
		t.Errorf("after the renewal: %+v", v)
	}
	want(t, b.PutOrder(testContext(t), lease.Order{ID: "o2", Term: 2}), lease.ErrStale)
	must(t, a.Release(testContext(t), ""))
	want(t, b.PutOrder(testContext(t), lease.Order{ID: "o3", Term: 1}), lease.ErrStale)
}

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

func TestRandomnessFails(t *testing.T) {
	cfg := newNode(t, newShare(t, quickFS{}), "a").cfg
	cfg.RunFile, cfg.Rand = "", strings.NewReader("short")
	_, err := lease.New(cfg)
	want(t, err, io.ErrUnexpectedEOF)
}
