package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// keepLittle is a store in which everything that upkeep does happens within seconds.
func keepLittle(o *cluster.Options) {
	o.Schedule = "@every 1s"
	o.TTL, o.Renew, o.Margin = 30*time.Second, 2*time.Second, 6*time.Second
	o.KeepAll, o.Grace = 15*time.Second, 3*time.Second
	o.Sync = "  max_freeze: 10s\n" // how long it takes is not the question here
	o.Retention = "  hourly: 0s\n  daily: 0s\n  compact_below: 80\n  verify: 30s\n  rate: 8MiB\n"
}

// kept is how many rounds of churn the last table of a pack stays.
const kept = 20

// churn makes packs poor: again and again it fills four tables with rows that no compressor makes
// smaller, has them shipped together, and drops three of them. It ends with the test.
func churn(t *testing.T, ctx context.Context, i *cluster.Instance) {
	t.Helper()
	conn, err := i.Connect(ctx)
	must(t, err)
	must(t, second(conn.Exec(ctx, "create extension if not exists pgcrypto")))
	round := func(ctx context.Context, n int) error {
		var fill, drop string
		for k := range 4 {
			fill += fmt.Sprintf("create table churned_%d_%d as select gen_random_bytes(1000) from generate_series(1, 2000); ", n, k)
			if k > 0 {
				drop += fmt.Sprintf("drop table churned_%d_%d; ", n, k)
			}
		}
		if n >= kept {
			drop += fmt.Sprintf("drop table churned_%d_0; ", n-kept)
		}
		for _, q := range []string{fill, "checkpoint"} {
			if _, err := conn.Exec(ctx, q); err != nil {
				return err
			}
		}
		_, _ = i.CLI(ctx, "sync") // one that is given up is followed by others
		_, err := conn.Exec(ctx, drop)
		return err
	}
	cctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	pace := time.NewTicker(time.Second) // on a quick machine packs would be empty before anybody looks
	go func() {
		defer close(done)
		defer pace.Stop()
		for n := 0; cctx.Err() == nil; n++ {
			if round(cctx, n) != nil {
				return // what does not happen then fails the test
			}
			select {
			case <-pace.C:
			case <-cctx.Done():
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		_ = conn.Close(context.WithoutCancel(ctx))
	})
}

// hold pins what a reader reads, in a process of its own, until release is called. It returns the
// snapshot that the reader was told of.
func hold(t *testing.T, ctx context.Context, i *cluster.Instance, args ...string) (snapshot string, release func() error) {
	t.Helper()
	args = append([]string{"snapshots", "pin", "--config", i.Config}, args...)
	cmd := exec.CommandContext(ctx, env.binary, append(args, "--", "sh", "-c", `echo "$DBSUPERVISOR_SNAPSHOT"; exec cat`)...)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	t.Cleanup(func() { _ = in.Close() })
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	return strings.TrimSpace(line), func() error { return errors.Join(in.Close(), cmd.Wait()) }
}

// filesOf lists the files below a directory of the share.
func filesOf(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.Type().IsRegular() {
			out = append(out, p)
		}
		return err
	}))
	return out
}

// copyFile copies one file of the share; one that has vanished is left out, as by rsync.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func vanished(files []string) (n int) {
	for _, f := range files {
		if _, err := os.Lstat(f); errors.Is(err, fs.ErrNotExist) {
			n++
		}
	}
	return n
}

// listed are the snapshots that can be restored, with the moment of their freeze.
func listed(t *testing.T, ctx context.Context, i *cluster.Instance) map[string]time.Time {
	t.Helper()
	text, err := i.CLI(ctx, "snapshots", "--json")
	must(t, err)
	var rows []struct {
		ID     string    `json:"id"`
		Frozen time.Time `json:"frozen"`
	}
	must(t, json.Unmarshal([]byte(text), &rows))
	out := map[string]time.Time{}
	for _, r := range rows {
		out[r.ID] = r.Frozen
	}
	return out
}

// TestSlowReader copies the share file by file while the primary takes a snapshot a second,
// condemns, deletes and compacts. What the reader has pinned stays: the copy opens, verifies, and
// a database starts on it that has all that was acknowledged. Meanwhile what it has not pinned goes.
func TestSlowReader(t *testing.T) {
	if os.Getenv("TEST_LONG") == "" {
		t.Skip("takes minutes; make test-long runs it")
	}
	c, _ := start(t, 1, keepLittle)
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute) // it takes its time
	t.Cleanup(cancel)
	a := c.Instances[0]
	w, err := c.StartWriter(ctx)
	must(t, err)
	churn(t, ctx, a)
	upkeep := func() api.Upkeep {
		st, err := a.Status(ctx)
		if err != nil {
			return api.Upkeep{}
		}
		return st.Upkeep
	}
	within(t, ctx, 3*time.Minute, "packs are compacted", func() bool { return upkeep().CompactedPacks > 0 })

	began := time.Now() // a moment that a later snapshot is of
	within(t, ctx, 2*time.Minute, "a snapshot with what was written", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Head != nil && st.Head.Frozen.After(began)
	})
	st, err := a.Status(ctx)
	must(t, err)
	one, frozen := st.Head.ID, st.Head.Frozen
	snapshot, release := hold(t, ctx, a, "--snapshot", one)
	if snapshot != one {
		t.Fatalf("pinned is %q, not %q", snapshot, one)
	}
	files := filesOf(t, c.Share)
	to := filepath.Join(c.Root, "copy")
	compacted := upkeep().CompactedPacks
	for k, f := range files {
		rel, err := filepath.Rel(c.Share, f)
		must(t, err)
		if strings.HasPrefix(rel, "register") || strings.HasPrefix(rel, "members") {
			continue
		}
		if k == len(files)/3 { // this reader takes its time
			within(t, ctx, 4*time.Minute, "the snapshot has expired, others were deleted, packs compacted", func() bool {
				_, there := listed(t, ctx, a)[one]
				return !there && vanished(files) > 10 && upkeep().CompactedPacks > compacted
			})
			now := filesOf(t, c.Share)
			within(t, ctx, 2*time.Minute, "more is deleted", func() bool { return vanished(now) > 10 })
		}
		must(t, copyFile(f, filepath.Join(to, rel)))
	}
	gone := vanished(files)
	must(t, release())
	t.Logf("%d of %d files were deleted while the others were copied", gone, len(files))
	out, err := a.CLI(ctx, "snapshots", "verify", "--store", to, "--snapshot", one)
	if err != nil {
		t.Fatalf("the copy: %v\n%s", err, out)
	}
	restored := filepath.Join(c.Root, "restored")
	must(t, second(a.CLI(ctx, "restore", "--store", to, "--snapshot", one, "--to", restored)))
	have := rowsOf(t, ctx, restored)
	checked := 0
	for _, ack := range w.Acks() {
		if ack.At.Before(frozen) {
			checked++
			if !have[ack.N] {
				t.Errorf("write %d, acknowledged %s before the freeze, is not in the copy", ack.N, frozen.Sub(ack.At))
			}
		}
	}
	if checked == 0 {
		t.Error("nothing was acknowledged before the snapshot")
	}
	within(t, ctx, time.Minute, "the snapshot is deleted now", func() bool {
		return a.Is(ctx, "primary") && vanished([]string{filepath.Join(c.Share, "manifests", one+".manifest")}) == 1
	})
	must(t, second(a.CLI(ctx, "snapshots", "verify")))
	within(t, ctx, time.Minute, "the store is verified in the background", func() bool {
		u := upkeep()
		return u.Checking && u.CheckedFiles > 0 && u.CheckedBytes > 0
	})
	if bad := upkeep().Damaged; len(bad) > 0 {
		t.Errorf("found damaged: %v", bad)
	}
}

// rowsOf starts a database on a directory and lists the rows that the writer wrote.
func rowsOf(t *testing.T, ctx context.Context, dir string) map[int64]bool {
	t.Helper()
	id, err := exec.CommandContext(ctx, "docker", "run", "-d", "--network", "none", "--stop-signal", "SIGINT",
		"-e", "POSTGRES_HOST_AUTH_METHOD=trust", "-v", dir+":/var/lib/postgresql/data", "dbsupervisor/postgres:15").Output()
	must(t, err)
	name := strings.TrimSpace(string(id))
	t.Cleanup(func() { _ = exec.Command("docker", "rm", "-f", "-v", name).Run() })
	out := map[int64]bool{}
	within(t, ctx, time.Minute, "a database starts on the copy", func() bool {
		text, err := exec.CommandContext(ctx, "docker", "exec", "-u", "postgres", name, "psql", "-Atqc", "select n from acked", "postgres").Output()
		if err != nil {
			return false
		}
		for _, f := range strings.Fields(string(text)) {
			var n int64
			if _, err := fmt.Sscan(f, &n); err == nil {
				out[n] = true
			}
		}
		return true
	})
	return out
}

// TestDamageIsFoundInTheBackground: one file of the store goes bad; the instance that verifies
// finds it without being asked, names it, and says so until the file has gone.
func TestDamageIsFoundInTheBackground(t *testing.T) {
	c, ctx := start(t, 2, func(o *cluster.Options) {
		o.Schedule, o.Grace = "@every 1h", 4*time.Second // there is a catalog soon
		o.Retention = "  verify: 4s\n"
	})
	a, b := c.Instances[0], c.Instances[1]
	status := func(i *cluster.Instance) api.Status {
		st, err := i.Status(ctx)
		if err != nil {
			return api.Status{}
		}
		return st
	}
	within(t, ctx, time.Minute, "the standby verifies", func() bool {
		u := status(b).Upkeep
		return u.Checking && u.CheckedFiles > 0 && u.CheckedFiles == u.CheckFiles && !status(a).Upkeep.Checking
	})
	file := newest(t, filepath.Join(c.Share, "packs"))
	whole, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, flip(whole, len(whole)/2), 0o600))
	within(t, ctx, time.Minute, "the damage is found", func() bool {
		st := status(b)
		return len(st.Upkeep.Damaged) == 1 && strings.Contains(st.Upkeep.Damaged[0], filepath.Base(file)) &&
			strings.Contains(strings.Join(st.Degraded, " "), "damaged") && !b.Is(ctx, "health")
	})
	text, err := b.CLI(ctx, "history")
	must(t, err)
	if !strings.Contains(text, "damage") || !strings.Contains(text, filepath.Base(file)) {
		t.Errorf("history does not tell:\n%s", text)
	}
	must(t, os.WriteFile(file, whole, 0o600))
	within(t, ctx, time.Minute, "it is whole again", func() bool { return len(status(b).Upkeep.Damaged) == 0 })
}
