package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
)

// engine is a Docker engine of a test's own, so that it can be restarted, killed and hung
// while the machine's engine serves everybody else. It has its own containerd, as on a
// machine where both are services, and its own bridge; it does not touch the machine's
// packet filter, and publishes ports by proxy alone.
type engine struct {
	host   string // for DOCKER_HOST
	root   string
	bridge string
	driver string
	ctrd   *exec.Cmd
	daemon *exec.Cmd
	done   chan struct{} // closed when daemon has ended
}

// engineImage is the database image that an engine is given.
const engineImage = "dbsupervisor/postgres:15"

// newEngine starts an engine that has the database image. The test's end removes it with
// everything that belongs to it.
func newEngine(t *testing.T) *engine {
	t.Helper()
	for _, p := range []string{"dockerd", "containerd", "ip"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs an engine of its own: %v", err)
		}
	}
	out, err := exec.Command("docker", "info", "-f", "{{.Driver}}").Output()
	must(t, err)
	e := &engine{root: tempDir(t), driver: strings.TrimSpace(string(out))}
	e.host = "unix://" + filepath.Join(e.root, "docker.sock")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("---- dockerd\n%s", tail(readFile(filepath.Join(e.root, "dockerd.log")), 60))
		}
		if err := e.close(); err != nil {
			t.Errorf("clean up engine: %v", err)
		}
	})
	must(t, e.addBridge())
	must(t, e.startContainerd())
	must(t, e.start())
	must(t, e.load())
	return e
}

// addBridge makes a bridge with a network that this machine has no route to yet. (Without
// one, or with "none", a daemon would take the machine's docker0 for its own.)
func (e *engine) addBridge() error {
	e.bridge = fmt.Sprintf("dbst%08x", rand.Uint32())
	if err := command("ip", "link", "add", e.bridge, "type", "bridge"); err != nil {
		e.bridge = ""
		return err
	}
	for range 20 {
		net3 := fmt.Sprintf("10.%d.%d", 200+rand.IntN(50), rand.IntN(256))
		if used(net3) {
			continue
		}
		if err := command("ip", "addr", "add", net3+".1/24", "dev", e.bridge); err != nil {
			return err
		}
		return command("ip", "link", "set", e.bridge, "up")
	}
	return errors.New("no free network found")
}

func used(net3 string) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.Contains(net.ParseIP(net3+".1")) {
			return true
		}
	}
	return false
}

func (e *engine) startContainerd() error {
	conf := filepath.Join(e.root, "containerd.toml")
	text := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, filepath.Join(e.root, "c"), filepath.Join(e.root, "cs"), e.ctrdSocket(), filepath.Join(e.root, "opt"))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	cmd, err := e.spawn("containerd", "--config", conf)
	if err != nil {
		return err
	}
	e.ctrd = cmd
	go func() { _ = cmd.Wait() }()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := cluster.Until(ctx, func() bool { _, err := os.Stat(e.ctrdSocket()); return err == nil }); err != nil {
		return fmt.Errorf("containerd is not up: %w", err)
	}
	return nil
}

func (e *engine) ctrdSocket() string { return filepath.Join(e.root, "c.sock") }

// spawn starts a program whose output goes to a log named like it.
func (e *engine) spawn(name string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(e.root, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd, cmd.Start()
}

// start starts the daemon, again if it has ended, and waits until it answers.
func (e *engine) start(extra ...string) error {
	// A daemon that was killed leaves this behind; the process ID may have been reused.
	_ = os.Remove(filepath.Join(e.root, "docker.pid"))
	// The machine's own settings are not for this one.
	conf := filepath.Join(e.root, "daemon.json")
	if err := os.WriteFile(conf, []byte("{}"), 0o600); err != nil {
		return err
	}
	cmd, err := e.spawn("dockerd", append([]string{
		"--config-file", conf,
		"--data-root", filepath.Join(e.root, "d"), "--exec-root", filepath.Join(e.root, "x"),
		"--pidfile", filepath.Join(e.root, "docker.pid"), "--host", e.host,
		"--containerd", e.ctrdSocket(), "--storage-driver", e.driver, "--bridge", e.bridge,
		"--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false",
	}, extra...)...)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	e.daemon, e.done = cmd, done
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := cluster.Until(ctx, func() bool { return e.docker(ctx, "version").Run() == nil || e.ended() }); err != nil || e.ended() {
		return fmt.Errorf("dockerd is not up: %w", errors.Join(err, errors.New(tail(readFile(filepath.Join(e.root, "dockerd.log")), 5))))
	}
	return nil
}

func (e *engine) ended() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

// load copies the database image from the machine's engine.
func (e *engine) load() error {
	save := exec.Command("docker", "save", engineImage)
	pipe, err := save.StdoutPipe()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	load := e.docker(ctx, "load")
	load.Stdin = pipe
	if err := save.Start(); err != nil {
		return err
	}
	out, err := load.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker load: %w: %s", err, out)
		_ = save.Process.Kill()
	}
	return errors.Join(err, save.Wait())
}

// docker is a command of this engine.
func (e *engine) docker(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+e.host)
	return cmd
}

// signal sends a signal to the daemon alone.
func (e *engine) signal(sig syscall.Signal) error { return e.daemon.Process.Signal(sig) }

// end ends the daemon with a signal and waits for it.
func (e *engine) end(sig syscall.Signal) error {
	if err := e.signal(sig); err != nil {
		return err
	}
	select {
	case <-e.done:
		return nil
	case <-time.After(30 * time.Second):
		return fmt.Errorf("dockerd (%d) does not end", e.daemon.Process.Pid)
	}
}

// revive makes the engine answer whatever a test has left it in, so that containers can be
// removed.
func (e *engine) revive() error {
	if e.daemon == nil {
		return nil
	}
	if e.ended() {
		return e.start()
	}
	return e.signal(syscall.SIGCONT)
}

// close ends everything that belongs to this engine and removes what it has mounted.
func (e *engine) close() error {
	var errs []error
	if e.daemon != nil && !e.ended() {
		_ = e.signal(syscall.SIGCONT)
		if err := e.end(syscall.SIGTERM); err != nil {
			errs = append(errs, err, e.end(syscall.SIGKILL))
		}
	}
	if e.ctrd != nil {
		_ = e.ctrd.Process.Kill()
	}
	// Shims, with what runs below them, and the storage driver's helpers outlive both.
	for range 3 {
		for _, pid := range e.leftover() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
	errs = append(errs, e.unmount())
	if e.bridge != "" {
		errs = append(errs, command("ip", "link", "del", e.bridge))
	}
	return errors.Join(append(errs, os.RemoveAll(e.root))...)
}

// leftover lists processes that were started for this engine: their command line or their
// control group leads to it.
func (e *engine) leftover() []int {
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if strings.Contains(readFile(filepath.Join(d, "cmdline")), e.root+"/") {
			out = append(out, pid)
		}
	}
	return out
}

// unmount takes away what is mounted below the engine's directory, the last first.
func (e *engine) unmount() error {
	var errs []error
	lines := strings.Split(readFile("/proc/self/mountinfo"), "\n")
	for n := len(lines) - 1; n >= 0; n-- {
		if f := strings.Fields(lines[n]); len(f) > 4 && strings.HasPrefix(f[4], e.root+"/") {
			errs = append(errs, syscall.Unmount(f[4], syscall.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
