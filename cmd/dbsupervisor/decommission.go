package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/fence"
	volsync "dbsupervisor/internal/sync"
)

func (a *app) decommissionCmd() *cobra.Command {
	erase, yes := false, false
	cmd := &cobra.Command{
		Use:   "decommission",
		Short: "Take this instance out of the cluster for good: firewall table, container, state",
		Long: "Take this instance out of the cluster for good. Stop its agent first (that hands the database\n" +
			"over), and the guard. It removes the dead container, the firewall table that keeps the write\n" +
			"port closed, what the instance has announced on the share, and its run directory. The local\n" +
			"copy and its forks stay unless --erase is given. The share's data is never touched.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			return a.decommission(cmd.Context(), cfg, erase, yes)
		},
	}
	cmd.Flags().BoolVar(&erase, "erase", false, "delete the local copy and its forks, too")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return cmd
}

func (a *app) decommission(ctx context.Context, cfg *config.Config, erase, yes bool) error {
	fail := func(err error) error { return fmt.Errorf("decommission: %w", err) }
	unit := "systemctl disable --now dbsupervisor@" + cfg.Cluster + " dbsupervisor-guard@" + cfg.Cluster
	if _, err := api.NewClient(cfg.RunDir).Status(ctx); !errors.Is(err, api.ErrNoAgent) {
		return fail(api.WithHint(errors.New("the agent of this instance is running"), unit))
	}
	if _, err := fence.DialGuard(ctx, cfg.RunDir); err == nil {
		return fail(api.WithHint(errors.New("the guard of this instance is running"), unit))
	}
	text := fmt.Sprintf("Instance %s leaves cluster %s. %s stays.", cfg.Instance, cfg.Cluster, cfg.Dir)
	if erase {
		text = fmt.Sprintf("Instance %s leaves cluster %s. %s is DELETED, and with it everything that\nthis instance wrote and nobody else has (see: dbsupervisor forks).", cfg.Instance, cfg.Cluster, cfg.Dir)
	}
	if err := a.confirm(yes, text); err != nil {
		return err
	}
	// Removing the gate opens the ports, so what is behind them goes first.
	if err := removeContainers(ctx, cfg); err != nil {
		return fail(err)
	}
	if err := fence.NewSwitch(fence.SwitchConfig{Table: switchTable(cfg)}).Remove(ctx); err != nil {
		return err
	}
	gate := fence.NewGate(fence.GateConfig{Table: gateTable(cfg), Ports: hostPorts(cfg), Clock: boottime.Real{}, Log: hclog.NewNullLogger()})
	if err := gate.Remove(ctx); err != nil {
		return fail(err)
	}
	if err := volsync.Untrack(cfg.Dir); err != nil {
		return fail(err)
	}
	// Others forget a silent instance by themselves: a share that can't be reached is no obstacle.
	if err := cfg.ShareMounted(); err == nil {
		beats, err := filepath.Glob(filepath.Join(cfg.Share, "members", cfg.Instance+"~*"))
		if err != nil {
			return fail(err)
		}
		for _, b := range beats {
			if err := os.Remove(b); err != nil {
				fmt.Fprintln(a.err, "not removed:", err)
			}
		}
	}
	gone := []string{cfg.RunDir}
	if erase {
		boot, err := boottime.BootID()
		if err != nil {
			return fail(err)
		}
		// Only one process can have the volume open.
		v, err := openVolume(cfg, boot, volsync.TierHashed, hclog.NewNullLogger())
		if errors.Is(err, volsync.ErrVolumeLocked) {
			return fail(err)
		}
		if err == nil {
			if err := v.Close(); err != nil {
				return fail(err)
			}
		}
		gone = append(gone, cfg.Dir)
	}
	for _, d := range gone {
		if err := os.RemoveAll(d); err != nil {
			return fail(err)
		}
	}
	_, err := fmt.Fprintf(a.out, "instance %s is out of cluster %s; its configuration is still in %s\n", cfg.Instance, cfg.Cluster, cfg.File())
	return err
}

// removeContainers removes this instance's dead containers and refuses if one runs.
func removeContainers(ctx context.Context, cfg *config.Config) (err error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	d, err := newDocker(hclog.NewNullLogger())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	found, err := d.Find(ctx, map[string]string{container.LabelCluster: cfg.Cluster, container.LabelInstance: cfg.Instance})
	if err != nil {
		return err
	}
	for _, c := range found {
		if c.Running && c.Labels[container.LabelRole] == container.RoleReplica {
			// What an agent left that was killed: a copy, of which nothing is lost.
			if err := d.Kill(ctx, c.ID); err != nil {
				return err
			}
		} else if c.Running {
			return api.WithHint(fmt.Errorf("the database runs (container %s)", c.Name), "start the agent and stop it again, which hands the database over")
		}
		if err := d.Remove(ctx, c.ID); err != nil {
			return err
		}
	}
	return nil
}
