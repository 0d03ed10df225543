package lease_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
)

// A record was certainly not made before View.MadeAfter, whatever the looks and swaps in
// between were, and that moment is not further away than two looks and two versions.
func TestMadeAfter(t *testing.T) {
	share := newShare(t, quickFS{})
	made := map[uint64]boottime.Instant{} // version -> when, on the reader's clock
	var reader *node
	slow := func() {} // between the making of a record and its swap
	p := newNode(t, share, "p", func(c *lease.Config) {
		c.Vouch = func(next *lease.Record) {
			made[next.Version+1] = reader.clock.Now()
			next.HeadAge = lease.Duration(time.Second)
			slow()
		}
	})
	reader = newNode(t, share, "r")
	reader.clock.Advance(1000 * time.Hour) // its clock has nothing to do with the other one
	p.hold(t)
	rnd := rand.New(rand.NewPCG(7, 7))
	advance := func(d time.Duration) { p.clock.Advance(d); reader.clock.Advance(d) }
	slow = func() {
		if rnd.IntN(3) == 0 {
			advance(time.Duration(rnd.IntN(300)) * time.Millisecond)
			reader.refresh(t)
		}
	}
	renewed, looked := 0*time.Second, 0*time.Second
	known, most := 0, time.Duration(0)
	for range 2000 {
		d := time.Duration(rnd.IntN(400)) * time.Millisecond
		advance(d)
		renewed, looked = renewed+d, looked+d
		if renewed > 1500*time.Millisecond || rnd.IntN(4) == 0 {
			p.step(t)
			renewed = 0
		}
		if looked > 1500*time.Millisecond || rnd.IntN(3) == 0 {
			v := reader.refresh(t)
			looked = 0
			at, ok := made[v.Record.Version]
			if v.MadeAfter == 0 || !ok {
				continue
			}
			known++
			if v.MadeAfter > at {
				t.Fatalf("version %d was made %s before it can have been", v.Record.Version, v.MadeAfter.Sub(at))
			}
			most = max(most, at.Sub(v.MadeAfter))
		}
	}
	if known < 500 || most > 6*time.Second {
		t.Errorf("known %d times, at most %s before", known, most)
	}
	t.Logf("known %d times, at most %s before", known, most)
}

// What a holder vouches for is in the records that it makes at that moment, and in no others.
func TestVouch(t *testing.T) {
	share := newShare(t, quickFS{})
	p := newNode(t, share, "p", func(c *lease.Config) {
		c.Vouch = func(next *lease.Record) { next.HeadAge = lease.Duration(5 * time.Second) }
	})
	other := newNode(t, share, "o")
	see := func(what string, want time.Duration) {
		t.Helper()
		if got := time.Duration(other.refresh(t).Record.HeadAge); got != want {
			t.Errorf("after %s: %s, want %s", what, got, want)
		}
	}
	p.hold(t)
	see("the acquisition", 0)
	p.step(t)
	see("a renewal", 5*time.Second)
	_, err := p.Commit(testContext(t), p.View().Record, func(r *lease.Record) { r.Head = headOf(1, 1) })
	must(t, err)
	see("a commit that says nothing of its head", 0)
	_, err = p.Commit(testContext(t), p.View().Record, func(r *lease.Record) { r.Head, r.HeadAge = headOf(1, 2), lease.Duration(time.Second) })
	must(t, err)
	see("a commit", time.Second)
	p.step(t)
	see("another renewal", 5*time.Second)
	must(t, other.SetPaused(testContext(t), true))
	see("somebody else's record", 0)
	p.step(t)
	see("another renewal", 5*time.Second)
	must(t, p.Release(testContext(t), ""))
	see("the release", 0)
}
