package supervisor

import (
	"context"
	"fmt"

	"dbsupervisor/internal/config"
)

// newReplica makes the read-only copies' side of the supervisor. It starts nothing.
func (s *Supervisor) newReplica(cfg ReplicaConfig) (*replica, error) {
	r := &replica{
		cfg: cfg, set: s.set, docker: s.cfg.Database.Docker, volume: s.volume, store: s.store, clock: s.clock,
		log: s.cfg.Log.Named("replica"), dir: replicaDir(s.set.Dir), bootID: s.cfg.Lease.BootID, nonce: s.nonce,
		ages: &s.ages, look: s.replicaView, fail: s.fail, kick: make(chan struct{}, 1),
		note: func(kind, text string) { s.event(kind, "", text) },
	}
	r.image = func(ctx context.Context, progress func(string)) (string, error) {
		return s.db.image(ctx, startRequest{Digest: s.lease.View().Record.ImageDigest, Progress: progress,
			Note: func(text string) { s.log.Info("image of the replica", "text", text) }})
	}
	if text := s.set.Replica.Schedule; text != "" {
		sched, err := config.ParseSchedule(text)
		if err != nil {
			return nil, fmt.Errorf("set up replica: %w", err)
		}
		r.schedule = sched
	}
	return r, nil
}

// replicaView is what the supervisor knows that matters for the read-only copies.
func (s *Supervisor) replicaView() replicaObservation {
	v := s.lease.View()
	db := s.db.state()
	s.mu.Lock()
	defer s.mu.Unlock()
	o := replicaObservation{Stopping: (s.stopping || s.fatal != nil) && !s.restarting}
	switch s.decision.State {
	case StateStandby:
		o.Standby = !v.Holding && s.job != ActAcquire
	case StateTakeover, StatePrimary, StateHandoff:
		o.Holder = true
	}
	o.Holder = o.Holder || v.Holding
	o.Primary = s.decision.State == StatePrimary && db.serving
	return o
}

// endReplica ends the read-only copies with the agent, except where it is only started anew.
func (s *Supervisor) endReplica(ctx context.Context) {
	s.mu.Lock()
	leave := s.restarting
	s.mu.Unlock()
	if s.replica == nil || leave || !s.set.Replica.Enabled {
		return
	}
	if err := s.replica.shutdown(context.WithoutCancel(ctx)); err != nil {
		s.log.Error("replica not ended", "error", err)
	}
}
