package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/config"
)

func (a *app) configCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Check the configuration, print an example", Args: cobra.NoArgs, RunE: help}
	offline := false
	check := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and what it refers to on this machine",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, warnings, err := a.load()
			if err != nil {
				return err
			}
			if !offline {
				ctx, cancel := context.WithTimeout(cmd.Context(), shareTimeout)
				defer cancel()
				if err := cfg.CheckHost(ctx); err != nil {
					return err
				}
			}
			for _, w := range warnings {
				fmt.Fprintln(a.err, "warning:", w)
			}
			d := cfg.Database
			_, err = fmt.Fprintf(a.out, "%s is valid: cluster %s, instance %s, engine %s, image %s, port %d\n",
				cfg.File(), cfg.Cluster, cfg.Instance, d.Engine, d.Image, d.Ports[0].Host)
			return err
		},
	}
	check.Flags().BoolVar(&offline, "offline", false, "check only the file, not the share and other things on this machine")
	example := &cobra.Command{
		Use:   "example",
		Short: "Print a commented example configuration",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprint(a.out, config.Example())
			return err
		},
	}
	cmd.AddCommand(check, example)
	return cmd
}

// help is what a command does that only has subcommands.
func help(cmd *cobra.Command, _ []string) error { return cmd.Help() }
