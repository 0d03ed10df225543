package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	volsync "dbsupervisor/internal/sync"
)

// errDamaged: verify found something.
var errDamaged = errors.New("the store is damaged")

func (a *app) snapshotsCmd() *cobra.Command {
	cmd := a.listCmd("snapshots", "List the snapshots; verify them")
	cmd.AddCommand(a.listCmd("list", "List the snapshots, as without a command"), a.verifyCmd(), a.pinCmd(), a.statCmd())
	return cmd
}

func (a *app) listCmd(use, short string) *cobra.Command {
	asJSON := false
	copied := ""
	list := func(cmd *cobra.Command, _ []string) error {
		_, snaps, err := a.snapshotsOf(cmd.Context(), copied, "")
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(a.out, snapshotRows(snaps))
		}
		if len(snaps) == 0 {
			_, err = fmt.Fprintln(a.out, "no snapshot has been committed yet")
			return err
		}
		tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "ID\tFROZEN\tTERM\tSIZE\tCHANGED\tSTORED\tFILES\tBY")
		for _, i := range snaps {
			fmt.Fprintf(tw, "%s\t%s\t%d\t%s\t%s\t%s\t%d\t%s\n", i.ID, i.Frozen.UTC().Format(stamp), i.Term,
				bytes(i.LogicalSize), bytes(i.ChangedBytes), bytes(i.StoredBytes), i.Files, orDash(i.Writer))
		}
		return tw.Flush()
	}
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: list}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	storeFlag(cmd, &copied)
	return cmd
}

// snapshotRow is a snapshot in JSON.
type snapshotRow struct {
	ID           string `json:"id"`
	Frozen       string `json:"frozen"`
	Term         uint64 `json:"term"`
	Seq          uint64 `json:"seq"`
	Parent       string `json:"parent,omitempty"`
	Writer       string `json:"writer,omitempty"`
	LogicalSize  int64  `json:"logical_size"`
	ChangedBytes int64  `json:"changed_bytes"`
	StoredBytes  int64  `json:"stored_bytes"`
	Files        int64  `json:"files"`
}

func snapshotRows(list []volsync.SnapshotInfo) []snapshotRow {
	rows := make([]snapshotRow, 0, len(list))
	for _, i := range list {
		rows = append(rows, snapshotRow{
			ID: i.ID, Frozen: i.Frozen.UTC().Format("2006-01-02T15:04:05.000Z07:00"), Term: i.Term, Seq: i.Seq, Parent: i.Parent,
			Writer: i.Writer, LogicalSize: i.LogicalSize, ChangedBytes: i.ChangedBytes, StoredBytes: i.StoredBytes, Files: i.Files,
		})
	}
	return rows
}

func (a *app) verifyCmd() *cobra.Command {
	var pick choice
	copied := ""
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Read everything that the snapshots need and check every block and reference",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, snaps, err := a.snapshotsOf(cmd.Context(), copied, pick.id)
			if err != nil {
				return err
			}
			var refs []volsync.SnapshotRef // none: everything
			if pick.id != "" {
				one, err := pick.find(snaps, time.Now())
				if err != nil {
					return err
				}
				snaps, refs = []volsync.SnapshotInfo{one}, []volsync.SnapshotRef{one.SnapshotRef}
			}
			var rep volsync.VerifyReport
			m := newMeter(a.err)
			err = a.pinned(cmd.Context(), r, refs, "snapshots verify", func(ctx context.Context) error {
				if pick.id == "" && r.list != nil { // what is retained now that the pin is there
					if snaps, err = r.list(ctx); err != nil {
						return err
					}
				}
				rep, err = r.store.Verify(ctx, snaps, m)
				return err
			})
			m.done()
			if err != nil {
				return fmt.Errorf("verify snapshots: %w", err)
			}
			return a.showVerified(rep)
		},
	}
	cmd.Flags().StringVar(&pick.id, "snapshot", "", "check only this one")
	storeFlag(cmd, &copied)
	return cmd
}

func (a *app) showVerified(rep volsync.VerifyReport) error {
	fmt.Fprintf(a.out, "checked %d snapshots, %d packs, %s\n", rep.Snapshots, rep.Packs, bytes(rep.Bytes))
	if len(rep.Problems) == 0 {
		_, err := fmt.Fprintln(a.out, "all of them are whole")
		return err
	}
	for _, p := range rep.Problems {
		fmt.Fprintf(a.out, "BAD %s: %s\n    can't be restored because of it: %s\n", p.Path, p.What, orDash(strings.Join(p.Snapshots, ", ")))
	}
	if w := rep.NewestWhole; w != nil {
		fmt.Fprintf(a.out, "the newest whole snapshot is %s of %s\n", w.ID, w.Frozen.UTC().Format(stamp))
		return wholeHint(fmt.Errorf("verify snapshots: %d problems: %w", len(rep.Problems), errDamaged), w.ID)
	}
	return fmt.Errorf("verify snapshots: %d problems, no snapshot is whole: %w", len(rep.Problems), errDamaged)
}
