package faults

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

// TestDaemon: the primary's Docker daemon ends, is killed, or hangs. The standby has the
// machine's own engine, as another machine would.
func TestDaemon(t *testing.T) {
	e := newEngine(t)
	t.Run("restarted", func(t *testing.T) { daemonRestarted(t, e) })
	t.Run("hangs", func(t *testing.T) { daemonHangs(t, e) })
}

// onEngine runs a primary whose container is on e and a warm standby on the machine's
// engine. The primary sees the shared directory through a file system that breaks on demand.
func onEngine(t *testing.T, e *engine) (*cluster.Cluster, *efssim.Remote, context.Context) {
	t.Helper()
	c, ctx := start(t, 0)
	t.Cleanup(func() { must(t, e.revive()) })
	at := filepath.Join(c.Root, "mnt")
	must(t, os.Mkdir(at, 0o755))
	sh, err := efssim.Spawn(c.Share, at)
	must(t, err)
	t.Cleanup(func() { _ = sh.Close() })
	a, err := c.Add(at)
	must(t, err)
	a.DockerHost = e.host
	must(t, a.Start())
	must(t, second(c.WaitPrimary(ctx)))
	must(t, second(a.CLI(ctx, "sync")))
	b, err := c.Add("")
	must(t, err)
	must(t, b.Start())
	must(t, b.WaitWarm(ctx))
	return c, sh, ctx
}

// daemonRestarted: however the daemon goes and comes back, the database is adopted or
// restarted in place, in the same term, with everything that it has acknowledged, and never
// beside another one.
func daemonRestarted(t *testing.T, e *engine) {
	c, _, ctx := onEngine(t, e)
	a := c.Instances[0]
	before, err := a.Status(ctx)
	must(t, err)
	watch := watchWriters(a.Dir)
	defer watch.stop()
	w, err := c.StartWriter(ctx)
	must(t, err)
	for _, way := range []struct {
		name   string
		sig    syscall.Signal
		down   time.Duration // how long there is no daemon
		live   bool          // it comes back with live-restore
		adopts bool          // the container outlives it
	}{
		// The daemon stops its containers.
		{name: "terminated", sig: syscall.SIGTERM, down: 2 * time.Second},
		// The container outlives the daemon, and is stopped by the next one.
		{name: "killed", sig: syscall.SIGKILL, down: time.Second},
		{name: "killed with live-restore", sig: syscall.SIGKILL, down: time.Second, live: true, adopts: true},
	} {
		id, err := a.Container(ctx)
		must(t, err)
		began := postmaster(t, ctx, a)
		must(t, e.end(way.sig))
		time.Sleep(way.down)
		var opts []string
		if way.live {
			opts = []string{"--live-restore"}
		}
		must(t, e.start(opts...))
		took := within(t, ctx, 15*time.Second, way.name+": writes are taken again", func() bool { return writable(ctx, a) })
		within(t, ctx, 5*time.Second, way.name+": primary again", func() bool { return a.Is(ctx, "primary") })
		now, err := a.Container(ctx)
		must(t, err)
		if way.adopts && (now != id || !postmaster(t, ctx, a).Equal(began)) {
			t.Errorf("%s: container %.12s -> %.12s; want the same one, never restarted", way.name, id, now)
		}
		if !way.adopts && now == id {
			t.Errorf("%s: container %.12s was not replaced", way.name, id)
		}
		t.Logf("%s: writes again %s after the daemon was back (adopted: %v)", way.name, took, now == id)
	}
	st, err := a.Status(ctx)
	must(t, err)
	if st.Role != api.RolePrimary || st.Term != before.Term {
		t.Errorf("%s, term %d; want a primary in term %d as before", st.Role, st.Term, before.Term)
	}
	within(t, ctx, 15*time.Second, "snapshots go on", func() bool {
		now, err := a.Status(ctx)
		return err == nil && now.Sync.Commits > st.Sync.Commits
	})
	acks := w.Stop()
	missing, err := c.Missing(ctx, a, acks)
	must(t, err)
	if len(missing) > 0 {
		t.Errorf("%d of %d acknowledged writes are gone", len(missing), len(acks))
	}
	if most := watch.stop(); most != 1 {
		t.Errorf("at most %d databases ran on the volume at once, want exactly 1", most)
	}
	failoverWithout(t, ctx, e, a, c.Instances[1])
}

// daemonHangs: a daemon that hangs takes nothing from the database: lease, snapshots and
// clients go on for three TTLs. Then the shared directory hangs as well: the database is
// ended in time without Docker's help.
func daemonHangs(t *testing.T, e *engine) {
	c, sh, ctx := onEngine(t, e)
	a, b := c.Instances[0], c.Instances[1]
	id, err := a.Container(ctx)
	must(t, err)
	conn, err := a.Connect(ctx)
	must(t, err)
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	w, err := c.StartWriter(ctx)
	must(t, err)
	before, err := a.Status(ctx)
	must(t, err)

	must(t, e.signal(syscall.SIGSTOP))
	hung := time.Now()
	said := false
	for time.Since(hung) < 3*c.TTL {
		// New connections, too: that is how clients behind a health check come back.
		if !a.Is(ctx, "primary") {
			t.Fatalf("not primary any more %s after the daemon hung", time.Since(hung))
		}
		if !writable(ctx, a) {
			t.Fatalf("no write taken %s after the daemon hung", time.Since(hung))
		}
		if b.Is(ctx, "primary") {
			t.Fatal("two primaries")
		}
		if st, err := a.Status(ctx); err == nil {
			said = said || strings.Contains(strings.Join(st.Degraded, " ")+st.Database.Error, "ocker")
		}
		time.Sleep(50 * time.Millisecond)
	}
	after, err := a.Status(ctx)
	must(t, err)
	if after.Term != before.Term || after.Sync.Commits < before.Sync.Commits+2 {
		t.Errorf("term %d -> %d, commits %d -> %d; want the same term and more snapshots", before.Term, after.Term, before.Sync.Commits, after.Sync.Commits)
	}
	if !said {
		t.Error("status has not said that Docker does not answer")
	}
	_, err = conn.Exec(ctx, "select 1")
	if err != nil {
		t.Errorf("connection of before the hang: %v", err)
	}
	if gap, at := cluster.Gap(w.Acks()); at.After(hung) && gap > c.TTL {
		t.Errorf("no write was acknowledged for %s", gap)
	}

	must(t, sh.Hang())
	alone := time.Now()
	// Reads need no share; whoever still reaches the database after the deadline would write.
	took := within(t, ctx, c.TTL+time.Second, "database is ended without Docker and share", func() bool { return dead(t, id) })
	if took > c.TTL {
		t.Errorf("database ended %s after the share hung, later than the TTL of %s", took, c.TTL)
	}
	if writable(ctx, a) {
		t.Error("a write was taken after the deadline")
	}
	within(t, ctx, c.TTL+8*time.Second, "b takes over", func() bool { return b.Is(ctx, "primary") })
	served := time.Since(alone)
	must(t, sh.Heal())
	// Without its engine a can do nothing, and it says so; nor does it disturb b.
	within(t, ctx, 10*time.Second, "a sees that it has lost the term", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Term > before.Term
	})
	must(t, e.signal(syscall.SIGCONT))
	must(t, a.WaitWarm(ctx))
	w.Stop()
	st, err := a.Status(ctx)
	must(t, err)
	if len(st.Forks) != 1 {
		t.Errorf("want one fork on %s, got %+v", a.Name, st.Forks)
	}
	if now, err := a.Container(ctx); err != nil || now != "" {
		t.Errorf("container %.12s is here on a standby (%v)", now, err)
	}
	if !b.Is(ctx, "primary") {
		t.Error("the successor was disturbed")
	}
	must(t, second(b.CLI(ctx, "snapshots", "verify")))
	t.Logf("TTL %s: database ended %s after share and daemon hung, successor served after %s", c.TTL, took, served)
}

// failoverWithout forces a primary whose daemon hangs to let go at once.
func failoverWithout(t *testing.T, ctx context.Context, e *engine, a, b *cluster.Instance) {
	t.Helper()
	must(t, b.WaitWarm(ctx))
	id, err := a.Container(ctx)
	must(t, err)
	must(t, e.signal(syscall.SIGSTOP))
	began := time.Now()
	fctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	must(t, second(b.CLI(fctx, "failover", "--yes")))
	within(t, ctx, 10*time.Second, "b takes over from a primary without Docker", func() bool { return b.Is(ctx, "primary") })
	if !dead(t, id) {
		t.Error("the old primary's database still runs")
	}
	t.Logf("failover while the primary's daemon hung took %s", time.Since(began))
	must(t, e.signal(syscall.SIGCONT))
}

// writable says whether a new connection can write right now.
func writable(ctx context.Context, i *cluster.Instance) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := i.Connect(ctx)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	_, err = conn.Exec(ctx, "insert into acked values (-(extract(epoch from clock_timestamp())*1e6)::bigint, now())")
	return err == nil
}

// postmaster is when the database's server was started.
func postmaster(t *testing.T, ctx context.Context, i *cluster.Instance) time.Time {
	t.Helper()
	conn, err := i.Connect(ctx)
	must(t, err)
	defer func() { _ = conn.Close(ctx) }()
	var at time.Time
	must(t, conn.QueryRow(ctx, "select pg_postmaster_start_time()").Scan(&at))
	return at
}

// dead says that no process of a container is left, without asking Docker.
func dead(t *testing.T, id string) bool {
	t.Helper()
	groups, err := cgroup.Find(id)
	must(t, err)
	for _, g := range groups {
		empty, err := g.Empty()
		must(t, err)
		if !empty {
			return false
		}
	}
	return true
}

// writers counts the databases on one volume, without asking Docker.
type writers struct {
	once sync.Once
	quit chan struct{}
	done chan struct{}
	most int
}

// watchWriters begins to count how many containers have processes at work in the volume.
func watchWriters(dir string) *writers {
	w := &writers{quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			w.most = max(w.most, databasesOn(filepath.Join(dir, "volume")))
			select {
			case <-w.quit:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return w
}

// stop returns the highest count seen.
func (w *writers) stop() int {
	w.once.Do(func() { close(w.quit) })
	<-w.done
	return w.most
}

// containerID is found in the control groups of a container's processes.
func containerID(cgroups string) string {
	for _, part := range strings.FieldsFunc(cgroups, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) }) {
		if len(part) == 64 {
			return part
		}
	}
	return ""
}

// databasesOn counts the containers of database servers whose working directory is the
// volume. (Docker's own helpers pass through it, too.)
func databasesOn(volume string) int {
	root, err := os.Stat(volume)
	if err != nil {
		return 0
	}
	ids := map[string]bool{}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cwd, err := os.Stat(filepath.Join(p, "cwd"))
		if err != nil || !os.SameFile(cwd, root) || strings.TrimSpace(readFile(filepath.Join(p, "comm"))) != "postgres" {
			continue
		}
		if id := containerID(readFile(filepath.Join(p, "cgroup"))); id != "" {
			ids[id] = true
		}
	}
	return len(ids)
}
