package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

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
			err = runAgent(cmd.Context(), cfg, log)
			if !errors.Is(err, errRestart) {
				return err
			}
			return restartSelf()
		},
	}
}

// restartSelf becomes the program that is installed now. Under systemd it only ends: the
// unit starts it again, with the unit's own settings.
func restartSelf() error {
	if os.Getenv("INVOCATION_ID") != "" {
		return nil
	}
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return fmt.Errorf("find the program to start again: %w", err)
	}
	if err := syscall.Exec(path, os.Args, os.Environ()); err != nil { //nolint:gosec // the very command line of this process
		return fmt.Errorf("start %s again: %w", path, err)
	}
	return nil
}
