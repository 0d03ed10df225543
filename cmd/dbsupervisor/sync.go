package main

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
)

func (a *app) syncCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "sync",
		Short: "Take and commit a snapshot now",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			m := newMeter(a.err)
			res, err := c.Sync(cmd.Context(), m.report)
			m.done()
			if err != nil {
				return err
			}
			for _, s := range res.Skipped {
				fmt.Fprintln(a.err, "left out (no snapshot keeps it):", s)
			}
			if res.Unchanged {
				_, err = fmt.Fprintf(a.out, "nothing has changed since %s\n", res.ID)
				return err
			}
			_, err = fmt.Fprintf(a.out, "committed %s: changed %s, stored %s, froze %s, took %s\n", res.ID,
				bytes(res.ChangedBytes), bytes(res.StoredBytes), since(millis(res.FreezeMS)), since(millis(res.DurationMS)))
			return err
		},
	}
}

func bytes(n int64) string { return humanize.IBytes(uint64(max(n, 0))) } //nolint:gosec // not negative

func millis(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
