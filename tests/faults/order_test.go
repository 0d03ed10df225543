package faults

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// zones places three instances: c is away from the other two.
func zones(k int) string { return []string{"z1", "z1", "z2"}[k] }

// settings writes an instance's configuration anew and waits until its agent has it.
func settings(t *testing.T, ctx context.Context, c *cluster.Cluster, k, priority int, more string) {
	t.Helper()
	i := c.Instances[k]
	c.Extra = fmt.Sprintf("zone: %s\nfailover:\n  priority: %d\n  max_per_hour: 10\n%s", zones(k), priority, more)
	must(t, i.WriteConfig(c.Schedule))
	within(t, ctx, 10*time.Second, "the new settings are there", func() bool {
		st, err := i.Status(ctx)
		return err == nil && st.Failover.Priority == priority && st.Failover.Never == (more != "")
	})
}

// trio runs three instances, the first of them primary.
func trio(t *testing.T, extra func(k int) string) (*cluster.Cluster, context.Context) {
	t.Helper()
	c, ctx := start(t, 0)
	for k := range 3 {
		c.Extra = extra(k)
		i, err := c.Add("")
		must(t, err)
		must(t, i.Start())
		if k == 0 {
			must(t, second(c.WaitPrimary(ctx)))
			synced(t, ctx, i)
		} else {
			must(t, i.WaitWarm(ctx))
		}
	}
	return c, ctx
}

// lose crashes the primary and waits for its successor. Meanwhile do is called when the others
// have announced themselves as ready, before the lease is over.
func lose(t *testing.T, ctx context.Context, c *cluster.Cluster, do func()) (lost, next *cluster.Instance, took time.Duration) {
	t.Helper()
	lost = c.Primary(ctx)
	if lost == nil {
		t.Fatal("no primary to be lost")
	}
	for _, i := range c.Instances {
		if i != lost {
			must(t, i.WaitWarm(ctx))
		}
	}
	must(t, lost.Crash(ctx))
	if do != nil {
		time.Sleep(c.TTL * 3 / 4)
		do()
	}
	began := time.Now()
	within(t, ctx, 3*c.TTL+10*time.Second, "somebody takes over", func() bool {
		next = c.Primary(ctx)
		return next != nil
	})
	return lost, next, time.Since(began)
}

// TestTakeoverOrder: three instances lose one primary after the other; priority, zone and
// nofailover say who is next, and one that hangs when it is its turn is not waited for.
func TestTakeoverOrder(t *testing.T) {
	c, ctx := trio(t, func(k int) string { return "zone: " + zones(k) + "\nfailover: {max_per_hour: 10}\n" })
	a, b, d := c.Instances[0], c.Instances[1], c.Instances[2]
	for _, step := range []struct {
		name     string
		settings func()
		hang     *cluster.Instance
		want     *cluster.Instance
	}{
		{"another zone than the lost primary's", func() {}, nil, d},
		{"the higher priority", func() { settings(t, ctx, c, 1, 200, "") }, nil, b},
		{"never with nofailover, whatever the priority", func() { settings(t, ctx, c, 2, 900, "  nofailover: true\n") }, nil, a},
		{"the next one when the first hangs", func() { settings(t, ctx, c, 2, 100, "") }, b, d},
	} {
		step.settings()
		lost, next, took := lose(t, ctx, c, func() {
			if step.hang != nil {
				must(t, step.hang.SignalAgent(syscall.SIGSTOP))
			}
		})
		t.Logf("%s: %s after %s, %s later", step.name, next.Name, lost.Name, took)
		if next != step.want {
			t.Fatalf("%s: %s took over, want %s", step.name, next.Name, step.want.Name)
		}
		if step.hang != nil {
			must(t, step.hang.SignalAgent(syscall.SIGCONT))
			if log := readFile(next.LogPath("run")); !strings.Contains(log, "leaves the free lease to "+step.hang.Name) {
				t.Errorf("%s did not wait for %s: this proves nothing", next.Name, step.hang.Name)
			}
		}
		must(t, lost.Start())
		must(t, lost.WaitWarm(ctx))
	}
}

// TestTooManyFailovers: after so many within an hour nobody takes over until a person has asked
// for it, on the instance itself or for the cluster.
func TestTooManyFailovers(t *testing.T) {
	c, ctx := trio(t, func(int) string { return "failover: {max_per_hour: 1}\n" })
	_, next, _ := lose(t, ctx, c, nil)
	last := c.Instances[2]
	if next == last {
		last = c.Instances[1]
	}
	must(t, last.WaitWarm(ctx))
	st, err := next.Status(ctx)
	must(t, err)
	if st.Failover.LastHour != 1 || !strings.Contains(strings.Join(st.Degraded, "\n"), "dbsupervisor resume") {
		t.Errorf("the primary's status does not say that this was the last failover: %+v %q", st.Failover, st.Degraded)
	}
	must(t, next.Crash(ctx))
	asks(t, ctx, c, last)
	must(t, second(last.CLI(ctx, "failover", "--yes")))
	if !last.Is(ctx, "primary") {
		t.Fatal("did not become primary although a person asked for it")
	}
	// The same once more, with the other command. What a person asked for was not counted.
	must(t, next.Start())
	must(t, next.WaitWarm(ctx))
	must(t, last.Crash(ctx))
	asks(t, ctx, c, next)
	must(t, second(next.CLI(ctx, "resume")))
	within(t, ctx, 2*c.TTL+10*time.Second, "takes over after resume", func() bool { return next.Is(ctx, "primary") })
	if st, err = next.Status(ctx); err != nil || st.Failover.LastHour != 1 || st.Failover.AsksForPerson {
		t.Errorf("after resume and one failover: %+v (%v)", st.Failover, err)
	}
}

// asks checks that i asks for a person, and goes on asking instead of taking over.
func asks(t *testing.T, ctx context.Context, c *cluster.Cluster, i *cluster.Instance) {
	t.Helper()
	var st api.Status
	within(t, ctx, 3*c.TTL, "a person is asked", func() bool {
		var err error
		st, err = i.Status(ctx)
		return err == nil && st.Failover.AsksForPerson
	})
	if text := strings.Join(st.Degraded, "\n"); !strings.Contains(text, "dbsupervisor failover") || !strings.Contains(text, "dbsupervisor resume") {
		t.Errorf("status does not say what to do: %q", text)
	}
	quiet, cancel := context.WithTimeout(ctx, 2*c.TTL)
	defer cancel()
	if err := cluster.Until(quiet, func() bool { return i.Is(ctx, "primary") }); err == nil {
		t.Fatal("took over by itself")
	}
	out, err := i.CLI(ctx, "history")
	must(t, err)
	if !strings.Contains(out, "asks for a person") {
		t.Errorf("the history does not say that a person is asked:\n%s", out)
	}
}
