package lease_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
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

// A reader whose record is pruned between listing and opening must list again.
func TestLoadSurvivesPruning(t *testing.T) {
	cfg := newShare(t, quickFS{})
	other := mustOpen(t, cfg)
	slow := newFaultFS(quickFS{})
	scfg := cfg
	scfg.FS = slow
	reader := mustOpen(t, scfg)
	prev := mustLoad(t, reader)
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
	rec := grow(t, r, mustLoad(t, r), 99) // versions 1 to 100
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
	if n < 12 {
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

func TestUnmountedShareIsNoCluster(t *testing.T) {
	cfg := newShare(t, quickFS{})
	r := mustOpen(t, cfg)
	prev := mustLoad(t, r)
	must(t, os.Rename(cfg.Share, cfg.Share+".unmounted"))
	must(t, os.Mkdir(cfg.Share, 0o700))
	_, err := r.Load(testContext(t))
	want(t, err, lease.ErrNotInitialised)
	_, err = r.CompareAndSwap(testContext(t), prev, prev)
	want(t, err, lease.ErrNotInitialised)
	if errors.Is(err, lease.ErrUnknown) {
		t.Errorf("nothing was offered, but: %v", err)
	}
	_, err = lease.OpenFile(testContext(t), cfg)
	want(t, err, lease.ErrNotInitialised)
	want(t, r.Prune(testContext(t)), lease.ErrNotInitialised)
	_, err = r.History(testContext(t))
	want(t, err, lease.ErrNotInitialised)
	if left := names(t, cfg.Share); len(left) > 0 {
		t.Errorf("something was written into the mount point: %v", left)
	}
	// Mounted again, elsewhere and under another name, it is the same cluster.
	must(t, os.Remove(cfg.Share))
	must(t, os.Rename(cfg.Share+".unmounted", cfg.Share))
	if got := mustLoad(t, r); !reflect.DeepEqual(got, prev) {
		t.Errorf("loaded %+v, want %+v", got, prev)
	}
	if mustOpen(t, cfg).FSID() != r.FSID() {
		t.Error("the file system id changed")
	}
}

func TestInitRefuses(t *testing.T) {
	seen := func(t *testing.T, cfg *lease.FileConfig) {
		cfg.SeenFile = filepath.Join(t.TempDir(), "seen.json")
		must(t, os.WriteFile(cfg.SeenFile, []byte(`{"format":1,"cluster_id":"x","version":3}`), 0o600))
	}
	for _, c := range []struct {
		name  string
		setup func(*testing.T, *lease.FileConfig)
		err   error
	}{
		{"share missing", func(_ *testing.T, c *lease.FileConfig) { c.Share += "/missing" }, os.ErrNotExist},
		{"initialised", func(t *testing.T, c *lease.FileConfig) {
			_, err := lease.InitFile(testContext(t), *c, lease.Record{TTL: 1})
			must(t, err)
		}, lease.ErrInitialised},
		{"seen before", seen, lease.ErrSeenCluster},
		{"memory damaged", func(t *testing.T, c *lease.FileConfig) {
			seen(t, c)
			must(t, os.WriteFile(c.SeenFile, []byte("?"), 0o600))
		}, lease.ErrCorrupt},
		{"packs without a cluster", func(t *testing.T, c *lease.FileConfig) {
			must(t, os.MkdirAll(filepath.Join(c.Share, "packs", "00"), 0o700))
		}, lease.ErrInitialised},
		{"register without a cluster", func(t *testing.T, c *lease.FileConfig) {
			_, err := lease.InitFile(testContext(t), *c, lease.Record{TTL: 1})
			must(t, err)
			r := mustOpen(t, *c)
			grow(t, r, mustLoad(t, r), 1)
			must(t, os.Remove(filepath.Join(c.Share, "cluster")))
		}, lease.ErrInitialised},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := lease.FileConfig{FS: quickFS{}, Share: t.TempDir(), Rand: rand.Reader}
			c.setup(t, &cfg)
			before := ""
			if cfg.SeenFile != "" {
				b, err := os.ReadFile(cfg.SeenFile)
				must(t, err)
				before = string(b)
			}
			files := 0
			if _, err := os.Stat(cfg.Share); err == nil {
				files = len(names(t, cfg.Share))
			}
			_, err := lease.InitFile(testContext(t), cfg, lease.Record{TTL: 1})
			want(t, err, c.err)
			if _, err := os.Stat(cfg.Share); err == nil && len(names(t, cfg.Share)) != files {
				t.Errorf("a refused initialisation left %v", names(t, cfg.Share))
			}
			if cfg.SeenFile != "" {
				if b, err := os.ReadFile(cfg.SeenFile); err != nil || string(b) != before {
					t.Errorf("the memory changed: %s %v", b, err)
				}
			}
		})
	}
}

// Initialising is remembered off the share, so that a lost mount can't lead to a second one.
func TestInitIsRemembered(t *testing.T) {
	cfg := lease.FileConfig{FS: quickFS{}, Share: t.TempDir(), Rand: rand.Reader, SeenFile: filepath.Join(t.TempDir(), "seen.json")}
	id, err := lease.InitFile(testContext(t), cfg, lease.Record{TTL: 1})
	must(t, err)
	if r := mustOpen(t, cfg); r.ClusterID() != id {
		t.Errorf("cluster id %s, want %s", r.ClusterID(), id)
	}
	cfg.Share = t.TempDir()
	_, err = lease.InitFile(testContext(t), cfg, lease.Record{TTL: 1})
	want(t, err, lease.ErrSeenCluster)
	// Nor does it accept another cluster in the mount's place.
	other := cfg
	other.SeenFile = ""
	_, err = lease.InitFile(testContext(t), other, lease.Record{TTL: 1})
	must(t, err)
	_, err = lease.OpenFile(testContext(t), cfg)
	want(t, err, lease.ErrWrongCluster)
}

func TestInitOnce(t *testing.T) {
	cfg := lease.FileConfig{FS: quickFS{}, Share: t.TempDir(), Rand: rand.Reader}
	const n = 8
	var ids [n]string
	var errs [n]error
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			c := cfg
			c.SeenFile = filepath.Join(t.TempDir(), "seen.json")
			ids[i], errs[i] = lease.InitFile(testContext(t), c, lease.Record{TTL: 1})
			if _, err := os.Stat(c.SeenFile); (err == nil) != (errs[i] == nil) {
				t.Errorf("result %v, memory %v", errs[i], err)
			}
		})
	}
	wg.Wait()
	winner := mustOpen(t, cfg).ClusterID()
	won := 0
	for i := range n {
		if errs[i] == nil {
			won++
			if ids[i] != winner {
				t.Errorf("%s believes to have won, the cluster is %s", ids[i], winner)
			}
		} else if !errors.Is(errs[i], lease.ErrInitialised) {
			t.Errorf("loser: %v", errs[i])
		}
	}
	if won != 1 {
		t.Errorf("%d winners", won)
	}
}

// Two that have both found the share empty: the file `cluster` is made exclusively.
func TestInitRace(t *testing.T) {
	f := newFaultFS(quickFS{})
	fast := lease.FileConfig{FS: quickFS{}, Share: t.TempDir(), Rand: rand.Reader}
	slow := fast
	slow.FS = f
	won := ""
	f.set(func(op fsx.Op, path string) error {
		if op == fsx.OpLink && filepath.Base(path) == "cluster" {
			var err error
			won, err = lease.InitFile(testContext(t), fast, lease.Record{TTL: 1})
			must(t, err)
		}
		return nil
	}, nil)
	_, err := lease.InitFile(testContext(t), slow, lease.Record{TTL: 1})
	want(t, err, lease.ErrInitialised)
	if got := mustOpen(t, fast).ClusterID(); got != won {
		t.Errorf("cluster id is %s, want %s", got, won)
	}
	// The answer "exists" to a repeated request that had succeeded is no conflict.
	f.set(nil, nil)
	again := slow
	again.Share = t.TempDir()
	f.set(nil, func(op fsx.Op, path string, err error) error {
		if op == fsx.OpLink && filepath.Base(path) == "cluster" {
			return syscall.EEXIST
		}
		return err
	})
	_, err = lease.InitFile(testContext(t), again, lease.Record{TTL: 1})
	must(t, err)
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

// A crash anywhere in an initialisation leaves either no cluster or a whole one, and never
// makes this instance ready to begin another one after a cluster may exist.
func TestInitCrashAtEveryStep(t *testing.T) {
	steps := 0
	for i := 0; i <= steps; i++ {
		f := newFaultFS(quickFS{})
		cfg := lease.FileConfig{FS: f, Share: t.TempDir(), Rand: rand.Reader, SeenFile: filepath.Join(t.TempDir(), "seen.json")}
		k := 0
		f.set(func(fsx.Op, string) error {
			k++
			if i > 0 && k >= i {
				return fsx.ErrCrash
			}
			return nil
		}, nil)
		_, err := lease.InitFile(testContext(t), cfg, lease.Record{TTL: 1})
		f.set(nil, nil)
		if i == 0 {
			must(t, err)
			steps = k
			continue
		}
		r, oerr := lease.OpenFile(testContext(t), cfg)
		switch {
		case oerr == nil:
			mustLoad(t, r)
			grow(t, r, mustLoad(t, r), 1)
		case !errors.Is(oerr, lease.ErrNotInitialised):
			t.Fatalf("crash at step %d of %d: open: %v", i, steps, oerr)
		}
		again := cfg
		again.Share = t.TempDir() // the mount was lost
		_, err = lease.InitFile(testContext(t), again, lease.Record{TTL: 1})
		if oerr == nil && !errors.Is(err, lease.ErrSeenCluster) {
			t.Fatalf("crash at step %d of %d: a second cluster: %v", i, steps, err)
		}
		// Another instance, without that memory, can finish the job on the same share.
		if oerr != nil {
			other := cfg
			other.SeenFile = ""
			_, err = lease.InitFile(testContext(t), other, lease.Record{TTL: 1})
			must(t, err)
		}
	}
	if steps < 15 {
		t.Errorf("only %d steps", steps)
	}
}

func TestOpenRefuses(t *testing.T) {
	cfg := newShare(t, quickFS{})
	other := cfg
	other.ClusterID = "another"
	_, err := lease.OpenFile(testContext(t), other)
	want(t, err, lease.ErrWrongCluster)
	any := cfg
	any.ClusterID = ""
	if got := mustOpen(t, any).ClusterID(); got != cfg.ClusterID {
		t.Errorf("cluster id %s, want %s", got, cfg.ClusterID)
	}
	name := filepath.Join(cfg.Share, "cluster")
	good, err := os.ReadFile(name)
	must(t, err)
	for _, c := range []struct {
		old, new string
		err      error
	}{
		{`"file"`, `"dynamodb"`, lease.ErrWrongCluster},
		{`"format": 1`, `"format": 2`, lease.ErrCorrupt},
		{`"register/`, `"../register/`, lease.ErrCorrupt},
		{`"register/`, `"register/../`, lease.ErrCorrupt},
		{`{`, ``, lease.ErrCorrupt},
		{cfg.ClusterID, ``, lease.ErrCorrupt},
	} {
		bad := strings.Replace(string(good), c.old, c.new, 1)
		if bad == string(good) {
			t.Fatalf("%q does not occur in %s", c.old, good)
		}
		must(t, os.WriteFile(name, []byte(bad), 0o600))
		_, err = lease.OpenFile(testContext(t), any)
		want(t, err, c.err)
	}
}

// A restored backup of the directory has the same ids inside; that it is a copy shows in the
// inode number.
func TestCopiedShareIsRefused(t *testing.T) {
	cfg := newShare(t, quickFS{})
	b, err := os.ReadFile(filepath.Join(cfg.Share, "cluster"))
	must(t, err)
	if !strings.Contains(string(b), `"inode"`) {
		t.Skip("no stable inode numbers on this file system")
	}
	copied := cfg
	copied.Share = filepath.Join(t.TempDir(), "copy")
	must(t, os.CopyFS(copied.Share, os.DirFS(cfg.Share)))
	_, err = lease.OpenFile(testContext(t), copied)
	want(t, err, lease.ErrWrongCluster)
}

func TestRescue(t *testing.T) {
	for _, lost := range []string{"register", "cluster", "nothing"} {
		t.Run(lost, func(t *testing.T) {
			cfg := newShare(t, quickFS{})
			cfg.SeenFile = filepath.Join(t.TempDir(), "seen.json")
			must(t, os.MkdirAll(filepath.Join(cfg.Share, "packs", "00"), 0o700))
			running := mustOpen(t, cfg)
			grow(t, running, mustLoad(t, running), 3)
			prev := mustLoad(t, running)
			switch lost {
			case "register":
				must(t, os.RemoveAll(filepath.Join(cfg.Share, "register")))
			case "cluster":
				must(t, os.Remove(filepath.Join(cfg.Share, "cluster")))
			}
			first := lease.Record{TTL: 1, Term: 9, Released: true, Head: headOf(9, 4)}
			id, err := lease.RescueFile(testContext(t), cfg, first)
			must(t, err)
			if id != cfg.ClusterID {
				t.Errorf("cluster id %s, want %s", id, cfg.ClusterID)
			}
			r := mustOpen(t, cfg)
			if got := mustLoad(t, r); got.Term != 9 || got.Version != 1 || !got.SameHead(first) {
				t.Errorf("rescued register holds %+v", got)
			}
			// Whoever still uses the old register notices, before it writes.
			_, err = running.Load(testContext(t))
			want(t, err, lease.ErrWrongCluster)
			_, err = running.CompareAndSwap(testContext(t), prev, prev)
			want(t, err, lease.ErrWrongCluster)
			if old, err := filepath.Glob(filepath.Join(cfg.Share, "cluster.retired-*")); err != nil || (len(old) == 1) == (lost == "cluster") {
				t.Errorf("retired: %v %v", old, err)
			}
		})
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
	for _, op := range []fsx.Op{fsx.OpCreate, fsx.OpWrite, fsx.OpSync, fsx.OpClose, fsx.OpLink, fsx.OpSyncDir, fsx.OpReadDir} {
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
