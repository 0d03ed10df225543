package nfs_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	volsync "dbsupervisor/internal/sync"
)

// shortTTL is how long a survivor waits; it is more than any outage in these tests, so that a
// lease outlives those.
const shortTTL = 40 * time.Second

// cluster is two guests with a cluster, of which the first holds the lease.
type cluster struct {
	t *testing.T
	s *server
	a *guest
	b *guest
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	p := build(t)
	s := newServer(t)
	gs := startGuests(t, p, s, "alpha", "beta")
	id := ask[string](gs[0], "Init", shortTTL)
	both[None](gs, "Open", func(i int) any { return Member{Name: gs[i].name, ClusterID: id, TTL: shortTTL} })
	c := &cluster{t: t, s: s, a: gs[0], b: gs[1]}
	if term := ask[uint64](c.a, "Acquire", time.Minute); term != 1 {
		t.Fatalf("acquired term %d", term)
	}
	ask[None](c.a, "Live", None{})
	ask[None](c.a, "Fill", Fill{Seed: 1, Files: 40, Size: 100_000})
	return c
}

// packs are the packs that the server has, by name, with their sizes.
func (c *cluster) packs() map[string]int64 {
	c.t.Helper()
	names, err := filepath.Glob(filepath.Join(c.s.share, "cluster", "packs", "*", "*.pack"))
	must(c.t, err)
	sizes := map[string]int64{}
	for _, n := range names {
		if st, err := os.Stat(n); err == nil {
			sizes[n] = st.Size()
		}
	}
	return sizes
}

// publishing begins to publish something large and returns in the middle of it, when a part
// of a new pack has reached the server. done gets the result.
func (c *cluster) publishing(seed byte) (done chan error, ref *volsync.SnapshotRef) {
	c.t.Helper()
	before := c.packs()
	ask[None](c.a, "Fill", Fill{Seed: seed, Files: 16, Size: 2 << 20})
	done, ref = make(chan error, 1), new(volsync.SnapshotRef)
	go func() { done <- c.a.try("Publish", None{}, ref) }()
	eventually(c.t, "a part of a pack is there", time.Minute, func() bool {
		for name, size := range c.packs() {
			if _, old := before[name]; !old && size > 0 {
				return true
			}
		}
		return false
	})
	if len(done) > 0 {
		c.t.Fatalf("published before it could be disturbed (%v): this test shows nothing", <-done)
	}
	return done, ref
}

// same brings the second guest to the head and compares the two volumes.
func (c *cluster) same(want volsync.SnapshotRef) {
	c.t.Helper()
	if got := ask[volsync.SnapshotRef](c.b, "Follow", None{}); got.ID != want.ID || want.ID == "" {
		c.t.Fatalf("the head is %q, published was %q", got.ID, want.ID)
	}
	sameTree(c.t, ask[[]string](c.a, "Digest", None{}), ask[[]string](c.b, "Digest", None{}))
}

func sameTree(t *testing.T, want, got []string) {
	t.Helper()
	if len(want) < 40 {
		t.Fatalf("only %d names: this shows nothing", len(want))
	}
	if slices.Equal(want, got) {
		return
	}
	t.Errorf("trees of %d and %d names differ", len(want), len(got))
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("missing: %s", l)
		}
	}
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("unwanted: %s", l)
		}
	}
}

func (c *cluster) verify(g *guest, snapshots int) {
	c.t.Helper()
	v := ask[Verdict](g, "Verify", None{})
	if len(v.Problems) > 0 || v.Snapshots != snapshots || v.Packs == 0 {
		c.t.Errorf("verify: %+v, want %d snapshots without a problem", v, snapshots)
	}
}

// TestStore: what one guest publishes the other restores, also when the server stands still,
// crashes or loses the publisher in the middle.
func TestStore(t *testing.T) {
	c := newCluster(t)
	step := func(name string, f func()) {
		t.Helper()
		begin := time.Now()
		f()
		t.Logf("%s: %.1f s", name, time.Since(begin).Seconds())
	}
	var last volsync.SnapshotRef
	step("publish and restore", func() {
		c.same(ask[volsync.SnapshotRef](c.a, "Publish", None{}))
		ask[None](c.a, "Fill", Fill{Seed: 2, Files: 10, Size: 50_000})
		c.same(ask[volsync.SnapshotRef](c.a, "Publish", None{}))
	})
	step("the server stands still for 6 s", func() {
		done, ref := c.publishing(3)
		c.s.pause(t)
		time.Sleep(6 * time.Second)
		if len(done) > 0 {
			t.Error("published without a server")
		}
		c.s.resume(t)
		must(t, <-done)
		c.same(*ref)
	})
	step("the server crashes and comes back after 3 s", func() {
		done, ref := c.publishing(4)
		c.s.kill()
		time.Sleep(3 * time.Second)
		if len(done) > 0 {
			t.Error("published without a server")
		}
		c.s.start(t)
		must(t, <-done)
		c.same(*ref)
		last = *ref
	})
	c.verify(c.b, 4)
	committed := ask[[]string](c.b, "Digest", None{})
	packs := len(c.packs())
	step("the publisher dies, the other one takes over", func() {
		done, _ := c.publishing(5)
		c.a.kill()
		if err := <-done; err == nil {
			t.Fatal("published before it was killed: this test shows nothing")
		}
		begin := time.Now()
		if term := ask[uint64](c.b, "Acquire", 3*shortTTL); term != 2 {
			t.Errorf("took over in term %d", term)
		}
		if waited := time.Since(begin); waited < shortTTL/2 {
			t.Errorf("took over after %v only", waited)
		}
		if head := ask[volsync.SnapshotRef](c.b, "Follow", None{}); head.ID != last.ID {
			t.Errorf("the head is %s, the last one published was %s", head.ID, last.ID)
		}
		sameTree(t, committed, ask[[]string](c.b, "Digest", None{}))
		c.verify(c.b, 4)
	})
	step("the survivor publishes and cleans", func() {
		if n := len(c.packs()); n <= packs {
			t.Errorf("the dead one left no pack behind (%d, %d)", n, packs)
		}
		ask[None](c.b, "Live", None{})
		ask[None](c.b, "Fill", Fill{Seed: 6, Files: 5, Size: 50_000})
		ask[volsync.SnapshotRef](c.b, "Publish", None{})
		if n := ask[int](c.b, "Clean", None{}); n < 1 {
			t.Errorf("%d files were cleaned away", n)
		}
		if n := len(c.packs()); n != packs+1 {
			t.Errorf("%d packs are left, want %d", n, packs+1)
		}
		c.verify(c.b, 5)
	})
}

// TestOutage: two guests contend while the server stands still, and while it crashes.
func TestOutage(t *testing.T) {
	p := build(t)
	s := newServer(t)
	gs := startGuests(t, p, s, "alpha", "beta")
	f := newFight(t, gs, ask[string](gs[0], "Init", longTTL))
	disturbed := func(away func(), back func()) {
		t.Helper()
		over := make(chan struct{})
		go func() {
			defer close(over)
			f.round("Fight", 8)
		}()
		time.Sleep(500 * time.Millisecond)
		away()
		time.Sleep(3 * time.Second)
		select {
		case <-over:
			t.Error("the round ended without a server: this test shows nothing")
		default:
		}
		back()
		<-over
	}
	for range 2 {
		disturbed(func() { s.pause(t) }, func() { s.resume(t) })
		disturbed(s.kill, func() { s.start(t) })
	}
	f.check()
}
