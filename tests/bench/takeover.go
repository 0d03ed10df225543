package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

func howTakeover(r *rig) string {
	return fmt.Sprintf(`Two instances, lease TTL %s, snapshots every %s, a warm standby, one client that writes row
after row to whichever instance is primary. Agent, guard and container of the primary are
killed with SIGKILL; the clock runs from right before the first of these signals to the first
acknowledgement by the other instance. The kills are spread evenly over the time between two
snapshots. Then the lost instance comes back with an empty disk,
and the roles are turned round. *Lease* is from the kill to the acquisition, *start* from
there to the first acknowledgement. *Between two acknowledged writes* is what a client misses: from
the last acknowledgement by the one to the first by the other. The standby can see the end of a lease only a whole TTL
after its last renewal, which is up to %s old at the kill.`, r.ttl, r.every, r.c.Renew)
}

// takeover kills primaries.
func (r *rig) takeover(ctx context.Context, s *section) error {
	r.c.Schedule = "@every " + r.every.String()
	if err := r.schedule(ctx, r.a, r.c.Schedule); err != nil {
		return err
	}
	b, err := r.c.Add("")
	if err != nil {
		return err
	}
	took, err := r.join(ctx, b)
	if err != nil {
		return err
	}
	s.add("empty standby is warm after", "s", took.Seconds())
	_, info, err := r.head(ctx)
	if err != nil {
		return err
	}
	s.add("volume", "MiB", float64(info.LogicalSize)/mib)
	w, err := r.c.StartWriter(ctx)
	if err != nil {
		return err
	}
	defer w.Stop()
	from, to := r.a, b
	for k := range r.takeovers {
		r.say("takeover %d of %d", k+1, r.takeovers)
		if err := r.kill(ctx, s, w, from, to, r.every*time.Duration(2*k+1)/time.Duration(2*r.takeovers)); err != nil {
			return err
		}
		if k < r.takeovers-1 {
			// After so many failovers within an hour a person would be asked.
			if err := api.NewClient(to.RunDir).Pause(ctx, false); err != nil {
				return err
			}
			if err := from.EraseDisk(); err != nil {
				return err
			}
			took, err := r.join(ctx, from)
			if err != nil {
				return err
			}
			s.add("empty standby is warm after", "s", took.Seconds())
		}
		from, to = to, from
	}
	return nil
}

// join starts an instance and waits until it is a warm standby.
func (r *rig) join(ctx context.Context, i *cluster.Instance) (time.Duration, error) {
	wctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	began := time.Now()
	if err := i.Start(); err != nil {
		return 0, err
	}
	err := i.WaitWarm(wctx)
	return time.Since(began), err
}

// kill ends one primary some time after a commit and measures until the other accepts writes.
func (r *rig) kill(ctx context.Context, s *section, w *cluster.Writer, from, to *cluster.Instance, after time.Duration) error {
	wctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	agent := api.NewClient(from.RunDir)
	st, err := agent.Status(ctx)
	if err != nil {
		return err
	}
	enough, written := st.Sync.Commits+2, len(w.Acks())+100
	if err := cluster.Until(wctx, func() bool {
		st, err := agent.Status(wctx)
		return err == nil && st.Sync.Commits >= enough && len(w.Acks()) > written
	}); err != nil {
		return fmt.Errorf("wait for two snapshots under load: %w", err)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(after):
	}
	if err := to.WaitWarm(wctx); err != nil {
		return err
	}
	if st, err = agent.Status(ctx); err != nil {
		return err
	}
	if st.Head == nil {
		return errors.New("there is no snapshot")
	}
	safe := st.Head.Frozen
	killed := time.Now()
	if err := from.Crash(ctx); err != nil {
		return err
	}
	var ack cluster.Ack
	if err := cluster.Until(wctx, func() bool {
		acks := w.Acks()
		ack = acks[len(acks)-1]
		return ack.By == to.Name
	}); err != nil {
		n, last := w.Errors()
		return fmt.Errorf("wait for writes on %s (%d attempts failed, the last with %s): %w\n%s", to.Name, n, last, err, tail(to.LogPath("run")))
	}
	acks := w.Acks()
	at := len(acks) - 1
	for at > 0 && acks[at-1].By == to.Name {
		at--
	}
	limit := (r.ttl + 5*time.Second).Seconds()
	s.add("kill to first acknowledged write", "s", acks[at].At.Sub(killed).Seconds()).goal = &limit
	between := s.add("between two acknowledged writes", "s", acks[at].At.Sub(acks[at-1].At).Seconds())
	middle := (r.ttl + 2*time.Second).Seconds()
	between.goal, between.middle = &limit, &middle
	evs, err := api.NewClient(to.RunDir).History(ctx, 50)
	if err != nil {
		return err
	}
	for _, ev := range evs {
		if ev.Kind == "acquired" && ev.At.After(killed) {
			s.add("of that lease", "s", ev.At.Sub(killed).Seconds())
			s.add("of that start", "s", acks[at].At.Sub(ev.At).Seconds())
		}
	}
	return r.losses(ctx, s, to, acks, safe, killed)
}

// losses counts the acknowledged writes that the successor does not have.
func (r *rig) losses(ctx context.Context, s *section, on *cluster.Instance, acks []cluster.Ack, safe, killed time.Time) error {
	missing, err := r.c.Missing(ctx, on, acks)
	if err != nil {
		return err
	}
	// What an earlier kill has cost is not counted again.
	older, newer := 0, 0
	for _, m := range missing {
		switch {
		case m.At.Before(safe) && !r.lost[m.N]:
			older++
		case !r.lost[m.N]:
			newer++
		}
		r.lost[m.N] = true
	}
	none := 0.0
	s.add("acknowledged writes older than the last commit, lost", "", float64(older)).goal = &none
	s.add("acknowledged writes newer than the last commit, lost", "", float64(newer))
	s.add("age of the last commit at the kill", "s", killed.Sub(safe).Seconds())
	return nil
}
