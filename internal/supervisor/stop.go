package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/container"
)

// stop asks the database to stop in the way its engine wants and waits for its time-out.
func (d *database) stop(ctx context.Context) error {
	d.use.Lock()
	defer d.use.Unlock()
	st := d.state()
	if !st.exists {
		return nil
	}
	d.setExpected(true)
	if st.running {
		if err := d.quiesce(ctx); err != nil {
			d.setExpected(false)
			return fmt.Errorf("stop database: %w", err)
		}
		if err := d.cfg.Docker.Stop(ctx, st.id, d.set.Database.StopTimeout); err != nil {
			d.setExpected(false)
			return fmt.Errorf("stop database: %w", err)
		}
	}
	return d.clear(ctx, st.id)
}

func (d *database) setExpected(on bool) {
	d.mu.Lock()
	d.expected = on
	d.mu.Unlock()
}

// clear closes the gate, disarms the guard and removes the dead container.
func (d *database) clear(ctx context.Context, id string) error {
	d.serve(false)
	err := d.cfg.Gate.Close(ctx)
	d.mu.Lock()
	d.gateTill = 0
	d.mu.Unlock()
	if gerr := d.disarm(ctx); gerr != nil {
		d.log.Warn("guard not disarmed", "error", gerr)
	}
	if rerr := d.cfg.Docker.Remove(ctx, id); rerr != nil {
		return errors.Join(err, fmt.Errorf("remove container: %w", rerr))
	}
	d.mu.Lock()
	d.gone()
	d.mu.Unlock()
	return err
}

// killTimeout bounds what is asked of Docker while fencing; the processes are killed
// without it first.
const killTimeout = 5 * time.Second

// kill ends the database at once: gate closed, processes killed through their control
// group, thawed if they were frozen. Docker comes last, because it may hang: it is no error
// if the processes are gone and only Docker's record of them is left. decide sees to that.
func (d *database) kill(ctx context.Context) error {
	base := context.WithoutCancel(ctx)
	ctx, cancel := context.WithTimeout(base, killTimeout)
	defer cancel()
	d.serve(false)
	d.mu.Lock()
	d.expected, d.gateTill = true, 0
	g, id := d.group, d.st.id
	d.mu.Unlock()
	gateErr := d.cfg.Gate.Close(ctx)
	dead := !g.IsZero()
	if dead {
		if err := g.Kill(ctx); err != nil {
			d.log.Error("control group not killed, asking the guard", "error", err)
			if err := d.cfg.Guard.Kill(ctx); err != nil {
				d.log.Error("guard did not kill", "error", err)
				dead = false
			}
		}
	}
	if id == "" {
		return gateErr
	}
	patience := killTimeout
	if dead {
		d.mu.Lock()
		d.st.running, d.st.healthy, d.group = false, false, cgroup.Group{}
		d.mu.Unlock()
		patience = 2 * engineAnswer // a forced failover waits for us, and needs no Docker
	}
	dctx, cancel := context.WithTimeout(base, patience)
	defer cancel()
	if err := d.cfg.Docker.Kill(dctx, id); err != nil {
		d.log.Warn("docker kill failed", "error", err)
	}
	err := d.clear(dctx, id)
	if dead && err != nil && (errors.Is(err, container.ErrUnavailable) || dctx.Err() != nil) {
		d.log.Warn("database is dead, its container is removed when docker answers", "error", err)
		err = nil
	}
	return errors.Join(gateErr, err)
}

// pids lists the database's processes.
func (d *database) pids() []int {
	d.mu.Lock()
	g := d.group
	d.mu.Unlock()
	if g.IsZero() {
		return nil
	}
	p, err := g.Pids()
	if err != nil {
		return nil
	}
	return p
}
