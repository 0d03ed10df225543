package lease_test

import (
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

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

// shortLinks is a file system that cuts long symbolic links off.
type shortLinks struct{ quickFS }

func (s shortLinks) Symlink(target, path string) error {
	return s.quickFS.Symlink(target[:min(len(target), 500)], path)
}

// A file system that can't keep every record is refused at once, not at some later record.
func TestInitTriesALongLink(t *testing.T) {
	cfg := lease.FileConfig{FS: shortLinks{}, Share: t.TempDir(), Rand: rand.Reader}
	_, err := lease.InitFile(testContext(t), cfg, lease.Record{TTL: 1})
	if err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("initialised: %v", err)
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
		{`"format": 2`, `"format": 1`, lease.ErrCorrupt},
		{`"format": 2`, `"format": 3`, lease.ErrCorrupt},
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
