package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/supervisor"
	volsync "dbsupervisor/internal/sync"
)

// shareTimeout bounds one look at the share by a command; a hard mount can hang for ever.
const shareTimeout = 10 * time.Second

// seenFile is this instance's memory of the register, on its own disk.
func seenFile(cfg *config.Config) string { return filepath.Join(cfg.Dir, "register.json") }

// runFile is what lets a restarted agent resume its term on this boot.
func runFile(cfg *config.Config) string { return filepath.Join(cfg.RunDir, "lease.json") }

// fileConfig describes the register as both the agent and the commands open it.
func fileConfig(cfg *config.Config, log hclog.Logger) lease.FileConfig {
	return lease.FileConfig{FS: fsx.OS{}, Share: cfg.Share, SeenFile: seenFile(cfg), Log: log, Rand: rand.Reader}
}

// share is the shared directory as commands see it that work without an agent.
type share struct {
	register *lease.FileRegister
	record   lease.Record
	store    *volsync.Store
}

// openShare reads the register and opens the store. Nothing needs to be closed.
func openShare(ctx context.Context, cfg *config.Config) (*share, error) {
	ctx, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	if err := cfg.CheckHost(ctx); err != nil {
		return nil, err
	}
	log := hclog.NewNullLogger()
	reg, err := lease.OpenFile(ctx, fileConfig(cfg, log))
	if err != nil {
		return nil, err
	}
	rec, err := reg.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("read register: %w", err)
	}
	store, err := openStore(cfg, log)
	if err != nil {
		return nil, err
	}
	return &share{register: reg, record: rec, store: store}, nil
}

// openSnapshots opens the share and lists what can be restored, newest first.
func openSnapshots(ctx context.Context, cfg *config.Config) (*share, []volsync.SnapshotInfo, error) {
	s, err := openShare(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	list, err := s.snapshots(ctx)
	return s, list, err
}

func openStore(cfg *config.Config, log hclog.Logger) (*volsync.Store, error) {
	return volsync.OpenStore(volsync.StoreConfig{FS: &fsx.Kept{}, Dir: cfg.Share, Log: log, Rand: rand.Reader, Workers: cfg.Sync.Workers})
}

// snapshots lists what can be restored, newest first. An empty cluster has none.
func (s *share) snapshots(ctx context.Context) ([]volsync.SnapshotInfo, error) {
	h := s.record.Head
	if h == nil {
		return nil, nil
	}
	list, err := s.store.List(ctx, supervisor.RefOf(h), volsync.CatalogRef{Name: s.record.Catalog, Hash: s.record.CatalogHash})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return list, nil
}

// choice says which snapshot is meant: by time, by ID, or the newest.
type choice struct{ at, id string }

var errChoice = errors.New("give either --at or --snapshot, not both")

// find picks from a list that is sorted newest first.
func (c choice) find(list []volsync.SnapshotInfo, now time.Time) (volsync.SnapshotInfo, error) {
	var none volsync.SnapshotInfo
	if c.at != "" && c.id != "" {
		return none, errChoice
	}
	if len(list) == 0 {
		return none, api.WithHint(fmt.Errorf("find snapshot: %w: none has been committed yet", api.ErrNoSnapshot), "take one with: dbsupervisor sync")
	}
	if c.id != "" {
		for _, s := range list {
			if s.ID == c.id {
				return s, nil
			}
		}
		return none, api.WithHint(fmt.Errorf("find snapshot %s: %w", c.id, api.ErrNoSnapshot), "list them with: dbsupervisor snapshots")
	}
	if c.at == "" {
		return list[0], nil
	}
	t, err := parseTime(c.at, now)
	if err != nil {
		return none, err
	}
	for _, s := range list {
		if !s.Frozen.After(t) {
			return s, nil
		}
	}
	oldest := list[len(list)-1].Frozen.UTC().Format(time.RFC3339)
	return none, api.WithHint(fmt.Errorf("find snapshot: %w at or before %s", api.ErrNoSnapshot, t.UTC().Format(time.RFC3339)), "the oldest is of "+oldest)
}

// parseTime reads a time of day as people write it. Without a zone it is local; a duration
// such as "15m" means that long ago.
func parseTime(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05", "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, layout := range []string{"15:04:05", "15:04"} {
		if t, err := time.ParseInLocation(layout, s, now.Location()); err == nil {
			return time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), t.Second(), 0, now.Location()), nil
		}
	}
	return time.Time{}, api.WithHint(fmt.Errorf("read time %q: not understood", s), `write "2026-01-31 14:05:00", "2026-01-31T14:05:00Z", "14:05" (today) or "15m" (ago)`)
}
