package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fence"
)

// checkFences asks gate and guard how they are, for status.
func (d *database) checkFences(ctx context.Context) {
	cctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := d.cfg.Guard.Status(cctx)
	d.mu.Lock()
	d.guardErr = err
	d.mu.Unlock()
}

// fences is what status shows.
func (d *database) fences() (open bool, left time.Duration, gateErr, guardErr error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	left = max(d.gateTill.Sub(d.clock.Now()), 0)
	return d.st.serving && left > 0, left, d.gateErr, d.guardErr
}

// extend moves guard and gate to a new deadline after a renewal. An error means that the
// renewal may not be used: nobody would end the database in time.
func (d *database) extend(ctx context.Context, term uint64, deadline boottime.Instant) error {
	st := d.state()
	if !st.running && !st.guarded || st.term != term {
		return nil
	}
	err := d.cfg.Guard.Extend(ctx, term, deadline)
	if errors.Is(err, fence.ErrNotArmed) {
		err = d.arm(ctx, term, deadline)
	}
	d.mu.Lock()
	d.guardErr = err
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("extend guard: %w", err)
	}
	if !st.serving {
		return nil
	}
	return d.open(ctx, deadline)
}

func (d *database) open(ctx context.Context, deadline boottime.Instant) error {
	err := d.cfg.Gate.OpenUntil(ctx, deadline)
	d.mu.Lock()
	d.gateErr = err
	if err == nil {
		d.gateTill = deadline
	}
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("open gate: %w", err)
	}
	return nil
}

func (d *database) arm(ctx context.Context, term uint64, deadline boottime.Instant) error {
	d.mu.Lock()
	r := fence.ArmRequest{Cluster: d.set.Cluster, Term: term, Container: d.st.id, Group: d.group, Deadline: deadline}
	d.mu.Unlock()
	if err := d.cfg.Guard.Arm(ctx, r); err != nil {
		return err
	}
	d.mu.Lock()
	d.st.guarded = d.st.id == r.Container
	d.mu.Unlock()
	return nil
}

// adopt takes over the container that an earlier start of the agent left running.
func (d *database) adopt(ctx context.Context, term uint64, deadline boottime.Instant) error {
	if err := d.look(ctx); err != nil {
		return err
	}
	st := d.state()
	if !st.running {
		return nil
	}
	if st.term != term {
		return fmt.Errorf("container %s belongs to term %d, not %d", st.name, st.term, term)
	}
	if err := d.arm(ctx, term, deadline); err != nil {
		return fmt.Errorf("arm guard: %w", err)
	}
	if err := d.probe(ctx); err != nil {
		d.log.Warn("adopted database does not answer yet", "error", err)
		if len(d.set.Database.BeforeReady) > 0 {
			return err // it is admitted like one that starts
		}
	}
	// The agent of before may have ended before this was done.
	if err := d.prime(ctx); err != nil {
		return err
	}
	d.serve(true)
	return d.open(ctx, deadline)
}

func (d *database) serve(on bool) {
	d.mu.Lock()
	d.st.serving = on
	d.mu.Unlock()
}
