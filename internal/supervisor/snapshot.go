package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// snapshotJob is a snapshot by schedule or by wish. It answers everyone who waited for one
// to begin.
func (s *Supervisor) snapshotJob(ctx context.Context) error {
	s.mu.Lock()
	waiters := slices.Concat(s.syncNext, s.tokens)
	s.syncNext, s.tokens, s.syncWanted = nil, nil, false
	s.armSchedule()
	s.mu.Unlock()
	res, err := s.snapshot(ctx, false)
	var token api.Token
	if h := s.lease.View().Record.Head; err == nil && h != nil {
		// Nobody else commits in this term: it is that snapshot's, or a later one's.
		token = api.Token{Term: h.Term, Seq: h.Seq}
	}
	for _, w := range waiters {
		w <- syncOutcome{result: res, token: token, err: err}
	}
	return err
}

// keepFailing is how many snapshots must fail in a row before the history says so.
const keepFailing = 3

// snapshot captures, ships and commits, and keeps the books. stopped says that the database
// does not run, so that nothing needs to be frozen.
func (s *Supervisor) snapshot(ctx context.Context, stopped bool) (api.SyncResult, error) {
	began := s.clock.Now()
	s.mu.Lock()
	s.capturing = began
	s.mu.Unlock()
	res, err := s.capture(ctx, stopped)
	took := s.clock.Now().Sub(began)
	kind, text := "", ""
	s.mu.Lock()
	s.capturing = 0
	switch {
	case err == nil:
		if s.alarmed {
			kind, text = "snapshots work", fmt.Sprintf("after %d that failed", s.failedFor)
		}
		s.syncErr, s.failedFor, s.aborted, s.alarmed = "", 0, 0, false
		if news := s.keepPace(took); news != "" && !stopped {
			kind, text = "interval", news
		}
	case ctx.Err() == nil:
		s.failures++
		s.failedFor++
		s.syncErr = err.Error()
		if errors.Is(err, volsync.ErrFreezeTooLong) {
			s.aborts++
			s.aborted++
		} else {
			s.aborted = 0
		}
		if s.failedFor >= keepFailing && !s.alarmed {
			s.alarmed = true
			kind, text = "snapshots fail", fmt.Sprintf("%d in a row: %v", s.failedFor, err)
		}
	}
	s.mu.Unlock()
	if kind != "" {
		s.log.Warn("snapshots changed their pace or state", "what", kind, "text", text)
		s.event(kind, "", text)
	}
	return res, err
}

// capture is one snapshot, from the freeze to the register's new head.
func (s *Supervisor) capture(ctx context.Context, stopped bool) (api.SyncResult, error) {
	var res api.SyncResult
	began := s.clock.Now()
	basis := s.lease.View()
	if !basis.Holding {
		return res, lease.ErrStale
	}
	term, seq := basis.Record.Term, uint64(1)
	if basis.Record.Head != nil {
		seq = basis.Record.Head.Seq + 1
	}
	fr := &timedFreezer{Freezer: s.db.freezer(s.set.Sync.MaxFreeze), clock: s.clock, at: began}
	req := volsync.CaptureRequest{
		MaxFreeze: s.set.Sync.MaxFreeze, NoFreeze: stopped, Progress: s.report(), Pids: s.db.pids,
	}
	if !stopped {
		req.Freezer, req.BeforeFreeze, req.AfterFreeze = fr, s.db.beforeFreeze, s.db.afterFreeze
		if len(s.set.Database.BeforeFreeze)+len(s.set.Database.AfterFreeze) > 0 {
			req.Prepare, req.Finish = s.db.prepare, s.db.finish
		}
	}
	alarm := s.volume.Tracking().Alarm
	c, err := s.volume.Capture(ctx, req)
	s.noteAlarm(alarm)
	if err != nil {
		return res, hintCapture(err)
	}
	return s.ship(ctx, basis.Record, c, term, seq, fr.at, began)
}

func hintCapture(err error) error {
	err = fmt.Errorf("capture volume: %w", err)
	switch {
	case errors.Is(err, volsync.ErrNoRoom):
		return api.WithHint(err, "make room on the local disk; the database is untouched and the next snapshot tries again")
	case errors.Is(err, volsync.ErrFreezeTooLong):
		return api.WithHint(err, "raise sync.max_freeze, or lower the write load; the database was let go at once")
	}
	return err
}

// ship writes a capture to the share and names it head.
func (s *Supervisor) ship(ctx context.Context, basis lease.Record, c *volsync.Capture, term, seq uint64,
	frozenAt, began boottime.Instant) (api.SyncResult, error) {
	res := api.SyncResult{FreezeMS: ms(c.FreezeFor), Skipped: c.Skipped, Capture: captureOf(c.Stats)}
	if c.Unchanged() && basis.Head != nil {
		s.volume.Abandon(c)
		res.ID, res.Unchanged = basis.Head.ID, true
		res.DurationMS = ms(s.clock.Now().Sub(began))
		s.mu.Lock()
		s.safeUntil, s.cleanSeen = frozenAt, true
		s.mu.Unlock()
		return res, nil
	}
	var base *volsync.Tree
	if basis.Head != nil {
		base = s.volume.BaseTree()
	}
	moves := s.moves()
	tree, stats, err := s.store.Write(ctx, volsync.WriteRequest{
		Base: base, Delta: c.Delta, Blocks: c.Blocks, Term: term, Seq: seq, Frozen: c.Frozen,
		Writer: s.set.Instance, Moves: moves, Gently: s.db.state().running, Progress: s.report(),
	})
	if err != nil {
		s.volume.Abandon(c)
		return res, api.WithHint(fmt.Errorf("ship snapshot: %w", err), "look at the shared directory: is it mounted, writable, with room?")
	}
	s.volume.Shipped(c)
	// Head must never be ahead of the local disk.
	if err := s.volume.SyncFS(ctx); err != nil {
		s.volume.Abandon(c)
		return res, fmt.Errorf("sync volume: %w", err)
	}
	if stats.Moved {
		if err := s.store.CheckNotCondemned(ctx, tree, catalogOf(basis)); err != nil {
			s.volume.Abandon(c)
			s.took(moves) // the next one goes without
			return res, fmt.Errorf("check snapshot %s: %w", tree.Ref.ID, err)
		}
	}
	digest := s.db.state().digest
	_, err = s.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.Head, r.HeadAge = HeadOf(tree.Ref), ageSince(s.clock.Now(), frozenAt)
		if digest != "" {
			r.ImageDigest = digest
		}
	})
	if errors.Is(err, lease.ErrUnknown) {
		err = s.settle(ctx, tree.Ref)
	}
	if err != nil {
		s.volume.Abandon(c)
		return res, fmt.Errorf("commit snapshot %s: %w", tree.Ref.ID, err)
	}
	s.took(moves)
	if err := s.volume.Adopt(c, tree); err != nil {
		// The commit stands; only what we know of it is gone.
		s.mu.Lock()
		s.hasBase = false
		s.mu.Unlock()
		return res, fmt.Errorf("adopt snapshot %s: %w", tree.Ref.ID, err)
	}
	took := s.clock.Now().Sub(began)
	res.ID, res.DurationMS = tree.Ref.ID, ms(took)
	res.ChangedBytes, res.StoredBytes = stats.ChangedBytes, stats.StoredBytes
	s.log.Info("snapshot committed", "id", tree.Ref.ID, "freeze", c.FreezeFor.String(), "took", took.String(),
		"changed_bytes", stats.ChangedBytes, "stored_bytes", stats.StoredBytes)
	s.mu.Lock()
	s.commits++
	s.safeUntil, s.baseline, s.hasBase = frozenAt, tree.Ref.ID, true
	s.lastCommit = &api.LastCommit{ID: tree.Ref.ID, At: s.clock.Wall(), FreezeMS: res.FreezeMS,
		ChangedBytes: res.ChangedBytes, StoredBytes: res.StoredBytes, DurationMS: res.DurationMS, Capture: res.Capture}
	s.mu.Unlock()
	return res, nil
}

// settleEvery is how often an unknown outcome is looked at.
const settleEvery = 200 * time.Millisecond

// settle waits until a version above the one attempted shows whether ref became head. It
// ends with the term: then nothing is known, and nothing is removed.
func (s *Supervisor) settle(ctx context.Context, ref volsync.SnapshotRef) error {
	for {
		if err := s.lease.Refresh(ctx); err == nil {
			v := s.lease.View()
			if v.Record.Head != nil && v.Record.Head.ID == ref.ID {
				return nil
			}
			if !v.Unknown {
				return lease.ErrConflict
			}
		}
		if err := s.clock.WaitUntil(ctx, s.clock.Now().Add(settleEvery)); err != nil {
			return fmt.Errorf("%w: %w", lease.ErrUnknown, err)
		}
	}
}

// handoff gives the term up in a planned way: nothing acknowledged is lost.
func (s *Supervisor) handoff(ctx context.Context) error {
	v := s.lease.View()
	if !v.Holding {
		return nil
	}
	s.mu.Lock()
	stopping := s.stopping
	s.mu.Unlock()
	to, err := s.chooseSuccessor(ctx, v, stopping)
	if err != nil {
		return err
	}
	send := s.lease.HandOver
	if o := v.Record.Order; !stopping && (o == nil || o.Term != v.Record.Term) {
		// Nobody asked for it: the database can't go on here.
		send = func(ctx context.Context, to string) error { return s.lease.MoveAway(ctx, to, true) }
	}
	began := s.clock.Now()
	s.event("handoff", "", "to "+orNobody(to))
	if err := s.announce(ctx, v, to); err != nil {
		return s.cancelHandoff(ctx, err)
	}
	if s.db.state().running {
		// With this one out of the way the last one is small.
		if err := s.learnIfNeeded(ctx, v); err != nil {
			return s.cancelHandoff(ctx, err)
		}
		_, err := s.snapshot(ctx, false)
		if errors.Is(err, volsync.ErrFreezeTooLong) {
			// The one after the stop needs no freeze: it only takes longer.
			s.log.Warn("no snapshot before the stop, writes will wait longer", "error", err)
		} else if err != nil {
			return s.cancelHandoff(ctx, err)
		}
		defer s.cfg.Proxies.Resume()
		s.holdProxies(ctx)
		if err := s.db.stop(ctx); err != nil {
			return s.cancelHandoff(ctx, err)
		}
	}
	if st := s.db.state(); st.exists && !st.running {
		// Docker may still be starting it: it goes before the volume is called clean.
		if err := s.db.kill(ctx); err != nil {
			return s.cancelHandoff(ctx, err)
		}
	}
	stopped := s.clock.Now()
	if err := s.lastSnapshot(ctx); err != nil {
		return s.cancelHandoff(ctx, err)
	}
	if err := s.release(ctx, to, send); err != nil {
		// It may have arrived. The lease counts as given up, and the local volume is clean.
		return err
	}
	now := s.clock.Now()
	s.event("handed off", "", fmt.Sprintf("stop %s, last snapshot and release %s; nothing acknowledged is lost",
		stopped.Sub(began).Round(time.Millisecond), now.Sub(stopped).Round(time.Millisecond)))
	return nil
}

// announce makes the others look at the register more often, so that they see the release
// at once. A switchover that was ordered has been announced by its order.
func (s *Supervisor) announce(ctx context.Context, v lease.View, to string) error {
	if v.Record.Order != nil && v.Record.Order.Term == v.Record.Term {
		return nil
	}
	o := &lease.Order{ID: s.nonce(), Kind: lease.OrderSwitchover, Term: v.Record.Term, To: to}
	if _, err := s.lease.Commit(ctx, v.Record, func(r *lease.Record) {
		if r.Order == nil || r.Order.Term != r.Term {
			r.Order = o
		}
	}); err != nil {
		return fmt.Errorf("announce handoff: %w", err)
	}
	return nil
}

// lastSnapshot commits the volume of a stopped database and marks the volume clean.
func (s *Supervisor) lastSnapshot(ctx context.Context) error {
	st := s.volume.State()
	if st.Phase != volsync.PhaseLive {
		return nil // never written in this term
	}
	if err := s.learnIfNeeded(ctx, s.lease.View()); err != nil {
		return err
	}
	if _, err := s.snapshot(ctx, true); err != nil {
		return err
	}
	head := s.lease.View().Record.Head
	if head == nil {
		return errors.New("no head after the last snapshot")
	}
	if err := s.volume.MarkClean(ctx, RefOf(head)); err != nil {
		return fmt.Errorf("mark volume clean: %w", err)
	}
	return nil
}

func (s *Supervisor) learnIfNeeded(ctx context.Context, v lease.View) error {
	id := ""
	if v.Record.Head != nil {
		id = v.Record.Head.ID
	}
	s.mu.Lock()
	known := s.hasBase && s.baseline == id
	s.mu.Unlock()
	if known {
		return nil
	}
	return s.learnBaseline(ctx)
}

// chooseSuccessor names who takes over. A switchover without anybody to take over is
// refused and its order withdrawn; a stop goes on.
func (s *Supervisor) chooseSuccessor(ctx context.Context, v lease.View, stopping bool) (string, error) {
	want := ""
	o := v.Record.Order
	ordered := o != nil && o.Term == v.Record.Term && o.Kind == lease.OrderSwitchover
	if ordered {
		want = o.To
	}
	for _, fresh := range []bool{false, true} {
		if fresh {
			if err := s.members.refresh(s.set.Instance); err != nil {
				s.log.Warn("other instances not looked up", "error", err)
			}
		}
		if m, ok := s.members.successor(want, s.set.Zone, s.memberWindow()); ok {
			return m.Instance, nil
		}
	}
	if stopping || !ordered {
		return "", nil
	}
	err := api.WithHint(api.ErrNoSuccessor, "start another instance, and see `dbsupervisor status` there: it must be a warm standby")
	return "", errors.Join(err, s.withdraw(ctx, err))
}

// cancelHandoff leaves the database to be started here again: nothing has been released.
func (s *Supervisor) cancelHandoff(ctx context.Context, cause error) error {
	s.event("handoff failed", "", cause.Error())
	err := fmt.Errorf("planned handoff given up, this instance stays primary while its term lives: %w", cause)
	return errors.Join(err, s.withdraw(ctx, err))
}

// withdraw answers the order with an error, so that whoever waits for it learns why.
func (s *Supervisor) withdraw(ctx context.Context, cause error) error {
	v := s.lease.View()
	o := v.Record.Order
	if o == nil || !v.Holding {
		return nil
	}
	ans := &lease.Answer{Order: o.ID, Error: cause.Error(), Hint: api.HintOf(cause)}
	if _, err := s.lease.Commit(ctx, v.Record, func(r *lease.Record) {
		if r.Order != nil && r.Order.ID == o.ID {
			r.Order = nil
		}
		r.Answer = ans
	}); err != nil {
		return fmt.Errorf("withdraw order: %w", err)
	}
	return nil
}

// rollback makes an older snapshot's content the new head. What was there stays in the
// history as the snapshot before.
func (s *Supervisor) rollback(ctx context.Context) error {
	o := s.lease.View().Record.Order
	if o == nil || o.Kind != lease.OrderRollback {
		return nil
	}
	if err := s.rollbackTo(ctx, *o); err != nil {
		return errors.Join(err, s.withdraw(ctx, err))
	}
	return nil // the volume is behind head now: the loop hydrates and starts
}

func (s *Supervisor) rollbackTo(ctx context.Context, o lease.Order) error {
	v := s.lease.View()
	if v.Record.Head == nil {
		return api.ErrNoSnapshot
	}
	target, err := s.findSnapshot(ctx, v.Record, o.Snapshot)
	if err != nil {
		return err
	}
	tree, err := s.store.LoadTree(ctx, target)
	if err != nil {
		return fmt.Errorf("read snapshot %s: %w", target.ID, err)
	}
	defer s.cfg.Proxies.Resume()
	s.holdProxies(ctx)
	if err := s.db.stop(ctx); err != nil {
		return err
	}
	// Clean before the new head: a crash in between must never start the old content.
	if err := s.lastSnapshot(ctx); err != nil {
		return err
	}
	v = s.lease.View()
	r := v.Record
	head := RefOf(r.Head)
	next, _, err := s.store.WriteRollback(ctx, volsync.RollbackRequest{
		Head: head, Catalog: catalogOf(r), Target: tree, Term: r.Term, Seq: head.Seq + 1,
		Frozen: s.clock.Wall(), Writer: s.set.Instance,
	})
	if err != nil {
		return fmt.Errorf("write rollback: %w", err)
	}
	_, err = s.lease.Commit(ctx, r, func(n *lease.Record) {
		n.Head, n.Answer = HeadOf(next.Ref), &lease.Answer{Order: o.ID}
		if n.Order != nil && n.Order.ID == o.ID {
			n.Order = nil
		}
	})
	if errors.Is(err, lease.ErrUnknown) {
		err = s.settle(ctx, next.Ref)
	}
	if err != nil {
		return fmt.Errorf("commit rollback: %w", err)
	}
	s.event("rolled back", "", fmt.Sprintf("head %s has the content of %s; the content before is %s", next.Ref.ID, target.ID, head.ID))
	return nil
}

func catalogOf(r lease.Record) volsync.CatalogRef {
	return volsync.CatalogRef{Name: r.Catalog, Hash: r.CatalogHash}
}

func (s *Supervisor) findSnapshot(ctx context.Context, r lease.Record, id string) (volsync.SnapshotRef, error) {
	list, err := s.store.List(ctx, RefOf(r.Head), catalogOf(r))
	if err != nil {
		return volsync.SnapshotRef{}, fmt.Errorf("list snapshots: %w", err)
	}
	for _, i := range list {
		if i.ID == id {
			return i.SnapshotRef, nil
		}
	}
	return volsync.SnapshotRef{}, api.WithHint(fmt.Errorf("%w: %s", api.ErrNoSnapshot, id), "see `dbsupervisor snapshots`")
}

// timedFreezer notes the moment of the freeze on the lease's clock.
type timedFreezer struct {
	volsync.Freezer
	clock boottime.Clock
	at    boottime.Instant
}

// Freeze implements volsync.Freezer. The moment is taken before: writes of the freeze's own
// milliseconds then count as lost rather than as safe.
func (f *timedFreezer) Freeze(ctx context.Context) error {
	f.at = f.clock.Now()
	return f.Freezer.Freeze(ctx)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
