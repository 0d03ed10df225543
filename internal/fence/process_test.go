package fence

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/cgroup/cgrouptest"
	"dbsupervisor/internal/dockertest"
)

// role is this test binary as another process.
type role struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func startRole(t *testing.T, name, dir string) *role {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	r := &role{t: t, cmd: exec.Command(os.Args[0])}
	r.cmd.Env = append(os.Environ(), "FENCE_TEST_ROLE="+name, "FENCE_TEST_DIR="+dir)
	r.cmd.Stderr = testWriter{t}
	in, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.in, r.out = in, bufio.NewReader(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.cmd.Process.Kill(); _ = r.cmd.Wait() })
	return r
}

func (r *role) signal(s syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// stop returns when every thread of the process stands still.
func (r *role) stop() {
	r.t.Helper()
	r.signal(syscall.SIGSTOP)
	dockertest.Until(r.t, soon, "the process is stopped", func() bool {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", r.cmd.Process.Pid))
		if err != nil || len(tasks) == 0 {
			return false
		}
		for _, f := range tasks {
			b, err := os.ReadFile(f)
			if err != nil || !strings.Contains(string(b), ") T ") {
				return false
			}
		}
		return true
	})
}

func (r *role) send(line string) {
	r.t.Helper()
	if _, err := fmt.Fprintln(r.in, line); err != nil {
		r.t.Fatal(err)
	}
}

func (r *role) hear() string {
	r.t.Helper()
	l, err := r.out.ReadString('\n')
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(l)
}

func (r *role) do(line string) {
	r.t.Helper()
	r.send(line)
	if got := r.hear(); got != "ok" {
		r.t.Fatalf("%s: %s", line, got)
	}
}

// startGuard starts a guard process and waits until it answers.
func startGuard(t *testing.T, dir string) (*role, *Guard) {
	t.Helper()
	p := startRole(t, "guard", dir)
	var g *Guard
	dockertest.Until(t, soon, "the guard answers", func() bool {
		var err error
		g, err = DialGuard(t.Context(), dir)
		if err != nil {
			return false
		}
		s, err := g.Status(t.Context())
		return err == nil && s.PID == p.cmd.Process.Pid
	})
	return p, g
}

// writer is a "database" in a real container that writes all the time into file.
func writer(t *testing.T) (id, file string, g cgroup.Group) {
	t.Helper()
	image := dockertest.Image(t)
	dir := t.TempDir()
	file = filepath.Join(dir, "count")
	id = dockertest.Run(t, "fence", "-v", dir+":/data", image, "count", "/data/count")
	found, err := cgroup.Find(id)
	if err != nil || len(found) != 1 {
		t.Fatalf("found %+v, %v", found, err)
	}
	dockertest.Until(t, soon, "it writes", func() bool { return size(file) > 0 })
	return id, file, found[0]
}

func size(file string) int64 {
	st, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return st.Size()
}

// The heart of it: the agent is stopped, or dead, and so says nothing; the database writes
// until the deadline and not after it.
func TestGuardActsForAnAgentThatCanNot(t *testing.T) {
	const lease = 2 * time.Second
	for _, c := range []struct {
		name string
		do   func(agent, guard *role, dir string)
		// again: the guard is started anew after the deadline.
		again bool
	}{
		{name: "agent is stopped", do: func(a, _ *role, _ string) { a.stop() }},
		{name: "agent is killed", do: func(a, _ *role, _ string) { a.signal(syscall.SIGKILL) }},
		{name: "agent and guard are killed, guard comes back", again: true, do: func(a, g *role, _ string) {
			a.signal(syscall.SIGKILL)
			g.signal(syscall.SIGKILL)
			_ = g.cmd.Wait()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			guard, _ := startGuard(t, dir)
			id, file, g := writer(t)
			agent := startRole(t, "agent", dir)
			var clock boottime.Real
			var wrote boottime.Instant
			deadline := clock.Now().Add(lease)
			left := func() time.Duration { return deadline.Sub(clock.Now()) }
			agent.do(fmt.Sprintf("arm 1 %s %d", id, deadline))
			c.do(agent, guard, dir)
			// It goes on writing until then: nobody is killed because an agent went away.
			for n := size(file); left() > 0; time.Sleep(time.Millisecond) {
				if size(file) > n {
					n, wrote = size(file), clock.Now()
				}
				if !alive(t, g) && left() > 0 {
					t.Fatal("killed before the deadline")
				}
			}
			if deadline.Sub(wrote) > lease/2 {
				t.Fatalf("last written %s before the deadline", deadline.Sub(wrote))
			}
			if c.again {
				time.Sleep(200 * time.Millisecond)
				if !alive(t, g) {
					t.Fatal("dead without a guard: this test shows nothing")
				}
				startGuard(t, dir)
			}
			dockertest.Until(t, soon, "the writer is dead", func() bool { return !alive(t, g) })
			t.Logf("dead %s after the deadline", -left())
			n := size(file)
			if c.name == "agent is stopped" {
				agent.signal(syscall.SIGCONT)
			}
			dockertest.Until(t, 20*time.Second, "Docker notices", func() bool {
				return dockertest.Docker(t, "inspect", "-f", "{{.State.Running}} {{.State.ExitCode}}", id) == "false 137"
			})
			if size(file) != n {
				t.Fatal("written to after its death")
			}
		})
	}
}

func TestGuardUndoesAnAbandonedFreeze(t *testing.T) {
	probe := dockertest.Binary(t)
	for version := 1; version <= 2; version++ {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("v%d killed=%v", version, killed), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				_, _ = startGuard(t, dir)
				id := cgrouptest.ID(t)
				g := cgrouptest.New(t, version, id)
				file := filepath.Join(t.TempDir(), "count")
				cgrouptest.Start(t, g, probe, "count", file)
				dockertest.Until(t, soon, "it writes", func() bool { return size(file) > 0 })
				agent := startRole(t, "agent", dir)
				budget := 700 * time.Millisecond
				if killed {
					budget = 5 * time.Minute // the end of the connection must do it
				}
				began := time.Now()
				agent.do("freeze " + id + " " + strconv.FormatInt(budget.Milliseconds(), 10))
				n := size(file)
				if killed {
					agent.signal(syscall.SIGKILL)
				} else {
					agent.stop()
				}
				dockertest.Until(t, soon, "it writes again", func() bool { return size(file) > n })
				if killed {
					return
				}
				t.Logf("thawed %s after the freeze", time.Since(began))
				if time.Since(began) < budget {
					t.Fatal("thawed inside of its budget")
				}
				agent.send("thaw")
				agent.signal(syscall.SIGCONT)
				if got := agent.hear(); got != ErrFreezeBroken.Error() {
					t.Fatalf("the agent believes its capture: %q", got)
				}
			})
		}
	}
}

// A guard that was stopped accepts connections and says nothing: the caller must get on.
func TestStoppedGuardIsNoticed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	guard, g := startGuard(t, dir)
	guard.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := g.Extend(ctx, 1, 1); !errors.Is(err, ErrNoGuard) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("extend: %v", err)
	}
	if time.Since(start) > 4*time.Second {
		t.Fatalf("took %s", time.Since(start))
	}
	guard.signal(syscall.SIGCONT)
	if _, err := g.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestGuardProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	guard, g := startGuard(t, dir)
	// Root may not be allowed to, in a container.
	if exec.Command("/bin/sh", "-c", "echo -999 > /proc/self/oom_score_adj").Run() == nil {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", guard.cmd.Process.Pid))
		if err != nil || strings.TrimSpace(string(b)) != "-999" {
			t.Errorf("oom_score_adj is %q, %v", b, err)
		}
	}
	st, err := os.Stat(SocketPath(dir))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket is %v, %v", st.Mode(), err)
	}
	// What makes no sense is answered, not obeyed, and harms nobody.
	c, err := g.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if _, err := c.roundTrip(t.Context(), request{Op: "dance"}); err == nil || !strings.Contains(err.Error(), "not known") {
		t.Errorf("unknown operation: %v", err)
	}
	if _, err := c.conn.Write([]byte("}{\n")); err != nil || !c.in.Scan() || !strings.Contains(c.in.Text(), "decode request") {
		t.Errorf("no JSON: %q, %v", c.in.Text(), err)
	}
	if _, err := c.conn.Write([]byte(strings.Repeat("x", 2*maxLine))); err == nil && c.in.Scan() {
		t.Errorf("endless line: answered %q", c.in.Text())
	}
	guard.signal(syscall.SIGTERM)
	if err := guard.cmd.Wait(); err != nil {
		t.Errorf("guard's end: %v", err)
	}
}
