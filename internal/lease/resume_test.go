package lease_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

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
		if op == fsx.OpSymlink {
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
