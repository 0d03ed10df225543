package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/fence"
	"dbsupervisor/internal/fsx"
)

func (a *app) guardCmd() *cobra.Command {
	runDir, device := "", ""
	cmd := &cobra.Command{
		Use:   "guard",
		Short: "Run the guard: the process that kills the database at the deadline",
		Long:  "Run the guard: a process of its own that kills the database when the lease is over,\nwhatever happens to the agent. It needs neither the share nor Docker.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The guard must come up even when the configuration is broken, if it is told
			// where its socket belongs.
			settings := config.Log{Level: "info"}
			if runDir == "" {
				path, err := a.findConfig()
				if err != nil {
					return err
				}
				cfg, err := config.Load(path)
				if err != nil {
					return err
				}
				runDir, settings = cfg.RunDir, cfg.Log
			}
			if err := os.MkdirAll(runDir, 0o700); err != nil {
				return fmt.Errorf("create run directory: %w", err)
			}
			boot, err := boottime.BootID()
			if err != nil {
				return err
			}
			err = fence.RunGuard(cmd.Context(), fence.GuardConfig{
				RunDir: runDir, BootID: boot, Clock: boottime.Real{}, FS: fsx.OS{}, Log: a.logger(settings).Named("guard"),
				OwnProcess: true, Watchdog: fence.WatchdogConfig{Device: device},
			})
			if errors.Is(err, cmd.Context().Err()) {
				return nil // asked to stop
			}
			return err
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", "", "directory of the socket (default: from the configuration)")
	cmd.Flags().StringVar(&device, "watchdog", "", "hardware watchdog, such as /dev/watchdog: the machine restarts when the guard fails")
	return cmd
}

// logger writes to standard error, where systemd takes it.
func (a *app) logger(set config.Log) hclog.Logger {
	format := ""
	if os.Getenv("JOURNAL_STREAM") == "" {
		format = time.RFC3339Nano // the journal has its own stamps, but a terminal none
	}
	return hclog.New(&hclog.LoggerOptions{
		Name: "dbsupervisor", Level: hclog.LevelFromString(set.Level), Output: a.err, JSONFormat: set.JSON,
		TimeFormat: format, DisableTime: format == "" && !set.JSON,
	})
}
