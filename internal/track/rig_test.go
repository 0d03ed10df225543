package track

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// skip skips a test that needs what is not here, or fails it where tracking must work.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("DBSUPERVISOR_REQUIRE_TRACKING") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// volume is a file system of its own on a loop device.
type volume struct {
	fs   string
	root string // a directory of it that is tracked
	top  string // where it is mounted
	pin  string
}

func eachFS(t *testing.T, test func(t *testing.T, v *volume)) {
	t.Helper()
	for _, fs := range []string{ext4, xfs} {
		t.Run(fs, func(t *testing.T) { test(t, newVolume(t, fs, 400)) })
	}
}

func newVolume(t testing.TB, fs string, mib int64) *volume {
	t.Helper()
	if os.Getuid() != 0 {
		skip(t, "needs root")
	}
	dir, err := os.MkdirTemp("", "track")
	must(t, err)
	image, top := filepath.Join(dir, "image"), filepath.Join(dir, "top")
	f, err := os.Create(image)
	must(t, err)
	must(t, f.Truncate(mib<<20))
	must(t, f.Close())
	must(t, os.Mkdir(top, 0o755))
	t.Cleanup(func() {
		_ = unix.Unmount(top, 0)
		if _, err := os.Stat(filepath.Join(top, "data")); err == nil {
			t.Errorf("%s is still mounted", top)
			return
		}
		_ = os.RemoveAll(dir)
	})
	mkfs := exec.CommandContext(context.Background(), "mkfs."+fs, "-q", image)
	if fs == ext4 {
		mkfs.Args = append(mkfs.Args, "-F", "-E", "lazy_itable_init=0")
	}
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		skip(t, "make %s: %v %s", fs, err, out)
	}
	if out, err := exec.CommandContext(context.Background(), "mount", "-o", "loop", image, top).CombinedOutput(); err != nil {
		skip(t, "mount %s: %v %s", fs, err, out)
	}
	v := &volume{fs: fs, top: top, root: filepath.Join(top, "data"), pin: filepath.Join(bpfRoot, fmt.Sprintf("track-test-%s", filepath.Base(dir)))}
	must(t, os.Mkdir(v.root, 0o755))
	if err := Supported(v.root); err != nil {
		skip(t, "%v", err)
	}
	t.Cleanup(func() { _ = Discard(v.pin) })
	return v
}

// remount calls between, which may be nil, while nothing is mounted.
func (v *volume) remount(t testing.TB, between func(image string)) {
	t.Helper()
	must(t, unix.Unmount(v.top, 0))
	if between != nil {
		between(filepath.Join(filepath.Dir(v.top), "image"))
	}
	out, err := exec.CommandContext(context.Background(), "mount", "-o", "loop", filepath.Join(filepath.Dir(v.top), "image"), v.top).CombinedOutput()
	if err != nil {
		t.Fatalf("mount: %v %s", err, out)
	}
}

func (v *volume) path(name string) string { return filepath.Join(v.root, name) }

func (v *volume) ino(t testing.TB, name string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(v.path(name), &st))
	return st.Ino
}

func (v *volume) open(t testing.TB) *Tracker {
	t.Helper()
	tr, err := Open(Config{Root: v.root, Pin: v.pin, Key: "test"})
	must(t, err)
	t.Cleanup(func() { _ = tr.Close() })
	return tr
}

// opened is a Tracker that has nothing to report.
func (v *volume) opened(t testing.TB) *Tracker {
	t.Helper()
	tr := v.open(t)
	c := drain(t, tr)
	if c.Lost == "" || c.NamesLost == "" {
		t.Fatalf("first drain of a new tracker: lost %q, names %q", c.Lost, c.NamesLost)
	}
	return tr
}

func drain(t testing.TB, tr *Tracker) *Changes {
	t.Helper()
	c, err := tr.Drain(context.Background())
	must(t, err)
	return c
}

// whole fails if something was lost.
func whole(t testing.TB, c *Changes) *Changes {
	t.Helper()
	if c.Lost != "" || c.NamesLost != "" {
		t.Fatalf("lost %q, names %q", c.Lost, c.NamesLost)
	}
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// byOther runs a program that is not this process, whose own writes are not recorded.
func byOther(t testing.TB, script string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), "sh", append([]string{"-ec", script, "sh"}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, &out)
	}
	return strings.TrimSpace(out.String())
}
