package lease_test

import (
	"slices"
	"testing"
	"time"

	"dbsupervisor/internal/lease"
)

// lose lets the holder fall silent and n take over; it returns what n then knows.
func (n *node) lose(t *testing.T) lease.View {
	t.Helper()
	n.refresh(t)
	n.clock.Advance(ttl)
	return n.hold(t)
}

func TestFailoversAreCounted(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	own := func(n *node) func(*lease.Record) {
		return func(r *lease.Record) { r.Holder.VolumeID = "vol-" + n.cfg.Self.Instance }
	}
	if v := a.hold(t); v.Failovers != 0 {
		t.Errorf("the first term counts as a failover: %+v", v.Record.Failovers)
	}
	if v := b.lose(t); v.Failovers != 1 {
		t.Errorf("a takeover from a silent holder is not counted: %+v", v.Record)
	}
	// The same instance goes on with its own volume: no failover.
	b.Relinquish()
	b.refresh(t)
	b.clock.Advance(ttl)
	must(t, b.Acquire(testContext(t), own(b)))
	if v := b.View(); v.Failovers != 1 || v.Record.Term != 3 {
		t.Errorf("going on counts as a failover: %+v", v.Record)
	}
	// Nor what a person asked for, by an order or before a release.
	a.refresh(t)
	must(t, a.PutOrder(testContext(t), lease.Order{ID: "o", Kind: lease.OrderFailover, Term: 3, To: "a"}))
	if v := a.lose(t); v.Failovers != 1 || v.Record.Term != 4 {
		t.Errorf("a failover that was ordered is counted: %+v", v.Record)
	}
	must(t, a.HandOver(testContext(t), "b"))
	if v := b.hold(t); v.Failovers != 1 || v.Record.Term != 5 {
		t.Errorf("a handoff is counted: %+v", v.Record)
	}
	// But a release that the holder decided on by itself is.
	must(t, b.MoveAway(testContext(t), "a", true))
	if v := a.hold(t); v.Failovers != 2 || !v.Record.Inherited {
		t.Errorf("a holder that gives up is not counted once: %+v", v.Record)
	}
	b.refresh(t)
	must(t, b.SetPaused(testContext(t), false))
	if v := b.View(); v.Failovers != 0 {
		t.Errorf("remembered after a person said resume: %+v", v.Record)
	}
}

// An order for another instance, or of another term, is no permission.
func TestFailoverForSomebodyElseIsNotAsked(t *testing.T) {
	r := lease.Record{Term: 3, Order: &lease.Order{Kind: lease.OrderFailover, Term: 3, To: "b"}}
	if !r.Asked("b") || r.Asked("c") {
		t.Error("an order for b must allow b and nobody else")
	}
	r.Order.To = ""
	if !r.Asked("c") {
		t.Error("an order for anybody must allow c")
	}
	r.Term = 4
	if r.Asked("c") {
		t.Error("an order of an earlier term allows nothing")
	}
	r.Term, r.Order.Kind = 3, lease.OrderRollback
	if r.Asked("c") {
		t.Error("a rollback is no failover")
	}
}

// The ages are counted on the clocks of those who look and write, however often the register
// changes hands, and never as more than what has passed.
func TestFailoversGrowOld(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	b.clock.Advance(500 * time.Hour) // the two clocks have nothing in common
	b.lose(t)
	for range 10 {
		b.clock.Advance(7 * time.Second)
		b.step(t)
	}
	if got := b.View().Record.Failovers; !slices.Equal(got, []lease.Duration{lease.Duration(70 * time.Second)}) {
		t.Errorf("after 70 s of renewals the failover is %v old", got)
	}
	// Seen, and watched for a TTL, by the next one.
	a.refresh(t)
	a.clock.Advance(30 * time.Second)
	a.hold(t)
	if got := a.View().Record.Failovers; !slices.Equal(got, []lease.Duration{lease.Duration(100 * time.Second), 0}) {
		t.Errorf("after the next failover: %v", got)
	}
	// Both are forgotten an hour after they happened, without any writing too.
	a.clock.Advance(time.Hour - 100*time.Second - time.Millisecond)
	if v := a.View(); v.Failovers != 2 {
		t.Errorf("forgotten too early: %d", v.Failovers)
	}
	a.clock.Advance(time.Millisecond)
	if v := a.View(); v.Failovers != 1 {
		t.Errorf("one of two is an hour old, %d are known", v.Failovers)
	}
	a.clock.Advance(100 * time.Second)
	if v := a.View(); v.Failovers != 0 {
		t.Errorf("both are an hour old, %d are known", v.Failovers)
	}
	// An instance that comes later has seen none of that time: it believes the record.
	c := newNode(t, share, "c")
	if v := c.refresh(t); v.Failovers != 2 {
		t.Errorf("time in which nobody looked was counted: %d known", v.Failovers)
	}
}

func TestFailoversAreBounded(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	for range lease.MostFailovers {
		b.lose(t)
		a.lose(t)
	}
	if n := len(a.View().Record.Failovers); n != lease.MostFailovers {
		t.Errorf("%d failovers in the record, want the newest %d", n, lease.MostFailovers)
	}
}

// A person knows that the holder's machine is gone: the one that is named need not wait.
func TestTerminatedHolderIsNotWaitedFor(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b, c := newNode(t, share, "a"), newNode(t, share, "b"), newNode(t, share, "c")
	a.hold(t)
	b.refresh(t)
	order := lease.Order{ID: "o", Kind: lease.OrderFailover, Term: 1, To: "b"}
	must(t, b.PutOrder(testContext(t), order))
	want(t, b.Acquire(testContext(t), nil), lease.ErrNotYet)
	order.ID, order.Terminated = "p", true
	must(t, b.PutOrder(testContext(t), order))
	c.refresh(t)
	want(t, c.Acquire(testContext(t), nil), lease.ErrNotYet)
	b.hold(t)
	if v := a.step(t); v.Holding || !v.Expired {
		t.Errorf("the old holder was there after all and goes on: %+v", v)
	}
}
