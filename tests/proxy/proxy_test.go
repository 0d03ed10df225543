package proxy

import (
	"context"

	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/tests/cluster"
)

// TestSwitchover: clients that open a connection for each transaction see no error and lose
// nothing while the database moves there and back, and while proxies and agents are restarted.
func TestSwitchover(t *testing.T) {
	// A TTL that an agent's restart survives on a busy machine.
	c, ctx := start(t, 2, func(o *cluster.Options) { o.TTL, o.Renew, o.Margin = 0, 0, 0 })
	a, b := c.Instances[0], c.Instances[1]
	_, port := startProxy(t, c, "")
	k := call(t, ctx, c, port, 4)
	k.more(t, ctx, 100)
	for n, from := range []*cluster.Instance{a, b} {
		to := c.Instances[1-n]
		within(t, ctx, time.Minute, "the other one is warm", func() bool { return to.WaitWarm(ctx) == nil })
		out, err := from.CLI(ctx, "switchover")
		must(t, err)
		if _, err := c.WaitPrimary(ctx, from); err != nil {
			t.Fatal(err)
		}
		k.more(t, ctx, 50)
		t.Log(strings.TrimSpace(out))
	}
	hist, err := a.CLI(ctx, "history")
	must(t, err)
	if !strings.Contains(hist, "1 proxies let new connections wait") {
		t.Errorf("the history does not tell of the proxy:\n%s", hist)
	}
	// The agent is restarted; its database and the proxy go on.
	conn, err := pgx.Connect(ctx, url(c, port))
	must(t, err)
	defer func() { _ = conn.Close(ctx) }()
	_, err = a.CLI(ctx, "agent", "restart")
	must(t, err)
	k.more(t, ctx, 50)
	if _, err := conn.Exec(ctx, "select 1"); err != nil {
		t.Errorf("connection of before the agent's restart: %v", err)
	}
	acks, errs := k.Stop()
	for _, err := range errs {
		t.Error(err)
	}
	missing, err := c.Missing(ctx, a, acks)
	must(t, err)
	if len(missing) > 0 {
		t.Errorf("%d acknowledged writes are lost", len(missing))
	}
	gap, _ := cluster.Gap(acks)
	t.Logf("%d writes, %d errors, longest pause %s", len(acks), len(errs), gap)
}

// TestCrash: the primary's machine is lost in mid-stream. What was under way fails, new
// connections wait, and are served by the successor.
func TestCrash(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	_, port := startProxy(t, c, "")
	k := call(t, ctx, c, port, 4)
	k.more(t, ctx, 100)
	conn, err := pgx.Connect(ctx, url(c, port))
	must(t, err)
	defer func() { _ = conn.Close(ctx) }()
	// What the clients write to must be in what the other one starts from.
	within(t, ctx, time.Minute, "a snapshot has the table", func() bool { _, err := a.CLI(ctx, "sync"); return err == nil })
	must(t, b.WaitWarm(ctx))
	killed := time.Now()
	must(t, a.Crash(ctx))
	if _, err := conn.Exec(ctx, "select 1"); err == nil {
		t.Error("a connection to the lost database still answers")
	}
	k.more(t, ctx, 50)
	acks, errs := k.Stop()
	if len(errs) > 4 {
		t.Errorf("%d errors of 4 clients: only what was under way may fail", len(errs))
	}
	for _, err := range errs {
		t.Log(err)
	}
	gap, at := cluster.Gap(acks)
	t.Logf("%d writes, %d errors, longest pause %s, begun %s after the kill", len(acks), len(errs), gap, at.Sub(killed))
}

// TestProxyRestart: SIGTERM lets what is under way finish.
func TestProxyRestart(t *testing.T) {
	c, ctx := start(t, 1)
	p, port := startProxy(t, c, "drain: 30s\n")
	conn, err := pgx.Connect(ctx, url(c, port))
	must(t, err)
	if _, err := conn.Exec(ctx, "begin"); err != nil {
		t.Fatal(err)
	}
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	within(t, ctx, 10*time.Second, "no new clients", func() bool {
		c, err := pgx.Connect(ctx, url(c, port))
		if err == nil {
			_ = c.Close(ctx)
		}
		return err != nil
	})
	var n int
	if err := conn.QueryRow(ctx, "select 42").Scan(&n); err != nil || n != 42 {
		t.Errorf("while it drains: %d, %v", n, err)
	}
	_, err = conn.Exec(ctx, "commit")
	must(t, err)
	must(t, conn.Close(ctx))
	wctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	select {
	case <-p.done:
		must(t, p.err)
	case <-wctx.Done():
		t.Error("it does not end when its clients have gone")
	}
}

// TestWritePortClosed: on everyone but the primary, from the first start of an agent on, the
// write port is closed in the kernel: also when something listens there, as after a reboot
// with a container that came up by itself.
func TestWritePortClosed(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	stray := listen(t, b.Port)
	defer stray.Close()
	if err := reach(b.Port); err == nil {
		t.Error("the write port of a standby takes connections")
	}
	must(t, reach(a.Port))
	// The agent's end leaves it closed.
	must(t, b.Stop(ctx))
	if err := reach(b.Port); err == nil {
		t.Error("the write port of a standby whose agent has ended takes connections")
	}
	// Before an agent has ever run on a machine there is no gate; with its first moment
	// there is one, before it has read the register.
	d, err := c.Add("")
	must(t, err)
	other := listen(t, d.Port)
	defer other.Close()
	must(t, reach(d.Port)) // what the gate is seen to close
	must(t, d.Start())
	within(t, ctx, 20*time.Second, "the first start closes it", func() bool { return reach(d.Port) != nil })
	must(t, d.WaitWarm(ctx))
	if err := reach(d.Port); err == nil {
		t.Error("the write port of a new standby takes connections")
	}
}
