package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
)

func (a *app) switchoverCmd() *cobra.Command {
	var req api.SwitchoverRequest
	cmd := &cobra.Command{
		Use:   "switchover",
		Short: "Move the database to another instance in a planned way; nothing is lost",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			m := newMeter(a.err)
			res, err := c.Switchover(cmd.Context(), req, m.report)
			m.done()
			if err != nil {
				return err
			}
			return a.moved(res)
		},
	}
	cmd.Flags().StringVar(&req.To, "to", "", "instance that shall take over (default: the primary chooses)")
	return cmd
}

// moved says where the term went and at what price.
func (a *app) moved(res api.MoveResult) error {
	loss := "nothing was lost"
	if !res.Lossless {
		loss = "what the old primary had not committed is not in it"
	}
	_, err := fmt.Fprintf(a.out, "%s is primary in term %d after %s; %s\n", res.Primary, res.Term, since(millis(res.DurationMS)), loss)
	if err == nil && res.Note != "" {
		_, err = fmt.Fprintln(a.out, res.Note)
	}
	return err
}
