package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/dockertest"

	"github.com/docker/docker/api/types/container"
)

const soon = 20 * time.Second

// lab is a connection to the real engine, the test image, and containers that are removed.
type lab struct {
	t *testing.T
	*Docker
	image string
}

func newLab(t *testing.T, cfg Config) *lab {
	t.Helper()
	l := &lab{t: t, image: dockertest.Image(t)}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	l.Docker = d
	return l
}

// spec returns a Spec with a name of the test's own.
func (l *lab) spec(cmd ...string) Spec {
	name := fmt.Sprintf("dbst-%d-%d", os.Getpid(), time.Now().UnixNano())
	l.t.Cleanup(func() { l.remove(name) })
	return Spec{
		Name: name, Image: l.image, Command: cmd,
		Labels: map[string]string{dockertest.Label: "container", LabelCluster: name, LabelTerm: "7"},
	}
}

func (l *lab) remove(name string) {
	d, err := New(Config{})
	if err != nil {
		l.t.Error(err)
		return
	}
	defer d.Close()
	ctx := context.Background()
	if err := errors.Join(d.Kill(ctx, name), d.Remove(ctx, name)); err != nil {
		l.t.Errorf("clean up: %v", err)
	}
}

func (l *lab) run(s Spec) Info {
	l.t.Helper()
	info, err := l.Run(l.t.Context(), s)
	if err != nil {
		l.t.Fatal(err)
	}
	return info
}

// logs waits for a line of the container's log.
func (l *lab) logs(id, line string) {
	l.t.Helper()
	dockertest.Until(l.t, soon, "the log says "+line, func() bool {
		lines, err := l.LastLogs(l.t.Context(), id, 100)
		return err == nil && strings.Contains("\n"+strings.Join(lines, "\n")+"\n", "\n"+line+"\n")
	})
}

func TestLife(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	ctx := t.Context()
	if err := l.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	s := l.spec("sleep")
	info := l.run(s)
	if !info.Running || info.Paused || info.Pid == 0 || info.StartedAt.IsZero() || info.Name != s.Name || len(info.ID) != 64 ||
		info.Labels[LabelTerm] != "7" || !strings.HasPrefix(info.ImageDigest, "sha256:") || info.IP == "" {
		t.Fatalf("after the start: %+v", info)
	}
	if _, err := l.Run(ctx, s); !errors.Is(err, ErrNameTaken) {
		t.Fatalf("second one of the name: %v", err)
	}
	// Adoption: by labels, running or not.
	found, err := l.Find(ctx, map[string]string{LabelCluster: s.Name, LabelTerm: "7"})
	if err != nil || len(found) != 1 || found[0].ID != info.ID || found[0].Pid != info.Pid {
		t.Fatalf("found %+v, %v", found, err)
	}
	for _, labels := range []map[string]string{{LabelCluster: s.Name, LabelTerm: "8"}, {LabelCluster: "none-" + s.Name}} {
		if found, err := l.Find(ctx, labels); err != nil || len(found) != 0 {
			t.Fatalf("%v: found %+v, %v", labels, found, err)
		}
	}
	if _, err := l.Find(ctx, nil); err == nil {
		t.Fatal("finds everybody's containers")
	}
	if err := l.Pause(ctx, info.ID); err != nil {
		t.Fatal(err)
	}
	if i, err := l.Inspect(ctx, s.Name); err != nil || !i.Running || !i.Paused {
		t.Fatalf("paused: %+v, %v", i, err)
	}
	for range 2 {
		if err := l.Unpause(ctx, info.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Remove(ctx, info.ID); err == nil || errors.Is(err, ErrUnavailable) {
		t.Fatalf("remove of a running container: %v", err)
	}
	for range 2 {
		if err := l.Stop(ctx, info.ID, 10*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	i, err := l.Inspect(ctx, info.ID)
	if err != nil || i.Running || i.ExitCode != 0 || i.Pid != 0 || i.FinishedAt.Before(i.StartedAt) {
		t.Fatalf("after the stop: %+v, %v", i, err)
	}
	if exit, err := l.Wait(ctx, info.ID); err != nil || exit != 0 {
		t.Fatalf("wait: %d, %v", exit, err)
	}
	if found, err := l.Find(ctx, map[string]string{LabelCluster: s.Name}); err != nil || len(found) != 1 {
		t.Fatalf("found after the stop: %+v, %v", found, err)
	}
	if err := l.Kill(ctx, info.ID); err != nil {
		t.Fatalf("kill of what does not run: %v", err)
	}
	for range 2 {
		if err := l.Remove(ctx, info.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, ierr := l.Inspect(ctx, info.ID)
	_, werr := l.Wait(ctx, info.ID)
	_, xerr := l.Exec(ctx, info.ID, []string{"/probe"})
	_, lerr := l.LastLogs(ctx, info.ID, 1)
	for _, err := range []error{ierr, werr, xerr, lerr, l.Start(ctx, info.ID), l.Stop(ctx, info.ID, 0)} {
		if !errors.Is(err, ErrNotFound) || errors.Is(err, ErrUnavailable) {
			t.Errorf("after the removal: %v", err)
		}
	}
	for _, id := range []string{info.ID, s.Name} {
		if err := l.Kill(ctx, id); err != nil {
			t.Errorf("kill of what is gone: %v", err)
		}
	}
}

// Only the agent may start a writer: a container that dies, or a daemon that comes up, must not.
func TestRestartPolicyIsAlwaysNo(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	s := l.spec("exit", "3")
	info := l.run(s)
	if info.Restart != "no" {
		t.Fatalf("restart policy is %q", info.Restart)
	}
	if got := dockertest.Docker(t, "inspect", "-f", "{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.AutoRemove}}", info.ID); got != "no false" {
		t.Fatalf("docker says %q", got)
	}
	if exit, err := l.Wait(t.Context(), info.ID); err != nil || exit != 3 {
		t.Fatalf("wait: %d, %v", exit, err)
	}
	i, err := l.Inspect(t.Context(), info.ID)
	if err != nil || i.Running || i.ExitCode != 3 {
		t.Fatalf("%+v, %v", i, err)
	}
	l.logs(info.ID, "last words")
	l.logs(info.ID, "and of what it died")
	lines, err := l.LastLogs(t.Context(), info.ID, 1)
	if err != nil || len(lines) != 1 {
		t.Fatalf("last line: %q, %v", lines, err)
	}
}

// Everything that a Spec can say, as the process in the container sees it.
func TestSpec(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	dir := t.TempDir()
	for name, text := range map[string]string{"env": "FROM_FILE=file\nBOTH=file\n", "conf": "mounted"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p1, p2 := dockertest.FreePort(t), dockertest.FreePort(t)
	s := l.spec("facts", "/proc/sys/net/core/somaxconn", "/etc/conf", "/run/secret/key", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
	s.EnvFile, s.Env = filepath.Join(dir, "env"), map[string]string{"FROM_MAP": "map", "BOTH": "map"}
	s.Files = []File{{Path: "/run/secret/key", Data: []byte("of mine"), Mode: 0o400, UID: 1234, GID: 5678}}
	s.Mounts = []Mount{{Source: filepath.Join(dir, "conf"), Target: "/etc/conf", ReadOnly: true}}
	s.Ports = []Port{{Container: 3050, Host: p1, Address: "127.0.0.1"}, {Container: p2}, {Container: 99, Host: p1, Address: "127.0.0.1", Protocol: "udp"}}
	s.ShmSize, s.Memory, s.CPUs = 96<<20, 128<<20, 0.5
	s.Ulimits = map[string]int64{"nofile": 4321}
	s.CapDrop, s.CapAdd = []string{"ALL"}, []string{"NET_ADMIN", "CAP_CHOWN"}
	s.Sysctls = map[string]string{"net.core.somaxconn": "777"}
	s.User, s.StopSignal, s.StopTimeout, s.Hostname, s.WorkDir = "1234:5678", "SIGUSR1", 1500*time.Millisecond, "db", "/tmp"
	info := l.run(s)
	if exit, err := l.Wait(t.Context(), info.ID); err != nil || exit != 0 {
		t.Fatalf("wait: %d, %v", exit, err)
	}
	for _, line := range []string{
		"uid=1234 gid=5678", "nofile=4321/4321", "shm=" + strconv.Itoa(96<<20), "capbnd=0000000000001001",
		"/proc/sys/net/core/somaxconn=777 <nil>", "/etc/conf=mounted <nil>", "/run/secret/key=of mine <nil>",
	} {
		l.logs(info.ID, line)
	}
	var c struct {
		Config struct {
			Env                              []string
			StopSignal, Hostname, WorkingDir string
			StopTimeout                      int
		}
		HostConfig struct {
			Memory, NanoCpus int64
			NetworkMode      string
			PortBindings     map[string][]struct{ HostIp, HostPort string }
			Mounts           []struct {
				Type     string
				ReadOnly bool
			}
		}
	}
	if err := json.Unmarshal([]byte(dockertest.Docker(t, "inspect", "-f", "{{json .}}", info.ID)), &c); err != nil {
		t.Fatal(err)
	}
	env := "\n" + strings.Join(c.Config.Env, "\n") + "\n"
	for _, e := range []string{"FROM_FILE=file", "FROM_MAP=map", "BOTH=map"} {
		if !strings.Contains(env, "\n"+e+"\n") {
			t.Errorf("environment %q lacks %s", c.Config.Env, e)
		}
	}
	if c.Config.StopSignal != "SIGUSR1" || c.Config.StopTimeout != 2 || c.Config.Hostname != "db" || c.Config.WorkingDir != "/tmp" {
		t.Errorf("config %+v", c.Config)
	}
	h := c.HostConfig
	if h.Memory != 128<<20 || h.NanoCpus != 5e8 || h.NetworkMode != "bridge" || len(h.Mounts) != 1 || h.Mounts[0].Type != "bind" || !h.Mounts[0].ReadOnly {
		t.Errorf("host config %+v", h)
	}
	for port, want := range map[string]string{
		"3050/tcp": fmt.Sprintf("[{127.0.0.1 %d}]", p1), "99/udp": fmt.Sprintf("[{127.0.0.1 %d}]", p1),
		fmt.Sprintf("%d/tcp", p2): fmt.Sprintf("[{ %d}]", p2),
	} {
		if got := fmt.Sprint(h.PortBindings[port]); got != want || len(h.PortBindings) != 3 {
			t.Errorf("port %s: %s, want %s", port, got, want)
		}
	}
}

func TestStopSignalAndTimeout(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	s := l.spec("usr1")
	s.StopSignal = "SIGUSR1"
	info := l.run(s)
	l.logs(info.ID, "ready")
	if err := l.Stop(t.Context(), info.ID, time.Minute); err != nil {
		t.Fatal(err)
	}
	if i, err := l.Inspect(t.Context(), info.ID); err != nil || i.ExitCode != 0 {
		t.Fatalf("it did not end by its own signal: %+v, %v", i, err)
	}
	info = l.run(l.spec("stubborn"))
	l.logs(info.ID, "ready")
	if err := l.Stop(t.Context(), info.ID, 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if i, err := l.Inspect(t.Context(), info.ID); err != nil || i.ExitCode != 137 {
		t.Fatalf("not killed after the timeout: %+v, %v", i, err)
	}
}

func TestKill(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	for _, state := range []string{"running", "paused", "frozen"} {
		info := l.run(l.spec("family", "2"))
		switch state {
		case "paused":
			if err := l.Pause(t.Context(), info.ID); err != nil {
				t.Fatal(err)
			}
		case "frozen":
			g, err := cgroup.Of(info.Pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := g.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Kill(t.Context(), info.ID); err != nil {
			t.Fatalf("%s: %v", state, err)
		}
		if i, err := l.Inspect(t.Context(), info.ID); err != nil || i.Running || i.ExitCode != 137 {
			t.Fatalf("%s: after the kill: %+v, %v", state, i, err)
		}
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	s := l.spec("sleep")
	s.Env = map[string]string{"GREETING": "hello"}
	info := l.run(s)
	res, err := l.Exec(t.Context(), info.ID, []string{"/probe", "env"})
	if err != nil || res.ExitCode != 0 || !strings.Contains(res.Stdout, "GREETING=hello\n") || res.Stderr != "" {
		t.Fatalf("%+v, %v", res, err)
	}
	res, err = l.Exec(t.Context(), info.ID, []string{"/probe", "exit", "5"})
	if err != nil || res.ExitCode != 5 || res.Stdout != "last words\n" || res.Stderr != "and of what it died\n" {
		t.Fatalf("%+v, %v", res, err)
	}
	res, err = l.Exec(t.Context(), info.ID, []string{"/no/such/command", "hunter2"})
	if err == nil && res.ExitCode == 0 || err != nil && strings.Contains(err.Error(), "hunter2") {
		t.Fatalf("missing command: %+v, %v", res, err)
	}
	if _, err := l.Exec(t.Context(), info.ID, nil); !errors.Is(err, ErrInvalidSpec) {
		t.Fatalf("no command: %v", err)
	}
	// A command that hangs, and any command in a frozen container: back when ctx ends.
	short := func() (time.Duration, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		res, err := l.Exec(ctx, info.ID, []string{"/probe", "sleep"})
		if err == nil && res.ExitCode == 0 {
			t.Fatalf("a command that never ends has ended: %+v", res)
		}
		t.Logf("%+v, %v", res, err)
		return time.Since(start), err
	}
	if d, err := short(); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnavailable) || d > 10*time.Second {
		t.Fatalf("hanging command: %v after %s", err, d)
	}
	g, err := cgroup.Of(info.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.Thaw(); err != nil {
			t.Error(err)
		}
	}()
	// (Some runtimes look at the freezer first and fail at once.)
	if d, err := short(); err != nil && !errors.Is(err, context.DeadlineExceeded) || d > 10*time.Second {
		t.Fatalf("in a frozen container: %v after %s", err, d)
	}
}

func TestLimited(t *testing.T) {
	var l limited
	for range 3 {
		if n, err := l.Write(make([]byte, maxOutput/2+1)); n != maxOutput/2+1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if l.Len() != maxOutput {
		t.Fatalf("kept %d", l.Len())
	}
}

func TestLongLogLines(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("first\n"+strings.Repeat("x", 100_000)+"\nno end"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := l.spec("cat", "/f")
	s.Mounts = []Mount{{Source: filepath.Join(dir, "f"), Target: "/f"}}
	info := l.run(s)
	if _, err := l.Wait(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	l.logs(info.ID, "no end")
	lines, err := l.LastLogs(t.Context(), info.ID, 50)
	if err != nil || lines[0] != "first" {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	for _, line := range lines {
		if len(line) > maxLogLine {
			t.Fatalf("line of %d bytes", len(line))
		}
	}
	if lines, err := l.LastLogs(t.Context(), info.ID, 0); err != nil || len(lines) != 0 {
		t.Fatalf("no lines: %q, %v", lines, err)
	}
}

func TestBadSpecs(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	used, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer used.Close()
	for _, c := range []struct {
		name string
		edit func(*Spec)
		want error
		text string
	}{
		{"relative mount", func(s *Spec) { s.Mounts = []Mount{{Source: "x", Target: "/y"}} }, ErrInvalidSpec, "absolute"},
		{"mount of nothing", func(s *Spec) { s.Mounts = []Mount{{Source: "/no/such/dir", Target: "/y"}} }, ErrInvalidSpec, "/no/such/dir"},
		{"port", func(s *Spec) { s.Ports = []Port{{Container: 70000}} }, ErrInvalidSpec, "70000"},
		{"protocol", func(s *Spec) { s.Ports = []Port{{Container: 7, Protocol: "x"}} }, ErrInvalidSpec, "7/x"},
		{"CPUs", func(s *Spec) { s.CPUs = -1 }, ErrInvalidSpec, "CPUs"},
		{"ulimit", func(s *Spec) { s.Ulimits = map[string]int64{"nofile": -2} }, ErrInvalidSpec, "nofile"},
		{"file path", func(s *Spec) { s.Files = []File{{Path: "/a/../../b"}} }, ErrInvalidSpec, "/a/../../b"},
		{"environment", func(s *Spec) { s.Env = map[string]string{"A B": "hunter2"} }, ErrInvalidSpec, "A B"},
		{"image", func(s *Spec) { s.Image = "dbsupervisor-test:none" }, ErrNoImage, "dbsupervisor-test:none"},
		{"network", func(s *Spec) { s.Network = "no-such-network" }, nil, "no-such-network"},
		{"entry point", func(s *Spec) {
			s.Entrypoint = []string{"/bin/hunter2hunter2"}
			s.Env = map[string]string{"PASSWORD": "hunter2hunter2"}
		}, nil, "***"},
		{"port is used", func(s *Spec) {
			s.Ports = []Port{{Container: 1, Host: used.Addr().(*net.TCPAddr).Port, Address: "127.0.0.1"}}
		}, nil, "address already in use"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := l.spec("sleep")
			c.edit(&s)
			info, err := l.Run(t.Context(), s)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) ||
				strings.Contains(err.Error(), "hunter2") || errors.Is(err, ErrUnavailable) {
				t.Fatalf("got %v", err)
			}
			if info.ID != "" {
				t.Errorf("names a container: %+v", info)
			}
			if found, err := l.Find(t.Context(), map[string]string{LabelCluster: s.Name}); err != nil || len(found) != 0 {
				t.Errorf("left behind: %+v, %v", found, err)
			}
		})
	}
}

func TestEnsureImage(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	ctx := t.Context()
	id := dockertest.Docker(t, "image", "inspect", "-f", "{{.Id}}", l.image)
	for _, c := range []struct {
		ref, pull, want string
		err             error
	}{
		{l.image, "", id, nil},
		{l.image, PullMissing, id, nil},
		{l.image, PullNever, id, nil},
		{id, PullNever, id, nil},
		{id, PullAlways, id, nil},
		{"dbsupervisor-test:none", PullNever, "", ErrNoImage},
		{"sha256:" + strings.Repeat("0", 64), "", "", ErrNoImage},
		{l.image, "sometimes", "", ErrInvalidSpec},
	} {
		got, err := l.EnsureImage(ctx, c.ref, c.pull, nil)
		if got != c.want || !errors.Is(err, c.err) || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s, %q: %q, %v; want %q, %v", c.ref, c.pull, got, err, c.want, c.err)
		}
	}
}

// A registry on loopback that is not there, and one that accepts and says nothing.
func TestPullFails(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{PullStall: time.Second})
	hung, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	for _, addr := range []string{fmt.Sprintf("127.0.0.1:%d", dockertest.FreePort(t)), hung.Addr().String()} {
		ref := addr + "/none:1"
		if _, err := l.EnsureImage(t.Context(), ref, "", nil); !errors.Is(err, ErrNoImage) || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", addr, err)
		}
		// With a copy at hand, "always" makes do with that.
		dockertest.Docker(t, "tag", l.image, ref)
		t.Cleanup(func() { dockertest.Docker(t, "rmi", ref) })
		if got, err := l.EnsureImage(t.Context(), ref, PullAlways, nil); err != nil || got == "" {
			t.Errorf("%s, always: %q, %v", addr, got, err)
		}
	}
}

func TestRepository(t *testing.T) {
	for in, want := range map[string]string{
		"postgres": "postgres", "postgres:16": "postgres", "docker.io/library/postgres:16": "postgres",
		"index.docker.io/library/postgres": "postgres", "postgres@sha256:ab": "postgres", "postgres:16@sha256:ab": "postgres",
		"host:5000/a/b": "host:5000/a/b", "host:5000/a/b:tag": "host:5000/a/b", "me/mine:1": "me/mine",
	} {
		if got := repository(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestPullReport(t *testing.T) {
	var got []string
	p := pullReport{ref: "db:1", layers: map[string]layer{}, say: func(s string) { got = append(got, s) }}
	msg := func(id, status string, done, total int64) {
		m := pullMessage{ID: id, Status: status}
		m.Progress.Current, m.Progress.Total = done, total
		p.add(m)
	}
	msg("1", "Pulling from library/db", 0, 0)
	msg("a", "Already exists", 0, 0)
	msg("b", "Downloading", 0, 1<<20)
	msg("b", "Downloading", 1, 1<<20) // not a whole percent
	msg("b", "Downloading", 1<<19, 1<<20)
	msg("c", "Downloading", 0, 1<<20)
	msg("b", "Download complete", 0, 0)
	msg("b", "Extracting", 5, 1<<20)
	msg("c", "Download complete", 0, 0)
	want := "pulling db:1: 0 % of 1.0 MiB|pulling db:1: 50 % of 1.0 MiB|pulling db:1: 25 % of 2.0 MiB|pulling db:1: 50 % of 2.0 MiB|pulling db:1: 100 % of 2.0 MiB"
	if s := strings.Join(got, "|"); s != want {
		t.Fatalf("got  %s\nwant %s", s, want)
	}
}

// daemonProxy stands between a test and the real daemon: it can hang and it can go away.
type daemonProxy struct {
	path string
	mu   sync.Mutex
	l    net.Listener
	hung bool
	open map[net.Conn]bool
}

func newProxy(t *testing.T) *daemonProxy {
	t.Helper()
	p := &daemonProxy{path: filepath.Join(t.TempDir(), "docker.sock"), open: map[net.Conn]bool{}}
	p.up(t)
	t.Cleanup(p.down)
	return p
}

func (p *daemonProxy) up(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.l = l
	p.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
}

func (p *daemonProxy) serve(c net.Conn) {
	s, err := net.Dial("unix", "/var/run/docker.sock")
	if err != nil {
		_ = c.Close()
		return
	}
	p.mu.Lock()
	p.open[c], p.open[s] = true, true
	p.mu.Unlock()
	pipe := func(to, from net.Conn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				_ = to.Close()
				return
			}
			p.mu.Lock()
			hung := p.hung
			p.mu.Unlock()
			if hung {
				continue // swallowed: no answer will come
			}
			if _, err := to.Write(buf[:n]); err != nil {
				_ = from.Close()
				return
			}
		}
	}
	go pipe(s, c)
	pipe(c, s)
}

func (p *daemonProxy) hang(yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung = yes
}

// down ends all connections and removes the socket, as a stopped daemon does.
func (p *daemonProxy) down() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.l.Close()
	for c := range p.open {
		_ = c.Close()
	}
	clear(p.open)
}

func TestDaemonHangs(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	info := newLab(t, Config{}).run((&lab{t: t, image: dockertest.Image(t)}).spec("sleep"))
	l := newLab(t, Config{Host: "unix://" + p.path, Timeout: 300 * time.Millisecond})
	dockertest.Until(t, soon, "the daemon answers through the proxy", func() bool { return l.Ping(t.Context()) == nil })
	p.hang(true)
	ctx := t.Context()
	calls(ctx, l, info.ID, func(name string, took time.Duration, err error) {
		if !errors.Is(err, ErrUnavailable) || took > 10*time.Second {
			t.Errorf("%s: %v after %s", name, err, took)
		}
	})
	// Those without a limit of their own end with ctx; a cancelled call is not the daemon's fault.
	for name, call := range map[string]func(context.Context) error{
		"wait": func(ctx context.Context) error { _, err := l.Wait(ctx, info.ID); return err },
		"exec": func(ctx context.Context) error { _, err := l.Exec(ctx, info.ID, []string{"/probe"}); return err },
		"ping": l.Ping,
	} {
		c, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		// A wait that is not answered can't be told from a container that runs on.
		if err := call(c); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnavailable) != (name != "wait") {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		c, cancel = context.WithCancel(ctx)
		time.AfterFunc(50*time.Millisecond, cancel)
		if err := call(c); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s, cancelled: %v", name, err)
		}
	}
	// The fence works without the daemon.
	if err := l.Kill(ctx, info.ID); err != nil {
		t.Errorf("kill: %v", err)
	}
	p.hang(false)
	dockertest.Until(t, soon, "the daemon answers again", func() bool { return l.Ping(ctx) == nil })
	dockertest.Until(t, soon, "the container is dead", func() bool {
		i, err := l.Inspect(ctx, info.ID)
		return err == nil && !i.Running && i.ExitCode == 137
	})
}

// calls tries everything that has a limit of its own.
func calls(ctx context.Context, l *lab, id string, check func(string, time.Duration, error)) {
	l.t.Helper()
	for name, call := range map[string]func() error{
		"ping":    func() error { return l.Ping(ctx) },
		"image":   func() error { _, err := l.EnsureImage(ctx, l.image, "", nil); return err },
		"run":     func() error { _, err := l.Run(ctx, l.spec("sleep")); return err },
		"start":   func() error { return l.Start(ctx, id) },
		"inspect": func() error { _, err := l.Inspect(ctx, id); return err },
		"find":    func() error { _, err := l.Find(ctx, map[string]string{"a": "b"}); return err },
		"stop":    func() error { return l.Stop(ctx, id, 0) },
		"pause":   func() error { return l.Pause(ctx, id) },
		"unpause": func() error { return l.Unpause(ctx, id) },
		"remove":  func() error { return l.Remove(ctx, id) },
		"logs":    func() error { _, err := l.LastLogs(ctx, id, 5); return err },
	} {
		start := time.Now()
		err := call()
		check(name, time.Since(start), err)
	}
}

func TestDaemonRestarts(t *testing.T) {
	t.Parallel()
	p := newProxy(t)
	l := newLab(t, Config{Host: "unix://" + p.path})
	ctx := t.Context()
	info := l.run(l.spec("sleep"))
	waited := make(chan error, 1)
	go func() { _, err := l.Wait(ctx, info.ID); waited <- err }()
	executed := make(chan error, 1)
	go func() { _, err := l.Exec(ctx, info.ID, []string{"/probe", "sleep"}); executed <- err }()
	dockertest.Until(t, soon, "the command runs", func() bool {
		return strings.Count(dockertest.Docker(t, "top", info.ID), "/probe") == 2
	})
	p.down()
	for name, ch := range map[string]chan error{"wait": waited, "exec": executed} {
		select {
		case err := <-ch:
			if !errors.Is(err, ErrUnavailable) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(soon):
			t.Fatalf("%s did not notice", name)
		}
	}
	calls(ctx, l, info.ID, func(name string, _ time.Duration, err error) {
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	})
	p.up(t)
	if i, err := l.Inspect(ctx, info.ID); err != nil || !i.Running || i.Pid != info.Pid {
		t.Fatalf("after the restart: %+v, %v", i, err)
	}
}

// A daemon that takes an order and dies before it answers may still carry it out: Run must not
// pretend that there is no container.
func TestStartOfUnknownOutcome(t *testing.T) {
	t.Parallel()
	l := newLab(t, Config{})
	l.cli = &lostStart{l.cli}
	s := l.spec("sleep")
	info, err := l.Run(t.Context(), s)
	if !errors.Is(err, ErrUnavailable) || info.ID == "" {
		t.Fatalf("%+v, %v", info, err)
	}
	if i, err := l.Inspect(t.Context(), info.ID); err != nil || !i.Running {
		t.Fatalf("this test shows nothing: %+v, %v", i, err)
	}
	if err := l.Kill(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
}

type lostStart struct{ engine }

func (e *lostStart) ContainerStart(ctx context.Context, id string, o container.StartOptions) error {
	if err := e.engine.ContainerStart(ctx, id, o); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}

func TestNoDaemon(t *testing.T) {
	d, err := New(Config{Host: "unix:///no/such/docker.sock"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Ping(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if _, err := New(Config{Host: "nonsense"}); err == nil {
		t.Fatal("a bad address was taken")
	}
}
