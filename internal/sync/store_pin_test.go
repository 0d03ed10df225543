package sync

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// pinRig is a history whose holder keeps the store with a clock of its own.
type pinRig struct {
	*storeHistory
	t      *testing.T
	dir    string
	clock  *boottime.Fake
	keeper *Keeper
	policy Policy
	grace  time.Duration
}

func newPinRig(t *testing.T, seed int64) *pinRig {
	r := &pinRig{t: t, dir: storeMemDir(t), clock: boottime.NewFake(), policy: Policy{All: 5 * time.Minute}, grace: time.Minute}
	r.storeHistory = newStoreHistory(t, newTestStore(t, nil, r.dir), seed)
	r.s.cfg.Clock = r.clock
	r.keeper = r.s.NewKeeper()
	return r
}

func (r *pinRig) look(context.Context) (SnapshotRef, CatalogRef, error) {
	return r.headRef(), r.cat, nil
}

func (r *pinRig) condemn() Summary {
	r.t.Helper()
	cat, sum, err := r.keeper.Condemn(context.Background(), CondemnRequest{Head: r.headRef(), Catalog: r.cat, Policy: r.policy, Now: r.now, Term: r.term})
	if err != nil {
		r.t.Fatal(err)
	}
	r.cat = cat
	if err := r.keeper.Follow(context.Background(), cat); err != nil {
		r.t.Fatal(err)
	}
	return sum
}

func (r *pinRig) sweep() SweepStats {
	r.t.Helper()
	st, err := r.keeper.Sweep(context.Background(), r.cat, r.grace)
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

// advance moves the clock by steps that a renewing reader can follow.
func (r *pinRig) advance(d time.Duration, readers int) {
	r.t.Helper()
	for end := r.clock.Now().Add(d); r.clock.Now() < end; {
		r.clock.Advance(10 * time.Second)
		for stop := time.Now().Add(10 * time.Second); r.clock.Waiters() != readers; {
			if time.Now().After(stop) {
				r.t.Fatalf("%d readers wait instead of %d", r.clock.Waiters(), readers)
			}
			<-time.After(100 * time.Microsecond)
		}
	}
}

// age lets everything but the head expire, be condemned and swept.
func (r *pinRig) age(readers int) SweepStats {
	r.t.Helper()
	for range 4 {
		r.step(r.t, 25, time.Hour)
	}
	r.condemn()
	r.advance(r.grace+10*time.Second, readers)
	return r.sweep()
}

func (r *pinRig) pinFiles() []string {
	r.t.Helper()
	es, err := os.ReadDir(filepath.Join(r.dir, pinDir))
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out
}

func (r *pinRig) whole(ref SnapshotRef) error {
	tree, err := r.s.LoadTree(context.Background(), ref)
	if err != nil {
		return err
	}
	return r.models[ref.ID].same(r.s, tree)
}

// TestPinKeepsSnapshot: what a pin covers outlives its condemnation; when the reader is done
// it goes.
func TestPinKeepsSnapshot(t *testing.T) {
	for _, everything := range []bool{false, true} {
		r := newPinRig(t, 51)
		for range 3 {
			r.step(t, 20, time.Minute)
		}
		old := r.headRef()
		req := PinRequest{Look: r.look}
		if !everything {
			req.Snapshots = []SnapshotRef{old}
		}
		err := r.s.WithPin(context.Background(), req, func(context.Context, SnapshotRef) error {
			st := r.age(1)
			if st.Pinned == 0 || everything != (st.Removed == 0) {
				t.Errorf("everything %v: sweep is %+v", everything, st)
			}
			r.advance(10*time.Minute, 1)
			if st := r.sweep(); st.Removed != 0 || st.Pinned == 0 {
				t.Errorf("everything %v: second sweep is %+v", everything, st)
			}
			return r.whole(old)
		})
		if err != nil {
			t.Fatalf("everything %v: %v", everything, err)
		}
		if files := r.pinFiles(); len(files) > 0 {
			t.Errorf("%v is left of the pins", files)
		}
		if st := r.sweep(); st.Removed == 0 || st.Pinned != 0 {
			t.Errorf("sweep without the pin is %+v", st)
		}
		if err := r.whole(old); !errors.Is(err, ErrMissing) {
			t.Errorf("reading the swept snapshot says %v", err)
		}
		storeAllWhole(t, r.storeHistory)
	}
}

// TestPinOfSilentReader: a reader that died does not hold the garbage for ever, and one that
// was only slow notices.
func TestPinOfSilentReader(t *testing.T) {
	r := newPinRig(t, 52)
	for range 3 {
		r.step(t, 20, time.Minute)
	}
	old := r.headRef()
	p := &pinner{s: r.s, r: PinRequest{Snapshots: []SnapshotRef{old}, Look: r.look, TTL: 2 * time.Minute}}
	if err := p.begin(context.Background()); err != nil {
		t.Fatal(err)
	}
	if st := r.age(0); st.Pinned == 0 {
		t.Errorf("sweep is %+v", st)
	}
	r.clock.Advance(3 * time.Minute)
	if st := r.sweep(); st.Pinned != 0 || st.Removed == 0 {
		t.Errorf("sweep after the silence is %+v", st)
	}
	if files := r.pinFiles(); len(files) > 0 {
		t.Errorf("%v is left of the pins", files)
	}
	// The reader wakes up.
	if err := p.keep(context.Background()); !errors.Is(err, ErrExpired) {
		t.Errorf("the reader is told %v", err)
	}
	p.release()
	// One whose pin was dropped although nothing of it was condemned goes on.
	cur := r.headRef()
	q := &pinner{s: r.s, r: PinRequest{Snapshots: []SnapshotRef{cur}, Look: r.look, TTL: 2 * time.Minute}}
	if err := q.begin(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.s.livePins(context.Background(), &r.keeper.pins); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(3 * time.Minute)
	if _, err := r.s.livePins(context.Background(), &r.keeper.pins); err != nil {
		t.Fatal(err)
	}
	if files := r.pinFiles(); len(files) > 0 {
		t.Fatalf("%v is left of the pins", files)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- q.keep(ctx) }()
	for r.clock.Waiters() == 0 {
		<-time.After(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the reader is told %v", err)
	}
	if files := r.pinFiles(); len(files) != 1 {
		t.Errorf("pins are %v", files)
	}
	q.release()
}

// TestPinSecondLook: a reader that slept between its look at the list and its pin is refused,
// also when everything has been deleted and forgotten meanwhile.
func TestPinSecondLook(t *testing.T) {
	r := newPinRig(t, 53)
	r.step(t, 20, time.Minute)
	old := r.headRef()
	pin := func() error {
		return r.s.WithPin(context.Background(), PinRequest{Snapshots: []SnapshotRef{old}, Look: r.look},
			func(context.Context, SnapshotRef) error { return nil })
	}
	if err := pin(); err != nil {
		t.Fatal(err)
	}
	r.step(t, 10, time.Hour)
	r.condemn()
	if err := pin(); !errors.Is(err, ErrExpired) {
		t.Errorf("pinning a condemned snapshot says %v", err)
	}
	r.clock.Advance(time.Hour)
	if st := r.sweep(); st.Removed == 0 {
		t.Errorf("sweep is %+v", st)
	}
	r.step(t, 10, time.Minute)
	r.condemn() // what was swept is no longer named as condemned
	if err := pin(); !errors.Is(err, ErrExpired) {
		t.Errorf("pinning a deleted snapshot says %v", err)
	}
	if files := r.pinFiles(); len(files) > 0 {
		t.Errorf("%v is left of the pins", files)
	}
}

// TestPinLost: a reader whose renewals fail learns that it can't rely on its pin.
func TestPinLost(t *testing.T) {
	r := newPinRig(t, 54)
	r.step(t, 20, time.Minute)
	broken := errors.New("the share is full")
	fail := false
	r.s.cfg.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		if fail && op == fsx.OpCreate && strings.Contains(path, pinDir) {
			return broken
		}
		return nil
	}}
	err := r.s.WithPin(context.Background(), PinRequest{Look: r.look}, func(ctx context.Context, _ SnapshotRef) error {
		for r.clock.Waiters() == 0 {
			<-time.After(time.Millisecond)
		}
		fail = true
		for ctx.Err() == nil {
			r.clock.Advance(10 * time.Second)
			<-time.After(time.Millisecond)
		}
		return ctx.Err()
	})
	if !errors.Is(err, ErrPinLost) || !errors.Is(err, broken) {
		t.Errorf("the reader is told %v", err)
	}
}

// TestPinUnreadable: a pin that can't be read yet counts as one on everything.
func TestPinUnreadable(t *testing.T) {
	r := newPinRig(t, 55)
	for range 3 {
		r.step(t, 20, time.Minute)
	}
	path := filepath.Join(r.dir, pinPath("00000000000000aa", 1))
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if st := r.age(0); st.Removed != 0 || st.Pinned == 0 {
		t.Errorf("sweep is %+v", st)
	}
	r.clock.Advance(pinTTLMost + time.Minute)
	if st := r.sweep(); st.Removed == 0 {
		t.Errorf("sweep is %+v", st)
	}
}

// TestSlowCopy copies the share file by file while the history goes on, everything old is
// condemned and deleted. With a pin the copy opens and is whole; without, it isn't.
func TestSlowCopy(t *testing.T) {
	for _, withPin := range []bool{true, false} {
		r := newPinRig(t, 56)
		for range 10 {
			r.step(t, 25, time.Minute)
		}
		r.condemn()
		begin := r.headRef()
		to := storeMemDir(t)
		readers := 0
		work := func() {
			r.step(t, 25, 3*time.Minute)
			r.condemn()
			r.advance(r.grace+10*time.Second, readers)
			r.sweep()
		}
		var err error
		if withPin {
			readers = 1
			err = r.s.WithPin(context.Background(), PinRequest{Look: r.look}, func(_ context.Context, head SnapshotRef) error {
				begin = head
				return slowCopy(r.dir, to, work)
			})
		} else {
			err = slowCopy(r.dir, to, work)
		}
		if err != nil {
			t.Fatal(err)
		}
		problem := checkCopy(t, to, begin, r.models)
		if withPin && problem != nil {
			t.Errorf("the copy under a pin: %v", problem)
		}
		if !withPin && problem == nil {
			t.Error("the copy without a pin is whole: the test tests nothing")
		}
		t.Logf("with a pin %v: %v", withPin, problem)
		storeAllWhole(t, r.storeHistory)
	}
}

// TestSlowCopyOfOne copies the share while only one snapshot is pinned: the copy has gaps, and
// that snapshot is whole in it.
func TestSlowCopyOfOne(t *testing.T) {
	r := newPinRig(t, 57)
	for range 10 {
		r.step(t, 25, time.Minute)
	}
	r.condemn()
	one, to := r.headRef(), storeMemDir(t)
	work := func() {
		r.step(t, 25, 3*time.Minute)
		r.condemn()
		r.advance(r.grace+10*time.Second, 1)
		r.sweep()
	}
	err := r.s.WithPin(context.Background(), PinRequest{Snapshots: []SnapshotRef{one}, Look: r.look},
		func(context.Context, SnapshotRef) error { return slowCopy(r.dir, to, work) })
	if err != nil {
		t.Fatal(err)
	}
	ctx, s := context.Background(), newTestStore(t, nil, to)
	rep, err := s.Scan(ctx)
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.Restorable(ctx, rep)
	if err != nil {
		t.Fatalf("the copy can't be opened: %v", err)
	}
	list = slices.DeleteFunc(slices.Concat(list, rep.Unproven), func(i SnapshotInfo) bool { return i.SnapshotRef != one })
	if len(list) != 1 {
		t.Fatalf("the snapshot is not in the copy; proven are %v", rep.Committed)
	}
	found, err := s.Verify(ctx, list, nil)
	if err != nil || len(found.Problems) > 0 {
		t.Fatalf("%+v, %v", found.Problems, err)
	}
	tree, err := s.LoadTree(ctx, one)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.models[one.ID].same(s, tree); err != nil {
		t.Error(err)
	}
}

// slowCopy copies a directory tree as rsync does, with work done between files. A file that
// has vanished is left out.
func slowCopy(from, to string, work func()) error {
	n := 0
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		if n++; n < 14 {
			work()
		}
		in, err := os.Open(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := os.Create(filepath.Join(to, rel))
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		return errors.Join(err, out.Close())
	})
}

// checkCopy opens a copy without any register and says what is wrong with it.
func checkCopy(t *testing.T, dir string, must SnapshotRef, models map[string]*storeModel) error {
	t.Helper()
	ctx := context.Background()
	s := newTestStore(t, nil, dir)
	rep, err := s.Scan(ctx)
	if err != nil {
		return err
	}
	list, err := s.Restorable(ctx, rep)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(i SnapshotInfo) bool { return i.SnapshotRef == must }) {
		return errors.New("the snapshot that was head at the beginning is missing")
	}
	found, err := s.Verify(ctx, list, nil)
	if err != nil {
		return err
	}
	if len(found.Problems) > 0 {
		return errors.New(found.Problems[0].Path + ": " + found.Problems[0].What)
	}
	for _, i := range list {
		tree, err := s.LoadTree(ctx, i.SnapshotRef)
		if err != nil {
			return err
		}
		if err := models[i.ID].same(s, tree); err != nil {
			return err
		}
	}
	return nil
}

// TestKeeperListsRarely: in the steady state no directory is listed but that of the pins, and
// nothing is left lying about all the same.
func TestKeeperListsRarely(t *testing.T) {
	r := newPinRig(t, 57)
	lists, reads := 0, 0
	r.s.cfg.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		switch {
		case op == fsx.OpReadDir && !strings.HasSuffix(path, pinDir):
			lists++
		case op == fsx.OpOpen && strings.HasSuffix(path, ".manifest"):
			reads++
		}
		return nil
	}}
	r.step(t, 20, time.Minute)
	r.condemn()
	if lists == 0 {
		t.Error("a new holder doesn't look for what its predecessor left")
	}
	lists, reads = 0, 0
	for range 40 {
		for range 3 {
			r.step(t, 6, time.Minute)
		}
		r.condemn()
		r.clock.Advance(2 * time.Minute)
		r.sweep()
	}
	if lists != 0 || reads != 0 {
		t.Errorf("%d directories listed, %d manifests read back", lists, reads)
	}
	r.policy = Policy{}
	for range 4 {
		r.step(t, 0, time.Hour)
		r.condemn()
		r.clock.Advance(2 * time.Minute)
		r.sweep()
	}
	storeNoLitter(t, r.storeHistory)
	storeAllWhole(t, r.storeHistory)
	r.clock.Advance(listEvery)
	r.condemn()
	if lists == 0 {
		t.Error("leftovers are never looked for")
	}
}

// TestKeeperGrace: a name is unlinked when this holder has seen it condemned for the grace,
// each by its own time; a new holder starts over.
func TestKeeperGrace(t *testing.T) {
	r := newPinRig(t, 58)
	for range 6 {
		r.step(t, 25, time.Hour)
	}
	r.condemn()
	early := func(what string) {
		t.Helper()
		if st := r.sweep(); st.Removed != 0 || st.Early == 0 {
			t.Errorf("%s: sweep is %+v", what, st)
		}
	}
	early("at once")
	r.clock.Advance(r.grace - time.Second)
	early("a second before")
	r.keeper = r.s.NewKeeper()
	r.clock.Advance(2 * time.Second)
	early("a new holder")
	r.clock.Advance(r.grace / 2)
	for range 4 {
		r.step(t, 25, time.Hour)
	}
	r.condemn()
	r.clock.Advance(r.grace / 2)
	if st := r.sweep(); st.Removed == 0 || st.Early == 0 {
		t.Errorf("older and younger names: sweep is %+v", st)
	}
	storeAllWhole(t, r.storeHistory)
}
