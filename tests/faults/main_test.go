// Package faults has the table of faults that a cluster must survive, each with real
// agents, guards, containers and databases.
package faults

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/history"
	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

// binary is the program under test, built once by TestMain.
type environment struct{ binary, root string }

//nolint:gochecknoglobals // set once by TestMain, the only way to hand something to tests
var env environment

func TestMain(m *testing.M) {
	if code, asked := efssim.ServeIfAsked(); asked {
		os.Exit(code)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if err := exec.Command("docker", "image", "inspect", "dbsupervisor/postgres:15").Run(); err != nil {
		fmt.Fprintln(os.Stderr, "no image dbsupervisor/postgres:15; run `make image` first")
		return 1
	}
	root, err := os.MkdirTemp("", "dbsupervisor-faults-")
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

// start runs a cluster of n instances: the first is primary with a first snapshot, the
// others are warm. At the end everything is stopped and the register's history is checked
// against the protocol's rules.
func start(t *testing.T, n int, edit ...func(*cluster.Options)) (*cluster.Cluster, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute+randomLasts())
	t.Cleanup(cancel)
	o := cluster.Options{Root: tempDir(t), Binary: env.binary, TTL: 4 * time.Second, Renew: time.Second, Margin: time.Second, Schedule: "@every 2s"}
	if ttl, err := time.ParseDuration(os.Getenv("FAULTS_TTL")); err == nil {
		o.TTL, o.Renew, o.Margin = ttl, ttl/5, ttl/5
	}
	for _, e := range edit {
		e(&o)
	}
	c, err := cluster.New(o)
	must(t, err)
	rec := record(t, c)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("clean up: %v", err)
		}
		rec()
		if t.Failed() || testing.Verbose() {
			dumpLogs(t, c)
		}
	})
	for i := range n {
		inst, err := c.Add("")
		must(t, err)
		must(t, inst.Start())
		if i == 0 {
			must(t, second(c.WaitPrimary(ctx)))
			synced(t, ctx, inst)
		} else {
			must(t, inst.WaitWarm(ctx))
		}
	}
	return c, ctx
}

// synced commits a snapshot. On a machine that is busy with other things a freeze may take too
// long and is given up, or a lease runs out; then it is tried again.
func synced(t *testing.T, ctx context.Context, i *cluster.Instance) {
	t.Helper()
	var err error
	if cluster.Until(ctx, func() bool {
		_, err = i.CLI(ctx, "sync")
		return err == nil || !strings.Contains(err.Error(), "freeze would take too long") && !strings.Contains(err.Error(), "not the primary")
	}) != nil || err != nil {
		t.Fatalf("no snapshot: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tempDir is like t.TempDir but on a path short enough for unix sockets.
func tempDir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp(env.root, "c")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

func dumpLogs(t *testing.T, c *cluster.Cluster) {
	for _, i := range c.Instances {
		for _, k := range []string{"run", "guard"} {
			b, _ := os.ReadFile(i.LogPath(k))
			lines := strings.Split(string(b), "\n")
			if len(lines) > 80 {
				lines = lines[len(lines)-80:]
			}
			t.Logf("---- %s %s\n%s", i.Name, k, strings.Join(lines, "\n"))
		}
	}
}

// record collects every record that the register ever holds while the test runs, and
// checks them at the end. The register keeps the newest 64, so looking a few times a second
// misses none.
func record(t *testing.T, c *cluster.Cluster) (finish func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	seen := map[string]map[uint64]lease.Record{} // by cluster ID: a test may begin another one
	look := func() {
		reg, err := lease.OpenFile(context.Background(), lease.FileConfig{FS: fsx.OS{}, Share: c.Share, Rand: rand.Reader})
		if err != nil {
			return // not initialised yet
		}
		recs, err := reg.History(context.Background())
		if err != nil {
			return // a record was removed while we read: the next look has the rest
		}
		for _, r := range recs {
			if seen[r.ClusterID] == nil {
				seen[r.ClusterID] = map[uint64]lease.Record{}
			}
			seen[r.ClusterID][r.Version] = r
		}
	}
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
				look()
			}
		}
	}()
	return func() {
		close(stop)
		<-done
		look()
		for id, versions := range seen {
			checkHistory(t, id, versions)
		}
	}
}

func checkHistory(t *testing.T, id string, versions map[uint64]lease.Record) {
	t.Helper()
	var recs []lease.Record
	for v := uint64(1); versions[v].Version == v; v++ {
		recs = append(recs, versions[v])
	}
	if len(recs) != len(versions) {
		t.Errorf("recorded %d of the register's versions, but only %d without a hole", len(versions), len(recs))
	}
	for _, v := range history.Check(recs) {
		t.Errorf("register history of %s breaks a rule: %v", id, v)
	}
	t.Logf("%d register versions checked", len(recs))
}

// within fails the test unless the condition comes true in time.
func within(t *testing.T, ctx context.Context, d time.Duration, what string, cond func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	wctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	if err := cluster.Until(wctx, cond); err != nil {
		t.Fatalf("%s: not within %s", what, d)
	}
	return time.Since(began)
}

// safeBefore is the moment of the last commit's freeze as the writer's clock sees it: what
// was acknowledged before must survive anything.
func safeBefore(t *testing.T, ctx context.Context, i *cluster.Instance) time.Time {
	t.Helper()
	st, err := i.Status(ctx)
	must(t, err)
	if st.Head == nil {
		t.Fatal("no snapshot yet")
	}
	return st.Head.Frozen
}

// checkLoss fails the test if an acknowledged write older than the last commit is missing.
func checkLoss(t *testing.T, ctx context.Context, c *cluster.Cluster, on *cluster.Instance, acks []cluster.Ack, safe time.Time) (lost int) {
	t.Helper()
	missing, err := c.Missing(ctx, on, acks)
	must(t, err)
	for _, m := range missing {
		if m.At.Before(safe) {
			t.Errorf("write %d, acknowledged %s before the last commit's freeze, is lost", m.N, safe.Sub(m.At))
		}
	}
	return len(missing)
}
