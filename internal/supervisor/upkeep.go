package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

const (
	// retainEvery is how often it is decided which snapshots stay.
	retainEvery = 5 * time.Minute
	// upkeepEvery is how often the upkeep looks whether it has something to do.
	upkeepEvery = time.Second
	// sweepEvery is how often condemned files are unlinked.
	sweepEvery = time.Minute
	// checkEvery is how often it is looked whether a file is due to be verified.
	checkEvery = 10 * time.Second
	// upkeepRetry is how long it leaves the store alone after an error.
	upkeepRetry = time.Minute
)

// upkeep is the work on the store that nobody waits for: unlinking what has been condemned,
// and what else is done a little at a time. It runs beside the loop's jobs and gives way to
// each of them: a job that begins cancels it and doesn't wait for it to end. All of it can be
// taken up again where it was. Supervisor.mu guards it.
type upkeep struct {
	keeper   *volsync.Keeper // of the term that is held; nil: none is
	checker  *volsync.Checker
	checking bool            // this instance is the one that verifies
	damaged  map[string]bool // files of which an event has told
	stop     context.CancelFunc
	retryAt  boottime.Instant
	sweepAt  boottime.Instant
	checkAt  boottime.Instant
}

// yield makes way for a job.
func (u *upkeep) yield() {
	if u.stop != nil {
		u.stop()
	}
}

// retainPause is the time between two decisions about what stays. s.mu is held.
func (s *Supervisor) retainPause() time.Duration {
	return min(retainEvery, max(s.set.Retention.Grace/2, time.Second))
}

// retain condemns what the policy doesn't keep. It is a job like a snapshot, because both
// commit on the same head: one that came in between would make the other's work void. What
// takes long, the unlinking, is left to the upkeep.
func (s *Supervisor) retain(ctx context.Context) error {
	v := s.lease.View()
	r := v.Record
	if !v.Holding || r.Head == nil {
		return nil
	}
	s.mu.Lock()
	set, keeper := s.set.Retention, s.upkeep.keeper
	s.retainAt = s.clock.Now().Add(s.retainPause())
	s.mu.Unlock()
	if keeper == nil {
		return nil
	}
	next, sum, err := keeper.Condemn(ctx, volsync.CondemnRequest{
		Head: RefOf(r.Head), Catalog: catalogOf(r), Now: s.clock.Wall(), Term: r.Term,
		Policy: volsync.Policy{All: set.All, Hourly: set.Hourly, Daily: set.Daily},
	})
	if err != nil {
		return fmt.Errorf("condemn old snapshots: %w", err)
	}
	if next.Name == r.Catalog {
		return nil
	}
	if _, err := s.lease.Commit(ctx, r, catalogEdit(next)); err != nil {
		return fmt.Errorf("commit catalog: %w", err)
	}
	s.log.Info("old snapshots condemned", "catalog", next.Name, "summary", fmt.Sprintf("%+v", sum))
	if err := keeper.Follow(ctx, next); err != nil {
		return fmt.Errorf("read own catalog: %w", err)
	}
	return nil
}

// runUpkeep does the upkeep, a little at a time, until ctx ends.
func (s *Supervisor) runUpkeep(ctx context.Context) {
	for s.clock.WaitUntil(ctx, s.clock.Now().Add(upkeepEvery)) == nil {
		s.upkeepOnce(ctx)
	}
}

// upkeepOnce does what is due, until it is done or a job begins.
func (s *Supervisor) upkeepOnce(base context.Context) {
	s.mu.Lock()
	if s.job != ActNone || s.interrupt != ActNone || s.stopping || s.restarting || s.clock.Now() < s.upkeep.retryAt {
		s.mu.Unlock()
		return
	}
	ctx, cancel := context.WithCancel(base)
	defer cancel()
	s.upkeep.stop = cancel
	term := s.termCtx
	s.mu.Unlock()
	if term != nil {
		defer context.AfterFunc(term, cancel)()
	}
	err := s.upkeepStep(ctx)
	s.mu.Lock()
	if s.job == ActNone {
		s.progress.clear()
	}
	s.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		s.fail("upkeep of the store failed", err)
		s.mu.Lock()
		s.upkeep.retryAt = s.clock.Now().Add(upkeepRetry)
		s.mu.Unlock()
	}
}

func (s *Supervisor) upkeepStep(ctx context.Context) error {
	if err := s.sweep(ctx); err != nil {
		return err
	}
	// What can't be compacted is the more reason to verify.
	return errors.Join(s.compact(ctx), s.check(ctx))
}

// check verifies the store a little at a time. One instance does it, so that the share is read
// once: the standby whose name comes first, since it has the network for itself and competes
// with no snapshot; the primary where there is no standby. Who that is follows from the beats,
// so that two may do it for a while: that costs reading and nothing else.
func (s *Supervisor) check(ctx context.Context) error {
	v := s.lease.View()
	s.mu.Lock()
	set, state := s.set.Retention, s.decision.State
	mine := s.checks(state)
	s.upkeep.checking = mine && set.Verify > 0
	wait := s.clock.Now() < s.upkeep.checkAt
	s.mu.Unlock()
	if !mine || wait || !v.Loaded || v.Record.Catalog == "" {
		return nil
	}
	err := s.upkeep.checker.Check(ctx, volsync.CheckRequest{Catalog: catalogOf(v.Record), Every: set.Verify,
		Rate: int64(set.Rate), Progress: s.upkeepReport()})
	s.tellDamage()
	if err == nil {
		s.mu.Lock()
		s.upkeep.checkAt = s.clock.Now().Add(checkEvery)
		s.mu.Unlock()
	}
	return err
}

// checks says whether it is this instance that verifies. s.mu is held.
func (s *Supervisor) checks(state State) bool {
	switch state {
	case StateStandby, StatePrimary:
	default:
		return false
	}
	for _, m := range s.members.alive(s.memberWindow()) {
		if m.Instance != s.set.Instance && m.State == StateStandby && (state == StatePrimary || m.Instance < s.set.Instance) {
			return false
		}
	}
	return true
}

// tellDamage makes an event of each file that is found damaged for the first time.
func (s *Supervisor) tellDamage() {
	for _, p := range s.upkeep.checker.Damage() {
		s.mu.Lock()
		known := s.upkeep.damaged[p.Path]
		if s.upkeep.damaged == nil {
			s.upkeep.damaged = map[string]bool{}
		}
		s.upkeep.damaged[p.Path] = true
		s.mu.Unlock()
		if !known {
			s.event("damage", "", p.Path+": "+p.What)
			s.fail("store is damaged", api.WithHint(fmt.Errorf("%s: %s", p.Path, p.What),
				"see what it spoils, and which snapshot is whole: dbsupervisor snapshots verify"))
		}
	}
}

// upkeepStatus tells what the upkeep has done. s.mu is held.
func (s *Supervisor) upkeepStatus() api.Upkeep {
	r := s.upkeep.checker.Report()
	u := api.Upkeep{Checking: s.upkeep.checking, CheckFiles: r.Files, CheckedFiles: r.Checked,
		OldestCheckSeconds: r.Oldest.Seconds(), CheckedBytes: r.ReadBytes}
	for _, p := range r.Problems {
		u.Damaged = append(u.Damaged, p.Path+": "+p.What)
	}
	if s.upkeep.keeper != nil {
		k := s.upkeep.keeper.Report()
		u.CondemnedFiles, u.CompactedPacks = k.Condemned, k.Compacted
	}
	return u
}

// compact brings the live rest of packs that are mostly dead together.
func (s *Supervisor) compact(ctx context.Context) error {
	v := s.lease.View()
	s.mu.Lock()
	keeper, set, known := s.upkeep.keeper, s.set.Retention, s.hasBase
	s.mu.Unlock()
	if keeper == nil || !known || !v.Holding || v.Record.Head == nil {
		return nil
	}
	head := s.volume.BaseTree()
	if head == nil || head.Ref.ID != v.Record.Head.ID {
		return nil
	}
	_, err := keeper.Compact(ctx, volsync.CompactRequest{
		Head: head, Catalog: catalogOf(v.Record), Term: v.Record.Term, Below: set.CompactBelow,
		Rate: int64(set.Rate), Progress: s.upkeepReport(),
	})
	return err
}

// moves are what compaction has ready for the next snapshot.
func (s *Supervisor) moves() *volsync.Moves {
	s.mu.Lock()
	keeper := s.upkeep.keeper
	s.mu.Unlock()
	if keeper == nil {
		return nil
	}
	return keeper.Moves()
}

// took tells compaction that they are committed.
func (s *Supervisor) took(m *volsync.Moves) {
	s.mu.Lock()
	keeper := s.upkeep.keeper
	s.mu.Unlock()
	if keeper != nil {
		keeper.Took(m)
	}
}

// upkeepReport shows how far the upkeep has come while no job runs that has more to tell.
func (s *Supervisor) upkeepReport() api.Report {
	return func(p api.Progress) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.job == ActNone {
			s.progress.set(p)
		}
	}
}

// sweep unlinks what has been condemned for the grace and what no reader's pin covers.
func (s *Supervisor) sweep(ctx context.Context) error {
	v := s.lease.View()
	s.mu.Lock()
	keeper, grace := s.upkeep.keeper, s.set.Retention.Grace
	now := s.clock.Now()
	wait := now < s.upkeep.sweepAt
	s.mu.Unlock()
	if keeper == nil || wait || !v.Holding || v.Record.Catalog == "" {
		return nil
	}
	cat := catalogOf(v.Record)
	if err := keeper.Follow(ctx, cat); err != nil {
		return fmt.Errorf("read catalog: %w", err)
	}
	if !keeper.Ripe(grace) {
		return nil
	}
	// What a pin covers stays ripe: it is looked at again, but not all the time.
	s.mu.Lock()
	s.upkeep.sweepAt = now.Add(min(sweepEvery, max(grace/2, time.Second)))
	s.mu.Unlock()
	st, err := keeper.Sweep(ctx, cat, grace)
	if st.Removed > 0 {
		s.log.Info("condemned files deleted", "catalog", cat.Name, "stats", fmt.Sprintf("%+v", st))
	}
	if err != nil {
		return fmt.Errorf("delete condemned files: %w", err)
	}
	return nil
}

func catalogEdit(next volsync.CatalogRef) func(*lease.Record) {
	return func(n *lease.Record) {
		n.GCSeq++
		n.Catalog, n.CatalogHash = next.Name, next.Hash
	}
}

// pinned runs f while a snapshot can't be deleted under it. Where no pin can be written f
// runs all the same: it checks whatever it reads.
func (s *Supervisor) pinned(ctx context.Context, ref volsync.SnapshotRef, f func(context.Context, volsync.SnapshotRef) error) error {
	began := false
	err := s.store.WithPin(ctx, volsync.PinRequest{
		Snapshots: []volsync.SnapshotRef{ref}, Owner: "standby " + s.set.Instance,
		Look: func(ctx context.Context) (head volsync.SnapshotRef, cat volsync.CatalogRef, err error) {
			if err := s.lease.Refresh(ctx); err != nil {
				return head, cat, fmt.Errorf("look at the register: %w", err)
			}
			r := s.lease.View().Record
			if r.Head != nil {
				head = RefOf(r.Head)
			}
			return head, catalogOf(r), nil
		},
	}, func(ctx context.Context, head volsync.SnapshotRef) error {
		began = true
		return f(ctx, head)
	})
	if began || err == nil || ctx.Err() != nil || errors.Is(err, volsync.ErrExpired) {
		return err
	}
	s.log.Warn("snapshot is read without a pin", "snapshot", ref.ID, "error", err)
	return f(ctx, ref)
}
