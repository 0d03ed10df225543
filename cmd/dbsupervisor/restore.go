package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	volsync "dbsupervisor/internal/sync"
)

// flags adds --at and --snapshot.
func (c *choice) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.at, "at", "", `the newest snapshot at or before this time ("2026-01-31 14:05:00", "14:05", or "15m" for that long ago)`)
	cmd.Flags().StringVar(&c.id, "snapshot", "", "this snapshot, by ID")
}

func (a *app) restoreCmd() *cobra.Command {
	var pick choice
	to, copied := "", ""
	cmd := &cobra.Command{
		Use:   "restore --to DIR",
		Short: "Write a snapshot into a new directory (the newest unless --at or --snapshot is given)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				return &usageError{err: fmt.Errorf("--to is required"), help: cmd.CommandPath()}
			}
			dir, err := filepath.Abs(to)
			if err != nil {
				return fmt.Errorf("find directory: %w", err)
			}
			r, list, err := a.snapshotsOf(cmd.Context(), copied, pick.id)
			if err != nil {
				return err
			}
			one, err := pick.find(list, time.Now())
			if err != nil {
				return err
			}
			began := time.Now()
			m := newMeter(a.err)
			err = a.pinned(cmd.Context(), r, []volsync.SnapshotRef{one.SnapshotRef}, "restore", func(ctx context.Context) error {
				return volsync.Restore(ctx, r.store, one.SnapshotRef, dir, volsync.RestoreOptions{
					Workers: r.workers, MinFree: r.minFree, Progress: m,
				})
			})
			m.done()
			if err != nil {
				return fmt.Errorf("restore snapshot %s: %w", one.ID, err)
			}
			took := time.Since(began)
			_, err = fmt.Fprintf(a.out, "restored %s of %s (%s) to %s in %s, %s/s\n", one.ID, one.Frozen.UTC().Format(stamp), bytes(one.LogicalSize), dir,
				since(took), bytes(int64(float64(one.LogicalSize)/max(took.Seconds(), 1e-3))))
			return err
		},
	}
	pick.flags(cmd)
	storeFlag(cmd, &copied)
	cmd.Flags().StringVar(&to, "to", "", "directory, new or empty")
	_ = cmd.MarkFlagDirname("to") // the flag exists
	return cmd
}

// wholeHint tells how to get at a snapshot that is whole.
func wholeHint(err error, id string) error {
	return api.WithHint(err, "restore it with: dbsupervisor restore --snapshot "+id+" --to DIR, or go back to it with: dbsupervisor rollback --snapshot "+id)
}
