package main

import (
	"context"
	"fmt"
	"os"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/lease"
)

func (a *app) initCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Make a new cluster in the shared directory",
		Long:  "Make a new cluster in the shared directory: once, on one instance. It refuses where a\ncluster is, was, or should be.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			id, err := initCluster(cmd.Context(), cfg, hclog.NewNullLogger())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.out, "cluster %s was made in %s, cluster id %s\n", cfg.Cluster, cfg.Share, id)
			return err
		},
	}
}

// initCluster makes the store's directories and then the register, whose file `cluster`
// is what makes the share a cluster.
func initCluster(ctx context.Context, cfg *config.Config, log hclog.Logger) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	if err := cfg.CheckHost(ctx); err != nil {
		return "", err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return "", fmt.Errorf("create the instance's directory: %w", err)
	}
	// An existing cluster is refused before anything is written; InitFile looks again.
	if _, err := lease.OpenFile(ctx, fileConfig(cfg, log)); err == nil {
		return "", fmt.Errorf("initialise cluster in %s: %w", cfg.Share, lease.ErrInitialised)
	}
	id, err := lease.InitFile(ctx, fileConfig(cfg, log), lease.Record{TTL: lease.Duration(cfg.Lease.TTL), Wall: wallNow()})
	if err != nil {
		return "", err
	}
	store, err := openStore(cfg, log)
	if err != nil {
		return "", err
	}
	if err := store.Init(ctx); err != nil {
		return "", fmt.Errorf("prepare store: %w", err)
	}
	return id, nil
}
