package lease

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dbsupervisor/internal/boottime"
)

// maxSwapTries bounds how often one call swaps anew because the register moved on.
const maxSwapTries = 16

// attempt is one swap: what it gave and from when its effect counts.
type attempt struct {
	rec  Record
	sent boottime.Instant // before the swap was sent (rule 3); 0: it proves no validity
}

// swap does one compare-and-swap under its own time-out. The slot is taken.
func (l *Lease) swap(ctx context.Context, prev, next Record) (attempt, error) {
	next.By = l.self.Incarnation
	next.Wall = l.cfg.Clock.Wall()
	octx, cancel := context.WithTimeout(ctx, l.cfg.OpTimeout)
	defer cancel()
	a := attempt{sent: l.cfg.Clock.Now()}
	l.mu.Lock()
	if prev.Version == l.rec.Version {
		next.Failovers = carried(prev.Failovers, next.Failovers, a.sent.Sub(l.knownAt))
	}
	l.mu.Unlock()
	var err error
	a.rec, err = l.cfg.Register.CompareAndSwap(octx, prev, next)
	switch {
	case err == nil:
		if err := l.observe(a.rec, a.sent, true); err != nil {
			return a, err
		}
		l.mu.Lock()
		l.knownAt = a.sent // what the ages in it were computed for
		l.mu.Unlock()
		return a, nil
	case errors.Is(err, ErrUnknown):
		l.mu.Lock()
		l.offered = append(l.offered, a.rec)
		l.mu.Unlock()
		l.failed(err)
	case !errors.Is(err, ErrConflict):
		l.failed(err)
	}
	return a, err
}

// change is what one of the lease's operations wants of the register.
type change struct {
	// next makes the new record from the newest one, or says why not. It may be called
	// several times.
	next func(cur Record) (Record, error)
	// done recognises, in a newer record, the effect of an own swap of unknown outcome. nil:
	// it can't be told, so the change is applied once more.
	done func(cur Record) bool
	// ours: done can be true only if an own swap took effect, so that it proves validity.
	ours bool
	// watched: the swap is done on the record that was watched and on no other one.
	watched bool
}

// apply swaps until the change has taken effect, has become impossible, or ctx has ended.
// A conflict leads to a fresh look and, unless the change is bound to the watched version,
// to another swap. An unknown outcome is settled only by seeing a higher version: until then
// the same change is offered again for the same number, of which only one can win.
// The slot is taken.
func (l *Lease) apply(ctx context.Context, c change) (attempt, error) {
	l.mu.Lock()
	cur := l.rec
	l.mu.Unlock()
	var unknown *attempt // our first swap of unknown outcome
	var cause error      // why it is unknown
	var nonces []string  // of all own swaps for that number
	lost := func(err error) (attempt, error) {
		if unknown == nil {
			return attempt{}, err
		}
		return *unknown, fmt.Errorf("%w: %w", cause, err)
	}
	for range maxSwapTries {
		if err := ctx.Err(); err != nil {
			return lost(err)
		}
		// What its maker vouched for holds for the moment at which it was made only.
		from := cur
		from.HeadAge = 0
		next, err := c.next(from)
		if err != nil {
			return lost(err)
		}
		a, err := l.swap(ctx, cur, next)
		if err == nil {
			return a, nil
		}
		switch {
		case errors.Is(err, ErrUnknown):
			if unknown == nil {
				u := a
				unknown = &u
			}
			cause, nonces = err, append(nonces, a.rec.Nonce)
		case !errors.Is(err, ErrConflict):
			return lost(err)
		}
		if cerr := ctx.Err(); cerr != nil && unknown != nil {
			return lost(cerr)
		}
		if lerr := l.load(ctx); lerr != nil {
			if unknown != nil {
				return lost(lerr)
			}
			return attempt{}, fmt.Errorf("%w: %w", err, lerr)
		}
		l.mu.Lock()
		newest := l.rec
		l.mu.Unlock()
		if newest.Version == cur.Version {
			if unknown == nil {
				// A conflict that a fresh look does not show.
				return attempt{}, err
			}
			continue
		}
		if unknown != nil {
			// It counts from the first offer, the earliest that may have taken effect.
			if slices.Contains(nonces, newest.Nonce) || (c.ours && c.done(newest)) {
				return attempt{rec: newest, sent: unknown.sent}, nil
			}
			if c.done != nil && c.done(newest) {
				return attempt{rec: newest}, nil
			}
			unknown, cause, nonces = nil, nil, nil
		}
		if c.watched {
			return attempt{}, ErrConflict
		}
		cur = newest
	}
	if unknown != nil {
		return *unknown, cause
	}
	return attempt{}, ErrConflict
}

// extend makes a successful swap count: it asks the fence first and then moves the deadline.
// own says which tenure (nil: a new one); epoch is the one in which the swap was sent.
func (l *Lease) extend(ctx context.Context, a attempt, ttl time.Duration, own *tenure, epoch uint64) error {
	if a.sent == 0 {
		return nil
	}
	deadline := a.sent.Add(min(ttl, l.cfg.TTL) - l.cfg.Margin)
	valid := func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		switch {
		case l.closed:
			return ErrClosed
		case l.epoch != epoch || l.held != own || l.duplicate != nil:
			return ErrNotHeld
		case l.cfg.Clock.Now() >= deadline || (own != nil && l.cfg.Clock.Now() >= own.deadline):
			// Too late: the fence has acted, or nobody has armed it.
			if own != nil {
				l.expire("the deadline passed before the renewal was answered")
			}
			l.expired = true
			return fmt.Errorf("answered after the deadline: %w", ErrNotHeld)
		}
		return nil
	}
	if err := valid(); err != nil {
		return err
	}
	if l.cfg.Extend != nil {
		ectx, cancel := context.WithTimeout(ctx, l.cfg.OpTimeout)
		err := l.cfg.Extend(ectx, a.rec.Term, deadline)
		cancel()
		l.mu.Lock()
		l.fenceErr = err
		l.mu.Unlock()
		if err != nil {
			l.notify()
			return fmt.Errorf("extend fence: %w", err)
		}
		if err := valid(); err != nil {
			return err
		}
	}
	if own != nil && deadline < own.deadline {
		deadline = own.deadline
	}
	l.writeRun(a.rec.ClusterID, a.rec.Term, deadline)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch != epoch || l.held != own {
		if l.epoch != epoch {
			l.forgetRun() // given up meanwhile: nothing to resume
		}
		return ErrNotHeld
	}
	if own == nil {
		l.held = &tenure{term: a.rec.Term, deadline: deadline}
		l.holdings++
		l.expired, l.claim = false, 0
		l.log.Info("lease held", "term", a.rec.Term, "version", a.rec.Version)
		select {
		case l.rearm <- struct{}{}:
		default:
		}
	} else {
		own.deadline = deadline
	}
	l.deadline = deadline
	l.notify()
	return nil
}

// current returns the tenure if it is valid now, or ErrNotHeld.
func (l *Lease) current() (*tenure, uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held != nil && l.cfg.Clock.Now() >= l.held.deadline {
		l.expire("deadline")
	}
	if l.held == nil {
		return nil, l.epoch, ErrNotHeld
	}
	return l.held, l.epoch, nil
}

// refused returns why nothing may be written to the register now.
func (l *Lease) refused() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.duplicate != nil {
		return l.duplicate
	}
	return l.blocked
}

// renew reapplies the tenure on the newest version.
func (l *Lease) renew(ctx context.Context) error {
	if err := l.begin(ctx); err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	defer l.end()
	own, epoch, err := l.current()
	if err != nil {
		l.mu.Lock()
		claim := l.claim != 0 && l.mine(l.rec, l.claim)
		l.mu.Unlock()
		if !claim {
			return fmt.Errorf("renew lease: %w", err)
		}
	}
	a, err := l.apply(ctx, change{next: func(cur Record) (Record, error) { return l.renewed(own, epoch, cur) }})
	if err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	if err := l.extend(ctx, a, time.Duration(a.rec.TTL), own, epoch); err != nil {
		return fmt.Errorf("renew lease: %w", err)
	}
	return nil
}

// renewed is the record that every write of the holder starts from.
func (l *Lease) renewed(own *tenure, epoch uint64, cur Record) (Record, error) {
	if err := l.stillOurs(own, epoch, cur); err != nil {
		return Record{}, err
	}
	next := cur.Clone()
	next.TTL = Duration(l.cfg.TTL)
	if l.cfg.Vouch != nil {
		l.cfg.Vouch(&next)
	}
	return next, nil
}

// stillOurs checks the tenure against the clock and against a record.
func (l *Lease) stillOurs(own *tenure, epoch uint64, cur Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch != epoch || l.held != own {
		return ErrNotHeld
	}
	if own != nil {
		if l.cfg.Clock.Now() >= own.deadline {
			l.expire("deadline")
			return ErrNotHeld
		}
		if !l.mine(cur, own.term) {
			return ErrNotHeld
		}
		return nil
	}
	if l.claim == 0 || !l.mine(cur, l.claim) {
		return ErrNotHeld
	}
	return nil
}
