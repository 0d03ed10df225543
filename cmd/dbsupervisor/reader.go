package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/supervisor"
	volsync "dbsupervisor/internal/sync"
)

// reader is a store that a command reads: the cluster's, or a copy of it.
type reader struct {
	store   *volsync.Store
	workers int
	minFree int64
	// list lists what can be restored now, newest first; look loads the register afresh.
	// Both are nil for a copy: nothing is deleted there.
	list func(ctx context.Context) ([]volsync.SnapshotInfo, error)
	look func(ctx context.Context) (volsync.SnapshotRef, volsync.CatalogRef, error)
}

func storeFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "store", "", "read this copy of a shared directory; neither configuration nor register is needed")
	_ = cmd.MarkFlagDirname("store") // the flag exists
}

// snapshotsOf lists what can be restored, newest first: from the cluster's shared directory,
// or from the copy in dir. There, what was committed is what other snapshots or a catalog
// prove; one that is named by its id need not be proven.
func (a *app) snapshotsOf(ctx context.Context, dir, id string) (*reader, []volsync.SnapshotInfo, error) {
	if dir != "" {
		return a.copiedSnapshots(ctx, dir, id)
	}
	cfg, _, err := a.load()
	if err != nil {
		return nil, nil, err
	}
	s, err := openShare(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	r := &reader{store: s.store, workers: cfg.Sync.Workers, minFree: int64(cfg.Sync.MinFree)}
	r.look = func(ctx context.Context) (volsync.SnapshotRef, volsync.CatalogRef, error) {
		var head volsync.SnapshotRef
		s, err := openShare(ctx, cfg)
		if err != nil {
			return head, volsync.CatalogRef{}, err
		}
		if s.record.Head != nil {
			head = supervisor.RefOf(s.record.Head)
		}
		return head, volsync.CatalogRef{Name: s.record.Catalog, Hash: s.record.CatalogHash}, nil
	}
	r.list = func(ctx context.Context) ([]volsync.SnapshotInfo, error) {
		head, cat, err := r.look(ctx)
		if err != nil || head.ID == "" {
			return nil, err
		}
		return r.store.List(ctx, head, cat)
	}
	list, err := s.snapshots(ctx)
	return r, list, err
}

func (a *app) copiedSnapshots(ctx context.Context, dir, id string) (*reader, []volsync.SnapshotInfo, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("find directory: %w", err)
	}
	store, err := volsync.OpenStore(volsync.StoreConfig{FS: fsx.OS{}, Dir: dir, Log: hclog.NewNullLogger(), Rand: rand.Reader})
	if err != nil {
		return nil, nil, err
	}
	rep, err := store.Scan(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("look for snapshots: %w", err)
	}
	list, err := store.Restorable(ctx, rep)
	for _, u := range rep.Unproven {
		if u.ID == id {
			list = append([]volsync.SnapshotInfo{u}, list...)
		} else if id == "" {
			fmt.Fprintf(a.err, "not proven to have been committed, to be chosen with --snapshot only: %s of %s\n", u.ID, u.Frozen.UTC().Format(stamp))
		}
	}
	return &reader{store: store}, list, err
}

// pinned runs f while what it reads can't be deleted: one snapshot, or everything (none
// named). On a share that can't be written it goes on without: whatever is missing then is
// noticed, since everything that is read is checked.
func (a *app) pinned(ctx context.Context, r *reader, snaps []volsync.SnapshotRef, what string, f func(ctx context.Context) error) error {
	if r.look == nil {
		return f(ctx)
	}
	began := false
	err := r.store.WithPin(ctx, volsync.PinRequest{Snapshots: snaps, Look: r.look, Owner: owner(what)},
		func(ctx context.Context, _ volsync.SnapshotRef) error {
			began = true
			return f(ctx)
		})
	if !began && (errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.ENOSPC)) {
		fmt.Fprintf(a.err, "reading without a pin, what is read may be deleted meanwhile: %v\n", err)
		return f(ctx)
	}
	return err
}

// owner says who reads, for people who look into a pin.
func owner(what string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return fmt.Sprintf("%s on %s, process %d", what, host, os.Getpid())
}
