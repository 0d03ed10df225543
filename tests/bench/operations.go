package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

func howOperations(r *rig) string {
	return fmt.Sprintf(`A cluster of its own with an empty PostgreSQL, whose share is a file system (FUSE) that counts
what reaches it: what a network file system would be asked, less what its client answers from
its own cache. *Idle*: all that one instance asks in %s with the schedule off: the lease
(renewed or looked at every %s), and the instances' beats. *A snapshot*: the same while a
snapshot is taken, of a volume in which 1 MiB of a file was overwritten before. No time is measured here.`, idleFor, r.c.Renew)
}

// idleFor is how long nothing is done but keeping the lease.
const idleFor = 10 * time.Second

// operations counts what a network file system would be asked.
func (r *rig) operations(ctx context.Context, s *section) (err error) {
	root := filepath.Join(r.root, "ops")
	if err := os.Mkdir(root, 0o700); err != nil {
		return err
	}
	c, err := cluster.New(cluster.Options{Root: root, Binary: r.binary, Image: r.image, Schedule: never, TTL: r.ttl})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	var mounts []*efssim.Remote
	var is []*cluster.Instance
	defer func() {
		for _, m := range mounts {
			err = errors.Join(err, m.Close())
		}
	}()
	for k := range 2 {
		at := filepath.Join(root, fmt.Sprintf("mnt%d", k))
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		m, err := efssim.Spawn(c.Share, at)
		if err != nil {
			return err
		}
		mounts = append(mounts, m)
		i, err := c.Add(at)
		if err != nil {
			return err
		}
		is = append(is, i)
	}
	if err := is[0].Start(); err != nil {
		return err
	}
	if _, err := c.WaitPrimary(ctx); err != nil {
		return err
	}
	if err := r.countSnapshots(ctx, s, is[0], mounts[0]); err != nil {
		return err
	}
	if _, err := r.join(ctx, is[1]); err != nil {
		return err
	}
	return countIdle(ctx, s, "idle, as a standby", mounts[1])
}

func (r *rig) countSnapshots(ctx context.Context, s *section, i *cluster.Instance, m *efssim.Remote) error {
	one := *r
	one.a, one.pages = i, mib/page
	if err := one.dirtyFile(0); err != nil {
		return err
	}
	if _, err := api.NewClient(i.RunDir).Sync(ctx, nil); err != nil {
		return err
	}
	if err := countIdle(ctx, s, "idle, as primary", m); err != nil {
		return err
	}
	for range 3 {
		if err := one.dirtyFile(one.pages); err != nil {
			return err
		}
		before, err := m.Stats()
		if err != nil {
			return err
		}
		if _, err := api.NewClient(i.RunDir).Sync(ctx, nil); err != nil {
			return err
		}
		after, err := m.Stats()
		if err != nil {
			return err
		}
		addOps(s, "a snapshot of 1 MiB", before, after)
	}
	return nil
}

func countIdle(ctx context.Context, s *section, what string, m *efssim.Remote) error {
	before, err := m.Stats()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(idleFor):
	}
	after, err := m.Stats()
	if err != nil {
		return err
	}
	addOps(s, what, before, after)
	return nil
}

// addOps adds the operations between two looks, by kind.
func addOps(s *section, what string, before, after efssim.Stats) {
	s.add(what+": operations", "", float64(after.Total()-before.Total()))
	var kinds []efssim.Op
	for op := range after.Ops {
		kinds = append(kinds, op)
	}
	slices.Sort(kinds)
	for _, op := range kinds {
		if n := after.Ops[op] - before.Ops[op]; n > 0 {
			s.add(what+": "+string(op), "", float64(n))
		}
	}
	s.add(what+": written", "KiB", float64(after.Written-before.Written)/1024)
	s.add(what+": read", "KiB", float64(after.Read-before.Read)/1024)
}
