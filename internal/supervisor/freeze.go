package supervisor

import (
	"context"
	"errors"
	"fmt"
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
		Guard: d.cfg.Guard, Group: d.group, Budget: budget + thawLate,
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

// prepare runs the engine's own preparation in the container. Probes go on meanwhile.
func (d *database) prepare(ctx context.Context) error {
	return d.hook(ctx, "before_freeze", d.set.Database.BeforeFreeze, d.hookTimeout())
}

// finish undoes it.
func (d *database) finish(ctx context.Context) error {
	return d.hook(ctx, "after_freeze", d.set.Database.AfterFreeze, d.hookTimeout())
}

// beforeFreeze keeps others from asking Docker for anything: a probe that is under way is
// waited for here, where it does not count as time frozen.
func (d *database) beforeFreeze(context.Context) error {
	d.use.Lock()
	return nil
}

// afterFreeze undoes it.
func (d *database) afterFreeze(context.Context) error {
	d.use.Unlock()
	return nil
}
