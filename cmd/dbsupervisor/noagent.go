package main

import (
	"context"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/lease"
)

// lookTimeout bounds each look when there is no agent to ask.
const lookTimeout = 5 * time.Second

// lookWithoutAgent puts together what can be seen without an agent. What can't be seen is
// said, never an error: status is most wanted when things are broken.
func lookWithoutAgent(ctx context.Context, cfg *config.Config, why string) api.Status {
	now := time.Now().UTC()
	s := api.Status{
		Role: api.RoleDown, State: "no agent", Source: "register", At: now, Degraded: []string{why},
		Cluster: cfg.Cluster, Instance: cfg.Instance, Zone: cfg.Zone,
		Local: api.Local{Phase: "not known"}, Sync: api.Sync{Schedule: cfg.Sync.Schedule}, Forks: []api.Fork{}, History: []api.Event{},
	}
	rec, id, err := lookAtRegister(ctx, cfg)
	if err != nil {
		s.Lease.Error = err.Error()
		s.LastError = &api.Problem{What: err.Error(), Hint: hint(err), At: now}
	} else {
		s.ClusterID, s.Term, s.Released, s.Successor, s.Paused = id, rec.Term, rec.Released, rec.Successor, rec.Paused
		s.Primary = api.Primary{
			Instance: rec.Holder.Instance, Address: rec.Holder.Address, HTTP: rec.Holder.HTTP, Zone: rec.Holder.Zone,
			Self: rec.Holder.Instance == cfg.Instance,
		}
		s.HeadComplete = rec.Head != nil && (rec.Holder.Instance == "" || rec.Released && rec.Complete)
		s.Lease.Version, s.Lease.TTLMS = rec.Version, time.Duration(rec.TTL).Milliseconds()
		zero := int64(0)
		s.Lease.LastContactMS = &zero
		if h := rec.Head; h != nil {
			s.Head = &api.Head{ID: h.ID, Seq: h.Seq, Term: h.Term, Frozen: h.Frozen, AgeSeconds: now.Sub(h.Frozen).Seconds()}
		}
	}
	info, err := lookAtDocker(ctx, cfg)
	switch {
	case err != nil:
		s.Database.Error = err.Error()
		if s.LastError == nil {
			s.LastError = &api.Problem{What: err.Error(), Hint: hint(err), At: now}
		}
	case info != nil:
		s.Database.Container, s.Database.Image, s.Database.Running = info.Name, info.ImageDigest, info.Running
		if info.Running {
			s.Degraded = append(s.Degraded, "the database still runs; the guard ends it when its lease is over")
		}
	}
	if s.LastError == nil {
		s.LastError = &api.Problem{What: why, Hint: "look at: systemctl status 'dbsupervisor*', journalctl -u 'dbsupervisor*'", At: now}
	}
	return s
}

func lookAtRegister(ctx context.Context, cfg *config.Config) (lease.Record, string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	if err := cfg.ShareMounted(); err != nil {
		return lease.Record{}, "", api.WithHint(err, "mount the shared file system")
	}
	reg, err := lease.OpenFile(ctx, fileConfig(cfg, hclog.NewNullLogger()))
	if err != nil {
		return lease.Record{}, "", err
	}
	rec, err := reg.Load(ctx)
	return rec, reg.ClusterID(), err
}
