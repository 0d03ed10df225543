package efssim_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/tests/efssim"
	"dbsupervisor/tests/efssim/opscript"
)

// patient is a client that never forgets by itself, so that a slow machine counts the same.
func patient() efssim.Options {
	o := efssim.Options{Volatile: true}
	o.AttrMin, o.AttrMax, o.DirMin, o.DirMax = time.Hour, time.Hour, time.Hour, time.Hour
	return o
}

func mount(t *testing.T, backing string, o efssim.Options) (string, *efssim.Remote) {
	t.Helper()
	at := t.TempDir()
	r, err := efssim.SpawnWith(backing, at, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return at, r
}

func wire(t *testing.T, r *efssim.Remote) efssim.Wire {
	t.Helper()
	s, err := r.Stats()
	must(t, err)
	return s.NFS
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCounts holds the model to what a Linux client is known to send (docs/EFSSIM.md). Each
// step begins with what those before it have left in the caches.
func TestCounts(t *testing.T) {
	type ops = map[efssim.Proc]uint64
	backing := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(backing, "d/e"), 0o700))
	must(t, os.WriteFile(filepath.Join(backing, "d/f2"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(backing, "d/old"), make([]byte, 5<<20), 0o600))
	for k := range 40 {
		must(t, os.WriteFile(filepath.Join(backing, "d/e", string(rune('A'+k))), nil, 0o600))
	}
	m, r := mount(t, backing, patient())
	in := func(p string) string { return filepath.Join(m, p) }
	write := func(p string, n int) error {
		f, err := os.OpenFile(in(p), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if _, err := f.Write(make([]byte, n)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		return f.Close()
	}
	stat := func(p string) error { _, err := os.Stat(in(p)); return err }
	read := func(p string) error { _, err := os.ReadFile(in(p)); return err }
	list := func(p string) error { _, err := os.ReadDir(in(p)); return err }
	for _, c := range []struct {
		name    string
		do      func() error
		want    ops
		read    int64
		written int64
	}{
		{"a first stat walks the path", func() error { return stat("d/old") }, ops{"ACCESS": 2, "LOOKUP": 2}, 0, 0},
		{"a second one is answered by the cache", func() error { return stat("d/old") }, ops{}, 0, 0},
		{"a file is opened, read and closed", func() error { return read("d/old") }, ops{"OPEN": 1, "READ": 5, "CLOSE": 1}, 5 << 20, 0},
		{"its pages stay, the open asks all the same", func() error { return read("d/old") }, ops{"OPEN": 1, "CLOSE": 1}, 0, 0},
		{"a small new file: one stable write", func() error { return write("d/new", 100) }, ops{"OPEN": 1, "SETATTR": 1, "WRITE": 1, "CLOSE": 1}, 0, 100},
		// The directory has changed: its names and the right to search it are asked for again.
		{"a large new file: writes and a commit", func() error { return write("d/big", 3<<20+1) },
			ops{"ACCESS": 1, "OPEN": 1, "SETATTR": 1, "WRITE": 4, "COMMIT": 1, "CLOSE": 1}, 0, 3<<20 + 1},
		{"what exists can't be created", func() error {
			if err := write("d/new", 1); !os.IsExist(err) {
				t.Errorf("created again: %v", err)
			}
			return nil
		}, ops{"ACCESS": 1, "LOOKUP": 1}, 0, 0},
		{"a name is linked without a look at it, but not any file", func() error { return os.Link(in("d/new"), in("d/link")) }, ops{"ACCESS": 1, "LINK": 1}, 0, 0},
		{"what is demanded past the cache is asked for", func() error {
			var st unix.Statx_t
			return unix.Statx(unix.AT_FDCWD, in("d/f2"), unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st)
		}, ops{"ACCESS": 1, "LOOKUP": 1, "GETATTR": 1}, 0, 0},
		{"removing looks the name up", func() error { return os.Remove(in("d/new")) }, ops{"LOOKUP": 1, "REMOVE": 1}, 0, 0},
		{"what was removed is known to be missing", func() error {
			if err := stat("d/new"); !os.IsNotExist(err) {
				t.Errorf("%v", err)
			}
			return nil
		}, ops{"ACCESS": 1}, 0, 0},
		{"a symbolic link is made, and its name and target are known", func() error {
			if err := os.Symlink("target", in("d/symlink")); err != nil {
				return err
			}
			_, err := os.Readlink(in("d/symlink"))
			return err
		}, ops{"SYMLINK": 1, "ACCESS": 1}, 0, 0},
		{"another client's is looked up and read, once", func() error {
			must(t, os.Symlink("target", filepath.Join(backing, "d/other")))
			for range 2 {
				if _, err := os.Readlink(in("d/other")); err != nil {
					return err
				}
			}
			return nil
		}, ops{"LOOKUP": 1, "READLINK": 1}, 0, 0},
		{"a directory is made", func() error { return os.Mkdir(in("d/f"), 0o700) }, ops{"CREATE": 1}, 0, 0},
		{"renamed", func() error { return os.Rename(in("d/link"), in("d/f/link")) }, ops{"ACCESS": 2, "LOOKUP": 2, "RENAME": 1}, 0, 0}, // Go looks at the target itself
		{"a listing comes in growing pieces", func() error { return list("d/e") }, ops{"ACCESS": 2, "LOOKUP": 1, "GETATTR": 1, "READDIR": 2}, 0, 0},
		{"a listing is kept; opening the directory asks whether it still holds", func() error { return list("d/e") }, ops{"GETATTR": 1}, 0, 0},
		{"its names came along", func() error { return stat("d/e/B") }, ops{}, 0, 0},
		{"fsync of a directory costs what opening it does", func() error {
			d, err := os.Open(in("d/e"))
			if err != nil {
				return err
			}
			if err := d.Sync(); err != nil {
				return err
			}
			return d.Close()
		}, ops{"GETATTR": 1}, 0, 0},
		{"what another client did in a directory shows when that is opened", func() error {
			must(t, os.WriteFile(filepath.Join(backing, "d/e/other"), nil, 0o600))
			if err := stat("d/e/other"); err != nil { // not known to be missing either
				return err
			}
			return list("d/e")
		}, ops{"LOOKUP": 1, "GETATTR": 1, "ACCESS": 1, "READDIR": 2}, 0, 0},
	} {
		before := wire(t, r)
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		got := wire(t, r).Since(before)
		if !maps.Equal(got.Ops, c.want) || got.Read != c.read || got.Written != c.written {
			t.Errorf("%s: %v; want %v, %d bytes read, %d written", c.name, got, c.want, c.read, c.written)
		}
	}
}

// TestCloseToOpen: what another client has changed is seen by whoever opens, while a stat
// believes the cache.
func TestCloseToOpen(t *testing.T) {
	backing := t.TempDir()
	a, _ := mount(t, backing, patient())
	b, rb := mount(t, backing, patient())
	must(t, os.WriteFile(filepath.Join(a, "file"), []byte("one"), 0o600))
	size := func() int64 {
		st, err := os.Stat(filepath.Join(b, "file"))
		must(t, err)
		return st.Size()
	}
	if size() != 3 {
		t.Fatal("first look")
	}
	if _, err := os.Stat(filepath.Join(b, "new")); !os.IsNotExist(err) {
		t.Fatal(err)
	}
	must(t, os.WriteFile(filepath.Join(a, "file"), []byte("longer"), 0o600))
	must(t, os.WriteFile(filepath.Join(a, "new"), nil, 0o600))
	if size() != 3 {
		t.Error("attributes were not cached")
	}
	if _, err := os.Stat(filepath.Join(b, "new")); !os.IsNotExist(err) {
		t.Error("a missing name was not cached")
	}
	data, err := os.ReadFile(filepath.Join(b, "file"))
	must(t, err)
	if string(data) != "longer" {
		t.Errorf("opened and read %q", data)
	}
	if size() != 6 {
		t.Error("the open did not bring the attributes")
	}
	list, err := os.ReadDir(b)
	must(t, err)
	if len(list) != 2 {
		t.Errorf("listing shows %d names", len(list))
	}
	if _, err := os.Stat(filepath.Join(b, "new")); err != nil {
		t.Errorf("after the listing: %v", err)
	}
	must(t, rb.StaleListings(""))
	must(t, os.Remove(filepath.Join(a, "new")))
	must(t, os.WriteFile(filepath.Join(a, "third"), nil, 0o600))
	list, err = os.ReadDir(b)
	must(t, err)
	if len(list) != 2 || list[1].Name() != "new" {
		t.Errorf("stale listing shows %v", list)
	}
	must(t, rb.Heal())
	list, err = os.ReadDir(b)
	must(t, err)
	if len(list) != 2 || list[1].Name() != "third" {
		t.Errorf("healed, it shows %v", list)
	}
}

// TestPace: the bytes wait for the link, the operations for the server.
func TestPace(t *testing.T) {
	o := patient()
	o.Pace = efssim.Pace{Look: 20 * time.Millisecond, Change: 40 * time.Millisecond, Rate: 20 << 20}
	m, r := mount(t, t.TempDir(), o)
	took := func(f func() error) time.Duration {
		began := time.Now()
		must(t, f())
		return time.Since(began)
	}
	file := filepath.Join(m, "f")
	// ACCESS, OPEN that makes it, 4 MiB at 20 MiB/s, WRITE and COMMIT, CLOSE.
	if d := took(func() error { return os.WriteFile(file, make([]byte, 4<<20), 0o600) }); d < 300*time.Millisecond {
		t.Errorf("writing took %v", d)
	}
	must(t, r.Forget())
	if d := took(func() error { _, err := os.ReadFile(file); return err }); d < 240*time.Millisecond {
		t.Errorf("reading took %v", d)
	}
	must(t, r.SetPace(efssim.Pace{}))
	must(t, r.Forget())
	before := wire(t, r)
	if d := took(func() error { _, err := os.ReadFile(file); return err }); d > 200*time.Millisecond {
		t.Logf("without a pace reading took %v", d) // a slow machine, or a pace that stayed
	}
	if got := wire(t, r).Since(before); got.Read != 4<<20 {
		t.Errorf("after forgetting: %v", got)
	}
}

// TestScriptCountsTheSame runs the store's and the register's operations twice, on shares of
// their own: the counts are the same.
func TestScriptCountsTheSame(t *testing.T) {
	var first []efssim.Wire
	for run := range 2 {
		m, r := mount(t, t.TempDir(), patient())
		at := filepath.Join(m, "script") // not the root, which a real client asks about now and then
		must(t, os.Mkdir(at, 0o700))
		s := opscript.New(at, t.TempDir())
		for k, step := range s.Steps() {
			if step.Cold {
				must(t, r.Forget())
			}
			before := wire(t, r)
			if err := step.Run(t.Context()); err != nil {
				t.Fatalf("%s: %v", step.Name, err)
			}
			got := wire(t, r).Since(before)
			if run == 0 {
				t.Logf("%s: %v", step.Name, got)
				first = append(first, got)
				continue
			}
			// Records and manifests differ by some digits of a time; operations must not. Only
			// where several readers share a file does it depend on who comes first in how many
			// pieces the kernel asks for the same bytes.
			was, is := first[k].Ops["READ"], got.Ops["READ"]
			delete(first[k].Ops, "READ")
			delete(got.Ops, "READ")
			if !maps.Equal(got.Ops, first[k].Ops) || max(was, is)-min(was, is) > 2 {
				t.Errorf("%s: first %v, then %v", step.Name, first[k], got)
			}
		}
		must(t, s.Close())
	}
}
