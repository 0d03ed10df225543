package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	volsync "dbsupervisor/internal/sync"
)

func howRestore(*rig) string {
	return `"dbsupervisor restore" of the newest snapshot into a new directory on the local disk, a
process of its own, from start to end: it checks every block and fsyncs what it wrote. Its
throughput counts the restored files' lengths, of which the random tables and the file do not
compress and pgbench's tables nearly vanish. The packs alone: the pack files that the snapshot
refers to, read from beginning to end one after another and thrown away, counted by their
(compressed) lengths. Before each of both the packs are dropped from the page cache; below it
the machine's host may still have them.`
}

func howRestoreLater(*rig) string {
	return `The same after all the snapshots of the tables before: the newest one refers to packs that
are mostly replaced by later ones. Reading them alone reads all of them, a restore only what
it needs.`
}

// restore restores head some times, reading the packs alone beside it.
func (r *rig) restore(ctx context.Context, s *section) error {
	tree, info, err := r.head(ctx)
	if err != nil {
		return err
	}
	s.add("snapshot: length of all files", "MiB", float64(info.LogicalSize)/mib)
	s.add("snapshot: packs", "", float64(len(tree.Packs)))
	for range r.restores {
		bytes, took, err := r.readPacks(tree)
		if err != nil {
			return err
		}
		s.add("packs alone: read", "MiB", float64(bytes)/mib)
		s.add("packs alone: time", "s", took.Seconds())
		s.add("packs alone: throughput", "MiB/s", perSecond(bytes, took))
		if took, err = r.restoreOnce(ctx, tree); err != nil {
			return err
		}
		s.add("restore: time", "s", took.Seconds())
		s.add("restore: throughput", "MiB/s", perSecond(info.LogicalSize, took))
	}
	return nil
}

func (r *rig) restoreOnce(ctx context.Context, tree *volsync.Tree) (took time.Duration, err error) {
	if err := r.forget(tree); err != nil {
		return 0, err
	}
	to := filepath.Join(r.root, "restored")
	defer func() { err = errors.Join(err, os.RemoveAll(to)) }()
	began := time.Now()
	if _, err := r.a.CLI(ctx, "restore", "--snapshot", tree.Ref.ID, "--to", to); err != nil {
		return 0, err
	}
	took = time.Since(began)
	if _, err := os.Stat(filepath.Join(to, "PG_VERSION")); err != nil {
		return 0, fmt.Errorf("look at what was restored: %w", err)
	}
	return took, nil
}

func (r *rig) readPacks(tree *volsync.Tree) (bytes int64, took time.Duration, err error) {
	if err := r.forget(tree); err != nil {
		return 0, 0, err
	}
	buf := make([]byte, mib)
	began := time.Now()
	for _, p := range tree.Packs {
		f, err := os.Open(filepath.Join(r.c.Share, p.Path))
		if err != nil {
			return 0, 0, err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, 0, err
		}
		bytes += n
	}
	return bytes, time.Since(began), nil
}

// forget drops the packs from the page cache. They have been fsynced, so nothing holds them.
func (r *rig) forget(tree *volsync.Tree) error {
	for _, p := range tree.Packs {
		f, err := os.Open(filepath.Join(r.c.Share, p.Path))
		if err != nil {
			return err
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("drop %s from the page cache: %w", p.Path, err)
		}
	}
	return nil
}
