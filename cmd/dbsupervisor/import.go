package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/supervisor"
	volsync "dbsupervisor/internal/sync"
)

func (a *app) importCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "import DIR",
		Short: "Make an existing data directory the first snapshot of a new cluster",
		Long:  "Make an existing data directory (of a database that is stopped, or a copy of one) the\nfirst snapshot of a cluster that was just made with init. The directory is only read.\nStart the agents afterwards.",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return fmt.Errorf("find directory: %w", err)
			}
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			m := newMeter(a.err)
			ref, stats, err := importDir(cmd.Context(), cfg, dir, m, a.logger(config.Log{Level: "warn"}))
			m.done()
			if err != nil {
				return err
			}
			for _, s := range stats.Skipped {
				fmt.Fprintln(a.err, "left out (no snapshot keeps it):", s)
			}
			_, err = fmt.Fprintf(a.out, "%s is snapshot %s: %d files, %s\nstart the agents now\n", dir, ref.ID, stats.Files, bytes(stats.Bytes))
			return err
		},
	}
}

// importDir takes a term like any agent, so that a cluster that somebody else is
// starting at this moment can't get two beginnings.
func importDir(ctx context.Context, cfg *config.Config, dir string, m *meter, log hclog.Logger) (ref volsync.SnapshotRef, stats volsync.ImportStats, err error) {
	// A lock file tells nothing: what was restored from a snapshot of a running database has
	// one too, and the process ID in it is that of another machine or container.
	if pid, name, err := userOf(dir); err != nil {
		return ref, stats, fmt.Errorf("import %s: %w", dir, err)
	} else if pid != 0 {
		return ref, stats, api.WithHint(fmt.Errorf("import %s: process %d (%s) uses it", dir, pid, name), "stop the database first; its files change while it runs")
	}
	s, err := openShare(ctx, cfg)
	if err != nil {
		return ref, stats, err
	}
	if s.record.Head != nil {
		return ref, stats, api.WithHint(fmt.Errorf("import %s: cluster %s has data already", dir, cfg.Cluster), "import into a cluster that was just made with init, before any agent has run")
	}
	boot, err := boottime.BootID()
	if err != nil {
		return ref, stats, err
	}
	for _, d := range []string{cfg.Dir, cfg.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return ref, stats, fmt.Errorf("create directory: %w", err)
		}
	}
	v, err := openVolume(cfg, boot, volsync.TierHashed, log) // one capture, of a volume that nobody writes
	if err != nil {
		return ref, stats, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if st := v.State(); st.Phase == volsync.PhaseLive && st.LiveTerm == 0 && st.Base.ID == "" {
		// An import that was cut off before its commit; no database has ever run on it.
		if _, err := v.SetAside(ctx, "an import that was not finished", volsync.SnapshotRef{}); err != nil {
			return ref, stats, err
		}
	}
	stats, err = v.Import(ctx, dir, m)
	if err != nil {
		return ref, stats, fmt.Errorf("import %s: %w", dir, err)
	}

	lc := leaseConfig(cfg, s.register, boot, log)
	lc.Self.VolumeID = v.State().ID
	l, err := lease.New(lc)
	if err != nil {
		return ref, stats, fmt.Errorf("set up lease: %w", err)
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if err := takeTerm(ctx, cfg, l); err != nil {
		return ref, stats, fmt.Errorf("take a term: %w", err)
	}
	if l.View().Record.Head != nil {
		return ref, stats, errors.Join(fmt.Errorf("import %s: another instance has committed data meanwhile", dir), l.Release(ctx, ""))
	}
	// Renews while the snapshot is shipped.
	renewing, stop := context.WithCancel(ctx)
	renewed := make(chan struct{})
	go func() { defer close(renewed); _ = l.Run(renewing) }() // its end is ours
	ref, err = firstSnapshot(ctx, cfg, s.store, v, l, m)
	stop()
	<-renewed
	if err != nil {
		return ref, stats, err
	}
	// No database ran in this term: head has all of it.
	if err := l.HandOver(ctx, ""); err != nil {
		return ref, stats, fmt.Errorf("release the term (the snapshot is committed): %w", err)
	}
	return ref, stats, nil
}

// userOf finds a process of this machine, in a container or not, that works in a directory or
// has a file directly in it open: what the server of a database does. 0 if there is none.
func userOf(dir string) (pid int, name string, err error) {
	own := map[[2]uint64]bool{}
	add := func(path string) {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			own[[2]uint64{st.Dev, st.Ino}] = true
		}
	}
	add(dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, "", err
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			add(filepath.Join(dir, e.Name()))
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, "", err
	}
	for _, p := range procs {
		fds, err := filepath.Glob(p + "/fd/*")
		if err != nil {
			return 0, "", err
		}
		for _, f := range append(fds, p+"/cwd") {
			var st unix.Stat_t
			// What ends meanwhile uses nothing.
			if n, aerr := strconv.Atoi(filepath.Base(p)); unix.Stat(f, &st) == nil && own[[2]uint64{st.Dev, st.Ino}] && aerr == nil && n != os.Getpid() {
				comm, _ := os.ReadFile(p + "/comm") // for the message only
				return n, strings.TrimSpace(string(comm)), nil
			}
		}
	}
	return 0, "", nil
}

// takeTerm acquires the lease: at once in a new cluster, after a TTL when an earlier import
// died with it. It gives up when somebody else keeps renewing.
func takeTerm(ctx context.Context, cfg *config.Config, l *lease.Lease) error {
	clock := boottime.Real{}
	for end := clock.Now().Add(3 * cfg.Lease.TTL); ; {
		if err := l.Refresh(ctx); err != nil {
			return fmt.Errorf("read register: %w", err)
		}
		err := l.Acquire(ctx, func(*lease.Record) {})
		if !errors.Is(err, lease.ErrNotYet) || clock.Now() >= end {
			return err
		}
		if err := clock.WaitUntil(ctx, l.View().ChallengeAt); err != nil {
			return err
		}
	}
}

// firstSnapshot captures a volume that no database uses, ships it and commits it.
func firstSnapshot(ctx context.Context, cfg *config.Config, store *volsync.Store, v *volsync.Volume, l *lease.Lease, m *meter) (volsync.SnapshotRef, error) {
	var none volsync.SnapshotRef
	basis := l.View().Record
	if err := v.Baseline(ctx, store, none); err != nil {
		return none, fmt.Errorf("begin history: %w", err)
	}
	c, err := v.Capture(ctx, volsync.CaptureRequest{NoFreeze: true, Progress: m})
	if err != nil {
		return none, fmt.Errorf("capture volume: %w", err)
	}
	tree, _, err := store.Write(ctx, volsync.WriteRequest{
		Delta: c.Delta, Blocks: c.Blocks, Term: basis.Term, Seq: 1, Frozen: c.Frozen, Writer: cfg.Instance, Progress: m,
	})
	if err != nil {
		v.Abandon(c)
		return none, fmt.Errorf("ship snapshot: %w", err)
	}
	if err := v.SyncFS(ctx); err != nil {
		v.Abandon(c)
		return none, fmt.Errorf("sync volume: %w", err)
	}
	if _, err := l.Commit(ctx, basis, func(r *lease.Record) { r.Head = supervisor.HeadOf(tree.Ref) }); err != nil {
		v.Abandon(c)
		return none, fmt.Errorf("commit snapshot: %w", err)
	}
	if err := v.Adopt(c, tree); err != nil {
		return none, fmt.Errorf("adopt snapshot: %w", err)
	}
	if err := v.MarkClean(ctx, tree.Ref); err != nil {
		return none, fmt.Errorf("mark volume clean: %w", err)
	}
	return tree.Ref, nil
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// openVolume opens the instance's own copy; only one process can.
func openVolume(cfg *config.Config, boot, tier string, log hclog.Logger) (*volsync.Volume, error) {
	return volsync.OpenVolume(volsync.VolumeConfig{
		Dir: cfg.Dir, FS: fsx.OS{}, Log: log.Named("volume"), Workers: cfg.Sync.Workers, MinFree: int64(cfg.Sync.MinFree), Tier: tier, SpareCopy: cfg.Sync.SpareCopy, BootID: boot, Rand: rand.Reader,
	})
}

// leaseConfig is the lease as agents and commands take it; the volume's ID is still missing.
func leaseConfig(cfg *config.Config, reg lease.Register, boot string, log hclog.Logger) lease.Config {
	return lease.Config{
		Register: reg, Clock: boottime.Real{}, Log: log.Named("lease"), Rand: rand.Reader,
		Self: lease.Holder{Instance: cfg.Instance, Address: cfg.AdvertisedDatabase(), HTTP: cfg.AdvertisedHTTP(), Zone: cfg.Zone},
		TTL:  cfg.Lease.TTL, RenewInterval: cfg.Lease.RenewInterval, Margin: cfg.Lease.Margin, OpTimeout: cfg.Lease.OpTimeout,
		SeenFile: seenFile(cfg), RunFile: runFile(cfg), FS: fsx.OS{}, BootID: boot,
	}
}

// wallNow is the time of day for records, which are in UTC.
func wallNow() time.Time { return time.Now().UTC() }
