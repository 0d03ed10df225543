package faults

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/tests/cluster"
)

// disk puts a small ext4 of its own under an instance's directory.
func disk(t *testing.T, c *cluster.Cluster, i *cluster.Instance, size string) {
	t.Helper()
	img := i.Dir + ".img"
	for _, cmd := range [][]string{
		{"truncate", "-s", size, img},
		{"mkfs.ext4", "-q", "-F", "-m", "0", img},
		{"mount", "-o", "loop", img, i.Dir},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(cmd, " "), err, out)
		}
	}
	t.Cleanup(func() {
		must(t, c.Close()) // what runs on the disk; the kernel may lag behind
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := cluster.Until(ctx, func() bool { return unix.Unmount(i.Dir, 0) == nil }); err != nil {
			t.Errorf("disk of %s stays mounted", i.Name)
		}
	})
}

// fill leaves only so many bytes free and returns the way back.
func fill(t *testing.T, dir string, leave int64) (release func()) {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave))
	must(t, f.Close())
	return func() { must(t, os.Remove(path)) }
}

// TestDiskFullCopying: no room to spool a snapshot. The database is untouched, status says
// what is wrong, and snapshots go on when there is room.
func TestDiskFullCopying(t *testing.T) {
	c, ctx := start(t, 0, func(o *cluster.Options) { o.MinFree = "100MiB" })
	a, err := c.Add("")
	must(t, err)
	disk(t, c, a, "1G")
	must(t, a.Start())
	must(t, second(c.WaitPrimary(ctx)))
	must(t, second(a.CLI(ctx, "sync")))
	w, err := c.StartWriter(ctx)
	must(t, err)
	release := fill(t, a.Dir, 90<<20)
	within(t, ctx, 20*time.Second, "status says that there is no room", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Sync.ConsecutiveFailures > 0 && strings.Contains(st.Sync.LastError, "room")
	})
	n := len(w.Acks())
	within(t, ctx, 10*time.Second, "the database goes on", func() bool { return len(w.Acks()) > n+20 })
	release()
	freed := time.Now()
	within(t, ctx, 40*time.Second, "snapshots go on", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Head != nil && st.Head.Frozen.After(freed) && st.Sync.ConsecutiveFailures == 0
	})
	if n, last := w.Errors(); n > 0 {
		t.Errorf("client saw %d errors: %s", n, last)
	}
	w.Stop()
	must(t, second(a.CLI(ctx, "snapshots", "verify")))
}

// TestDiskFullHydrating: a standby without room for the volume says so, disturbs nobody,
// and becomes warm when there is room.
func TestDiskFullHydrating(t *testing.T) {
	c, ctx := start(t, 1)
	a := c.Instances[0]
	b, err := c.Add("")
	must(t, err)
	disk(t, c, b, "1G")
	release := fill(t, b.Dir, 70<<20)
	must(t, b.Start())
	within(t, ctx, 20*time.Second, "status says that there is no room", func() bool {
		st, err := b.Status(ctx)
		return err == nil && st.LastError != nil && strings.Contains(st.LastError.What, "room")
	})
	if !a.Is(ctx, "primary") {
		t.Error("the primary was disturbed")
	}
	release()
	must(t, b.WaitWarm(ctx))
}
