package main

import (
	"github.com/spf13/cobra"
)

func (a *app) runCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Run the agent",
		Long:  "Run the agent. Stopping it (SIGTERM, SIGINT) hands the database over to another instance\nif there is one, and stops it here. To restart the agent alone: dbsupervisor agent restart.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, warnings, err := a.load()
			if err != nil {
				return err
			}
			log := a.logger(cfg.Log)
			for _, w := range warnings {
				log.Warn("configuration has a weak point", "what", w)
			}
			return runAgent(cmd.Context(), cfg, log)
		},
	}
}
