package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"dbsupervisor/internal/boottime"
)

// pruneEvery is how many versions lie between two prunings.
const pruneEvery = 16

// orderPoll is how often a standby looks while a planned handoff is announced: the release
// may name it, and every moment until it is seen is a moment without a primary.
const orderPoll = 200 * time.Millisecond

// Run looks at the register twice per RenewInterval while the lease is not held, renews it once
// per RenewInterval while it is, and watches the deadline apart from both. It returns ctx's error, or
// ErrInstanceInUse if another agent runs under this instance name and this one has not held
// the lease. It never releases.
func (l *Lease) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.watchDeadline(ctx); err != nil && ctx.Err() == nil {
			cancel(fmt.Errorf("watch deadline: %w", err))
		}
	})
	wg.Go(func() {
		if err := l.keep(ctx); err != nil && ctx.Err() == nil {
			cancel(err)
		}
	})
	wg.Wait()
	return context.Cause(ctx)
}

// keep polls and renews.
func (l *Lease) keep(ctx context.Context) error {
	pruned := make(chan struct{}, 1) // one pruning at a time, apart from the renewals
	var wg sync.WaitGroup
	defer wg.Wait()
	var lastPruned uint64
	for {
		start := l.cfg.Clock.Now()
		err := l.step(ctx)
		if err := ctx.Err(); err != nil {
			return err
		}
		v := l.View()
		if errors.Is(err, ErrInstanceInUse) && l.neverHeld() {
			return err
		}
		wait := l.cfg.RenewInterval
		if !v.Holding {
			// The TTL is counted from when a version was seen: looking late adds to the gap.
			wait /= 2
		}
		if !v.Holding && v.Record.Order != nil && v.Record.Order.Term == v.Record.Term {
			wait = min(wait, orderPoll)
		}
		if err != nil {
			l.log.Debug("register not reached", "error", err)
			wait /= 4
		}
		if p, ok := l.cfg.Register.(interface{ Prune(context.Context) error }); ok && v.Holding && v.Record.Version >= lastPruned+pruneEvery {
			select {
			case pruned <- struct{}{}:
				lastPruned = v.Record.Version
				wg.Go(func() {
					defer func() { <-pruned }()
					pctx, cancel := context.WithTimeout(ctx, l.cfg.TTL)
					defer cancel()
					if err := p.Prune(pctx); err != nil && ctx.Err() == nil {
						l.log.Warn("old records not removed", "error", err)
					}
				})
			default:
			}
		}
		if err := l.cfg.Clock.WaitUntil(ctx, start.Add(wait)); err != nil {
			return err
		}
	}
}

// step renews what is held (or was acquired with an unknown outcome) and looks otherwise.
func (l *Lease) step(ctx context.Context) error {
	l.mu.Lock()
	ours := l.held != nil || (l.claim != 0 && l.mine(l.rec, l.claim))
	l.mu.Unlock()
	if ours {
		err := l.renew(ctx)
		if !errors.Is(err, ErrNotHeld) {
			return err
		}
	}
	return l.Refresh(ctx)
}

func (l *Lease) neverHeld() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.holdings == 0
}

// watchDeadline reports the end of a tenure at its deadline, however long a renewal hangs.
// Extensions need not wake it: it finds them when the old deadline has come.
func (l *Lease) watchDeadline(ctx context.Context) error {
	for {
		l.mu.Lock()
		var at boottime.Instant
		if l.held != nil {
			at = l.held.deadline
			if l.cfg.Clock.Now() >= at {
				l.expire("deadline")
				at = 0
			}
		}
		l.mu.Unlock()
		if at == 0 {
			select {
			case <-l.rearm:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		if err := l.cfg.Clock.WaitUntil(ctx, at); err != nil {
			return err
		}
	}
}
