package faults

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// TestPrimaryLost: agent, guard and container are killed together; the standby serves.
func TestPrimaryLost(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	grow(t, ctx, a, b)
	size := volumeSize(t, b)
	before, err := a.Status(ctx)
	must(t, err)
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 30*time.Second, "two more snapshots under load", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Sync.Commits >= before.Sync.Commits+2
	})
	must(t, b.WaitWarm(ctx))
	safe := safeBefore(t, ctx, a)
	must(t, a.Crash(ctx))
	took := within(t, ctx, c.TTL+5*time.Second, "standby serves writes", func() bool { return b.Is(ctx, "primary") })
	within(t, ctx, 10*time.Second, "writes go on", func() bool {
		acks := w.Acks()
		return acks[len(acks)-1].By == b.Name
	})
	acks := w.Stop()
	lost := checkLoss(t, ctx, c, b, acks, safe)
	gap, _ := cluster.Gap(acks)
	t.Logf("TTL %s, volume %d MiB: primary again after %s, write gap %s, %d writes acknowledged, %d newer than the last commit lost", c.TTL, size>>20, took, gap, len(acks), lost)
}

// grow fills the database by pgbench to the scale in $FAULTS_SCALE (about 15 MiB each; 68
// makes 1 GiB) and waits until b's copy has it. Without the variable it does nothing.
func grow(t *testing.T, ctx context.Context, a, b *cluster.Instance) {
	t.Helper()
	scale := os.Getenv("FAULTS_SCALE")
	if scale == "" {
		return
	}
	must(t, a.Pgbench(ctx, "-i", "-q", "-s", scale))
	// Otherwise the takeover replays the whole load from the write-ahead log: that is the
	// database's own time, set by its checkpoint settings, and not what is measured here.
	must(t, second(a.Exec(ctx, "psql", "-U", "postgres", "-c", "checkpoint")))
	must(t, second(a.CLI(ctx, "sync")))
	must(t, b.WaitWarm(ctx))
}

// volumeSize is what the instance's copy of the volume takes on its disk, in bytes.
func volumeSize(t *testing.T, i *cluster.Instance) (total int64) {
	t.Helper()
	must(t, filepath.WalkDir(filepath.Join(i.Dir, "volume"), func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the copy is being refreshed
		}
		if err != nil || d.IsDir() {
			return err
		}
		if fi, err := d.Info(); err == nil {
			total += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	}))
	return total
}

// TestOnlyInstanceLost: there is no standby; another machine starts with nothing but the
// share, as an Auto Scaling group of one does.
func TestOnlyInstanceLost(t *testing.T) {
	c, ctx := start(t, 1)
	a := c.Instances[0]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 30*time.Second, "more snapshots", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Sync.Commits >= 3
	})
	safe := safeBefore(t, ctx, a)
	must(t, a.Crash(ctx))
	must(t, a.EraseDisk())
	b, err := c.Add("")
	must(t, err)
	began := time.Now()
	must(t, b.Start())
	must(t, second(c.WaitPrimary(ctx)))
	took := time.Since(began)
	lost := checkLoss(t, ctx, c, b, w.Stop(), safe)
	t.Logf("served again %s after the new instance's start (rsync from cron: 6 to 10 minutes); %d newer writes lost", took, lost)
}

// TestAllLost: every instance is lost at once, disks included.
func TestAllLost(t *testing.T) {
	c, ctx := start(t, 2)
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 30*time.Second, "more snapshots", func() bool {
		st, err := c.Instances[0].Status(ctx)
		return err == nil && st.Sync.Commits >= 3
	})
	safe := safeBefore(t, ctx, c.Instances[0])
	for _, i := range c.Instances {
		must(t, i.Crash(ctx))
		must(t, i.EraseDisk())
	}
	for range 2 {
		i, err := c.Add("")
		must(t, err)
		must(t, i.Start())
	}
	p, err := c.WaitPrimary(ctx)
	must(t, err)
	checkLoss(t, ctx, c, p, w.Stop(), safe)
}

// TestRebootKeepsNewest: the machine comes back with its disk before anybody else took
// over: nothing at all is lost, not even what was newer than the last commit.
func TestRebootKeepsNewest(t *testing.T) {
	c, ctx := start(t, 1, func(o *cluster.Options) { o.Schedule = "@every 1h" })
	a := c.Instances[0]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 10*time.Second, "some writes", func() bool { return len(w.Acks()) > 50 })
	must(t, a.Crash(ctx))
	acks := w.Stop()
	must(t, a.Start())
	must(t, second(c.WaitPrimary(ctx)))
	missing, err := c.Missing(ctx, a, acks)
	must(t, err)
	if len(missing) > 0 {
		t.Errorf("%d acknowledged writes are gone although the disk is still there", len(missing))
	}
}

// TestAgentStopped: the agent is stopped for three TTLs. Its database takes no write after
// the deadline although the agent can't do anything about it; then the agent continues and
// finds its data set aside as a fork.
func TestAgentStopped(t *testing.T) {
	c, ctx := start(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 10*time.Second, "some writes", func() bool { return len(w.Acks()) > 20 })
	stopAgentAndSucceed(t, ctx, c, a, b, w)
}

// TestAgentStoppedInFreeze is the same with the database frozen by the agent at that
// moment: the guard lets it go, and what was captured is thrown away.
func TestAgentStoppedInFreeze(t *testing.T) {
	c, ctx := start(t, 2, func(o *cluster.Options) { o.Schedule = "@every 1s" })
	a, b := c.Instances[0], c.Instances[1]
	id, err := a.Container(ctx)
	must(t, err)
	state := filepath.Join("/sys/fs/cgroup/freezer/docker", id, "freezer.state")
	w, err := c.StartWriter(ctx)
	must(t, err)
	hit := false
	for try := 0; try < 200 && !hit; try++ {
		hit = stopWhileFrozen(ctx, a, state)
	}
	if !hit {
		t.Fatal("the agent was never caught inside a freeze")
	}
	within(t, ctx, 10*time.Second, "guard thaws", func() bool { return readState(state) != "FROZEN" })
	stopAgentAndSucceed(t, ctx, c, a, b, w)
}

// stopAgentAndSucceed stops a's agent (again, if need be) for three TTLs.
func stopAgentAndSucceed(t *testing.T, ctx context.Context, c *cluster.Cluster, a, b *cluster.Instance, w *cluster.Writer) {
	t.Helper()
	// A connection of its own that stays with the old primary whatever happens.
	conn, err := a.Connect(ctx)
	must(t, err)
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	must(t, a.SignalAgent(syscall.SIGSTOP))
	stopped := time.Now()
	var lastOnA time.Time
	for {
		ectx, cancel := context.WithTimeout(ctx, 2*c.TTL)
		_, err := conn.Exec(ectx, "insert into acked values (-(extract(epoch from clock_timestamp())*1e6)::bigint, now())")
		cancel()
		if err != nil {
			break
		}
		lastOnA = time.Now()
		if time.Since(stopped) > 3*c.TTL {
			t.Fatal("the old primary still takes writes three TTLs after its agent was stopped")
		}
	}
	within(t, ctx, c.TTL+5*time.Second, "standby serves", func() bool { return b.Is(ctx, "primary") })
	if took := lastOnA.Sub(stopped); took > c.TTL {
		t.Errorf("the old primary took writes for %s, longer than the TTL of %s", took, c.TTL)
	}
	if conn, err := a.Connect(ctx); err == nil {
		if _, err := conn.Exec(ctx, "insert into acked values (-1, now())"); err == nil {
			t.Error("the old primary takes writes although the successor serves")
		}
		_ = conn.Close(ctx)
	}
	for time.Since(stopped) < 3*c.TTL {
		if !b.Is(ctx, "primary") {
			t.Fatal("the successor stopped serving")
		}
		time.Sleep(100 * time.Millisecond)
	}
	before, err := b.Status(ctx)
	must(t, err)
	must(t, a.SignalAgent(syscall.SIGCONT))
	must(t, a.WaitWarm(ctx))
	st, err := a.Status(ctx)
	must(t, err)
	if len(st.Forks) != 1 {
		t.Errorf("want one fork on %s, got %+v", a.Name, st.Forks)
	}
	after, err := b.Status(ctx)
	must(t, err)
	if after.Role != api.RolePrimary || after.Term != before.Term {
		t.Errorf("the successor's term was disturbed: %s term %d, then %s term %d", before.Role, before.Term, after.Role, after.Term)
	}
	if out, err := b.CLI(ctx, "snapshots", "verify"); err != nil {
		t.Errorf("history does not verify: %v\n%s", err, out)
	}
	w.Stop()
	t.Logf("TTL %s: last write on the old primary %s after its agent was stopped", c.TTL, lastOnA.Sub(stopped))
}

// stopWhileFrozen waits for a freeze and stops the agent in it. It reports whether the
// database was still frozen after the agent had stopped.
func stopWhileFrozen(ctx context.Context, a *cluster.Instance, state string) bool {
	wctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for wctx.Err() == nil {
		if readState(state) == "FROZEN" {
			_ = a.SignalAgent(syscall.SIGSTOP)
			time.Sleep(5 * time.Millisecond) // the signal is delivered at once; the state settles
			if readState(state) == "FROZEN" {
				return true
			}
			_ = a.SignalAgent(syscall.SIGCONT)
		}
	}
	return false
}

func readState(path string) string { return strings.TrimSpace(readFile(path)) }
