package lease_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

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
	cfg := newShare(t, quickFS{})
	other := mustOpen(t, cfg)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	sleeper := mustOpen(t, scfg)
	prev := mustLoad(t, sleeper)

	asleep, wake := make(chan struct{}), make(chan struct{})
	slow.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink {
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
	if _, err := os.Lstat(stray); err != nil {
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
		if op == fsx.OpSymlink && err == nil {
			// The link took effect; before its reply is repeated as "exists", the history
			// goes on, is pruned, and another sleeper leaves a stray in its place.
			rec := mustLoad(t, other)
			grow(t, other, rec, 100)
			must(t, other.Prune(testContext(t)))
			b, jerr := json.Marshal(lease.Record{Format: lease.RecordFormat, ClusterID: cfg.ClusterID, Version: rec.Version, Nonce: "stray", TTL: 1})
			must(t, jerr)
			must(t, os.Symlink(string(b), path))
			return syscall.EEXIST
		}
		return err
	})
	_, err := sleeper.CompareAndSwap(testContext(t), prev, prev)
	if !errors.Is(err, lease.ErrUnknown) {
		t.Errorf("a swap that had taken effect: %v, want ErrUnknown", err)
	}
}

// A sleeper's predecessor was pruned, and something else took its number: a stray record, or the
// very same record again, made by a request that the server executed a second time (EFS has no
// reply cache). Either is another file, however like the one that was loaded.
func TestAnotherFileIsNoPredecessor(t *testing.T) {
	for _, c := range []struct {
		name  string
		nonce func(string) string
	}{
		{"a stray record", func(n string) string { return strings.Repeat("0", len(n)) }},
		{"the same record", func(n string) string { return n }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := newShare(t, quickFS{})
			other := mustOpen(t, cfg)
			slow := newFaultFS(quickFS{})
			scfg := cfg
			scfg.FS = slow
			sleeper := mustOpen(t, scfg)
			prev := mustSwap(t, sleeper, mustLoad(t, sleeper), lease.Record{ClusterID: cfg.ClusterID, TTL: lease.Duration(ttl)})
			name := filepath.Join(registerDir(t, cfg.Share), strconv.FormatUint(prev.Version, 10))
			target, err := os.Readlink(name)
			must(t, err)
			slow.set(func(op fsx.Op, _ string) error {
				if op == fsx.OpSymlink {
					grow(t, other, prev, 100)
					must(t, other.Prune(testContext(t)))
					must(t, os.Symlink(strings.Replace(target, prev.Nonce, c.nonce(prev.Nonce), 1), name))
				}
				return nil
			}, nil)
			_, err = sleeper.CompareAndSwap(testContext(t), prev, prev)
			want(t, err, lease.ErrUnknown)
		})
	}
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
		if op == fsx.OpFollow && filepath.Base(path) == "1" {
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
	rec = grow(t, r, rec, 99) // versions 1 to 100
	dir := registerDir(t, cfg.Share)

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
	if w := strings.Fields("1 2 3 4 5 6 7 8 9 10"); !slices.Equal(removed, w) {
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
	if n < 6 {
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

func TestDamagedRecordIsRefused(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	rec := grow(t, r, mustLoad(t, r), 1)
	path := filepath.Join(registerDir(t, cfg.Share), "2")
	good, err := os.Readlink(path)
	must(t, err)
	for _, c := range []struct {
		name, data string
		err        error
	}{
		{"no json", "?", lease.ErrCorrupt},
		{"cut off", good[:len(good)/2], lease.ErrCorrupt},
		{"two", good + good, lease.ErrCorrupt},
		{"older format", strings.Replace(good, `"format":2`, `"format":1`, 1), lease.ErrCorrupt},
		{"newer format", strings.Replace(good, `"format":2`, `"format":3`, 1), lease.ErrCorrupt},
		{"unknown field", strings.Replace(good, `"format":2`, `"format":2,"x":1`, 1), lease.ErrCorrupt},
		{"other version", strings.Replace(good, `"version":2`, `"version":3`, 1), lease.ErrCorrupt},
		{"no nonce", strings.Replace(good, rec.Nonce, "", 1), lease.ErrCorrupt},
		{"other cluster", strings.Replace(good, cfg.ClusterID, "other", 1), lease.ErrWrongCluster},
		{"not base64", "z:?", lease.ErrCorrupt},
		{"not compressed", "z:AAAA", lease.ErrCorrupt},
	} {
		if c.data == good {
			t.Fatalf("%s: nothing changed", c.name)
		}
		must(t, os.Remove(path))
		must(t, os.Symlink(c.data, path))
		_, err := r.Load(testContext(t))
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
	}
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte(good), 0o600)) // as records once were
	_, err = r.Load(testContext(t))
	want(t, err, lease.ErrCorrupt)
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
		case fsx.OpStat:
			<-gate
		case fsx.OpSymlink:
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
	r.Drain()
	f.mu.Lock()
	f.before, f.gate = nil, make(chan struct{})
	f.mu.Unlock()
	if len(links) > 0 {
		t.Errorf("made %s after the caller was told that nothing was offered", <-links)
	}
	if got := mustLoad(t, r); got.Version != 1 {
		t.Errorf("newest is %d", got.Version)
	}
}

// The record is on the disk before anybody is told, and the look at its predecessor comes last.
func TestSwapIsDurable(t *testing.T) {
	f := newFaultFS(quickFS{})
	r := mustOpen(t, newShare(t, f))
	prev := mustLoad(t, r)
	var ops []string
	f.set(func(op fsx.Op, path string) error {
		ops = append(ops, string(op)+" "+filepath.Base(path))
		return nil
	}, nil)
	rec := mustSwap(t, r, prev, prev)
	at := 0
	for _, op := range []string{"stat 1", "symlink 2", "syncdir", "stat 2", "stat 1"} {
		i := slices.IndexFunc(ops[at:], func(o string) bool { return strings.HasPrefix(o, op) })
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
}

// noise is text of n bytes that can't be compressed to less than half.
func noise(t testing.TB, n int) string {
	t.Helper()
	b := make([]byte, n/2)
	_, err := rand.Read(b)
	must(t, err)
	return hex.EncodeToString(b)
}

// Records of all sizes fit into a link, and what a holder answers never makes one too long for
// any file system (XFS takes 1,024 bytes).
func TestLongRecords(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	rec := mustLoad(t, r)
	id := "12-48123-" + noise(t, 16)
	host := strings.Repeat("ip-10-0-1-23.eu-central-1.compute.internal.", 3)
	rec.Head = &lease.Head{ID: id, Manifest: "manifests/12/" + id, Hash: noise(t, 64), Term: 12, Seq: 48123}
	rec.Catalog, rec.CatalogHash, rec.ImageDigest = "catalogs/"+id, noise(t, 64), "sha256:"+noise(t, 64)
	rec.Order = &lease.Order{ID: noise(t, 32), Kind: lease.OrderRollback, Term: 12, To: host, Snapshot: id}
	rec.Holder = lease.Holder{Instance: host, Incarnation: noise(t, 32), VolumeID: noise(t, 32), Address: host + ":5432", HTTP: host + ":8425", Zone: "eu-central-1a"}
	for k := range lease.MostFailovers {
		rec.Failovers = append(rec.Failovers, lease.Duration(59*time.Minute+59*time.Second-time.Duration(k)*293*time.Second-time.Duration(k*37)*time.Millisecond))
	}
	for _, answer := range []int{0, 60, 600, 100_000} {
		rec.Answer = &lease.Answer{Order: noise(t, 32), Error: "ü" + noise(t, answer), Hint: noise(t, answer)}
		got := mustSwap(t, r, rec, rec)
		target, err := os.Readlink(filepath.Join(registerDir(t, cfg.Share), strconv.FormatUint(got.Version, 10)))
		must(t, err)
		t.Logf("answer of 2 x %d bytes: the target has %d", answer, len(target))
		if len(target) > 1020 {
			t.Errorf("the target has %d bytes", len(target))
		}
		loaded := mustLoad(t, mustOpen(t, cfg))
		if !reflect.DeepEqual(loaded, got) {
			t.Errorf("loaded %+v, swapped %+v", loaded, got)
		}
		a := loaded.Answer
		if a.Order != rec.Answer.Order || len(a.Error) < min(20, answer) || !utf8.ValidString(a.Error) || !utf8.ValidString(a.Hint) {
			t.Errorf("answer: %+v", a)
		}
		rec = loaded
	}
	rec.Holder.Zone = noise(t, 8000)
	if _, err := r.CompareAndSwap(testContext(t), rec, rec); err == nil || errors.Is(err, lease.ErrUnknown) {
		t.Errorf("a record that no link holds: %v", err)
	}
	if got := mustLoad(t, r); got.Nonce != rec.Nonce {
		t.Errorf("newest is %d", got.Version)
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

// slowListing is a directory that is listed while more records are made than are kept: the
// listing shows nothing above a number that was taken again.
type slowListing struct {
	fsx.FS
	begin func() // what happens while it lasts, once
	top   uint64
	times int
}

func (s *slowListing) ReadDir(path string) ([]fs.DirEntry, error) {
	if s.times++; s.times > 1 {
		return s.FS.ReadDir(path)
	}
	s.begin()
	es, err := s.FS.ReadDir(path)
	return slices.DeleteFunc(es, func(e fs.DirEntry) bool {
		v, err := strconv.ParseUint(e.Name(), 10, 64)
		return err == nil && v > s.top
	}), err
}

// TestSlowListingIsNotBelieved: records that are made again at numbers that were freed, by
// requests that the server executes once more, are not taken for the newest, neither by who has
// never loaded anything nor by who knows one of them.
func TestSlowListingIsNotBelieved(t *testing.T) {
	for _, c := range []struct {
		name string
		knew uint64 // version that the reader has loaded before
	}{{"a new reader", 0}, {"a reader that knew an older one", 2}, {"a reader that knew this one", 3}} {
		t.Run(c.name, func(t *testing.T) {
			cfg := newShare(t, quickFS{})
			r := mustOpen(t, cfg)
			slow := &slowListing{FS: quickFS{}, begin: func() {}, top: 3, times: 1}
			lcfg := cfg
			lcfg.FS = slow
			late := mustOpen(t, lcfg)
			rec := mustLoad(t, r)
			for range 2 { // to version 3
				rec = grow(t, r, rec, 1)
				if rec.Version == c.knew {
					mustLoad(t, late)
				}
			}
			var newest lease.Record
			slow.times, slow.begin = 0, func() {
				kept := map[string]string{}
				for _, v := range []string{"2", "3"} {
					name := filepath.Join(registerDir(t, cfg.Share), v)
					var err error
					kept[name], err = os.Readlink(name)
					must(t, err)
				}
				newest = grow(t, r, rec, 100)
				must(t, r.Prune(testContext(t)))
				for name, target := range kept {
					must(t, os.Symlink(target, name))
				}
			}
			if got := mustLoad(t, late); got.Version != newest.Version {
				t.Errorf("loaded version %d, the newest is %d", got.Version, newest.Version)
			}
			if slow.times < 2 {
				t.Error("one listing was enough: this test shows nothing")
			}
		})
	}
}
