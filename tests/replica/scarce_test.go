package replica

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
	"dbsupervisor/tests/efssim"
)

// smallDisk puts a file system of its own under an instance's directory.
func smallDisk(t *testing.T, c *cluster.Cluster, i *cluster.Instance) {
	t.Helper()
	img := i.Dir + ".img"
	for _, cmd := range [][]string{{"truncate", "-s", "1G", img}, {"mkfs.ext4", "-q", "-F", "-m", "0", img}, {"mount", "-o", "loop", img, i.Dir}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(cmd, " "), err, out)
		}
	}
	t.Cleanup(func() {
		must(t, c.Close()) // what runs on it
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := cluster.Until(ctx, func() bool { return unix.Unmount(i.Dir, 0) == nil }); err != nil {
			t.Errorf("disk of %s stays mounted", i.Name)
		}
	})
}

// The standby's share hangs, then its disk is full: reads go on, the age grows, there is an
// alarm, and refreshes go on when it is over.
func TestReplicaWithoutShareOrRoom(t *testing.T) {
	t.Parallel()
	var share *efssim.Remote
	_, p, s := startOn(t, "  interval: 1s\n  drain: 5s\n", func(c *cluster.Cluster) *cluster.Instance {
		at := filepath.Join(c.Root, "mnt")
		must(t, os.MkdirAll(at, 0o700))
		var err error
		share, err = efssim.Spawn(c.Share, at)
		must(t, err)
		t.Cleanup(func() { must(t, share.Close()) })
		i, err := c.Add(at)
		must(t, err)
		smallDisk(t, c, i)
		return i
	})
	ctx := t.Context()
	stop := counter(t, p)
	defer stop()
	within(t, time.Minute, "the table on the replica", func() bool {
		n, err := ask(ctx, s, readSQL)
		return err == nil && n > 0 && age(ctx, s) > 0
	})
	r := startReaders(t, s, "127.0.0.1")
	t.Run("share hangs", func(t *testing.T) {
		must(t, share.Hang())
		defer func() { must(t, share.Heal()) }()
		time.Sleep(3 * time.Second) // what was on its way
		served, first := s.AskReplica(ctx, "")
		must(t, first)
		before, began := age(ctx, s), time.Now()
		time.Sleep(4 * time.Second)
		grown, passed := age(ctx, s)-before, time.Since(began)
		now, err := s.AskReplica(ctx, "")
		if err != nil || !now.OK {
			t.Errorf("while the share hangs: %+v, %v", now, err)
		}
		if now.Snapshot == served.Snapshot && grown < passed-time.Second {
			t.Errorf("the age grew by %s in %s", grown, passed)
		}
	})
	had := refreshes(ctx, s)
	within(t, time.Minute, "a refresh after the share came back", func() bool { return refreshes(ctx, s) > had })
	t.Run("disk full", func(t *testing.T) {
		ballast := filepath.Join(s.Dir, "ballast")
		var fs unix.Statfs_t
		must(t, unix.Statfs(s.Dir, &fs))
		f, err := os.Create(ballast)
		must(t, err)
		must(t, unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-(20<<20))) // sync.min_free is 64 MiB
		must(t, f.Close())
		within(t, time.Minute, "an alarm", func() bool {
			st, err := s.Status(ctx)
			return err == nil && strings.Contains(strings.Join(st.Degraded, " "), "not enough room") ||
				err == nil && strings.Contains(strings.Join(st.Degraded, " "), "can't be brought to head")
		})
		reads := r.reads.Load()
		within(t, time.Minute, "reads while the disk is full", func() bool { return r.reads.Load() > reads+50 })
		if !s.Is(ctx, "replica") {
			t.Error("the old copy does not serve any more")
		}
		must(t, os.Remove(ballast))
	})
	had = refreshes(ctx, s)
	within(t, 2*time.Minute, "a refresh after there was room", func() bool { return refreshes(ctx, s) > had })
	if fails := r.end(); len(fails) > 0 {
		t.Errorf("%d reads failed, the first: %v", len(fails), fails[0])
	}
	t.Logf("%d reads", r.reads.Load())
}
