// Package consistency proves that a snapshot of a PostgreSQL under load is one point in time,
// and that the proof would notice if it were not: with the freeze switched off it must fail.
package consistency

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/fence"
	volsync "dbsupervisor/internal/sync"
)

const (
	image = "dbsupervisor/postgres:15"
	label = "dbsupervisor.test=consistency"
	// readRate is what the volume is read at, by both workers together: a disk that is not
	// mostly cache. A copy that takes no time hides the corruption that this test is about.
	readRate = 100 << 20
	workers  = 2
)

// TestFrozen: every snapshot of a database under load starts, and holds together.
func TestFrozen(t *testing.T) {
	rounds := 2
	if n, err := strconv.Atoi(os.Getenv("ROUNDS")); err == nil {
		rounds = n
	}
	h := newHarness(t)
	for n := range rounds {
		if err := h.round(n, true); err != nil {
			t.Errorf("snapshot %d is not one point in time: %v", n, err)
		}
	}
}

// TestNotFrozen switches the mechanism off: the same test must fail, either because the
// capture itself sees files come and go, or because the copy is found bad.
func TestNotFrozen(t *testing.T) {
	h := newHarness(t)
	const most = 5
	for n := range most {
		if err := h.round(n, false); err != nil {
			t.Logf("as it must be, copy %d without a freeze fails: %v", n, err)
			return
		}
	}
	t.Errorf("%d copies without a freeze were all good: the test would not notice a missing freeze", most)
}

type harness struct {
	t         *testing.T
	ctx       context.Context
	dir       string
	store     *volsync.Store
	volume    *volsync.Volume
	container string
	group     cgroup.Group
	base      *volsync.Tree
	seq       uint64
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	h := &harness{t: t, ctx: ctx, dir: t.TempDir()}
	share := filepath.Join(h.dir, "share")
	h.must(os.Mkdir(share, 0o700))
	boot, err := boottime.BootID()
	h.must(err)
	log := hclog.NewNullLogger()
	h.store, err = volsync.OpenStore(volsync.StoreConfig{Dir: share, Log: log})
	h.must(err)
	h.must(h.store.Init(ctx))
	h.volume, err = volsync.OpenVolume(volsync.VolumeConfig{Dir: filepath.Join(h.dir, "local"), Log: log, BootID: boot, Workers: workers, Rand: rand.Reader})
	h.must(err)
	t.Cleanup(func() { _ = h.volume.Close() })
	h.must(h.volume.MarkLive(ctx, 1))
	h.must(h.volume.Baseline(ctx, h.store, volsync.SnapshotRef{}))
	h.container = h.run(h.volume.Path())
	h.must(h.ready(h.container))
	h.exec(h.container, "pgbench", "-i", "-q", "-s", "20", "-U", "postgres", "postgres")
	var pid int
	h.must(json.Unmarshal([]byte(h.docker("inspect", "-f", "{{.State.Pid}}", h.container)), &pid))
	h.group, err = cgroup.Of(pid)
	h.must(err)
	h.load()
	return h
}

// load keeps pgbench running until the test ends, and checkpoints with it: what a torn copy
// is recovered from moves on all the time.
func (h *harness) load() {
	ctx, cancel := context.WithCancel(h.ctx)
	cmd := exec.CommandContext(ctx, "docker", "exec", h.container, "pgbench", "-n", "-c", "8", "-T", "3600", "-U", "postgres", "postgres")
	h.must(cmd.Start())
	points := exec.CommandContext(ctx, "docker", "exec", h.container, "sh", "-c",
		"while psql -qU postgres -c checkpoint postgres; do sleep 0.3; done")
	h.must(points.Start())
	h.t.Cleanup(func() { cancel(); _ = cmd.Wait(); _ = points.Wait() })
	h.within("pgbench writes", func() bool {
		out, err := h.query(h.container, "select count(*) from pgbench_history")
		n, perr := strconv.Atoi(out)
		return err == nil && perr == nil && n > 100
	})
}

// disk is a Progress that slows the reading of the volume to readRate: a capture says after
// each piece how much a round has read so far.
type disk struct {
	mu   sync.Mutex
	last int64
}

// Set implements volsync.Progress.
func (d *disk) Set(_ string, done, _ int64) {
	d.mu.Lock()
	n := done - d.last
	if n < 0 { // another round
		n = done
	}
	d.last = done
	d.mu.Unlock()
	time.Sleep(time.Duration(float64(n) * workers / readRate * float64(time.Second)))
}

// thawed does nothing: the mechanism switched off.
type thawed struct{}

func (thawed) Freeze(context.Context) error { return nil }
func (thawed) Thaw() error                  { return nil }

// round takes one snapshot, restores it and checks the restored database. Its error says
// what is wrong with the copy; trouble of any other kind fails the test.
func (h *harness) round(n int, freeze bool) error {
	h.t.Helper()
	var freezer volsync.Freezer = thawed{}
	if freeze {
		freezer = fence.NewFreezer(fence.FreezerConfig{Group: h.group})
	}
	c, err := h.volume.Capture(h.ctx, volsync.CaptureRequest{Freezer: freezer, MaxFreeze: time.Minute, Progress: &disk{}})
	if errors.Is(err, volsync.ErrFreezeBroken) {
		return err // the capture itself has seen files move
	}
	h.must(err)
	h.seq++
	tree, stats, err := h.store.Write(h.ctx, volsync.WriteRequest{
		Base: h.base, Delta: c.Delta, Blocks: c.Blocks, Term: 1, Seq: h.seq, Frozen: c.Frozen, Writer: "test",
	})
	h.must(err)
	h.must(h.volume.Adopt(c, tree))
	h.base = tree
	h.t.Logf("snapshot %d: last round took %s, %d MiB changed", n, c.FreezeFor.Round(time.Millisecond), stats.ChangedBytes>>20)
	dir := filepath.Join(h.dir, fmt.Sprintf("copy%d", n))
	h.must(volsync.Restore(h.ctx, h.store, tree.Ref, dir, volsync.RestoreOptions{}))
	defer func() { _ = os.RemoveAll(dir) }()
	return h.check(dir)
}

// check starts the copy and asks everything that knows what a whole database looks like.
func (h *harness) check(dir string) error {
	id := h.run(dir)
	defer h.docker("rm", "-f", id)
	if err := h.ready(id); err != nil {
		logs, _ := exec.Command("docker", "logs", "--tail", "5", id).CombinedOutput()
		return fmt.Errorf("does not start: %w: %s", err, logs)
	}
	sums, err := h.query(id, `select (select sum(abalance) from pgbench_accounts) || ' ' || (select sum(tbalance) from pgbench_tellers)
		|| ' ' || (select sum(bbalance) from pgbench_branches) || ' ' || (select coalesce(sum(delta), 0) from pgbench_history)`)
	if err != nil {
		return fmt.Errorf("balances: %w", err)
	}
	if f := strings.Fields(sums); len(f) != 4 || f[0] != f[1] || f[1] != f[2] || f[2] != f[3] {
		return fmt.Errorf("balances of accounts, tellers, branches and history differ: %s", sums)
	}
	if out, err := exec.CommandContext(h.ctx, "docker", "exec", id, "pg_amcheck", "-U", "postgres", "--install-missing", "--heapallindexed", "postgres").CombinedOutput(); err != nil {
		return fmt.Errorf("pg_amcheck: %w: %s", err, firstLines(out))
	}
	h.docker("stop", "-t", "60", id)
	out, err := exec.CommandContext(h.ctx, "docker", "run", "--rm", "--label", label, "--entrypoint", "pg_checksums",
		"--user", "postgres", "-v", dir+":/var/lib/postgresql/data", image, "--check", "-D", "/var/lib/postgresql/data").CombinedOutput()
	if err != nil {
		return fmt.Errorf("pg_checksums: %w: %s", err, firstLines(out))
	}
	return nil
}

func firstLines(b []byte) string {
	s := string(b)
	if len(s) > 600 {
		s = s[:600]
	}
	return s
}

func (h *harness) run(dir string) string {
	h.t.Helper()
	id := h.docker("run", "-d", "--label", label, "-e", "POSTGRES_HOST_AUTH_METHOD=trust", "--stop-signal", "SIGINT",
		"-v", dir+":/var/lib/postgresql/data", image, "postgres", "-c", "shared_buffers=64MB",
		"-c", "max_wal_size=128MB")
	h.t.Cleanup(func() { _ = exec.Command("docker", "rm", "-f", id).Run() })
	return id
}

// ready waits until the database answers or its container ends.
func (h *harness) ready(id string) error {
	for {
		if _, err := h.query(id, "select 1"); err == nil {
			return nil
		}
		if h.docker("inspect", "-f", "{{.State.Running}}", id) != "true" {
			return errors.New("container ended")
		}
		select {
		case <-h.ctx.Done():
			return h.ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (h *harness) query(id, sql string) (string, error) {
	out, err := exec.CommandContext(h.ctx, "docker", "exec", id, "psql", "-h", "127.0.0.1", "-U", "postgres", "-Atqc", sql, "postgres").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, firstLines(out))
	}
	return strings.TrimSpace(string(out)), nil
}

func (h *harness) exec(id string, args ...string) { h.docker(append([]string{"exec", id}, args...)...) }

func (h *harness) docker(args ...string) string {
	h.t.Helper()
	out, err := exec.CommandContext(h.ctx, "docker", args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (h *harness) within(what string, cond func() bool) {
	h.t.Helper()
	for !cond() {
		select {
		case <-h.ctx.Done():
			h.t.Fatalf("%s: not in time", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (h *harness) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}
