package fence

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/dockertest"
)

// testGate returns a gate with a table of its own, which is removed when the test ends.
func testGate(t testing.TB, ports ...int) *Gate {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	cfg := GateConfig{Table: fmt.Sprintf("dbst-%d-%d", os.Getpid(), ports[0])}
	for _, p := range ports {
		cfg.Ports = append(cfg.Ports, uint16(p))
	}
	g := NewGate(cfg)
	t.Cleanup(func() {
		if err := NewGate(cfg).Remove(context.Background()); err != nil {
			t.Errorf("remove gate: %v", err)
		}
	})
	return g
}

func nft(t testing.TB, script string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

// client is one TCP connection of a test.
type client struct {
	net.Conn
	in *bufio.Scanner
}

func newClient(c net.Conn) *client { return &client{c, bufio.NewScanner(c)} }

// say sends a line and waits for the same line.
func (c *client) say(line string, limit time.Duration) error {
	_ = c.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	if !c.in.Scan() {
		if err := c.in.Err(); err != nil {
			return err
		}
		return errors.New("end of file")
	}
	if c.in.Text() != line {
		return fmt.Errorf("said %q, heard %q", line, c.in.Text())
	}
	return nil
}

// isReset says that the connection was ended by the other side or the gate, not by silence.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || err != nil && err.Error() == "end of file"
}

// route is one way from a client to the server.
type route struct {
	name string
	dial func() (net.Conn, error)
}

func dialer(addr string) func() (net.Conn, error) {
	return func() (net.Conn, error) { return net.DialTimeout("tcp", addr, 3*time.Second) }
}

// hostServer answers lines on all addresses of this machine, like a database in a container
// with the host's network.
func hostServer(t testing.TB) int {
	t.Helper()
	port, _ := hostServerLog(t)
	return port
}

// hostServerLog also returns what the server says.
func hostServerLog(t testing.TB) (port int, log func() string) {
	t.Helper()
	cmd := exec.Command(dockertest.Binary(t), "serve", "")
	port = dockertest.FreePort(t)
	cmd.Args[2] = ":" + strconv.Itoa(port)
	file := filepath.Join(t.TempDir(), "log")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	log = func() string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	dockertest.Until(t, soon, "the server listens", func() bool { return log() == "listening\n" })
	return port, log
}

// containerServer is the same behind a port that Docker publishes.
func containerServer(t testing.TB) (id string, port int) {
	t.Helper()
	image := dockertest.Image(t)
	port = dockertest.FreePort(t)
	id = dockertest.Run(t, "fence", "-p", fmt.Sprintf("%d:5432", port), image, "serve", ":5432")
	dockertest.Until(t, 20*time.Second, "the container serves", func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return false
		}
		defer c.Close()
		return newClient(c).say("hello", 3*time.Second) == nil
	})
	return id, port
}

// outside makes a network namespace that reaches this machine over a cable of its own.
func outside(t testing.TB, octet int) (ns, hostAddr string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ns = fmt.Sprintf("dbst-%d-%d", os.Getpid(), octet)
	veth := fmt.Sprintf("dbst%d%d", os.Getpid()%100000, octet)
	hostAddr = fmt.Sprintf("10.213.%d.1", octet)
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v\n%s", args, err, out)
		}
	}
	run("netns", "add", ns)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
	run("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", ns)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", veth).Run() })
	run("addr", "add", hostAddr+"/24", "dev", veth)
	run("link", "set", veth, "up")
	run("-n", ns, "link", "set", "lo", "up")
	run("-n", ns, "addr", "add", fmt.Sprintf("10.213.%d.2/24", octet), "dev", "eth0")
	run("-n", ns, "link", "set", "eth0", "up")
	run("-n", ns, "route", "add", "default", "via", hostAddr)
	return ns, hostAddr
}

// dialFrom connects from inside of a network namespace.
func dialFrom(ns, addr string) func() (net.Conn, error) {
	return func() (net.Conn, error) {
		var c net.Conn
		err := inNamespace(ns, func() (err error) {
			c, err = net.DialTimeout("tcp", addr, 3*time.Second)
			return err
		})
		return c, err
	}
}

// routes are all the ways to a server on this machine: loopback (through Docker's proxy for a
// container), an address of this machine's own, and from outside.
func routes(t testing.TB, port, octet int) []route {
	t.Helper()
	ns, hostAddr := outside(t, octet)
	p := strconv.Itoa(port)
	return []route{
		{"loopback", dialer("127.0.0.1:" + p)},
		{"loopback, IPv6", dialer("[::1]:" + p)},
		{"own address", dialer(hostAddr + ":" + p)},
		{"from outside", dialFrom(ns, hostAddr+":"+p)},
	}
}

// checkCut opens the gate for d, talks over all routes at once, keeps the gate open past the
// first timer, and then lets it be. It reports how long after the end of the last timer each
// connection was cut; a route that was not is missing.
func checkCut(t *testing.T, g *Gate, rs []route) map[string]time.Duration {
	t.Helper()
	const d = 1500 * time.Millisecond
	ctx := t.Context()
	open := func() {
		t.Helper()
		if err := g.OpenFor(ctx, d); err != nil {
			t.Fatal(err)
		}
	}
	open()
	start := time.Now()
	type end struct {
		at  time.Time
		err error
	}
	ends := make([]end, len(rs))
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, r := range rs {
		conn, err := r.dial()
		if err != nil {
			t.Fatalf("%s: open gate refused: %v", r.name, err)
		}
		wg.Go(func() {
			defer conn.Close()
			c := newClient(conn)
			for time.Since(start) < 4*d {
				if err := c.say("x", 3*time.Second); err != nil {
					ends[i] = end{time.Now(), err}
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	for i := 1; i <= 3; i++ { // at the half of the timer, past the first one's end
		time.Sleep(time.Until(start.Add(time.Duration(i) * d / 2)))
		open()
	}
	last := time.Now()
	wg.Wait()
	late := map[string]time.Duration{}
	for i, r := range rs {
		switch e := ends[i]; {
		case e.err == nil:
		case !isReset(e.err):
			t.Errorf("%s: want a reset, got %v", r.name, e.err)
		default:
			late[r.name] = e.at.Sub(last) - d
		}
	}
	return late
}

func TestGateCutsEstablishedConnections(t *testing.T) {
	t.Parallel()
	_, containerPort := containerServer(t)
	for i, s := range []struct {
		name string
		port int
	}{{"container", containerPort}, {"host", hostServer(t)}} {
		rs := routes(t, s.port, 10+i)
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			refused := func(when string) {
				t.Helper()
				for _, r := range rs {
					c, err := r.dial()
					if err == nil {
						_ = c.Close()
					}
					if !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("%s, %s: %v, want refused", when, r.name, err)
					}
				}
			}
			g := testGate(t, s.port)
			if err := g.Install(t.Context()); err != nil {
				t.Fatal(err)
			}
			refused("closed gate")
			late := checkCut(t, g, rs)
			for _, r := range rs {
				d, cut := late[r.name]
				if !cut {
					t.Errorf("%s: connection went on after the timer's end", r.name)
				}
				t.Logf("%s: cut %s after the timer's end", r.name, d)
				// The time that nft itself takes is on the near side.
				if d < -300*time.Millisecond {
					t.Errorf("%s: cut %s before the timer's end", r.name, -d)
				}
			}
			refused("after the timer's end")
		})
	}
}

// The point of it all: nothing that a client sends over an established connection after the
// end reaches the server, whichever way it comes.
func TestNothingArrivesAfterTheEnd(t *testing.T) {
	t.Parallel()
	id, containerPort := containerServer(t)
	hostPort, hostLog := hostServerLog(t)
	for i, s := range []struct {
		name string
		port int
		log  func() string
	}{
		{"container", containerPort, func() string { return dockertest.Docker(t, "logs", id) }},
		{"host", hostPort, hostLog},
	} {
		g := testGate(t, s.port)
		if err := g.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		for j, r := range routes(t, s.port, 40+i) {
			t.Run(s.name+", "+r.name, func(t *testing.T) {
				if err := g.OpenFor(t.Context(), time.Minute); err != nil {
					t.Fatal(err)
				}
				conn, err := r.dial()
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				c := newClient(conn)
				word := func(w string) string { return fmt.Sprintf("%s-%d", w, j) }
				if err := c.say(word("early"), soon); err != nil {
					t.Fatal(err)
				}
				if err := g.Close(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := c.say(word("late"), soon); !isReset(err) {
					t.Errorf("%v, want a reset", err)
				}
				// A later connection's words are in the log after all that came before.
				if err := g.OpenFor(t.Context(), time.Minute); err != nil {
					t.Fatal(err)
				}
				again, err := r.dial()
				if err != nil {
					t.Fatal(err)
				}
				defer again.Close()
				if err := newClient(again).say(word("marker"), soon); err != nil {
					t.Fatal(err)
				}
				dockertest.Until(t, soon, "the log is there", func() bool { return strings.Contains(s.log(), "got "+word("marker")) })
				log := s.log()
				if !strings.Contains(log, "got "+word("early")) || strings.Contains(log, "got "+word("late")) {
					t.Fatalf("the server got what it should not, or nothing:\n%s", log)
				}
			})
		}
	}
}

// Without the rules the very check above must not see a cut: it is the gate that cuts, not a
// server that ends, or a time-out in the test.
func TestWithoutRulesNothingIsCut(t *testing.T) {
	t.Parallel()
	port := hostServer(t)
	g := testGate(t, port)
	if err := g.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	nft(t, fmt.Sprintf("flush table inet %s", g.cfg.Table))
	if late := checkCut(t, g, []route{{"loopback", dialer(fmt.Sprintf("127.0.0.1:%d", port))}}); len(late) != 0 {
		t.Fatal("cut without a rule")
	}
}

// A client that only waits must be told too, when the server answers after the end and when
// the server is killed.
func TestSilentClientsAreReset(t *testing.T) {
	t.Parallel()
	id, containerPort := containerServer(t)
	hostPort := hostServer(t)
	wait := func(t *testing.T, r route, g *Gate, line string, after func()) {
		t.Helper()
		if err := g.OpenFor(t.Context(), 10*time.Second); err != nil {
			t.Fatal(err)
		}
		conn, err := r.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := newClient(conn)
		if err := c.say("hello", 3*time.Second); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			// The request must be through before the gate closes.
			time.Sleep(100 * time.Millisecond)
			if err := g.Close(context.Background()); err != nil {
				t.Error(err)
			}
			after()
		})
		start := time.Now()
		if err := c.say(line, 8*time.Second); !isReset(err) {
			t.Fatalf("after %s: %v, want a reset", time.Since(start), err)
		}
	}
	for i, s := range []struct {
		name string
		port int
	}{{"container", containerPort}, {"host", hostPort}} {
		for _, r := range routes(t, s.port, 20+i) {
			t.Run("late answer: "+s.name+", "+r.name, func(t *testing.T) {
				g := testGate(t, s.port)
				if err := g.Install(t.Context()); err != nil {
					t.Fatal(err)
				}
				wait(t, r, g, "sleep 300ms", func() {})
			})
		}
	}
	for _, r := range routes(t, containerPort, 22) {
		t.Run("killed: "+r.name, func(t *testing.T) {
			dockertest.Docker(t, "restart", "-t", "0", id)
			dockertest.Until(t, 20*time.Second, "the container serves", func() bool {
				c, err := r.dial()
				if err != nil {
					return false
				}
				defer c.Close()
				return newClient(c).say("hello", 3*time.Second) == nil
			})
			g := testGate(t, containerPort)
			if err := g.Install(t.Context()); err != nil {
				t.Fatal(err)
			}
			wait(t, r, g, "sleep 1h", func() { dockertest.Docker(t, "kill", id) })
		})
	}
}

// Only ports of this machine are gated: not other ports, and not the same port elsewhere.
func TestGateLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	gated, other := hostServer(t), hostServer(t)
	g := testGate(t, gated)
	if err := g.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	say := func(dial func() (net.Conn, error)) error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return newClient(c).say("hello", 3*time.Second)
	}
	if err := say(dialer(fmt.Sprintf("127.0.0.1:%d", other))); err != nil {
		t.Errorf("other port: %v", err)
	}
	// A client elsewhere whose packets this machine only forwards, and one on this machine.
	nsA, _ := outside(t, 30)
	nsB, _ := outside(t, 31)
	addr := fmt.Sprintf("10.213.31.2:%d", gated)
	var l net.Listener
	if err := inNamespace(nsB, func() (err error) { l, err = net.Listen("tcp", addr); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for in := bufio.NewScanner(c); in.Scan(); {
					fmt.Fprintln(c, in.Text())
				}
			}()
		}
	}()
	if err := say(dialer(addr)); err != nil {
		t.Errorf("same port on another machine: %v", err)
	}
	if forwards(t) {
		if err := say(dialFrom(nsA, addr)); err != nil {
			t.Errorf("forwarded to the same port on another machine: %v", err)
		}
	}
}

// forwards reports whether this machine's firewall (Docker's, as a rule) lets the two test
// networks talk; the test adds a rule for them if that is possible.
func forwards(t *testing.T) bool {
	rule := []string{"FORWARD", "-s", "10.213.0.0/16", "-d", "10.213.0.0/16", "-j", "ACCEPT"}
	if err := exec.Command("iptables", append([]string{"-I"}, rule...)...).Run(); err != nil {
		return false
	}
	t.Cleanup(func() { _ = exec.Command("iptables", append([]string{"-D"}, rule...)...).Run() })
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

func TestGateLife(t *testing.T) {
	ctx := t.Context()
	port, port2 := dockertest.FreePort(t), dockertest.FreePort(t)
	g := testGate(t, port, port2)
	state := func(want bool, atMost time.Duration) {
		t.Helper()
		open, left, err := g.IsOpen(ctx)
		if err != nil || open != want || left > atMost || open && left < atMost-5*time.Second {
			t.Fatalf("open %v for %s, %v; want %v for %s", open, left, err, want, atMost)
		}
	}
	if _, _, err := g.IsOpen(ctx); err == nil {
		t.Fatal("a gate that is not installed has a state")
	}
	if err := g.Install(ctx); err != nil {
		t.Fatal(err)
	}
	state(false, 0)
	if err := g.OpenFor(ctx, time.Minute); err != nil {
		t.Fatal(err)
	}
	state(true, time.Minute)
	if err := g.OpenFor(ctx, 26*time.Hour); err != nil { // longer, in days
		t.Fatal(err)
	}
	state(true, 26*time.Hour)
	if err := g.OpenFor(ctx, 30*time.Second); err != nil { // and shorter
		t.Fatal(err)
	}
	state(true, 30*time.Second)
	// An agent that starts anew leaves a running timer alone, even with other ports.
	if err := g.Install(ctx); err != nil {
		t.Fatal(err)
	}
	state(true, 30*time.Second)
	nft(t, fmt.Sprintf("delete element inet %s open { %d }", g.cfg.Table, port2))
	state(false, 0) // one of two is not open
	if err := g.OpenFor(ctx, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	state(false, 0)
	// Somebody flushes the firewall: the next renewal puts the gate back, a closing one, too.
	nft(t, "delete table inet "+g.cfg.Table)
	if err := g.OpenFor(ctx, time.Minute); err != nil {
		t.Fatal(err)
	}
	state(true, time.Minute)
	nft(t, "delete table inet "+g.cfg.Table)
	if err := g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	state(false, 0)
	if err := g.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestGateTooLate(t *testing.T) {
	port := dockertest.FreePort(t)
	g := testGate(t, port)
	ctx := t.Context()
	if err := g.OpenFor(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := g.OpenUntil(ctx, boottime.Real{}.Now()); !errors.Is(err, ErrTooLate) {
		t.Fatalf("a deadline that is over: %v", err)
	}
	if open, _, err := g.IsOpen(ctx); err != nil || open {
		t.Fatalf("open %v, %v after a deadline that was over", open, err)
	}
	// The caller is stopped after it has read the clock and before the kernel hears of it.
	slow := filepath.Join(t.TempDir(), "nft")
	if err := os.WriteFile(slow, []byte("#!/bin/sh\nscript=$(cat)\nsleep 0.5\necho \"$script\" | exec nft -f -\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	late := NewGate(GateConfig{Table: g.cfg.Table, Ports: g.cfg.Ports, NFT: []string{slow}})
	if err := late.OpenUntil(ctx, boottime.Real{}.Now().Add(300*time.Millisecond)); !errors.Is(err, ErrTooLate) {
		t.Fatalf("late: %v", err)
	}
	if open, left, err := g.IsOpen(ctx); err != nil || open {
		t.Fatalf("open %v for %s, %v: longer than asked for", open, left, err)
	}
}

func TestGateErrors(t *testing.T) {
	ctx := t.Context()
	for _, c := range []GateConfig{
		{Table: "x y", Ports: []uint16{1}}, {Table: "", Ports: []uint16{1}}, {Table: "a; flush ruleset", Ports: []uint16{1}},
		{Table: "x"}, {Table: "x", Ports: []uint16{0, 1}},
	} {
		c.NFT = []string{"false"}
		if err := NewGate(c).Install(ctx); err == nil || strings.Contains(err.Error(), "run nft") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	g := NewGate(GateConfig{Table: "x", Ports: []uint16{1}, NFT: []string{"/nonexistent/nft"}})
	if err := g.Install(ctx); err == nil {
		t.Error("missing command is no error")
	}
	g = NewGate(GateConfig{Table: "x", Ports: []uint16{1}, NFT: []string{"no-such-nft-command"}})
	if err := g.Install(ctx); !errors.Is(err, ErrNoNFT) {
		t.Errorf("missing command: %v", err)
	}
	// A command that hangs, with a child that keeps its pipes open.
	g = NewGate(GateConfig{Table: "x", Ports: []uint16{1}, NFT: []string{"sh", "-c", "sleep 20 & sleep 20", "sh"}})
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := g.OpenFor(short, time.Second); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("hanging command: %v after %s", err, time.Since(start))
	}
}

func TestParseNFTTime(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"492ms": 492 * time.Millisecond, "7s492ms": 7492 * time.Millisecond, "1m": time.Minute,
		"1d1h59m59s996ms": 26*time.Hour - 4*time.Millisecond, "2d": 48 * time.Hour,
	} {
		if got, err := parseNFTTime(in); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "d", "7", "never"} {
		if got, err := parseNFTTime(in); err == nil {
			t.Errorf("%q: %s", in, got)
		}
	}
}

func BenchmarkGateOpen(b *testing.B) {
	g := testGate(b, dockertest.FreePort(b))
	if err := g.Install(context.Background()); err != nil {
		b.Fatal(err)
	}
	for range b.N {
		if err := g.OpenFor(context.Background(), time.Minute); err != nil {
			b.Fatal(err)
		}
	}
}
