package fence

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/cgroup"
)

// ErrFreezeBroken is returned by Freezer.Thaw when the database was not, or may not have been,
// frozen all the time since Freeze: what was read in between must be thrown away.
var ErrFreezeBroken = errors.New("database was thawed in the middle of a freeze")

// thawTimeout bounds Thaw's talk with the guard.
const thawTimeout = 2 * time.Second

// FreezerConfig describes how one container is frozen.
type FreezerConfig struct {
	// Guard thaws if the caller can't. nil freezes without that safety: for tests and for
	// containers that no client uses.
	Guard *Guard
	// Group is the container's. The container runtime's own pause is no way round a group that
	// can't be frozen: it writes the same file, and after the caller's death nobody could undo
	// it without the runtime.
	Group cgroup.Group
	// Budget is the time after which the guard thaws. It should be somewhat longer than the
	// caller's own limit, or every capture that just keeps to that is thrown away.
	Budget time.Duration
}

// Freezer stops and continues all processes of one container. It has the methods that a
// capture asks for. Not for concurrent use; while frozen, nobody may stop, kill or exec into
// the container through the container runtime, which would hang.
type Freezer struct {
	cfg    FreezerConfig
	begun  bool // FreezeBegin has succeeded
	active bool // Freeze was called and Thaw has not been
}

// NewFreezer returns a freezer for one container.
func NewFreezer(cfg FreezerConfig) *Freezer {
	return &Freezer{cfg: cfg}
}

// Freeze returns when no process of the container runs any more. On error all are thawed.
func (f *Freezer) Freeze(ctx context.Context) error {
	if f.cfg.Guard != nil {
		if err := f.cfg.Guard.FreezeBegin(ctx, f.cfg.Group, f.cfg.Budget); err != nil {
			return fmt.Errorf("freeze database: %w", err)
		}
		f.begun = true
	}
	f.active = true
	err := f.cfg.Group.Freeze(ctx)
	if err == nil {
		return nil
	}
	if terr := f.Thaw(); terr != nil && !errors.Is(terr, ErrFreezeBroken) {
		err = errors.Join(err, terr)
	}
	return fmt.Errorf("freeze database: %w", err)
}

// Thaw lets all processes continue. It thaws in any case, also without a Freeze before it.
func (f *Freezer) Thaw() error {
	ctx, cancel := context.WithTimeout(context.Background(), thawTimeout)
	defer cancel()
	var errs []error
	var broken error
	if !f.cfg.Group.IsZero() {
		if f.active {
			// Nobody freezes it but us, so what is frozen now has been all the time.
			if frozen, err := f.cfg.Group.Frozen(); err != nil || !frozen {
				broken = wrapBroken(err)
			}
		}
		errs = append(errs, f.cfg.Group.Thaw())
	}
	f.active = false
	if f.begun {
		f.begun = false
		if b, err := f.cfg.Guard.FreezeEnd(ctx); b && broken == nil { // also true after an error
			broken = wrapBroken(err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("thaw database: %w", err)
	}
	return broken
}

func wrapBroken(err error) error {
	if err == nil {
		return ErrFreezeBroken
	}
	return fmt.Errorf("%w (%w)", ErrFreezeBroken, err)
}
