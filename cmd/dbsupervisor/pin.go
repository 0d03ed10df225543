package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	volsync "dbsupervisor/internal/sync"
)

// pinStop is how long a command gets to end by itself when its pin was lost.
const pinStop = 10 * time.Second

func (a *app) pinCmd() *cobra.Command {
	var pick choice
	all := false
	var long time.Duration
	cmd := &cobra.Command{
		Use:   "pin [--snapshot ID | --all] [--for DURATION] [-- COMMAND...]",
		Short: "Keep snapshots from being deleted while a command reads or copies the shared directory",
		Long: "Keep snapshots from being deleted while COMMAND reads or copies the shared directory file by\n" +
			"file, or for a while. COMMAND finds the shared directory in DBSUPERVISOR_SHARE and the newest\n" +
			"snapshot that is covered in DBSUPERVISOR_SNAPSHOT. If the pin can't be kept up, COMMAND is\n" +
			"ended and the exit code is 1: a copy made so must not be relied on.\n\n" +
			"  dbsupervisor snapshots pin -- rsync -a /mnt/share/shop/ /backup/shop/\n" +
			"  dbsupervisor snapshots verify --store /backup/shop",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := pinArgs(args, pick.id, all, long); err != nil {
				return &usageError{err: err, help: cmd.CommandPath()}
			}
			r, list, err := a.snapshotsOf(cmd.Context(), "", "")
			if err != nil {
				return err
			}
			var refs []volsync.SnapshotRef
			if pick.id != "" {
				one, err := pick.find(list, time.Now())
				if err != nil {
					return err
				}
				refs = append(refs, one.SnapshotRef)
			}
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			err = r.store.WithPin(cmd.Context(), volsync.PinRequest{Snapshots: refs, Look: r.look, Owner: owner("snapshots pin")},
				func(ctx context.Context, head volsync.SnapshotRef) error {
					covered := head.ID
					if pick.id != "" {
						covered = pick.id
					}
					return a.whilePinned(ctx, args, long, cfg.Share, covered)
				})
			var exit *exec.ExitError
			if errors.As(err, &exit) && !errors.Is(err, volsync.ErrPinLost) && exit.ExitCode() > 0 {
				a.code = exit.ExitCode()
				return nil
			}
			return err
		},
	}
	cmd.Flags().StringVar(&pick.id, "snapshot", "", "only this one (default: everything that is retained)")
	cmd.Flags().BoolVar(&all, "all", false, "everything that is retained; the default")
	cmd.Flags().DurationVar(&long, "for", 0, "without a command: for so long; with one: at most so long")
	return cmd
}

func pinArgs(args []string, id string, all bool, long time.Duration) error {
	switch {
	case id != "" && all:
		return errors.New("give either --snapshot or --all, not both")
	case long < 0:
		return errors.New("--for must not be negative")
	case len(args) == 0 && long == 0:
		return errors.New("give a command after --, or --for DURATION")
	}
	return nil
}

// whilePinned runs the command, or waits. ctx ends when the pin is lost.
func (a *app) whilePinned(ctx context.Context, args []string, long time.Duration, share, snapshot string) error {
	if len(args) == 0 {
		fmt.Fprintf(a.out, "pinned up to %s for %s\n", orDash(snapshot), long)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(long):
			return nil
		}
	}
	if long > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, long)
		defer cancel()
	}
	run := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // the operator's own command
	run.Stdin, run.Stdout, run.Stderr = a.in, a.out, a.err
	run.Env = append(os.Environ(), "DBSUPERVISOR_SHARE="+share, "DBSUPERVISOR_SNAPSHOT="+snapshot)
	run.Cancel = func() error { return run.Process.Signal(syscall.SIGTERM) }
	run.WaitDelay = pinStop
	if err := run.Run(); err != nil {
		return fmt.Errorf("run %s: %w", args[0], err)
	}
	return nil
}
