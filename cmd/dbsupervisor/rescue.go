package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/supervisor"
	volsync "dbsupervisor/internal/sync"
)

func (a *app) rescueCmd() *cobra.Command {
	snapshot := ""
	yes, accept := false, false
	cmd := &cobra.Command{
		Use:   "rescue",
		Short: "Rebuild a lost or damaged register from the snapshots on the share",
		Long: "Rebuild a lost or damaged register from the share alone. It shows which snapshots were\n" +
			"provably committed, then makes a new register, with a new cluster ID, whose head is the\n" +
			"newest of them. Stop all agents first. Run `rescue --accept` on every other instance\n" +
			"afterwards: they refuse the new cluster ID until they are told.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.load()
			if err != nil {
				return err
			}
			if _, err := api.NewClient(cfg.RunDir).Status(cmd.Context()); !errors.Is(err, api.ErrNoAgent) {
				return api.WithHint(errors.New("rescue: the agent of this instance is running"), "stop all agents of the cluster first")
			}
			if accept {
				return a.accept(cmd.Context(), cfg, yes)
			}
			return a.rescue(cmd.Context(), cfg, snapshot, yes)
		},
	}
	cmd.Flags().StringVar(&snapshot, "snapshot", "", "make this snapshot head, also if nothing proves that it was committed")
	cmd.Flags().BoolVar(&accept, "accept", false, "on the other instances: accept the register that a rescue has made")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return cmd
}

func (a *app) rescue(ctx context.Context, cfg *config.Config, id string, yes bool) error {
	looking, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	if err := cfg.CheckHost(looking); err != nil {
		return err
	}
	store, err := openStore(cfg, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	rep, err := store.Scan(ctx)
	if err != nil {
		return fmt.Errorf("look for snapshots: %w", err)
	}
	fmt.Fprintf(a.out, "%d snapshots were provably committed, %d may have been\n", len(rep.Committed), len(rep.Unproven))
	for _, p := range rep.Problems {
		fmt.Fprintf(a.out, "BAD %s: %s\n", p.Path, p.What)
	}
	for _, u := range rep.Unproven {
		fmt.Fprintf(a.out, "not proven: %s of %s\n", u.ID, u.Frozen.UTC().Format(stamp))
	}
	head, err := rescueHead(rep, id)
	if err != nil {
		return err
	}
	first := rescueRecord(cfg, rep, head)
	if err := a.confirm(yes, rescueText(ctx, cfg, head)); err != nil {
		return err
	}
	making, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("create the instance's directory: %w", err)
	}
	clusterID, err := lease.RescueFile(making, fileConfig(cfg, hclog.NewNullLogger()), first)
	if err != nil {
		return err
	}
	if err := forgetRegister(cfg); err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.out, "the new register has cluster id %s and head %s\non every other instance: dbsupervisor rescue --accept; then start the agents\n", clusterID, head.ID)
	return err
}

// rescueHead chooses the snapshot that the new register begins with.
func rescueHead(rep volsync.RescueReport, id string) (volsync.SnapshotInfo, error) {
	if id == "" {
		if len(rep.Committed) == 0 {
			return volsync.SnapshotInfo{}, api.WithHint(fmt.Errorf("rescue: %w was provably committed", api.ErrNoSnapshot),
				"choose one that is not proven with --snapshot ID, if there is one; or begin anew with import and a backup")
		}
		return rep.Committed[0], nil
	}
	for _, list := range [][]volsync.SnapshotInfo{rep.Committed, rep.Unproven} {
		for _, s := range list {
			if s.ID == id {
				return s, nil
			}
		}
	}
	return volsync.SnapshotInfo{}, fmt.Errorf("rescue: %w: %s", api.ErrNoSnapshot, id)
}

// rescueRecord is the first record of the new register. Its term is higher than that of
// everything that was ever written, so that no name can come again, and nobody holds it:
// whoever starts first waits a TTL.
func rescueRecord(cfg *config.Config, rep volsync.RescueReport, head volsync.SnapshotInfo) lease.Record {
	r := lease.Record{TTL: lease.Duration(cfg.Lease.TTL), Head: supervisor.HeadOf(head.SnapshotRef), Wall: wallNow(), GCSeq: 1}
	for _, list := range [][]volsync.SnapshotInfo{rep.Committed, rep.Unproven} {
		for _, s := range list {
			r.Term = max(r.Term, s.Term)
		}
	}
	r.Term++
	r.Catalog, r.CatalogHash = rep.Catalog.Name, rep.Catalog.Hash
	return r
}

func rescueText(ctx context.Context, cfg *config.Config, head volsync.SnapshotInfo) string {
	var b strings.Builder
	ctx, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	cfgNoMemory := fileConfig(cfg, hclog.NewNullLogger())
	cfgNoMemory.SeenFile = ""
	if reg, err := lease.OpenFile(ctx, cfgNoMemory); err == nil {
		if rec, err := reg.Load(ctx); err == nil {
			fmt.Fprintf(&b, "ATTENTION: there is a register that can be read: cluster id %s, version %d, term %d.\n", reg.ClusterID(), rec.Version, rec.Term)
			b.WriteString("It will be retired. Are you sure that it is not the right one?\n")
		}
	}
	fmt.Fprintf(&b, "A new register will be made in %s with head %s of %s.\n", cfg.Share, head.ID, head.Frozen.UTC().Format(stamp))
	b.WriteString("ALL agents of the cluster must be stopped, on every instance. What databases wrote after\nthat snapshot stays on their disks as forks.")
	return b.String()
}

// accept lets this instance join the register that a rescue has made.
func (a *app) accept(ctx context.Context, cfg *config.Config, yes bool) error {
	looking, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	if err := cfg.CheckHost(looking); err != nil {
		return err
	}
	fc := fileConfig(cfg, hclog.NewNullLogger())
	fc.SeenFile = ""
	reg, err := lease.OpenFile(looking, fc)
	if err != nil {
		return err
	}
	if err := a.confirm(yes, fmt.Sprintf("This instance will forget the register that it knew and join cluster id %s in %s.", reg.ClusterID(), cfg.Share)); err != nil {
		return err
	}
	if err := forgetRegister(cfg); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.out, "this instance will join when its agent starts")
	return err
}

// forgetRegister removes this instance's memory of the old register.
func forgetRegister(cfg *config.Config) error {
	if err := os.Remove(seenFile(cfg)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the old register: %w", err)
	}
	return nil
}
