package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"dbsupervisor/internal/fence"
	volsync "dbsupervisor/internal/sync"
)

// thawLate is how much longer than the capture's own budget the guard waits before it
// thaws: a capture that just keeps to its budget must not be thrown away.
const thawLate = 250 * time.Millisecond

// freezer returns what stops the database for one capture. While it is frozen nobody asks
// Docker for anything that would hang on it.
func (d *database) freezer(budget time.Duration) volsync.Freezer {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &freezer{f: fence.NewFreezer(fence.FreezerConfig{
		Guard: d.cfg.Guard, Group: d.group, Budget: budget + thawLate, Log: d.log,
	})}
}

type freezer struct{ f *fence.Freezer }

// Freeze implements volsync.Freezer.
func (f *freezer) Freeze(ctx context.Context) error { return f.f.Freeze(ctx) }

// Thaw implements volsync.Freezer.
func (f *freezer) Thaw() error {
	err := f.f.Thaw()
	if errors.Is(err, fence.ErrFreezeBroken) {
		return fmt.Errorf("%w: %w", volsync.ErrFreezeBroken, err)
	}
	return err
}

// beforeFreeze runs the engine's own preparation in the container, then keeps others from
// asking Docker for anything: a probe that is under way is waited for here, where it does
// not count as time frozen.
func (d *database) beforeFreeze(ctx context.Context) error {
	d.use.Lock()
	if err := d.hook(ctx, "before_freeze", d.set.Database.BeforeFreeze); err != nil {
		d.use.Unlock()
		return err
	}
	return nil
}

// afterFreeze undoes it.
func (d *database) afterFreeze(ctx context.Context) error {
	defer d.use.Unlock()
	return d.hook(ctx, "after_freeze", d.set.Database.AfterFreeze)
}

// hook runs a command in the container. d.use is held.
func (d *database) hook(ctx context.Context, name string, cmd []string) error {
	if len(cmd) == 0 {
		return nil
	}
	res, err := d.cfg.Docker.Exec(ctx, d.state().id, cmd)
	if err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	if res.ExitCode != 0 {
		return fmt.Errorf("run %s: exit status %d: %s", name, res.ExitCode, strings.TrimSpace(res.Stderr+res.Stdout))
	}
	return nil
}
