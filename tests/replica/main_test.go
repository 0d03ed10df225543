// Package replica tests standbys that serve reads, with real agents, databases and readers.
package replica

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

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
	root, err := os.MkdirTemp("", "dbsupervisor-replica-")
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

// start runs a primary and a standby that serves reads.
func start(t *testing.T, replica string, edit ...func(*cluster.Options)) (c *cluster.Cluster, primary, standby *cluster.Instance) {
	t.Helper()
	return startOn(t, replica, func(c *cluster.Cluster) *cluster.Instance {
		i, err := c.Add("")
		must(t, err)
		return i
	}, edit...)
}

// startOn is start with a standby of the test's own making.
func startOn(t *testing.T, replica string, add func(*cluster.Cluster) *cluster.Instance, edit ...func(*cluster.Options)) (c *cluster.Cluster, primary, standby *cluster.Instance) {
	t.Helper()
	ctx := t.Context()
	dir, err := os.MkdirTemp(env.root, "c") // short: unix sockets are below it
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	o := cluster.Options{Root: dir, Binary: env.binary, TTL: 12 * time.Second, Renew: 2 * time.Second, Margin: 2400 * time.Millisecond,
		Schedule: "@every 1s", Replica: "  enabled: true\n" + replica}
	for _, e := range edit {
		e(&o)
	}
	c, err = cluster.New(o)
	must(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if t.Failed() || os.Getenv("REPLICA_LOGS") != "" {
			dumpLogs(t, c)
		}
	})
	primary, err = c.Add("")
	must(t, err)
	must(t, primary.Start())
	within(t, time.Minute, "a primary", func() bool { return primary.Is(ctx, "primary") })
	standby = add(c)
	must(t, standby.Start())
	within(t, time.Minute, "a replica that serves", func() bool { return standby.Is(ctx, "replica") })
	return c, primary, standby
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is how much longer than on an idle machine everything may take.
const patience = 4

// within fails the test unless the condition comes true in time.
func within(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	d *= patience
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := cluster.Until(ctx, cond); err != nil {
		t.Fatalf("%s: not within %s", what, d)
	}
}

func dumpLogs(t *testing.T, c *cluster.Cluster) {
	for _, i := range c.Instances {
		b, _ := os.ReadFile(i.LogPath("run"))
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		t.Logf("---- %s\n%s", i.Name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
}

// connect opens a reader's connection, closed with the test.
func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// write runs a statement on the primary.
func write(t *testing.T, p *cluster.Instance, sql string, args ...any) {
	t.Helper()
	conn := connect(t, p.URL())
	_, err := conn.Exec(t.Context(), sql, args...)
	must(t, err)
	_ = conn.Close(t.Context())
}

// ask reads one number from a standby, through a connection of its own.
func ask(ctx context.Context, i *cluster.Instance, sql string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, i.ReadURL("127.0.0.1"))
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close(context.Background()) }()
	n := 0
	err = conn.QueryRow(ctx, sql).Scan(&n)
	return n, err
}
