package lease_test

import (
	"errors"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

func TestAcquireSettlesUnknownOutcome(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.refresh(t)
	// The reply is lost, and so is the look that would have shown it.
	lost := false
	a.share.set(func(op fsx.Op, _ string) error {
		if lost && op == fsx.OpFollow {
			lost = false
			return syscall.EIO
		}
		return nil
	}, func(op fsx.Op, _ string, err error) error {
		if op == fsx.OpSymlink {
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
				if blind && op == fsx.OpStat {
					a.share.set(nil, nil)
					if c.meddle {
						must(t, b.SetPaused(testContext(t), true))
					}
					return syscall.EIO
				}
				if op == fsx.OpSymlink && !c.effect {
					blind = true
					return syscall.EIO
				}
				return nil
			}, func(op fsx.Op, _ string, err error) error {
				if op == fsx.OpSymlink && c.effect {
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

// An unchanged version settles nothing: the same number is offered again, and neither attempt
// is taken for lost before a higher version is seen.
func TestAcquireOffersAgain(t *testing.T) {
	a := newNode(t, newShare(t, quickFS{}), "a")
	a.refresh(t)
	fails := 2
	a.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink && fails > 0 {
			fails--
			return syscall.EIO // without effect
		}
		return nil
	}, nil)
	sent := a.clock.Now()
	must(t, a.Acquire(testContext(t), nil))
	if v := a.View(); !v.Holding || v.Unknown || v.Record.Version != 2 || v.Deadline != sent.Add(ttl-margin) {
		t.Errorf("acquired: %+v", v)
	}
	// If it can't be settled, it is unknown, never a conflict.
	b := newNode(t, newShare(t, quickFS{}), "b")
	b.refresh(t)
	b.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink {
			return syscall.EIO
		}
		return nil
	}, nil)
	err := b.Acquire(testContext(t), nil)
	want(t, err, lease.ErrUnknown)
	if errors.Is(err, lease.ErrConflict) {
		t.Errorf("both unknown and a conflict: %v", err)
	}
	if v := b.View(); v.Holding || !v.Unknown {
		t.Errorf("unknown: %+v", v)
	}
}
