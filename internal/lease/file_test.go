package lease_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/leasetest"
)

func TestFileRegisterContract(t *testing.T) {
	leasetest.RunRegister(t, func(t *testing.T) leasetest.Backend {
		cfg := newShare(t, fsx.OS{})
		cfg.FS = quickFS{}
		return leasetest.Backend{
			ClusterID: cfg.ClusterID,
			Open:      func(t *testing.T) lease.Register { return mustOpen(t, cfg) },
			Faulty: func(t *testing.T) (lease.Register, leasetest.Faults) {
				c := cfg
				f := newFaultFS(quickFS{})
				c.FS = f
				r := mustOpen(t, c)
				t.Cleanup(func() { f.Heal(); r.Drain() })
				return r, f
			},
		}
	})
}

// grow swaps n times.
func grow(t testing.TB, r lease.Register, rec lease.Record, n int) lease.Record {
	t.Helper()
	for range n {
		rec = mustSwap(t, r, rec, rec)
	}
	return rec
}

// A process that sleeps between its look and its link, until its number has been pruned, gets
// the link but not the version.
func TestSleeperDoesNotWinPrunedNumber(t *testing.T) {
	pruner := newFaultFS(quickFS{})
	cfg := newShare(t, pruner)
	other := mustOpen(t, cfg)
	// Pruning also removes old temporary names, which alone would stop this sleeper. Here
	// its temporary name stays, as a link request that is already on its way would find it.
	pruner.set(func(op fsx.Op, path string) error {
		if op == fsx.OpRemove && strings.HasPrefix(filepath.Base(path), ".2-") {
			return syscall.ENOENT
		}
		return nil
	}, nil)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	sleeper := mustOpen(t, scfg)
	prev := mustLoad(t, sleeper)

	asleep, wake := make(chan struct{}), make(chan struct{})
	slow.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpLink {
			close(asleep)
			<-wake
		}
		return nil
	}, nil)
	type result struct {
		rec lease.Record
		err error
	}
	done := make(chan result, 1)
	go func() {
		rec, err := sleeper.CompareAndSwap(testContext(t), prev, prev)
		done <- result{rec, err}
	}()
	<-asleep
	newest := grow(t, other, prev, 100)
	must(t, other.Prune(testContext(t)))
	close(wake)
	got := <-done
	if !errors.Is(got.err, lease.ErrUnknown) {
		t.Errorf("the sleeper's swap: %v, want ErrUnknown", got.err)
	}
	stray := filepath.Join(registerDir(t, cfg.Share), strconv.FormatUint(got.rec.Version, 10))
	if _, err := os.Stat(stray); err != nil {
		t.Errorf("the sleeper's link did not succeed, so this test shows nothing: %v", err)
	}
	slow.set(nil, nil)
	for _, r := range []*lease.FileRegister{other, sleeper} {
		if rec := mustLoad(t, r); rec.Nonce != newest.Nonce {
			t.Errorf("newest is %d, want %d", rec.Version, newest.Version)
		}
	}
	hist, err := other.History(testContext(t))
	must(t, err)
	if len(hist) != 64 || hist[0].Version != newest.Version-63 {
		t.Errorf("history has %d records from %d", len(hist), hist[0].Version)
	}
	// A second sleeper that had loaded the real record of that number meets a stray there.
	real := prev
	real.Version, real.Nonce = got.rec.Version, "the real one's"
	if _, err := other.CompareAndSwap(testContext(t), real, prev); !errors.Is(err, lease.ErrConflict) {
		t.Errorf("swap on a stray: %v", err)
	}
}

// The reply "exists" to a sleeper proves nothing if meanwhile its own record was pruned.
func TestConflictNeedsPredecessor(t *testing.T) {
	cfg := newShare(t, quickFS{})
	other := mustOpen(t, cfg)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	sleeper := mustOpen(t, scfg)
	prev := mustLoad(t, sleeper)
	slow.set(nil, func(op fsx.Op, path string, err error) error {
		if op == fsx.OpLink && err == nil {
			// The link took effect; before its reply is repeated as "exists", the history
			// goes on, is pruned, and another sleeper leaves a stray in its place.
			rec := mustLoad(t, other)
			grow(t, other, rec, 100)
			must(t, other.Prune(testContext(t)))
			b, jerr := json.Marshal(lease.Record{Format: 1, ClusterID: cfg.ClusterID, Version: rec.Version, Nonce: "stray", TTL: 1})
			must(t, jerr)
			must(t, os.WriteFile(path, b, 0o600))
			return syscall.EEXIST
		}
		return err
	})
	_, err := sleeper.CompareAndSwap(testContext(t), prev, prev)
	if !errors.Is(err, lease.ErrUnknown) {
		t.Errorf("a swap that had taken effect: %v, want ErrUnknown", err)
	}
}

// A sleeper's predecessor was pruned, and a stray record took its number: another file, however
// like the one it had looked at before.
func TestStrayIsNoPredecessor(t *testing.T) {
	cfg := newShare(t, quickFS{})
	pruner := newFaultFS(quickFS{})
	pcfg := cfg
	pcfg.FS = pruner
	other := mustOpen(t, pcfg)
	// The pruner's listing came too early to show the sleeper's temporary name.
	pruner.set(func(op fsx.Op, path string) error {
		if op == fsx.OpRemove && strings.HasPrefix(filepath.Base(path), ".3-") {
			return syscall.ENOENT
		}
		return nil
	}, nil)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	sleeper := mustOpen(t, scfg)
	prev := mustSwap(t, sleeper, mustLoad(t, sleeper), lease.Record{ClusterID: cfg.ClusterID, TTL: lease.Duration(ttl)})
	slow.set(func(op fsx.Op, path string) error {
		if op == fsx.OpLink {
			grow(t, other, prev, 100)
			must(t, other.Prune(testContext(t)))
			stray := prev
			stray.Nonce = strings.Repeat("0", len(prev.Nonce)) // of the same size
			b, err := json.MarshalIndent(stray, "", " ")
			must(t, err)
			must(t, os.WriteFile(filepath.Join(filepath.Dir(path), strconv.FormatUint(prev.Version, 10)), append(b, '\n'), 0o600))
		}
		return nil
	}, nil)
	_, err := sleeper.CompareAndSwap(testContext(t), prev, prev)
	want(t, err, lease.ErrUnknown)
}

// A reader whose record is pruned between listing and opening must list again.
func TestLoadSurvivesPruning(t *testing.T) {
	cfg := newShare(t, quickFS{})
	other := mustOpen(t, cfg)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	reader := mustOpen(t, scfg)
	prev := mustLoad(t, other)
	var newest lease.Record
	var done sync.Once
	slow.set(func(op fsx.Op, path string) error {
		if op == fsx.OpOpen && filepath.Base(path) == "1" {
			done.Do(func() {
				newest = grow(t, other, prev, 100)
				must(t, other.Prune(testContext(t)))
			})
		}
		return nil
	}, nil)
	if got := mustLoad(t, reader); newest.Version == 0 || got.Nonce != newest.Nonce {
		t.Errorf("loaded version %d, want %d", got.Version, newest.Version)
	}
}

func versionsIn(t testing.TB, dir string) []uint64 {
	t.Helper()
	var out []uint64
	for _, n := range names(t, dir) {
		if v, err := strconv.ParseUint(n, 10, 64); err == nil {
			out = append(out, v)
		}
	}
	slices.Sort(out)
	return out
}

func TestPruneIsAscendingAndStops(t *testing.T) {
	f := newFaultFS(quickFS{})
	cfg := newShare(t, f)
	r := mustOpen(t, cfg)
	rec := mustLoad(t, r)
	for range 99 { // versions 1 to 100, by as many writers: each removes its temporary name
		rec = grow(t, mustOpen(t, cfg), rec, 1)
	}
	dir := registerDir(t, cfg.Share)
	must(t, os.WriteFile(filepath.Join(dir, ".5-abc.tmp"), nil, 0o600))  // a crashed writer's
	must(t, os.WriteFile(filepath.Join(dir, ".99-abc.tmp"), nil, 0o600)) // perhaps still at work

	var removed []string
	f.set(func(op fsx.Op, path string) error {
		if op != fsx.OpRemove {
			return nil
		}
		removed = append(removed, filepath.Base(path))
		if filepath.Base(path) == "10" {
			return syscall.EIO
		}
		return nil
	}, nil)
	want(t, r.Prune(testContext(t)), syscall.EIO)
	if w := strings.Fields(".5-abc.tmp 1 2 3 4 5 6 7 8 9 10"); !slices.Equal(removed, w) {
		t.Errorf("removed %v, want %v", removed, w)
	}
	// "No such file" is no reason to stop: another pruning was faster.
	removed = nil
	f.set(func(op fsx.Op, path string) error {
		if op == fsx.OpRemove && filepath.Base(path) == "20" {
			return syscall.ENOENT
		}
		return nil
	}, nil)
	must(t, r.Prune(testContext(t)))
	f.set(nil, nil)
	left := versionsIn(t, dir)
	if len(left) != 65 || left[0] != 20 || left[1] != 37 || left[64] != 100 {
		t.Errorf("left are %v", left)
	}
	if _, err := os.Stat(filepath.Join(dir, ".99-abc.tmp")); err != nil {
		t.Errorf("a new temporary file was removed: %v", err)
	}
	if got := mustLoad(t, r); got.Nonce != rec.Nonce {
		t.Errorf("newest is %d", got.Version)
	}
}

// swapOps counts the operations of one swap.
func swapOps(t *testing.T) int {
	f := newFaultFS(quickFS{})
	r := mustOpen(t, newShare(t, f))
	prev := mustLoad(t, r)
	n := 0
	f.set(func(fsx.Op, string) error { n++; return nil }, nil)
	mustSwap(t, r, prev, prev)
	if n < 10 {
		t.Fatalf("a swap has only %d operations", n)
	}
	return n
}

// Whatever fails, and wherever the process dies: what the swap says is true, the register can
// be read, and it can go on.
func TestSwapFaultAtEveryStep(t *testing.T) {
	n := swapOps(t)
	for _, fault := range []error{syscall.EIO, syscall.ENOSPC, syscall.EROFS, syscall.ESTALE, fsx.ErrCrash} {
		for _, after := range []bool{false, true} {
			for i := range n {
				t.Run(fmt.Sprintf("%v,after=%v,step %d", fault, after, i), func(t *testing.T) {
					f := newFaultFS(quickFS{})
					cfg := newShare(t, f)
					r := mustOpen(t, cfg)
					prev := mustLoad(t, r)
					var k atomic.Int32
					hit := func() error {
						at := int(k.Add(1)) - 1
						if at == i || (at > i && errors.Is(fault, fsx.ErrCrash)) {
							return fault // the dead do nothing more
						}
						return nil
					}
					if after {
						dead := false
						f.set(func(fsx.Op, string) error {
							if dead {
								return fault
							}
							return nil
						}, func(_ fsx.Op, _ string, err error) error {
							if h := hit(); h != nil {
								dead = errors.Is(h, fsx.ErrCrash)
								return h
							}
							return err
						})
					} else {
						f.set(func(fsx.Op, string) error { return hit() }, nil)
					}
					next := prev
					next.CleanSeq = 7
					offered, err := r.CompareAndSwap(testContext(t), prev, next)
					f.set(nil, nil)
					other := mustOpen(t, cfg)
					got := mustLoad(t, other)
					took := got.Version == 2 && got.CleanSeq == 7
					switch {
					case !took && got.Nonce != prev.Nonce:
						t.Errorf("register holds %+v", got)
					case err == nil && !took:
						t.Error("success without effect")
					case errors.Is(err, lease.ErrConflict):
						t.Errorf("conflict with nobody: %v", err)
					case err != nil && took && !errors.Is(err, lease.ErrUnknown):
						t.Errorf("took effect, but says: %v", err)
					case errors.Is(err, lease.ErrUnknown) && offered.Version != 2:
						t.Errorf("offered record is not returned: %+v", offered)
					}
					grow(t, other, got, 1)
				})
			}
		}
	}
}

// A crash leaves a temporary name behind (nothing of the dead process cleans up); it harms
// nobody and is removed with the records of its age.
func TestCrashedWritersTemporaryFile(t *testing.T) {
	f := newFaultFS(quickFS{})
	cfg := newShare(t, f)
	r := mustOpen(t, cfg)
	prev := mustLoad(t, r)
	crash := once(fsx.OpLink, fsx.ErrCrash)
	f.set(nil, crash)
	_, err := r.CompareAndSwap(testContext(t), prev, prev)
	want(t, err, lease.ErrUnknown)
	f.set(nil, nil)
	temps := func() int {
		m, err := filepath.Glob(filepath.Join(registerDir(t, cfg.Share), ".*.tmp"))
		must(t, err)
		return len(m)
	}
	if n := temps(); n != 1 {
		t.Fatalf("%d temporary files after the crash", n)
	}
	grow(t, r, mustLoad(t, r), 100)
	must(t, r.Prune(testContext(t)))
	if n := temps(); n != 0 {
		t.Errorf("%d temporary files after pruning", n)
	}
}

func TestDamagedRecordIsRefused(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	rec := grow(t, r, mustLoad(t, r), 1)
	path := filepath.Join(registerDir(t, cfg.Share), "2")
	good, err := os.ReadFile(path)
	must(t, err)
	for _, c := range []struct {
		name, data string
		err        error
	}{
		{"empty", "", lease.ErrCorrupt},
		{"cut off", string(good[:len(good)/2]), lease.ErrCorrupt},
		{"two", string(good) + string(good), lease.ErrCorrupt},
		{"newer format", strings.Replace(string(good), `"format": 1`, `"format": 2`, 1), lease.ErrCorrupt},
		{"unknown field", strings.Replace(string(good), `"format": 1`, `"format": 1, "x": 1`, 1), lease.ErrCorrupt},
		{"other version", strings.Replace(string(good), `"version": 2`, `"version": 3`, 1), lease.ErrCorrupt},
		{"no nonce", strings.Replace(string(good), rec.Nonce, "", 1), lease.ErrCorrupt},
		{"other cluster", strings.Replace(string(good), cfg.ClusterID, "other", 1), lease.ErrWrongCluster},
	} {
		if c.data == string(good) {
			t.Fatalf("%s: nothing changed", c.name)
		}
		must(t, os.WriteFile(path, []byte(c.data), 0o600))
		_, err := r.Load(testContext(t))
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
	}
	must(t, os.WriteFile(path, make([]byte, 2<<20), 0o600))
	if _, err := r.Load(testContext(t)); err == nil {
		t.Error("a huge record was read")
	}
	must(t, os.Remove(path))
	must(t, os.Remove(filepath.Join(registerDir(t, cfg.Share), "1")))
	_, err = r.Load(testContext(t))
	want(t, err, lease.ErrCorrupt)
}

// A share that hangs for ever costs a bounded number of goroutines, and what never began is
// not called unknown.
func TestHangingShareIsBounded(t *testing.T) {
	cfg := newShare(t, quickFS{})
	f := newFaultFS(quickFS{})
	cfg.FS, cfg.OpWorkers = f, 2
	r := mustOpen(t, cfg)
	prev := mustLoad(t, r)
	f.HangAll()
	for range 2 {
		_, err := r.Load(shortly(t))
		want(t, err, context.DeadlineExceeded)
	}
	_, err := r.CompareAndSwap(shortly(t), prev, prev)
	want(t, err, context.DeadlineExceeded)
	if errors.Is(err, lease.ErrUnknown) {
		t.Errorf("a swap that never began: %v", err)
	}
	f.Heal()
	mustSwap(t, r, prev, prev)
	r.Drain()
}

// A caller that left before the name was offered knows that nothing was, and nothing is.
func TestAbandonedSwapOffersNothing(t *testing.T) {
	cfg := newShare(t, quickFS{})
	f := newFaultFS(quickFS{})
	cfg.FS = f
	r := mustOpen(t, cfg)
	prev := mustLoad(t, r)
	links := make(chan string, 1)
	f.mu.Lock()
	gate := f.gate
	f.mu.Unlock()
	f.set(func(op fsx.Op, path string) error {
		switch op {
		case fsx.OpSync:
			<-gate
		case fsx.OpLink:
			links <- path
		}
		return nil
	}, nil)
	_, err := r.CompareAndSwap(shortly(t), prev, prev)
	want(t, err, context.DeadlineExceeded)
	if errors.Is(err, lease.ErrUnknown) {
		t.Errorf("nothing was offered, but: %v", err)
	}
	close(gate)
	eventually(t, "the worker cleans up", func() bool { return len(names(t, registerDir(t, cfg.Share))) == 1 })
	f.mu.Lock()
	f.before, f.gate = nil, make(chan struct{})
	f.mu.Unlock()
	if len(links) > 0 {
		t.Errorf("linked %s after the caller was told that nothing was offered", <-links)
	}
	if got := mustLoad(t, r); got.Version != 1 {
		t.Errorf("newest is %d", got.Version)
	}
}

// A record is whole and on the disk before its name is offered, and the name is on the disk
// before anybody is told.
func TestSwapIsDurable(t *testing.T) {
	f := newFaultFS(quickFS{})
	r := mustOpen(t, newShare(t, f))
	prev := mustLoad(t, r)
	var ops []fsx.Op
	f.set(func(op fsx.Op, _ string) error { ops = append(ops, op); return nil }, nil)
	rec := mustSwap(t, r, prev, prev)
	at := 0
	for _, op := range []fsx.Op{fsx.OpCreate, fsx.OpWrite, fsx.OpSync, fsx.OpClose, fsx.OpLink, fsx.OpSyncDir, fsx.OpStat} {
		i := slices.Index(ops[at:], op)
		if i < 0 {
			t.Fatalf("no %s after %v in %v", op, ops[:at], ops)
		}
		at += i + 1
	}
	f.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSyncDir {
			return syscall.EIO
		}
		return nil
	}, nil)
	_, err := r.CompareAndSwap(testContext(t), rec, rec)
	want(t, err, lease.ErrUnknown)
	// Errors of writing that are reported only at the end are errors.
	for _, last := range []fsx.Op{fsx.OpSync, fsx.OpClose} {
		f.set(nil, nil)
		rec = mustLoad(t, r)
		f.set(nil, func(op fsx.Op, path string, err error) error {
			if op == last && strings.HasSuffix(path, ".tmp") {
				return syscall.EIO
			}
			return err
		})
		_, err = r.CompareAndSwap(testContext(t), rec, rec)
		want(t, err, syscall.EIO)
		f.set(nil, nil)
		if got := mustLoad(t, r); got.Nonce != rec.Nonce {
			t.Errorf("a record with a failed %s was offered", last)
		}
	}
}

// A swap of a version that the register does not have (any more) writes nothing above it.
func TestSwapAboveTheNewest(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	prev := mustLoad(t, r)
	ahead := prev
	ahead.Version = 5
	_, err := r.CompareAndSwap(testContext(t), ahead, prev)
	want(t, err, lease.ErrWentBack)
	if left := names(t, registerDir(t, cfg.Share)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// slowListing is a directory that is listed while more records are made than are kept: its
// first listing shows nothing above a stray record.
type slowListing struct {
	fsx.FS
	stray uint64
	times int
}

func (s *slowListing) ReadDir(path string) ([]fs.DirEntry, error) {
	es, err := s.FS.ReadDir(path)
	if s.times++; s.times > 1 || err != nil {
		return es, err
	}
	return slices.DeleteFunc(es, func(e fs.DirEntry) bool {
		v, err := strconv.ParseUint(e.Name(), 10, 64)
		return err == nil && v > s.stray
	}), nil
}

// TestSlowListingIsNotBelieved: a stray record of a number that was freed long ago is not
// taken for the newest one, although the listing shows nothing newer.
func TestSlowListingIsNotBelieved(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	first := grow(t, r, mustLoad(t, r), 1) // version 2
	stray := filepath.Join(registerDir(t, cfg.Share), strconv.FormatUint(first.Version, 10))
	kept, err := os.ReadFile(stray)
	must(t, err)
	newest := grow(t, r, first, 100)
	must(t, r.Prune(testContext(t)))
	must(t, os.WriteFile(stray, kept, 0o600))
	slow := &slowListing{FS: quickFS{}, stray: first.Version}
	cfg.FS = slow
	late := mustOpen(t, cfg)
	slow.times = 0
	if got := mustLoad(t, late); got.Version != newest.Version {
		t.Errorf("loaded version %d, the newest is %d", got.Version, newest.Version)
	}
	if slow.times < 2 {
		t.Error("one listing was enough: this test shows nothing")
	}
}
