// Package engines takes each engine through a life with real agents, guards and databases:
// writes, snapshots under load, a restore that the engine's own checker looks at, the loss
// of the primary, a planned move.
package engines

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/workload"
)

// environment has what TestMain makes once.
type environment struct{ binary, root string }

//nolint:gochecknoglobals // set once by TestMain, the only way to hand something to tests
var env environment

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	root, err := os.MkdirTemp("", "dbsupervisor-engines-")
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

// rig is a cluster of one engine with a client.
type rig struct {
	*cluster.Cluster
	k   *workload.Client
	t   *testing.T
	ctx context.Context
	e   workload.Engine
}

func newRig(t *testing.T, e workload.Engine, edit ...func(*cluster.Options)) *rig {
	t.Helper()
	if err := exec.Command("docker", "image", "inspect", e.Image).Run(); err != nil {
		t.Fatalf("no image %s; run `make image` first", e.Image)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	root, err := os.MkdirTemp(env.root, "c") // short enough for unix sockets
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	o := e.Options(cluster.Options{Root: root, Binary: env.binary, TTL: 8 * time.Second, Renew: 1500 * time.Millisecond, Margin: 2 * time.Second, Schedule: "@every 2s"})
	for _, f := range edit {
		f(&o)
	}
	c, err := cluster.New(o)
	must(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if t.Failed() {
			dumpLogs(t, c)
		}
	})
	k, err := workload.Start(ctx, e, c)
	must(t, err)
	return &rig{Cluster: c, k: k, t: t, ctx: ctx, e: e}
}

// primary starts the first instance.
func (r *rig) primary() *cluster.Instance {
	r.t.Helper()
	a, err := r.Add("")
	must(r.t, err)
	must(r.t, a.Start())
	must(r.t, second(r.WaitPrimary(r.ctx)))
	if r.e.Setup != "" {
		must(r.t, second(r.k.Do(r.ctx, a, r.e.Setup)))
	}
	must(r.t, second(a.CLI(r.ctx, "sync")))
	return a
}

// standby starts another one, which follows.
func (r *rig) standby() *cluster.Instance {
	r.t.Helper()
	b, err := r.Add("")
	must(r.t, err)
	must(r.t, b.Start())
	must(r.t, b.WaitWarm(r.ctx))
	return b
}

// sync takes a snapshot and returns the moment before which everything acknowledged is in it.
func (r *rig) sync(i *cluster.Instance) time.Time {
	r.t.Helper()
	must(r.t, second(i.CLI(r.ctx, "sync")))
	st, err := i.Status(r.ctx)
	must(r.t, err)
	return st.Head.Frozen
}

// checkRestore restores the newest snapshot and has the engine's own checker look at it.
func (r *rig) checkRestore(i *cluster.Instance, name string) {
	r.t.Helper()
	dir := filepath.Join(r.Root, name)
	must(r.t, second(i.CLI(r.ctx, "restore", "--to", dir)))
	out, err := r.k.CheckCopy(r.ctx, dir)
	if err != nil {
		r.t.Errorf("restored copy %s: %v", name, err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	r.checkDamage(dir)
	r.t.Logf("checker on %s, last of %d lines: %s", name, len(lines), lines[len(lines)-1])
}

// checkDamage proves that the checker looks: it must complain about a copy that is damaged.
func (r *rig) checkDamage(dir string) {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, r.e.Damage))
	must(r.t, err)
	if len(files) == 0 {
		r.t.Fatalf("no file %s to damage", r.e.Damage)
	}
	f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
	must(r.t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{0xa5}, int(r.e.DamageBytes)), r.e.DamageAt)
	must(r.t, errors.Join(err, f.Close()))
	if out, err := r.k.CheckCopy(r.ctx, dir); err == nil {
		r.t.Errorf("the checker is content with a damaged copy:\n%s", out)
	}
}

// checkLoss fails the test if a write is missing that was acknowledged before a moment.
func (r *rig) checkLoss(i *cluster.Instance, acks []cluster.Ack, safe time.Time) {
	r.t.Helper()
	missing, err := r.k.Missing(r.ctx, i, acks)
	must(r.t, err)
	old := 0
	for _, a := range acks {
		if a.At.Before(safe) {
			old++
		}
	}
	for _, m := range missing {
		if m.At.Before(safe) {
			r.t.Errorf("write %d, acknowledged %s before the last freeze, is lost", m.N, safe.Sub(m.At))
		}
	}
	r.t.Logf("%d acknowledged, %d of them before the last freeze; %d missing", len(acks), old, len(missing))
	if old < 10 {
		r.t.Errorf("only %d writes before the last freeze: the test proves nothing", old)
	}
}

func (r *rig) waitWrites(w *workload.Writer, on *cluster.Instance, n int) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, 2*time.Minute)
	defer cancel()
	from := len(w.Acks())
	if err := cluster.Until(ctx, func() bool {
		acks := w.Acks()
		return len(acks) >= from+n && acks[len(acks)-1].By == on.Name
	}); err != nil {
		r.t.Fatalf("no %d writes through %s: the writer's last error is %v", n, on.Name, w.Err())
	}
}

// until fails the test unless the condition comes true.
func (r *rig) until(what string, cond func() bool) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, 2*time.Minute)
	defer cancel()
	if err := cluster.Until(ctx, cond); err != nil {
		r.t.Fatalf("never: %s", what)
	}
}

func (r *rig) docker(args ...string) string {
	r.t.Helper()
	out, err := exec.CommandContext(r.ctx, "docker", args...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestLife takes every engine through the same steps.
func TestLife(t *testing.T) {
	for _, e := range workload.Engines() {
		t.Run(e.Name, func(t *testing.T) {
			r := newRig(t, e)
			a := r.primary()
			w := r.k.StartWriter(r.ctx, 0)
			defer w.Stop()
			r.waitWrites(w, a, 20)
			b := r.standby()
			for range 2 {
				r.sync(a)
				r.waitWrites(w, a, 20)
			}
			r.checkRestore(a, "underload")

			safe := r.sync(a)
			must(t, a.Crash(r.ctx))
			must(t, second(r.WaitPrimary(r.ctx, a)))
			acks := w.Acks()
			r.checkLoss(b, acks, safe)
			r.waitWrites(w, b, 20)

			must(t, a.Start())
			must(t, a.WaitWarm(r.ctx))
			moved := len(w.Acks())
			must(t, second(b.CLI(r.ctx, "switchover")))
			r.waitWrites(w, a, 5)
			all := w.Stop()
			if len(all) <= moved {
				t.Error("no writes around the planned move")
			}
			// Of what the successor was told, nothing is lost in the planned move.
			r.checkLoss(a, all[len(acks):], time.Now())
			r.sync(a)
			r.checkRestore(a, "moved")
		})
	}
}

func second[T any](_ T, err error) error { return err }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func dumpLogs(t *testing.T, c *cluster.Cluster) {
	for _, i := range c.Instances {
		for _, k := range []string{"run", "guard"} {
			b, _ := os.ReadFile(i.LogPath(k))
			lines := strings.Split(string(b), "\n")
			t.Logf("---- %s %s\n%s", i.Name, k, strings.Join(lines[max(0, len(lines)-60):], "\n"))
		}
	}
}
