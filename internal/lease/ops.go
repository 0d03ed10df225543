package lease

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Acquire takes the lease in a new term, by a swap on the very version that has been watched
// and never on a re-read one. edit may set the holder's volume ID, addresses and zone; the
// term, head, catalog, gcseq and image digest are as in the watched record. A paused cluster,
// and a bound on View.Failovers, are the caller's to respect.
//
// It returns ErrNotYet (see View.ChallengeAt), ErrConflict (somebody was faster), ErrHeld,
// ErrInstanceInUse, or ErrUnknown: then the lease counts as not held, and Run goes on to
// find out.
func (l *Lease) Acquire(ctx context.Context, edit func(*Record)) error {
	if err := l.begin(ctx); err != nil {
		return fmt.Errorf("acquire lease: %w", err)
	}
	defer l.end()
	if err := l.acquire(ctx, edit); err != nil {
		return fmt.Errorf("acquire lease: %w", err)
	}
	return nil
}

func (l *Lease) acquire(ctx context.Context, edit func(*Record)) error {
	if err := l.refused(); err != nil {
		return err
	}
	// What was watched must be remembered before anything is built on it.
	if err := l.memory.flush(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	cur, epoch := l.rec, l.epoch
	now := l.cfg.Clock.Now()
	var err error
	switch at := l.challengeAt(); {
	case !l.loaded:
		err = fmt.Errorf("the register was not read yet: %w", ErrNotYet)
	case l.held != nil && now < l.held.deadline:
		err = ErrHeld
	case now < at:
		err = fmt.Errorf("version %d must stay unchanged for another %s: %w", cur.Version, at.Sub(now), ErrNotYet)
	case l.held != nil:
		l.expire("deadline")
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	next := cur.Clone()
	next.HeadAge = 0
	next.Term = cur.Term + 1
	next.Holder = l.self
	next.Inherited = cur.Released && cur.Complete
	next.Released, next.Complete, next.Successor, next.Order = false, false, "", nil
	if edit != nil {
		edited := next.Clone()
		edit(&edited)
		next.Holder.VolumeID = edited.Holder.VolumeID
		next.Holder.Address = edited.Holder.Address
		next.Holder.HTTP = edited.Holder.HTTP
		next.Holder.Zone = edited.Holder.Zone
	}
	next.TTL = Duration(l.cfg.TTL)
	if unasked(cur, next) {
		next.Failovers = append(next.Failovers, 0)
	}
	return l.take(ctx, next, epoch, change{
		next:    func(Record) (Record, error) { return next, nil },
		done:    func(rec Record) bool { return l.mine(rec, next.Term) },
		ours:    true,
		watched: true,
	})
}

// take applies a change that makes this incarnation the holder and begins the tenure.
func (l *Lease) take(ctx context.Context, next Record, epoch uint64, c change) error {
	a, err := l.apply(ctx, c)
	if errors.Is(err, ErrUnknown) {
		l.mu.Lock()
		if l.epoch == epoch {
			l.claim = next.Term
		}
		l.mu.Unlock()
		return err
	}
	if err != nil {
		return err
	}
	return l.extend(ctx, a, time.Duration(a.rec.TTL), nil, epoch)
}

// Resume continues the term of this agent's previous start: same boot, same instance, the
// incarnation from RunFile is still the record's holder, and its deadline is not over. The
// new incarnation is swapped in; the term stays. It returns ErrNotYet if there is nothing to
// resume, and otherwise what Acquire returns.
func (l *Lease) Resume(ctx context.Context) error {
	if err := l.begin(ctx); err != nil {
		return fmt.Errorf("resume lease: %w", err)
	}
	defer l.end()
	if err := l.resume(ctx); err != nil {
		return fmt.Errorf("resume lease: %w", err)
	}
	return nil
}

func (l *Lease) resume(ctx context.Context) error {
	own, epoch, err := l.current()
	if err == nil && own != nil {
		return ErrHeld
	}
	run := l.readRun()
	if run == nil {
		return fmt.Errorf("nothing is left of an earlier start on this boot: %w", ErrNotYet)
	}
	if err := l.load(ctx); err != nil {
		return err
	}
	if err := l.refused(); err != nil {
		return err
	}
	resumable := func(cur Record) error {
		switch {
		case cur.ClusterID != run.ClusterID || cur.Term != run.Term ||
			cur.Holder.Instance != l.self.Instance || cur.Holder.Incarnation != run.Incarnation || cur.Released:
			return fmt.Errorf("term %d of the earlier start has ended: %w", run.Term, ErrNotYet)
		case l.cfg.Clock.Now() >= run.Deadline:
			return fmt.Errorf("the deadline of the earlier start has passed: %w", ErrNotYet)
		}
		return nil
	}
	next := Record{Term: run.Term}
	return l.take(ctx, next, epoch, change{
		next: func(cur Record) (Record, error) {
			if err := resumable(cur); err != nil {
				return Record{}, err
			}
			next := cur.Clone()
			next.Holder.Incarnation = l.self.Incarnation
			if l.self.Address != "" {
				next.Holder.Address = l.self.Address
			}
			if l.self.HTTP != "" {
				next.Holder.HTTP = l.self.HTTP
			}
			if l.self.Zone != "" {
				next.Holder.Zone = l.self.Zone
			}
			// The TTL stays: the fence still runs on the deadline of the earlier start,
			// and a challenger must not wait for less than that was computed from.
			return next, nil
		},
		done: func(rec Record) bool { return l.mine(rec, run.Term) },
		ours: true,
	})
}

// Commit makes edit's changes (head, catalog and gcseq, image digest, the holder's volume ID)
// the truth, if term, incarnation, head and gcseq still equal those of basis, the record that
// the changes were computed from. It is retried on versions that moved for other reasons, so
// edit may be called several times. A commit is also a renewal.
//
// It returns the record that holds the change; ErrStale if the basis has changed; ErrNotHeld
// if the lease was lost; ErrUnknown if ctx ended before the outcome was known: wait until
// View.Unknown is false, then look into View.Record.
func (l *Lease) Commit(ctx context.Context, basis Record, edit func(*Record)) (Record, error) {
	if err := l.begin(ctx); err != nil {
		return Record{}, fmt.Errorf("commit: %w", err)
	}
	defer l.end()
	if err := l.refused(); err != nil {
		return Record{}, fmt.Errorf("commit: %w", err)
	}
	own, epoch, err := l.current()
	if err != nil {
		return Record{}, fmt.Errorf("commit: %w", err)
	}
	var last Record
	a, err := l.apply(ctx, change{
		next: func(cur Record) (Record, error) {
			if cur.Term != basis.Term || cur.Holder.Incarnation != basis.Holder.Incarnation ||
				!cur.SameHead(basis) || cur.GCSeq != basis.GCSeq {
				return Record{}, ErrStale
			}
			next, err := l.renewed(own, epoch, cur)
			if err != nil {
				return Record{}, err
			}
			ttl, vouched := next.TTL, next.HeadAge
			edit(&next)
			if !next.SameHead(cur) && next.HeadAge == vouched {
				next.HeadAge = 0 // that was said of another head
			}
			// Not an edit's to change.
			next.ClusterID, next.Term, next.TTL = cur.ClusterID, cur.Term, ttl
			next.Holder.Instance, next.Holder.Incarnation = cur.Holder.Instance, cur.Holder.Incarnation
			next.Released, next.Complete, next.Successor, next.Inherited = false, false, "", cur.Inherited
			last = next
			return next, nil
		},
		done: func(rec Record) bool {
			return l.mine(rec, own.term) && rec.SameData(last) && !rec.SameData(basis)
		},
	})
	if err != nil {
		return a.rec, fmt.Errorf("commit: %w", err)
	}
	// The commit stands, whatever becomes of the deadline: View tells about that.
	if err := l.extend(ctx, a, time.Duration(a.rec.TTL), own, epoch); err != nil && !errors.Is(err, ErrNotHeld) {
		l.log.Warn("commit did not extend the lease", "error", err)
	}
	return a.rec, nil
}

// Release gives the term up and names the instance that may acquire at once ("": any). The
// database must have been stopped. From the moment it is sent the lease counts as not held,
// whatever the outcome: only a later Acquire makes it held again. Without success others
// acquire after the TTL.
func (l *Lease) Release(ctx context.Context, successor string) error {
	return l.release(ctx, Record{Successor: successor})
}

// HandOver is a Release of which the caller vouches that head holds everything that was
// acknowledged in this term. The next term's record says so (Inherited).
func (l *Lease) HandOver(ctx context.Context, successor string) error {
	return l.release(ctx, Record{Successor: successor, Complete: true})
}

// MoveAway is a Release, or if complete a HandOver, that no person asked for: it counts as a
// failover.
func (l *Lease) MoveAway(ctx context.Context, successor string, complete bool) error {
	return l.release(ctx, Record{Successor: successor, Complete: complete, Failovers: []Duration{0}})
}

// release sends the release that says what r does; r.Failovers are those to be added.
func (l *Lease) release(ctx context.Context, r Record) error {
	if err := l.begin(ctx); err != nil {
		return fmt.Errorf("release lease: %w", err)
	}
	defer l.end()
	own, _, err := l.current()
	if err != nil {
		return fmt.Errorf("release lease: %w", err)
	}
	l.letGo("released")
	_, err = l.apply(ctx, change{
		next: func(cur Record) (Record, error) {
			if !l.mine(cur, own.term) {
				return Record{}, ErrNotHeld
			}
			next := cur.Clone()
			next.Released, next.Complete, next.Successor, next.Order = true, r.Complete, r.Successor, nil
			next.Failovers = append(next.Failovers, r.Failovers...)
			return next, nil
		},
		done: func(rec Record) bool {
			return rec.Term == own.term && rec.Holder.Incarnation == l.self.Incarnation && rec.Released
		},
	})
	if err != nil {
		return fmt.Errorf("release lease: %w", err)
	}
	return nil
}

// Relinquish stops holding at once without telling anybody: the database was fenced. Nothing
// that is under way counts any more; others acquire after the TTL.
func (l *Lease) Relinquish() { l.letGo("relinquished") }

func (l *Lease) letGo(reason string) {
	l.mu.Lock()
	l.epoch++
	l.claim = 0
	if l.held != nil {
		l.log.Info("lease given up", "term", l.held.term, "reason", reason)
		l.held = nil
	}
	l.notify()
	l.mu.Unlock()
	l.forgetRun()
}

// PutOrder leaves an operator's wish for the holder of o.Term. Any instance may; the term and
// the holder stay. It returns ErrStale if that term has ended.
func (l *Lease) PutOrder(ctx context.Context, o Order) error {
	err := l.tell(ctx, func(next *Record) error {
		if next.Term != o.Term || next.Released {
			return fmt.Errorf("term %d has ended: %w", o.Term, ErrStale)
		}
		next.Order = &o
		return nil
	}, func(rec Record) bool { return rec.Order != nil && rec.Order.ID == o.ID })
	if err != nil {
		return fmt.Errorf("put order: %w", err)
	}
	return nil
}

// SetPaused sets or clears the maintenance mode. Clearing it also forgets the failovers of the
// last hour: a person has looked. Any instance may.
func (l *Lease) SetPaused(ctx context.Context, paused bool) error {
	err := l.tell(ctx, func(next *Record) error {
		next.Paused = paused
		if !paused {
			next.Failovers = nil
		}
		return nil
	}, func(rec Record) bool { return rec.Paused == paused && (paused || len(rec.Failovers) == 0) })
	if err != nil {
		return fmt.Errorf("set paused: %w", err)
	}
	return nil
}

// tell changes something that belongs to no term. It starts from a fresh look and keeps
// everything else, the TTL included. It does not extend anything, not even for the holder.
func (l *Lease) tell(ctx context.Context, edit func(*Record) error, done func(Record) bool) error {
	if err := l.begin(ctx); err != nil {
		return err
	}
	defer l.end()
	if err := l.load(ctx); err != nil {
		return err
	}
	if err := l.refused(); err != nil {
		return err
	}
	l.mu.Lock()
	already := done(l.rec)
	l.mu.Unlock()
	if already {
		return nil // nothing is written that changes nothing
	}
	_, err := l.apply(ctx, change{
		next: func(cur Record) (Record, error) {
			next := cur.Clone()
			if err := edit(&next); err != nil {
				return Record{}, err
			}
			return next, nil
		},
		done: done,
	})
	return err
}
