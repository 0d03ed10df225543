package faults

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

// mounted runs a cluster whose instances see the shared directory through file systems
// that break on demand, one each.
func mounted(t *testing.T, n int, edit ...func(*cluster.Options)) (*cluster.Cluster, []*efssim.Remote, context.Context) {
	t.Helper()
	c, ctx := start(t, 0, edit...)
	var shares []*efssim.Remote
	for k := range n {
		at := filepath.Join(c.Root, "mnt"+string(rune('a'+k)))
		must(t, os.Mkdir(at, 0o755))
		sh, err := efssim.Spawn(c.Share, at)
		must(t, err)
		t.Cleanup(func() { _ = sh.Close() })
		shares = append(shares, sh)
		inst, err := c.Add(at)
		must(t, err)
		must(t, inst.Start())
		if k == 0 {
			must(t, second(c.WaitPrimary(ctx)))
			synced(t, ctx, inst)
		} else {
			must(t, inst.WaitWarm(ctx))
		}
	}
	return c, shares, ctx
}

// TestShareHangsBriefly: inside the lease a hang is nothing but a pause in snapshots.
func TestShareHangsBriefly(t *testing.T) {
	c, shares, ctx := mounted(t, 2, func(o *cluster.Options) { o.TTL, o.Renew, o.Margin = 10*time.Second, time.Second, 2*time.Second })
	a := c.Instances[0]
	w, err := c.StartWriter(ctx)
	must(t, err)
	st, err := a.Status(ctx)
	must(t, err)
	must(t, shares[0].Hang())
	within(t, ctx, 10*time.Second, "the hang is noticed", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Lease.LastContactMS != nil && *st.Lease.LastContactMS > 3000
	})
	must(t, shares[0].Heal())
	before := time.Now()
	within(t, ctx, 20*time.Second, "snapshots go on", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Head != nil && st.Head.Frozen.After(before)
	})
	after, err := a.Status(ctx)
	must(t, err)
	if after.Term != st.Term || after.Role != api.RolePrimary {
		t.Errorf("term %d -> %d, role %s: want the same term and primary", st.Term, after.Term, after.Role)
	}
	if n, last := w.Errors(); n > 0 {
		t.Errorf("client saw %d errors: %s", n, last)
	}
	w.Stop()
}

// TestShareHangsLong: the primary's share hangs for longer than the lease. It fences itself
// at its deadline, the other one takes over, and the first comes back as a standby.
func TestShareHangsLong(t *testing.T) {
	c, shares, ctx := mounted(t, 2)
	a, b := c.Instances[0], c.Instances[1]
	w, err := c.StartWriter(ctx)
	must(t, err)
	within(t, ctx, 20*time.Second, "more snapshots", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Sync.Commits >= 2
	})
	must(t, shares[0].Hang())
	hung := time.Now()
	within(t, ctx, c.TTL+time.Second, "a fences itself", func() bool {
		id, err := a.Container(ctx)
		return err == nil && id == ""
	})
	fenced := time.Since(hung)
	within(t, ctx, c.TTL+8*time.Second, "b takes over", func() bool { return b.Is(ctx, "primary") })
	if fenced > c.TTL {
		t.Errorf("database ended %s after the share hung, later than the TTL of %s", fenced, c.TTL)
	}
	for time.Since(hung) < 3*c.TTL {
		time.Sleep(100 * time.Millisecond) // the hang goes on while b serves
	}
	must(t, shares[0].Heal())
	must(t, a.WaitWarm(ctx))
	w.Stop()
	must(t, second(b.CLI(ctx, "snapshots", "verify")))
}

// TestShareFails: errors of every kind on the primary's side. The database goes on inside
// the lease or is fenced; afterwards everything recovers and verifies.
func TestShareFails(t *testing.T) {
	for _, f := range []struct {
		name   string
		break_ func(*efssim.Remote) error
		word   string // in what status says
	}{
		{"EIO", func(r *efssim.Remote) error { return r.Fail(syscall.EIO) }, "input/output error"},
		{"ENOSPC", func(r *efssim.Remote) error { return r.NoSpace(0) }, "no space left"},
		{"read-only", func(r *efssim.Remote) error { return r.ReadOnly() }, "read-only file system"},
	} {
		t.Run(f.name, func(t *testing.T) {
			c, shares, ctx := mounted(t, 1)
			a := c.Instances[0]
			w, err := c.StartWriter(ctx)
			must(t, err)
			within(t, ctx, 20*time.Second, "more snapshots", func() bool {
				st, err := a.Status(ctx)
				return err == nil && st.Sync.Commits >= 2
			})
			must(t, f.break_(shares[0]))
			within(t, ctx, c.TTL+2*time.Second, "status says what is wrong", func() bool {
				st, err := a.Status(ctx)
				return err == nil && strings.Contains(st.Lease.Error+st.Sync.LastError, f.word)
			})
			within(t, ctx, c.TTL+2*time.Second, "fenced at the deadline", func() bool { return !a.Is(ctx, "primary") })
			must(t, shares[0].Heal())
			within(t, ctx, 4*c.TTL+20*time.Second, "primary again", func() bool { return a.Is(ctx, "primary") })
			// The disk was never lost, nor the term taken by anybody: nothing is missing.
			missing, err := c.Missing(ctx, a, w.Stop())
			must(t, err)
			if len(missing) > 0 {
				t.Errorf("%d acknowledged writes are gone", len(missing))
			}
			must(t, second(a.CLI(ctx, "sync")))
			must(t, second(a.CLI(ctx, "snapshots", "verify")))
		})
	}
}

// TestShareUnmounted: an empty directory is left where the share was. No agent takes it for
// a new cluster, neither the running one nor one that starts.
func TestShareUnmounted(t *testing.T) {
	c, shares, ctx := mounted(t, 1)
	a := c.Instances[0]
	must(t, shares[0].Unmount())
	within(t, ctx, c.TTL+5*time.Second, "fenced at the deadline", func() bool {
		id, err := a.Container(ctx)
		return err == nil && id == ""
	})
	must(t, a.SignalAgent(syscall.SIGKILL))
	_ = a.WaitAgent(ctx)
	must(t, a.StartAgent())
	quiet, cancel := context.WithTimeout(ctx, c.TTL)
	defer cancel()
	if err := cluster.Until(quiet, func() bool { return a.Is(ctx, "primary") }); err == nil {
		t.Fatal("an agent became primary on an empty directory")
	}
	left, err := os.ReadDir(a.Share)
	must(t, err)
	for _, e := range left {
		if e.Name() == "cluster" || e.Name() == "register" {
			t.Errorf("an agent initialised a cluster in the empty directory: %s", e.Name())
		}
	}
}
