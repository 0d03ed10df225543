package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
)

// agentTimeout bounds what a command waits for the agent's status, which needs no I/O.
const agentTimeout = 10 * time.Second

func (a *app) statusCmd() *cobra.Command {
	asJSON, watch := false, false
	every := 2 * time.Second
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how this instance and the cluster are; the exit code says it too",
		Long:  "Show how this instance and the cluster are. Without a running agent it shows what the\nregister and Docker say. The exit code is 0 for a primary, 10 for a standby, 11 for\nsomething that is not well, 12 for down (see: dbsupervisor help exit-codes).",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, c, err := a.client()
			if err != nil {
				return err
			}
			for {
				s, err := status(cmd.Context(), cfg, c)
				if err != nil {
					return err
				}
				a.code = statusCode(s)
				if watch && !asJSON && onTerminal(a.out) {
					fmt.Fprint(a.out, "\x1b[H\x1b[2J")
				}
				if asJSON {
					err = printJSON(a.out, s)
				} else {
					err = renderStatus(a.out, s)
				}
				if err != nil || !watch {
					return err
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "again and again, until interrupted")
	cmd.Flags().DurationVar(&every, "interval", every, "how often with --watch")
	return cmd
}

// status asks the agent, and where there is none, register and Docker.
func status(ctx context.Context, cfg *config.Config, c *api.Client) (api.Status, error) {
	asked, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	s, err := c.Status(asked)
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, api.ErrNoAgent):
		return lookWithoutAgent(ctx, cfg, "no agent is running"), nil
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		return lookWithoutAgent(ctx, cfg, "the agent does not answer"), nil
	}
	return s, err
}

// statusCode is the exit code for a status.
func statusCode(s api.Status) int {
	switch {
	case s.Role == api.RoleDown && !s.Database.Running:
		return exitDown
	case s.Source != "agent", len(s.Degraded) > 0:
		return exitDegraded
	case s.Role == api.RolePrimary:
		return exitOK
	case s.Role == api.RoleStandby:
		return exitStandby
	}
	return exitDegraded
}
