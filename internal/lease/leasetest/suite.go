// Package leasetest is the contract that every backend of the register must keep. A backend
// runs it from its own tests.
package leasetest

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"dbsupervisor/internal/lease"
)

// patience bounds operations that are expected to succeed.
const patience = 20 * time.Second

// Backend is one new register that holds just its first record.
type Backend struct {
	ClusterID string
	// Open returns a handle of its own, as another instance would have.
	Open func(t *testing.T) lease.Register
	// Faulty returns a handle of its own whose requests can be made to fail; nil if the
	// backend has no way of doing so, which skips the tests that need it.
	Faulty func(t *testing.T) (lease.Register, Faults)
}

// Faults are what can go wrong between an instance and the register.
type Faults interface {
	// LoseReply lets the next swap take effect but answers it with an error.
	LoseReply()
	// RepeatRequest lets the next swap take effect and then sends the request once more,
	// as a client without a reply does; the answer is that of the second one.
	RepeatRequest()
	// Hang lets the next swap hang directly before it takes effect, for ever, until Heal
	// is called.
	Hang()
	// HangAll lets every request hang until Heal is called.
	HangAll()
	// Heal ends all faults; what hung is then executed.
	Heal()
}

// RunRegister runs the contract. factory makes a new register for each test.
func RunRegister(t *testing.T, factory func(t *testing.T) Backend) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, Backend)
	}{
		{"first record", testFirst},
		{"swap", testSwap},
		{"every field survives", testFields},
		{"stale version conflicts", testStale},
		{"other nonce never wins", testOtherNonce},
		{"never loaded is refused", testNeverLoaded},
		{"other cluster is refused", testOtherCluster},
		{"one winner", testOneWinner},
		{"no update is lost", testNoLostUpdate},
		{"ended context", testEndedContext},
		{"sleeper loses", testSleeper},
		{"lost reply", testLostReply},
		{"repeated request", testRepeated},
		{"hung swap", testHungSwap},
		{"hung register", testHungAll},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, factory(t)) })
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func mustLoad(t *testing.T, r lease.Register) lease.Record {
	t.Helper()
	rec, err := r.Load(testContext(t))
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return rec
}

func mustSwap(t *testing.T, r lease.Register, prev, next lease.Record) lease.Record {
	t.Helper()
	rec, err := r.CompareAndSwap(testContext(t), prev, next)
	if err != nil {
		t.Fatalf("swap of version %d: %v", prev.Version, err)
	}
	return rec
}

// step is a change that every swap may do: one more on a counter.
func step(rec lease.Record) lease.Record {
	rec = rec.Clone()
	rec.CleanSeq++
	return rec
}

func testFirst(t *testing.T, b Backend) {
	a, c := mustLoad(t, b.Open(t)), mustLoad(t, b.Open(t))
	if a.Version != 1 || a.Nonce == "" || a.ClusterID != b.ClusterID || a.Format != lease.RecordFormat {
		t.Errorf("first record is %+v", a)
	}
	if !reflect.DeepEqual(a, c) {
		t.Errorf("two handles read %+v and %+v", a, c)
	}
	if b.Open(t).Describe() == "" {
		t.Error("Describe says nothing")
	}
}

func testSwap(t *testing.T, b Backend) {
	r, other := b.Open(t), b.Open(t)
	prev := mustLoad(t, r)
	seen := map[string]bool{prev.Nonce: true}
	for range 5 {
		next := step(prev)
		next.Version, next.Nonce, next.Format = 99, prev.Nonce, 99 // not the caller's to set
		rec := mustSwap(t, r, prev, next)
		if rec.Version != prev.Version+1 || rec.Format != lease.RecordFormat || rec.CleanSeq != prev.CleanSeq+1 {
			t.Fatalf("after version %d swap returned %+v", prev.Version, rec)
		}
		if rec.Nonce == "" || seen[rec.Nonce] {
			t.Fatalf("nonce %q is not fresh", rec.Nonce)
		}
		seen[rec.Nonce] = true
		if got := mustLoad(t, other); !reflect.DeepEqual(got, rec) {
			t.Fatalf("another handle reads\n%+v, written was\n%+v", got, rec)
		}
		prev = rec
	}
}

func testFields(t *testing.T, b Backend) {
	r := b.Open(t)
	prev := mustLoad(t, r)
	now := time.Date(2031, 5, 6, 7, 8, 9, 123456789, time.FixedZone("x", 3600))
	want := lease.Record{
		ClusterID: prev.ClusterID, Term: 7,
		Holder: lease.Holder{Instance: "a", Incarnation: "b", VolumeID: "c", Address: "d:1", HTTP: "e:2", Zone: "f"},
		TTL:    lease.Duration(1500 * time.Millisecond),
		Head:   &lease.Head{ID: "7-3-x", Manifest: "manifests/7-3-x", Hash: "00ff", Term: 7, Seq: 3, Frozen: now},
		GCSeq:  4, Catalog: "catalogs/1", CatalogHash: "ab", ImageDigest: "sha256:1",
		Released: true, Complete: true, Inherited: true, Successor: "g", Paused: true,
		Answer:   &lease.Answer{Order: "p", Error: "q", Hint: "r"},
		Order:    &lease.Order{ID: "o", Kind: lease.OrderRollback, Term: 7, To: "h", Snapshot: "s", Terminated: true},
		CleanSeq: 1<<64 - 1, HeadAge: lease.Duration(time.Second), By: "i", Wall: now,
		Failovers: []lease.Duration{lease.Duration(time.Hour - time.Millisecond), 0},
	}
	for f := range reflect.ValueOf(want).NumField() {
		name := reflect.TypeOf(want).Field(f).Name
		if reflect.ValueOf(want).Field(f).IsZero() && name != "Format" && name != "Version" && name != "Nonce" {
			t.Fatalf("this test does not set the field %s", name)
		}
	}
	got := mustSwap(t, r, prev, want)
	loaded := mustLoad(t, b.Open(t))
	if !reflect.DeepEqual(got, loaded) {
		t.Errorf("returned %+v, loaded %+v", got, loaded)
	}
	want.Format, want.Version, want.Nonce = lease.RecordFormat, 2, loaded.Nonce
	if !loaded.Wall.Equal(want.Wall) || !loaded.Head.Frozen.Equal(now) {
		t.Errorf("times are %v and %v, want %v", loaded.Wall, loaded.Head.Frozen, now)
	}
	want.Wall, want.Head.Frozen = loaded.Wall, loaded.Head.Frozen
	if !reflect.DeepEqual(loaded, want) {
		t.Errorf("loaded\n%+v, want\n%+v", loaded, want)
	}
}

func testStale(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	rec := mustSwap(t, r, mustSwap(t, r, first, step(first)), step(first))
	if _, err := b.Open(t).CompareAndSwap(testContext(t), first, step(first)); !errors.Is(err, lease.ErrConflict) {
		t.Errorf("swap of a stale version: %v, want ErrConflict", err)
	}
	if got := mustLoad(t, r); got.Nonce != rec.Nonce {
		t.Errorf("register changed to %+v", got)
	}
}

func testOtherNonce(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	forged := first
	forged.Nonce = "another"
	if _, err := r.CompareAndSwap(testContext(t), forged, step(first)); err == nil || errors.Is(err, lease.ErrUnknown) {
		t.Errorf("swap with another nonce: %v", err)
	}
	if got := mustLoad(t, r); !reflect.DeepEqual(got, first) {
		t.Errorf("register changed to %+v", got)
	}
}

func testNeverLoaded(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	_, err := r.CompareAndSwap(testContext(t), lease.Record{ClusterID: b.ClusterID}, step(first))
	if err == nil || errors.Is(err, lease.ErrUnknown) {
		t.Errorf("swap of a record that was never loaded: %v", err)
	}
}

func testOtherCluster(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	next := step(first)
	next.ClusterID = "another"
	if _, err := r.CompareAndSwap(testContext(t), first, next); !errors.Is(err, lease.ErrWrongCluster) {
		t.Errorf("swap to another cluster id: %v, want ErrWrongCluster", err)
	}
}

func testOneWinner(t *testing.T, b Backend) {
	const contenders = 8
	regs := make([]lease.Register, contenders)
	for i := range regs {
		regs[i] = b.Open(t)
	}
	ctx := testContext(t)
	for range 5 {
		prev := mustLoad(t, regs[0])
		errs, recs := make([]error, contenders), make([]lease.Record, contenders)
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i, r := range regs {
			wg.Go(func() {
				<-start
				recs[i], errs[i] = r.CompareAndSwap(ctx, prev, step(prev))
			})
		}
		close(start)
		wg.Wait()
		winners, now := 0, mustLoad(t, regs[0])
		for i, err := range errs {
			switch {
			case err == nil:
				winners++
				if now.Nonce != recs[i].Nonce {
					t.Errorf("contender %d won, but the register holds another record", i)
				}
			case !errors.Is(err, lease.ErrConflict):
				t.Errorf("contender %d: %v, want ErrConflict", i, err)
			}
		}
		if winners != 1 {
			t.Errorf("%d winners", winners)
		}
	}
}

func testNoLostUpdate(t *testing.T, b Backend) {
	const contenders, each = 4, 8
	ctx := testContext(t)
	var wg sync.WaitGroup
	for range contenders {
		r := b.Open(t)
		wg.Go(func() {
			for done := 0; done < each; {
				prev, err := r.Load(ctx)
				if err == nil {
					_, err = r.CompareAndSwap(ctx, prev, step(prev))
				}
				if err == nil {
					done++
				} else if !errors.Is(err, lease.ErrConflict) {
					t.Errorf("update: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	if got := mustLoad(t, b.Open(t)); got.CleanSeq != contenders*each || got.Version != 1+contenders*each {
		t.Errorf("after %d updates the counter is %d, the version %d", contenders*each, got.CleanSeq, got.Version)
	}
}

func testEndedContext(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Load(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("load: %v, want the context's error", err)
	}
	if _, err := r.CompareAndSwap(ctx, first, step(first)); err == nil || errors.Is(err, lease.ErrConflict) {
		t.Errorf("swap: %v", err)
	}
}

// testSleeper: whoever wakes up after its version was forgotten must not win.
func testSleeper(t *testing.T, b Backend) {
	r := b.Open(t)
	first := mustLoad(t, r)
	rec := first
	for range 80 {
		rec = mustSwap(t, r, rec, step(rec))
	}
	if p, ok := r.(interface{ Prune(context.Context) error }); ok {
		if err := p.Prune(testContext(t)); err != nil {
			t.Fatalf("prune: %v", err)
		}
	}
	if _, err := b.Open(t).CompareAndSwap(testContext(t), first, step(first)); err == nil {
		t.Error("a swap of a forgotten version succeeded")
	}
	if got := mustLoad(t, b.Open(t)); !reflect.DeepEqual(got, rec) {
		t.Errorf("newest is %+v, want %+v", got, rec)
	}
}

func faulty(t *testing.T, b Backend) (lease.Register, Faults) {
	t.Helper()
	if b.Faulty == nil {
		t.Skip("this backend has no faults to inject")
	}
	r, f := b.Faulty(t)
	t.Cleanup(f.Heal)
	return r, f
}

func testLostReply(t *testing.T, b Backend) {
	r, f := faulty(t, b)
	first := mustLoad(t, r)
	f.LoseReply()
	offered, err := r.CompareAndSwap(testContext(t), first, step(first))
	if err != nil && !errors.Is(err, lease.ErrUnknown) {
		t.Errorf("swap that took effect: %v, want success or ErrUnknown", err)
	}
	f.Heal()
	if got := mustLoad(t, b.Open(t)); got.Version != 2 || got.Nonce != offered.Nonce {
		t.Errorf("register holds %+v, offered was %+v", got, offered)
	}
}

func testRepeated(t *testing.T, b Backend) {
	r, f := faulty(t, b)
	first := mustLoad(t, r)
	f.RepeatRequest()
	rec, err := r.CompareAndSwap(testContext(t), first, step(first))
	if err != nil {
		t.Fatalf("swap that took effect, answered with a conflict with itself: %v", err)
	}
	if got := mustLoad(t, b.Open(t)); !reflect.DeepEqual(got, rec) {
		t.Errorf("register holds %+v, want %+v", got, rec)
	}
}

func testHungSwap(t *testing.T, b Backend) {
	r, f := faulty(t, b)
	other := b.Open(t)
	first := mustLoad(t, other)
	f.Hang()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	offered, err := r.CompareAndSwap(ctx, first, step(first))
	if !errors.Is(err, lease.ErrUnknown) {
		t.Fatalf("hung swap: %v, want ErrUnknown", err)
	}
	if offered.Nonce == "" || offered.Version != 2 {
		t.Errorf("offered record is not returned: %+v", offered)
	}
	// Somebody else is faster; what hung must not undo or overtake that when it ends.
	rec := mustSwap(t, other, first, step(first))
	f.Heal()
	rec = mustSwap(t, other, rec, step(rec))
	if got := mustLoad(t, r); !reflect.DeepEqual(got, rec) {
		t.Errorf("register holds %+v, want %+v", got, rec)
	}
}

func testHungAll(t *testing.T, b Backend) {
	r, f := faulty(t, b)
	first := mustLoad(t, r)
	f.HangAll()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.Load(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hung load: %v, want the context's error", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.CompareAndSwap(ctx, first, step(first)); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, lease.ErrConflict) {
		t.Errorf("hung swap: %v, want the context's error", err)
	}
	f.Heal()
	mustLoad(t, r)
}
