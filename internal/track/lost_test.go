package track

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// More changed chunks than slots: said, and whole again after.
func TestFullRing(t *testing.T) {
	eachFS(t, func(t *testing.T, v *volume) {
		tr, err := Open(Config{Root: v.root, Pin: v.pin, Key: "test", Slots: 64})
		must(t, err)
		defer tr.Close()
		drain(t, tr)
		byOther(t, `for n in $(seq 80); do echo x >"$1/f$n"; done`, v.root)
		c := drain(t, tr)
		if !strings.Contains(c.Lost, "more than 64 MiB") {
			t.Errorf("lost %q", c.Lost)
		}
		byOther(t, `echo x >"$1/g"`, v.root)
		if c = drain(t, tr); c.Lost != "" || !wrote(t, c, v, "g") {
			t.Errorf("after: lost %q, %v", c.Lost, c.Inodes)
		}
		// Drained slots that nobody settles give way, and then a restart has to say so.
		for range 4 {
			byOther(t, `for n in $(seq 10); do echo x >"$1/f$n"; done`, v.root)
			whole(t, drain(t, tr))
		}
		must(t, tr.Close())
		tr, err = Open(Config{Root: v.root, Pin: v.pin, Key: "test", Slots: 64})
		must(t, err)
		defer tr.Close()
		if c = drain(t, tr); !strings.Contains(c.Lost, "in hand") {
			t.Errorf("restart with unsettled changes that were dropped: lost %q", c.Lost)
		}
	})
}

func TestManyNames(t *testing.T) {
	v := newVolume(t, ext4, 400)
	limit := "/proc/sys/fs/inotify/max_queued_events"
	old, err := os.ReadFile(limit)
	must(t, err)
	t.Cleanup(func() { must(t, os.WriteFile(limit, old, 0o644)) })
	must(t, os.WriteFile(limit, []byte("16"), 0o644)) // for queues that are made from here on
	must(t, os.Mkdir(v.path("d"), 0o755))
	tr := v.opened(t)
	must(t, os.WriteFile(limit, old, 0o644))
	tr.names.mu.Lock() // nobody reads
	byOther(t, `for n in $(seq 40); do echo x >"$1/d/$n"; done`, v.root)
	tr.names.mu.Unlock()
	if c := drain(t, tr); !strings.Contains(c.NamesLost, "max_queued_events") {
		t.Fatalf("names lost %q", c.NamesLost)
	}
	// In the background everything is watched anew. Whoever looked before that has ended did
	// not see what happened where nobody watched.
	tr.names.work.Wait()
	if c := drain(t, tr); c.NamesLost == "" {
		t.Error("names are said to be complete that changed before they were watched")
	}
	byOther(t, `echo x >"$1/d/new"`, v.root)
	if c := whole(t, drain(t, tr)); !slices.Contains(c.Names, "d/new") {
		t.Errorf("names %q", c.Names)
	}
}

// What came into being below a new directory before it was watched.
func TestNewDirectories(t *testing.T) {
	v := newVolume(t, ext4, 400)
	tr := v.opened(t)
	tr.names.mu.Lock() // nobody reads
	byOther(t, `mkdir -p "$1/a/b/c" "$1/x/y"; mv "$1/x" "$1/z"`, v.root)
	tr.names.mu.Unlock()
	if c := whole(t, drain(t, tr)); !slices.Contains(c.Names, "a") || !slices.Contains(c.Names, "z") {
		t.Errorf("names %q", c.Names)
	}
	byOther(t, `touch "$1/a/b/c/f" "$1/z/y/f"`, v.root)
	c := whole(t, drain(t, tr))
	slices.Sort(c.Names)
	if want := []string{"a/b/c/f", "z/y/f"}; !slices.Equal(c.Names, want) {
		t.Errorf("names %q, want %q", c.Names, want)
	}
}

func TestTooManyDirectories(t *testing.T) {
	v := newVolume(t, ext4, 400)
	for n := range 30 {
		must(t, os.Mkdir(v.path(fmt.Sprint(n)), 0o755))
	}
	limit := "/proc/sys/fs/inotify/max_user_watches"
	old, err := os.ReadFile(limit)
	must(t, err)
	t.Cleanup(func() { must(t, os.WriteFile(limit, old, 0o644)) })
	must(t, os.WriteFile(limit, []byte("20"), 0o644))
	tr := v.opened(t)
	tr.names.work.Wait() // it tries again after each drain
	c := drain(t, tr)
	if !strings.Contains(c.NamesLost, "max_user_watches") || c.Lost != "" {
		t.Errorf("lost %q, names %q", c.Lost, c.NamesLost)
	}
	must(t, os.WriteFile(limit, old, 0o644))
	tr.names.work.Wait()
	drain(t, tr)
	tr.names.work.Wait()
	drain(t, tr)
	byOther(t, `touch "$1/29/x"`, v.root)
	if c := whole(t, drain(t, tr)); !slices.Equal(c.Names, []string{"29/x"}) {
		t.Errorf("names %q", c.Names)
	}
}

// What the agent itself writes is not recorded; what others do on the same device is, and
// harms nothing; other devices are not.
func TestWhoWrites(t *testing.T) {
	eachFS(t, func(t *testing.T, v *volume) {
		other := newVolume(t, v.fs, 400)
		tr := v.opened(t)
		must(t, os.WriteFile(v.path("own"), make([]byte, 1<<20), 0o644))
		byOther(t, `echo x >"$1"`, other.path("elsewhere"))
		byOther(t, `dd if=/dev/zero of="$1" bs=1M count=40 2>/dev/null`, filepath.Join(v.top, "neighbour"))
		byOther(t, `echo x >"$1"`, v.path("f"))
		c := whole(t, drain(t, tr))
		if n := c.Inodes[v.ino(t, "own")]; n != nil && len(n.Written)+len(n.Dirtied) > 0 {
			t.Errorf("own writes are reported: %+v", n)
		}
		if !wrote(t, c, v, "f") {
			t.Error("a write beside a neighbour's is missed")
		}
		for ino := range c.Inodes {
			if ino == other.ino(t, "elsewhere") && ino != v.ino(t, "f") && ino != v.ino(t, "own") {
				t.Errorf("a file of another device is reported: %d", ino)
			}
		}
		for _, name := range c.Names {
			if name != "f" && name != "own" {
				t.Errorf("name %q", name)
			}
		}
	})
}

func TestUnsupported(t *testing.T) {
	for _, dir := range []string{"/proc", "/dev/shm"} {
		err := Supported(dir)
		if err == nil || !strings.Contains(err.Error(), ErrUnsupported.Error()) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	const line = "36 35 7:0 / /mnt rw,noatime shared:1 - ext4 /dev/loop0 rw,data=journal\n"
	if err := checkOptions(line, 7<<8); err == nil || !strings.Contains(err.Error(), "data=journal") {
		t.Errorf("data=journal: %v", err)
	}
	if err := checkOptions(strings.ReplaceAll(line, "data=journal", "data=ordered"), 7<<8); err != nil {
		t.Errorf("data=ordered: %v", err)
	}
}
