// Package proxy has tests of clients that reach a cluster through one address: our own proxy,
// and a load balancer with the limits of a cloud's. Agents, guards, databases and haproxy
// are real.
package proxy

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
)

type environment struct{ binary, root string }

//nolint:gochecknoglobals // set once by TestMain, the only way to hand something to tests
var env environment

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if err := exec.Command("docker", "image", "inspect", "dbsupervisor/postgres:15").Run(); err != nil {
		fmt.Fprintln(os.Stderr, "no image dbsupervisor/postgres:15; run `make image` first")
		return 1
	}
	root, err := os.MkdirTemp("", "dbsupervisor-proxy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(root) }()
	env = environment{binary: filepath.Join(root, "dbsupervisor"), root: root}
	build := exec.Command("go", "build", "-o", env.binary, "dbsupervisor/cmd/dbsupervisor")
	build.Stderr = os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		return 1
	}
	return m.Run()
}

// start runs a cluster of n instances, the first one primary, the others warm.
func start(t *testing.T, n int, edit ...func(*cluster.Options)) (*cluster.Cluster, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	root, err := os.MkdirTemp(env.root, "c") // short enough for unix sockets
	must(t, err)
	o := cluster.Options{Root: root, Binary: env.binary, TTL: 4 * time.Second, Renew: time.Second, Margin: time.Second, Schedule: "@every 2s"}
	for _, e := range edit {
		e(&o)
	}
	c, err := cluster.New(o)
	must(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if t.Failed() {
			for _, i := range c.Instances {
				b, _ := os.ReadFile(i.LogPath("run"))
				lines := strings.Split(string(b), "\n")
				t.Logf("---- %s\n%s", i.Name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
			}
		}
	})
	for k := range n {
		i, err := c.Add("")
		must(t, err)
		must(t, i.Start())
		if k == 0 {
			_, err = c.WaitPrimary(ctx)
			must(t, err)
			// On a busy machine a freeze may take too long; the next one is tried then.
			within(t, ctx, time.Minute, "a first snapshot", func() bool { _, err := i.CLI(ctx, "sync"); return err == nil })
		} else {
			must(t, i.WaitWarm(ctx))
		}
	}
	return c, ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func within(t *testing.T, ctx context.Context, d time.Duration, what string, cond func() bool) {
	t.Helper()
	wctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	if err := cluster.Until(wctx, cond); err != nil {
		t.Fatalf("%s: not within %s", what, d)
	}
}

// freePort is one that nobody uses now.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// program is a process that is ended with the test.
type program struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
	log  string
}

func launch(t *testing.T, name string, args ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(name, args...), done: make(chan struct{}), log: filepath.Join(env.root, fmt.Sprintf("%s.%d.log", filepath.Base(name), time.Now().UnixNano()))}
	f, err := os.Create(p.log)
	must(t, err)
	defer f.Close()
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	must(t, p.cmd.Start())
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			b, _ := os.ReadFile(p.log)
			t.Logf("---- %s\n%s", name, b)
		}
	})
	return p
}

// startProxy runs `dbsupervisor proxy` for the cluster's instances and returns the port for
// writing.
func startProxy(t *testing.T, c *cluster.Cluster, more string) (p *program, port int) {
	t.Helper()
	port = freePort(t)
	var agents []string
	for _, i := range c.Instances {
		agents = append(agents, fmt.Sprintf("127.0.0.1:%d", i.HTTP))
	}
	path := filepath.Join(c.Root, fmt.Sprintf("proxy%d.yaml", port))
	text := fmt.Sprintf("cluster: %s\nagents: [%s]\nwrite: {listen: \"127.0.0.1:%d\"}\nhttp: {listen: \"\"}\nlog: {level: debug}\n%s",
		c.Name, strings.Join(agents, ", "), port, more)
	must(t, os.WriteFile(path, []byte(text), 0o600))
	p = launch(t, env.binary, "proxy", "--config", path)
	within(t, t.Context(), 20*time.Second, "the proxy listens", func() bool {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return p, port
}

func url(c *cluster.Cluster, port int) string { return c.URLAt(port) }

// caller is a cluster.Callers with a test around it.
type caller struct{ *cluster.Callers }

func call(t *testing.T, ctx context.Context, c *cluster.Cluster, port, callers int) caller {
	t.Helper()
	k, err := cluster.Call(ctx, url(c, port), callers)
	must(t, err)
	t.Cleanup(func() { k.Stop() })
	return caller{k}
}

// more waits for further acknowledged writes.
func (k caller) more(t *testing.T, ctx context.Context, n int) {
	t.Helper()
	wctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	must(t, k.More(wctx, n))
}
