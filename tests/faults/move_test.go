package faults

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

func readFile(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}

// TestAgentKilled: the agent is killed alone and started again at once. The database never
// stops, the term is kept, and snapshots go on.
func TestAgentKilled(t *testing.T) {
	c, ctx := start(t, 2)
	a := c.Instances[0]
	before, err := a.Status(ctx)
	must(t, err)
	id, err := a.Container(ctx)
	must(t, err)
	w, err := c.StartWriter(ctx)
	must(t, err)
	conn, err := a.Connect(ctx)
	must(t, err)
	defer func() { _ = conn.Close(ctx) }()
	must(t, a.SignalAgent(syscall.SIGKILL))
	_ = a.WaitAgent(ctx)
	must(t, a.StartAgent())
	within(t, ctx, 10*time.Second, "agent is primary again", func() bool { return a.Is(ctx, "primary") })
	within(t, ctx, 20*time.Second, "snapshots go on", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Sync.Commits >= 1
	})
	// The same connection, opened before, still works: it was never cut.
	if _, err := conn.Exec(ctx, "select 1"); err != nil {
		t.Errorf("connection of before the agent's death: %v", err)
	}
	after, err := a.Status(ctx)
	must(t, err)
	now, err := a.Container(ctx)
	must(t, err)
	if now != id || after.Term != before.Term {
		t.Errorf("container %.12s -> %.12s, term %d -> %d: want the same", id, now, before.Term, after.Term)
	}
	w.Stop()
}

// TestAgentRestartCommand: the operator's upgrade path.
func TestAgentRestartCommand(t *testing.T) {
	c, ctx := start(t, 1)
	a := c.Instances[0]
	id, err := a.Container(ctx)
	must(t, err)
	before, err := a.Status(ctx)
	must(t, err)
	must(t, second(a.CLI(ctx, "agent", "restart")))
	after, err := a.Status(ctx)
	must(t, err)
	if after.Incarnation == before.Incarnation || after.Term != before.Term {
		t.Errorf("incarnation %s -> %s, term %d -> %d: want a new start in the same term",
			before.Incarnation, after.Incarnation, before.Term, after.Term)
	}
	within(t, ctx, 10*time.Second, "agent is primary again", func() bool { return a.Is(ctx, "primary") })
	if now, _ := a.Container(ctx); now != id {
		t.Errorf("container changed from %.12s to %.12s", id, now)
	}
}

// TestDatabaseDies: restarted in place while the term lives; given up when it dies too often.
func TestDatabaseDies(t *testing.T) {
	c, ctx := start(t, 2, func(o *cluster.Options) { o.Database = "  max_restarts: 2\n" })
	a, b := c.Instances[0], c.Instances[1]
	st, err := a.Status(ctx)
	must(t, err)
	term := st.Term
	for n := 1; n <= 2; n++ {
		id, err := a.Container(ctx)
		must(t, err)
		must(t, exec.CommandContext(ctx, "docker", "kill", id).Run())
		within(t, ctx, 20*time.Second, "restarted in place", func() bool {
			now, err := a.Container(ctx)
			return err == nil && now != "" && now != id && a.Is(ctx, "primary")
		})
		if st, err = a.Status(ctx); err != nil || st.Term != term {
			t.Fatalf("term %d after death %d, want %d (%v)", st.Term, n, term, err)
		}
	}
	id, err := a.Container(ctx)
	must(t, err)
	must(t, exec.CommandContext(ctx, "docker", "kill", id).Run())
	within(t, ctx, 30*time.Second, "the other instance takes over", func() bool { return b.Is(ctx, "primary") })
}

// TestSwitchover: under load, nothing acknowledged is lost, in both directions.
func TestSwitchover(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 10*time.Second, "some writes", func() bool { return len(w.Acks()) > 20 })
	move := func(from, to *cluster.Instance) {
		t.Helper()
		out, err := from.CLI(ctx, "switchover")
		must(t, err)
		must(t, second(c.WaitPrimary(ctx, from)))
		within(t, ctx, 10*time.Second, "writes go on", func() bool {
			acks := w.Acks()
			return acks[len(acks)-1].By == to.Name
		})
		t.Log(out)
	}
	move(a, b)
	must(t, a.WaitWarm(ctx))
	st, err := a.Status(ctx)
	must(t, err)
	if len(st.Forks) != 0 {
		t.Errorf("a planned move left a fork: %+v", st.Forks)
	}
	// The other way round, asked on the standby.
	must(t, second(a.CLI(ctx, "switchover")))
	must(t, second(c.WaitPrimary(ctx, b)))
	acks := w.Stop()
	missing, err := c.Missing(ctx, a, acks)
	must(t, err)
	if len(missing) > 0 {
		t.Errorf("%d acknowledged writes lost in a planned move", len(missing))
	}
	gap, _ := cluster.Gap(acks)
	t.Logf("%d writes, longest gap %s", len(acks), gap)
}

// TestSwitchoverThatWasNone: the primary can't hear the order and its lease runs out. The
// command must not say that nothing was lost.
func TestSwitchoverThatWasNone(t *testing.T) {
	c, ctx := start(t, 2, func(o *cluster.Options) { o.Schedule = "@every 1h" })
	a, b := c.Instances[0], c.Instances[1]
	must(t, second(a.Exec(ctx, "psql", "-U", "postgres", "-c", "create table lost (n int)")))
	must(t, a.SignalAgent(syscall.SIGSTOP))
	out, err := b.CLI(ctx, "switchover")
	must(t, err)
	if strings.Contains(out, "nothing was lost") {
		t.Errorf("a move without a handoff is called lossless:\n%s", out)
	}
	if _, err := b.Exec(ctx, "psql", "-U", "postgres", "-c", "select * from lost"); err == nil {
		t.Error("nothing was lost after all: this test proves nothing")
	}
}

// TestCannotStart: the instance that takes over can't run the database, because its port is
// taken. It gives the term on instead of keeping it for ever.
func TestCannotStart(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", b.Port))
	must(t, err)
	defer func() { _ = l.Close() }()
	must(t, second(a.CLI(ctx, "switchover")))
	within(t, ctx, 60*time.Second, "the term comes back", func() bool { return a.Is(ctx, "primary") })
	st, err := b.Status(ctx)
	must(t, err)
	if st.LastError == nil || !strings.Contains(st.LastError.What, "start") {
		t.Errorf("status of %s does not say why: %+v", b.Name, st.LastError)
	}
}

// TestStopHandsOff: an explicit stop of the agent is a planned move.
func TestStopHandsOff(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 10*time.Second, "some writes", func() bool { return len(w.Acks()) > 20 })
	must(t, a.Stop(ctx))
	within(t, ctx, c.TTL, "successor does not wait for the TTL", func() bool { return b.Is(ctx, "primary") })
	missing, err := c.Missing(ctx, b, w.Stop())
	must(t, err)
	if len(missing) > 0 {
		t.Errorf("%d acknowledged writes lost", len(missing))
	}
}

// TestForcedFailover: the primary is alive and is told to let go at once.
func TestForcedFailover(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	must(t, second(b.CLI(ctx, "failover", "--yes")))
	within(t, ctx, 10*time.Second, "b is primary", func() bool { return b.Is(ctx, "primary") })
	must(t, a.WaitWarm(ctx))
	st, err := a.Status(ctx)
	must(t, err)
	if st.Role != api.RoleStandby || len(st.Forks) != 1 {
		t.Errorf("old primary: role %s, forks %+v; want a standby with one fork", st.Role, st.Forks)
	}
}

// TestPaused: while paused nobody takes over; afterwards somebody does.
func TestPaused(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	must(t, second(a.CLI(ctx, "pause")))
	// What an operator asks for is done all the same.
	must(t, second(a.CLI(ctx, "switchover")))
	must(t, second(c.WaitPrimary(ctx, a)))
	must(t, a.WaitWarm(ctx))
	a, b = b, a
	must(t, a.Crash(ctx))
	quiet, cancel := context.WithTimeout(ctx, 2*c.TTL)
	defer cancel()
	if err := cluster.Until(quiet, func() bool { return b.Is(ctx, "primary") }); err == nil {
		t.Fatal("took over while paused")
	}
	must(t, second(b.CLI(ctx, "resume")))
	within(t, ctx, c.TTL+10*time.Second, "takes over after resume", func() bool { return b.Is(ctx, "primary") })
}
