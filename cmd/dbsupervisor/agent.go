package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
)

func (a *app) agentCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "agent", Short: "Restart the agent without touching the database", Args: cobra.NoArgs, RunE: help}
	wait := 30 * time.Second
	restart := &cobra.Command{
		Use:   "restart",
		Short: "Restart the agent (after an upgrade) without touching the database",
		Long:  "The agent ends without handing off; its service manager starts the program that is\ninstalled now, which takes the running database over inside the same term.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			old, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := c.Restart(cmd.Context()); err != nil {
				return err
			}
			s, err := awaitAgent(cmd.Context(), c, old.Incarnation, wait)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "the agent runs again, version %s: %s in term %d\n", s.Version, s.Role, s.Term)
			return err
		},
	}
	restart.Flags().DurationVar(&wait, "wait", wait, "how long to wait for the agent to come back")
	cmd.AddCommand(restart)
	return cmd
}

// awaitAgent waits until an agent other than the old incarnation answers.
func awaitAgent(ctx context.Context, c *api.Client, old string, wait time.Duration) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := c.Status(ctx)
		if err == nil && s.Incarnation != old {
			return s, nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = errors.New("the old one still runs")
			}
			return s, api.WithHint(fmt.Errorf("wait %s for the new agent: %w", wait, err),
				"the database runs on until its lease is over; look at: systemctl status 'dbsupervisor*'")
		case <-tick.C:
		}
	}
}
