package efssim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if code, ok := ServeIfAsked(); ok {
		os.Exit(code)
	}
	if code, ok := actIfAsked(); ok {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// The programs that tests run in processes of their own.
func actIfAsked() (code int, asked bool) {
	act, arg, _ := strings.Cut(os.Getenv("SHARE_TEST_ACT"), " ")
	switch act {
	case "":
		return 0, false
	case "read":
		data, err := os.ReadFile(arg)
		if err != nil {
			fmt.Println(err)
			return 1, true
		}
		fmt.Print(string(data))
		return 0, true
	case "spawn": // and then wait for ever for a file system that hangs
		backing, mountpoint, _ := strings.Cut(arg, " ")
		r, err := Spawn(backing, mountpoint)
		if err == nil {
			err = r.Hang()
		}
		if err != nil {
			fmt.Println(err)
			return 1, true
		}
		fmt.Println("spawned")
		_, err = os.ReadDir(mountpoint)
		fmt.Println("not held", err)
		return 1, true
	}
	return 2, true
}

func actor(act string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "SHARE_TEST_ACT="+act)
	return cmd
}

func dirs(t *testing.T) (backing, mountpoint string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatal("no /dev/fuse: run scripts/ensure-tools.sh integration")
	}
	return t.TempDir(), t.TempDir()
}

func spawn(t *testing.T, backing, mountpoint string) *Remote {
	t.Helper()
	r, err := Spawn(backing, mountpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErrno(t *testing.T, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}

// eventually polls, because what is waited for happens in another process.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); {
		if ok() {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Fatal("never happened: " + what)
}

func stats(t *testing.T, c Controls) Stats {
	t.Helper()
	s, err := c.Stats()
	must(t, err)
	return s
}

func writeSync(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func TestTwoClientsSeeEachOtherAtOnce(t *testing.T) {
	backing, ma := dirs(t)
	_, mb := dirs(t)
	a, b := spawn(t, backing, ma), spawn(t, backing, mb)
	_ = b

	must(t, os.MkdirAll(filepath.Join(ma, "register/x"), 0o700))
	for i := range 20 {
		name := fmt.Sprint(i)
		in := func(m, n string) string { return filepath.Join(m, "register/x", n) }
		// The kernel must not remember that it was missing.
		if _, err := os.Stat(in(mb, name)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("before it was made: %v", err)
		}
		must(t, writeSync(in(ma, "tmp"), "from a "+name))
		must(t, os.Link(in(ma, "tmp"), in(ma, name)))
		must(t, syncDir(in(ma, "")))
		must(t, os.Remove(in(ma, "tmp")))
		data, err := os.ReadFile(in(mb, name))
		must(t, err)
		if string(data) != "from a "+name {
			t.Fatalf("read %q", data)
		}
		list, err := os.ReadDir(in(mb, ""))
		must(t, err)
		if len(list) != i+1 {
			t.Fatalf("round %d: listing has %d names", i, len(list))
		}
		// The other one's link and exclusive creation are refused.
		must(t, writeSync(in(mb, "tmpb"), "from b"))
		wantErrno(t, os.Link(in(mb, "tmpb"), in(mb, name)), syscall.EEXIST)
		must(t, os.Remove(in(mb, "tmpb")))
		wantErrno(t, writeSync(in(mb, name), "x"), syscall.EEXIST)
	}
	// Growth and replacement by the other one are seen as well.
	p := "register/x/0"
	must(t, os.WriteFile(filepath.Join(ma, p), []byte("longer than it was before"), 0o600))
	data, err := os.ReadFile(filepath.Join(mb, p))
	must(t, err)
	if string(data) != "longer than it was before" {
		t.Fatalf("stale content %q", data)
	}
	must(t, os.Rename(filepath.Join(ma, "register/x/1"), filepath.Join(ma, p)))
	data, err = os.ReadFile(filepath.Join(mb, p))
	must(t, err)
	if string(data) != "from a 1" {
		t.Fatalf("stale content %q", data)
	}
	st := stats(t, a.Controls)
	if st.Ops[OpLink] != 20 || st.Ops[OpFsync] != 20 || st.Ops[OpFsyncdir] != 20 || st.Ops[OpRename] != 1 {
		t.Fatalf("counted %+v", st.Ops)
	}
}

func TestCountsBytes(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	data := make([]byte, 5<<20+17)
	must(t, os.WriteFile(filepath.Join(m, "big"), data, 0o600))
	got, err := os.ReadFile(filepath.Join(m, "big"))
	must(t, err)
	if len(got) != len(data) {
		t.Fatalf("read %d bytes", len(got))
	}
	st := stats(t, r.Controls)
	if st.Written != int64(len(data)) || st.Read < int64(len(data)) || st.Total() == 0 {
		t.Fatalf("counted %+v", st)
	}
}

func TestHangHoldsAndResumes(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, r.Hang())
	done := make(chan error, 1)
	go func() { done <- writeSync(filepath.Join(m, "file"), "late") }()
	eventually(t, "the write is held", func() bool { return stats(t, r.Controls).Held == 1 })
	if _, err := os.Stat(filepath.Join(backing, "file")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("it took effect while held: %v", err)
	}
	must(t, r.Resume())
	must(t, <-done)
	data, err := os.ReadFile(filepath.Join(backing, "file"))
	must(t, err)
	if string(data) != "late" {
		t.Fatalf("%q arrived", data)
	}
}

func TestHangOfOneKindAfterTheEffect(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, os.Mkdir(filepath.Join(m, "a"), 0o700))
	must(t, r.Inject(Fault{Hang: true, After: true, Ops: []Op{OpMkdir}, Times: 1}))
	done := make(chan error, 1)
	go func() { done <- os.Mkdir(filepath.Join(m, "a/d"), 0o700) }()
	eventually(t, "it took effect", func() bool {
		_, err := os.Stat(filepath.Join(backing, "a/d"))
		return err == nil
	})
	eventually(t, "it is held all the same", func() bool { return stats(t, r.Controls).Held == 1 })
	// Other kinds go on, in other directories: the kernel holds a directory's lock while
	// it changes.
	must(t, os.WriteFile(filepath.Join(m, "other"), nil, 0o600))
	must(t, r.Heal())
	must(t, <-done)
}

func TestHungCallerLeavesOnlyWhenKilled(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, os.WriteFile(filepath.Join(m, "file"), []byte("content"), 0o600))
	held := func(n int) func() bool { return func() bool { return stats(t, r.Controls).Held == n } }

	t.Run("other signals make no difference", func(t *testing.T) {
		must(t, r.Hang(OpOpen))
		cmd := actor("read " + filepath.Join(m, "file"))
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		eventually(t, "it is held", held(1))
		for range 20 {
			must(t, cmd.Process.Signal(syscall.SIGURG))
			<-time.After(5 * time.Millisecond)
		}
		if st := stats(t, r.Controls); st.Held != 1 {
			t.Fatalf("%d are held", st.Held)
		}
		must(t, r.Heal())
		text, err := io.ReadAll(out)
		must(t, err)
		must(t, cmd.Wait())
		if string(text) != "content" {
			t.Fatalf("it read %q", text)
		}
	})
	t.Run("SIGKILL frees", func(t *testing.T) {
		must(t, r.Hang())
		cmd := actor("read " + filepath.Join(m, "file"))
		must(t, cmd.Start())
		eventually(t, "it is held", held(1))
		must(t, cmd.Process.Kill())
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait() // says that it was killed
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(15 * time.Second):
			t.Error("a killed process waits for the hung file system")
		}
		must(t, r.Heal())
		<-ended
	})
}

func TestUnmountWhileHung(t *testing.T) {
	for _, how := range []string{"spawned", "in this process"} {
		t.Run(how, func(t *testing.T) {
			backing, m := dirs(t)
			must(t, os.WriteFile(filepath.Join(backing, "file"), []byte("x"), 0o600))
			var c Controls
			if how == "spawned" {
				c = spawn(t, backing, m).Controls
			} else {
				s, err := Mount(backing, m, Options{})
				must(t, err)
				c = s.Controls
			}
			open, err := os.Open(filepath.Join(m, "file"))
			must(t, err)
			defer func() { _ = open.Close() }()
			must(t, c.Hang())
			var wg sync.WaitGroup
			for range 5 {
				wg.Go(func() {
					if _, err := os.ReadDir(m); err == nil {
						t.Error("a held operation succeeded")
					}
				})
			}
			eventually(t, "they are held", func() bool { return stats(t, c).Held == 5 })
			must(t, c.Unmount())
			wg.Wait()
			// What is left is an empty directory, and files that are open are dead.
			list, err := os.ReadDir(m)
			must(t, err)
			if len(list) != 0 {
				t.Fatalf("in its place: %v", list)
			}
			if _, err := open.Read(make([]byte, 1)); err == nil {
				t.Fatal("an open file can be read after the unmount")
			}
			must(t, c.Unmount())
		})
	}
}

func TestFail(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	file := filepath.Join(m, "file")
	write := func() error { return os.WriteFile(file, []byte("data"), 0o600) }
	must(t, write())
	cases := []struct {
		name  string
		fault func() error
		act   func() error
		want  syscall.Errno
	}{
		{"everything", func() error { return r.Fail(syscall.EIO) }, func() error { _, err := os.Stat(file); return err }, syscall.EIO},
		{"a close", func() error { return r.Fail(syscall.EDQUOT, OpFlush) }, write, syscall.EDQUOT},
		{"an fsync", func() error { return r.Fail(syscall.EIO, OpFsync) }, func() error { return writeSync(file+"2", "x") }, syscall.EIO},
		{"an fsync of a directory", func() error { return r.Fail(syscall.EIO, OpFsyncdir) }, func() error { return syncDir(m) }, syscall.EIO},
		{"a listing", func() error { return r.Fail(syscall.EIO, OpReaddir) }, func() error { _, err := os.ReadDir(m); return err }, syscall.EIO},
		{"a read", func() error { return r.Fail(syscall.ESTALE, OpRead) }, func() error { _, err := os.ReadFile(file); return err }, syscall.ESTALE},
		{"a link", func() error { return r.Fail(syscall.EMLINK, OpLink) }, func() error { return os.Link(file, file+"3") }, syscall.EMLINK},
		{"read-only: change", r.ReadOnly, write, syscall.EROFS},
		{"read-only: create", r.ReadOnly, func() error { return writeSync(file+"4", "") }, syscall.EROFS},
		{"read-only: remove", r.ReadOnly, func() error { return os.Remove(file) }, syscall.EROFS},
		{"no space", func() error { return r.NoSpace(0) }, func() error { return writeSync(file+"5", "") }, syscall.ENOSPC},
		{"below", func() error { return r.Inject(Fault{Errno: syscall.EIO, Under: "sub"}) }, func() error { return os.Mkdir(filepath.Join(m, "sub"), 0o700) }, syscall.EIO},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			must(t, c.fault())
			wantErrno(t, c.act(), c.want)
			if c.name == "below" {
				must(t, write())
			}
			if strings.HasPrefix(c.name, "read-only") {
				if _, err := os.ReadFile(file); err != nil {
					t.Errorf("reading: %v", err)
				}
			}
			must(t, r.Heal())
			must(t, write())
			if _, err := os.ReadDir(m); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNoSpaceAfterSomeBytes(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, r.NoSpace(3<<20))
	must(t, os.WriteFile(filepath.Join(m, "a"), make([]byte, 2<<20), 0o600))
	wantErrno(t, os.WriteFile(filepath.Join(m, "b"), make([]byte, 2<<20), 0o600), syscall.ENOSPC)
	wantErrno(t, os.Mkdir(filepath.Join(m, "c"), 0o700), syscall.ENOSPC)
	must(t, os.Remove(filepath.Join(m, "b"))) // as on a full disk
}

func TestLostReply(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, os.WriteFile(filepath.Join(m, "tmp"), []byte("mine"), 0o600))
	must(t, r.LoseReply(1, syscall.EEXIST, OpLink))
	wantErrno(t, os.Link(filepath.Join(m, "tmp"), filepath.Join(m, "1")), syscall.EEXIST)
	data, err := os.ReadFile(filepath.Join(m, "1"))
	must(t, err)
	if string(data) != "mine" {
		t.Fatalf("it holds %q", data)
	}
	must(t, os.Link(filepath.Join(m, "tmp"), filepath.Join(m, "2"))) // once only

	must(t, r.LoseReply(1, syscall.EIO, OpCreate))
	wantErrno(t, writeSync(filepath.Join(m, "new"), ""), syscall.EIO)
	wantErrno(t, writeSync(filepath.Join(m, "new"), ""), syscall.EEXIST)
	// An operation that fails by itself keeps its own error.
	must(t, r.LoseReply(1, syscall.EIO, OpMkdir))
	wantErrno(t, os.Mkdir(filepath.Join(m, "new"), 0o700), syscall.EEXIST)
}

func TestSlow(t *testing.T) {
	backing, m := dirs(t)
	r := spawn(t, backing, m)
	must(t, r.Slow(0, 30*time.Millisecond, 10<<20))
	begin := time.Now()
	must(t, os.Mkdir(filepath.Join(m, "d"), 0o700))
	if d := time.Since(begin); d < 30*time.Millisecond {
		t.Fatalf("a change took %v", d)
	}
	begin = time.Now()
	must(t, os.WriteFile(filepath.Join(m, "f"), make([]byte, 4<<20), 0o600))
	if d := time.Since(begin); d < 400*time.Millisecond {
		t.Fatalf("4 MiB at 10 MiB/s took %v", d)
	}
}

func TestMountAgainAfterTheServerWasKilled(t *testing.T) {
	backing, m := dirs(t)
	r, err := Spawn(backing, m)
	must(t, err)
	must(t, syscall.Kill(r.Pid(), syscall.SIGKILL))
	<-r.exit
	_, err = os.ReadDir(m)
	wantErrno(t, err, syscall.ENOTCONN)
	again := spawn(t, backing, m)
	must(t, os.WriteFile(filepath.Join(m, "f"), nil, 0o600))
	must(t, again.Unmount())
	must(t, again.Unmount())
}

func TestServerEndsWithAKilledParentThatHangs(t *testing.T) {
	backing, m := dirs(t)
	cmd := actor("spawn " + backing + " " + m)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line := make([]byte, len("spawned"))
	_, err = io.ReadFull(out, line)
	must(t, err)
	if string(line) != "spawned" {
		rest, _ := io.ReadAll(out)
		t.Fatalf("%s%s", line, rest)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // says that it was killed
	eventually(t, "the mount is gone", func() bool {
		_, dev, err := mounted(m)
		return err == nil && dev == 0
	})
}

func TestMountRefuses(t *testing.T) {
	backing, m := dirs(t)
	if _, err := Mount(filepath.Join(backing, "missing"), m, Options{}); err == nil {
		t.Error("a backing directory that is missing")
	}
	must(t, os.WriteFile(filepath.Join(m, "f"), nil, 0o600))
	if _, err := Mount(backing, m, Options{}); err == nil {
		t.Error("a mount point that is not empty")
	}
}
