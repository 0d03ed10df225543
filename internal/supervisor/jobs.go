package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// retryAfter is how long a failed action waits before it is tried again; it doubles with
// every failure in a row up to retryMost.
const (
	retryAfter = time.Second
	retryMost  = 30 * time.Second
)

// run starts an action in the background. There is one slot for ordinary actions and one
// for those that interrupt them.
func (s *Supervisor) run(parent context.Context, a Action) {
	interrupts := a == ActFence || a == ActYield
	s.mu.Lock()
	if parent == nil || s.interrupt != ActNone || !interrupts && s.job != ActNone {
		s.mu.Unlock()
		return
	}
	s.upkeep.yield()
	ctx, cancel := context.WithCancel(parent)
	if interrupts {
		s.interrupt = a
		if s.stopJob != nil {
			s.stopJob()
		}
	} else {
		s.job, s.stopJob = a, cancel
	}
	s.mu.Unlock()
	go func() {
		defer cancel()
		err := s.perform(ctx, a)
		s.mu.Lock()
		if interrupts {
			s.interrupt = ActNone
		} else {
			s.job, s.stopJob = ActNone, nil
			s.progress.clear()
		}
		if err != nil && ctx.Err() == nil {
			s.fails[a]++
			wait := min(retryAfter<<min(s.fails[a]-1, 10), retryMost)
			s.waiting[a] = s.clock.Now().Add(wait)
		} else {
			s.fails[a] = 0
			delete(s.waiting, a)
		}
		s.mu.Unlock()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			s.log.Info("action interrupted", "action", string(a), "error", err)
		default:
			s.fail(string(a)+" failed", err)
		}
		s.poke()
	}()
}

func (s *Supervisor) perform(ctx context.Context, a Action) error {
	s.log.Debug("action begins", "action", string(a))
	switch a {
	case ActFence:
		return s.fence(ctx)
	case ActYield:
		return s.yield(ctx)
	case ActAcquire:
		return s.acquire(ctx)
	case ActSetAside:
		return s.setAside(ctx)
	case ActHydrate:
		return s.hydrate(ctx)
	case ActBaseline:
		return s.learnBaseline(ctx)
	case ActStart:
		return s.start(ctx)
	case ActSnapshot:
		return s.snapshotJob(ctx)
	case ActHandoff:
		return s.handoff(ctx)
	case ActRollback:
		return s.rollback(ctx)
	case ActRetain:
		return s.retain(ctx)
	default:
		return fmt.Errorf("no such action: %q", a)
	}
}

// report is where long work tells how far it has come.
func (s *Supervisor) report() api.Report {
	return s.progress.set
}

// fence ends the database because the term is not ours (any more).
func (s *Supervisor) fence(ctx context.Context) error {
	term := s.db.state().term
	if err := s.db.kill(ctx); err != nil {
		return fmt.Errorf("kill database: %w", err)
	}
	s.event("fenced", "", fmt.Sprintf("database of term %d was ended because the term is not held", term))
	return nil
}

// yield is the primary's side of a forced failover: no last snapshot.
func (s *Supervisor) yield(ctx context.Context) error {
	to, why := "", "given up: the database could neither be started nor handed over here"
	send := func(ctx context.Context, to string) error { return s.lease.MoveAway(ctx, to, false) }
	if o := s.lease.View().Record.Order; o != nil && o.Kind == lease.OrderFailover {
		to, why, send = o.To, "forced", s.lease.Release
	} else if m, ok := s.members.successor("", s.set.Zone, s.memberWindow()); ok {
		to = m.Instance
	}
	if err := s.db.kill(ctx); err != nil {
		return fmt.Errorf("kill database: %w", err)
	}
	s.event("failover", "", why+"; writes since the last committed snapshot stay on this disk as a fork")
	return s.release(ctx, to, send)
}

func (s *Supervisor) release(ctx context.Context, to string, send func(context.Context, string) error) error {
	s.mu.Lock()
	s.yielded = s.clock.Now()
	s.mu.Unlock()
	if err := send(ctx, to); err != nil {
		return fmt.Errorf("release term: %w", err)
	}
	s.event("released", "", "successor: "+orNobody(to))
	return nil
}

func orNobody(name string) string {
	if name == "" {
		return "whoever is ready first"
	}
	return name
}

// acquire takes the lease. Nothing of ours runs: decide has seen to that.
func (s *Supervisor) acquire(ctx context.Context) error {
	id := s.volume.State().ID
	err := s.lease.Acquire(ctx, func(r *lease.Record) { r.Holder.VolumeID = id })
	if errors.Is(err, lease.ErrConflict) || errors.Is(err, lease.ErrNotYet) {
		s.log.Info("lease not acquired", "error", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("acquire lease: %w", err)
	}
	v := s.lease.View()
	s.event("acquired", "", fmt.Sprintf("term %d", v.Record.Term))
	return nil
}

func (s *Supervisor) setAside(ctx context.Context) error {
	v := s.lease.View()
	var head volsync.SnapshotRef
	if v.Record.Head != nil {
		head = RefOf(v.Record.Head)
	}
	f, err := s.volume.SetAside(ctx, s.currentWhy(), head)
	if err != nil {
		return fmt.Errorf("set volume aside: %w", err)
	}
	s.event("fork", "", "kept as "+f.Name+": "+f.Reason)
	return nil
}

func (s *Supervisor) currentWhy() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.decision.Why
}

// hydrate brings the volume to head.
func (s *Supervisor) hydrate(ctx context.Context) error {
	v := s.lease.View()
	if v.Record.Head == nil {
		return nil
	}
	ref := RefOf(v.Record.Head)
	var stats volsync.HydrateStats
	bring := func(ctx context.Context, _ volsync.SnapshotRef) (err error) {
		stats, err = s.volume.Hydrate(ctx, s.store, ref, s.report())
		return err
	}
	var err error
	if s.volume.State().Phase == volsync.PhaseClean {
		err = bring(ctx, ref) // a difference: done long before the grace of anything is over
	} else {
		err = s.pinned(ctx, ref, bring)
	}
	if err != nil {
		return fmt.Errorf("bring volume to %s: %w", v.Record.Head.ID, err)
	}
	s.log.Debug("volume hydrated", "head", v.Record.Head.ID, "stats", fmt.Sprintf("%+v", stats))
	s.mu.Lock()
	changed := stats.Copy != s.copied && stats.Copy != ""
	s.copied, s.copiedWhy = stats.Copy, stats.Why
	s.mu.Unlock()
	if changed {
		s.log.Info("way of following head", "copy", stats.Copy, "why", stats.Why)
	}
	return nil
}

// learnBaseline makes captures differences against head.
func (s *Supervisor) learnBaseline(ctx context.Context) error {
	var ref volsync.SnapshotRef // none: everything is new
	if h := s.lease.View().Record.Head; h != nil {
		ref = RefOf(h)
	}
	if err := s.volume.Baseline(ctx, s.store, ref); err != nil {
		return fmt.Errorf("read head: %w", err)
	}
	s.setBaseline(ref.ID)
	return nil
}

func (s *Supervisor) setBaseline(id string) {
	s.mu.Lock()
	s.baseline, s.hasBase = id, true
	s.mu.Unlock()
}

// start runs the database on the volume and waits until it answers.
func (s *Supervisor) start(ctx context.Context) error {
	v := s.lease.View()
	if !v.Holding {
		return lease.ErrStale
	}
	untouched := s.volume.State().Phase != volsync.PhaseLive
	// Before anything can write: a crash from here on leaves a volume that says so.
	if err := s.volume.MarkLive(ctx, v.Record.Term); err != nil {
		return fmt.Errorf("mark volume live: %w", err)
	}
	began := s.clock.Now()
	err := s.db.start(ctx, startRequest{
		Term: v.Record.Term, VolumeID: s.volume.State().ID, VolumePath: s.volume.Path(),
		Digest: v.Record.ImageDigest, Deadline: func() (d boottime.Instant, ok bool) {
			v := s.lease.View()
			return v.Deadline, v.Holding
		},
		Progress: func(text string) { s.report()(api.Progress{Phase: text}) },
		Note:     func(text string) { s.event("image", "", text) },
	})
	if err != nil {
		return fmt.Errorf("start database: %w", err)
	}
	took := s.clock.Now().Sub(began)
	s.log.Info("database answers", "term", v.Record.Term, "after", took.String())
	s.event("started", "", fmt.Sprintf("database answers after %s", took.Round(time.Millisecond)))
	s.mu.Lock()
	defer s.mu.Unlock()
	if untouched && v.Record.Head != nil {
		s.safeUntil = began // head has everything that was written until now
	} else {
		s.syncWanted = true // nothing has everything: don't wait for the schedule
	}
	return nil
}
