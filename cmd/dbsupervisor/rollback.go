package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
)

func (a *app) rollbackCmd() *cobra.Command {
	var pick choice
	yes := false
	cmd := &cobra.Command{
		Use:   "rollback --at TIME | --snapshot ID",
		Short: "Take the whole cluster back to a snapshot, as after a bad DROP; nothing is erased",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if pick.at == "" && pick.id == "" {
				return &usageError{err: fmt.Errorf("give --at or --snapshot"), help: cmd.CommandPath()}
			}
			cfg, c, err := a.client()
			if err != nil {
				return err
			}
			_, list, err := openSnapshots(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			now := time.Now()
			one, err := pick.find(list, now)
			if err != nil {
				return err
			}
			if err := a.confirm(yes, fmt.Sprintf("The database of cluster %s will be stopped, its present state committed as a snapshot,\nand started again with its content of %s (%s ago, snapshot %s).\nWhat was written since is not lost: it stays in the list of snapshots.",
				cfg.Cluster, one.Frozen.UTC().Format(stamp), since(now.Sub(one.Frozen)), one.ID)); err != nil {
				return err
			}
			m := newMeter(a.err)
			res, err := c.Rollback(cmd.Context(), api.RollbackRequest{Snapshot: one.ID}, m.report)
			m.done()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "head is %s with the content of %s; the state before is snapshot %s\n", res.Head, one.Frozen.UTC().Format(stamp), res.From)
			return err
		},
	}
	pick.flags(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return cmd
}
