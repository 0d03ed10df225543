package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

var _ api.Agent = (*Supervisor)(nil)

const (
	// memberEvery is how often an instance announces itself.
	memberEvery = 3 * time.Second
	// pollMove is how often a waiting command looks whether a move has happened.
	pollMove = 100 * time.Millisecond
	// movePatience is how long a command waits for a move, beside the engine's stop time-out.
	movePatience = 10 * time.Minute
)

// memberWindow is how long a silent instance counts as alive.
func (s *Supervisor) memberWindow() time.Duration { return 3 * memberEvery }

// musterEvery is how often a standby announces itself while the holder of a lease of this TTL
// is silent, so that at its end everybody knows who could take over, and how well prepared.
func musterEvery(ttl time.Duration) time.Duration { return ttl / 8 }

// beatEvery is how long to wait for the next beat.
func (s *Supervisor) beatEvery() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.muster {
		return min(memberEvery, musterEvery(time.Duration(s.lease.View().Record.TTL)))
	}
	return memberEvery
}

// rivalWindow is how long a silent instance counts as one that could take over. Nobody is waited
// for that has not announced itself after the holder fell silent.
func (s *Supervisor) rivalWindow(r lease.Record) time.Duration {
	if s.muster {
		return min(s.memberWindow(), 3*musterEvery(time.Duration(r.TTL)))
	}
	return s.memberWindow()
}

func (s *Supervisor) member() Member {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.me(s.lease.View().Record)
}

// followsBehind is by how many snapshots a copy that follows head may be behind at any moment.
const followsBehind = 2

// me is what this instance tells the others. s.mu is held.
func (s *Supervisor) me(r lease.Record) Member {
	set, state, st := s.set, s.decision.State, s.volume.State()
	broken := s.fails[ActHydrate] > 0 || s.fails[ActStart] > 0 || s.db.state().engineErr != ""
	m := Member{
		Instance: set.Instance, Incarnation: s.lease.Incarnation(), State: state,
		Base: st.Base.ID, BaseSeq: st.Base.Seq, Zone: set.Zone, HTTP: set.HTTP.Listen, Version: s.cfg.Version,
		Priority: set.Failover.Priority,
		Eligible: !set.Failover.Never() && state == StateStandby && !broken,
	}
	switch st.Phase {
	case volsync.PhaseLive:
		m.Newest = r.Continues(set.Instance, st.ID) && st.LiveTerm == r.Term
	case volsync.PhaseClean:
		m.Follows = r.Head != nil && st.Base.Seq+followsBehind >= r.Head.Seq
	}
	return m
}

func (s *Supervisor) memberFailed(err error) {
	if err != nil {
		s.log.Debug("instance not announced on the share", "error", err)
	}
}

// Live implements api.Agent.
func (s *Supervisor) Live() api.Live {
	v := s.lease.View()
	db := s.db.state()
	s.mu.Lock()
	defer s.mu.Unlock()
	l := api.Live{Role: s.role(v, db), Term: v.Record.Term, DatabaseAnswers: db.answers(s.clock.Now()), Beat: s.beat,
		NoLoadBalance: s.set.Replica.NoLoadBalance}
	if v.Holding {
		l.Deadline = v.Deadline
	}
	if s.replica != nil {
		l.ServesReads, l.Replica = s.replica.live(s.clock.Now())
	}
	if d := s.degraded(v, db); len(d) > 0 {
		l.Failing = strings.Join(d, "; ")
	}
	return l
}

// role is the state in the words that load balancers and operators know. s.mu is held.
func (s *Supervisor) role(v lease.View, db dbState) api.Role {
	switch s.decision.State {
	case StatePrimary:
		if v.Holding && db.serving {
			return api.RolePrimary
		}
		if !v.Holding {
			return api.RoleFenced
		}
		return api.RoleStarting
	case StateTakeover:
		return api.RoleStarting
	case StateHandoff:
		return api.RoleHandoff
	case StateFencing:
		return api.RoleFenced
	case StateStandby:
		return api.RoleStandby
	}
	return api.RoleDown
}

// degraded lists why the duty is not wholly fulfilled. s.mu is held.
func (s *Supervisor) degraded(v lease.View, db dbState) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	now := s.clock.Now()
	if s.decision.State == StateJoining {
		add("the register has not been read yet")
	}
	if v.Err != nil {
		add("register: %v", v.Err)
	}
	if v.FenceErr != nil {
		add("fence: %v", v.FenceErr)
	}
	if db.engineErr != "" {
		add("Docker does not answer: %s", db.engineErr)
	}
	if s.decision.State == StatePrimary || s.decision.State == StateTakeover {
		switch {
		case s.fails[ActStart] > 0:
			add("database can't be started (%d failures in a row)", s.fails[ActStart])
		case !db.answers(now):
			add("database does not answer")
		}
		if n := s.failedFor; n > 0 {
			add("snapshots fail (%d in a row)", n)
		}
		if s.aborted > 0 {
			add("the database would stand still for longer than sync.max_freeze (%s): snapshots are given up (%d in a row)", s.set.Sync.MaxFreeze, s.aborted)
		}
		if busy := now.Sub(s.capturing); s.capturing != 0 && busy > s.set.Sync.MaxInterval && s.commits > 0 {
			add("a snapshot has been under way for %s, longer than sync.max_interval (%s)", round(busy), s.set.Sync.MaxInterval)
		} else if s.pace.Over {
			add("a snapshot takes %s, longer than sync.max_interval (%s): the share or the disk is too slow", round(s.pace.recent), s.set.Sync.MaxInterval)
		}
	}
	if alarm := s.volume.Tracking().Alarm; alarm != "" {
		add("change tracking: %s", alarm)
	}
	if bad := s.upkeep.checker.Damage(); len(bad) > 0 {
		add("%d files of the store are damaged, the first: %s: %s (see `dbsupervisor snapshots verify`)", len(bad), bad[0].Path, bad[0].What)
	}
	if s.replica != nil {
		if why := s.replica.degraded(); why != "" {
			add("%s", why)
		}
	}
	if n := s.fails[ActHydrate]; n > 0 {
		add("local copy can't be brought to head (%d failures in a row)", n)
	}
	return out
}

// unprotected says that the cluster does not take over by itself any more. It is nothing that a
// health check should know: replacing instances would make it worse. s.mu is held.
func (s *Supervisor) unprotected(v lease.View) []string {
	most := s.set.Failover.MaxPerHour
	switch {
	case s.asks && most == 0:
		return []string{fmt.Sprintf("ASKS FOR A PERSON: %s fell silent, and failover.max_per_hour is 0 here: `dbsupervisor failover` makes this instance the primary",
			v.Record.Holder.Instance)}
	case s.asks:
		return []string{fmt.Sprintf("ASKS FOR A PERSON: %s fell silent, and there were %d failovers within the last hour already (failover.max_per_hour is %d). "+
			"Find out why; then `dbsupervisor failover` makes this instance the primary, `dbsupervisor resume` lets the cluster go on by itself",
			v.Record.Holder.Instance, v.Failovers, most)}
	case most > 0 && v.Failovers >= most && v.Record.Term > 0:
		return []string{fmt.Sprintf("there were %d failovers within the last hour (failover.max_per_hour is %d): if the primary is lost now, nobody takes over by itself. "+
			"Find out why; then `dbsupervisor resume` counts anew", v.Failovers, most)}
	}
	return nil
}

// Status implements api.Agent. It waits for nothing: everything in it is already known.
func (s *Supervisor) Status(context.Context) (api.Status, error) {
	v := s.lease.View()
	db := s.db.state()
	gateOpen, gateLeft, gateErr, guardErr := s.db.fences()
	forks, forkErr := s.volume.Forks()
	hist, histErr := s.events.last(5)
	now, wall := s.clock.Now(), s.clock.Wall()
	vol := s.volume.State()
	tier, tierWhy := s.volume.Tier()

	s.mu.Lock()
	defer s.mu.Unlock()
	r := v.Record
	st := api.Status{
		Role: s.role(v, db), State: string(s.decision.State), Degraded: append(s.degraded(v, db), s.unprotected(v)...),
		Source: "agent", At: wall, Version: s.cfg.Version,
		Cluster: s.set.Cluster, ClusterID: r.ClusterID, Instance: s.set.Instance,
		Incarnation: s.lease.Incarnation(), Zone: s.set.Zone, Term: r.Term,
		Primary: api.Primary{Instance: r.Holder.Instance, Address: r.Holder.Address, HTTP: r.Holder.HTTP,
			Zone: r.Holder.Zone, Self: r.Holder.Instance == s.set.Instance && v.Holding},
		HeadComplete: headComplete(r),
		Released:     r.Released, Successor: r.Successor, Paused: r.Paused,
		Lease: api.Lease{Holding: v.Holding, TTLMS: time.Duration(r.TTL).Milliseconds(), Version: r.Version},
		Local: api.Local{VolumeID: vol.ID, Phase: string(vol.Phase), Base: vol.Base.ID,
			Refreshed: s.copied, RefreshReason: s.copiedWhy},
		Database: api.Database{Container: db.name, Image: s.set.Database.Image, Running: db.running,
			Healthy: db.answers(now), Error: db.err, Restarts: db.restarts},
		Sync: api.Sync{Schedule: s.set.Sync.Schedule, Running: s.job == ActSnapshot,
			ConsecutiveFailures: s.failedFor, LastError: s.syncErr, Tier: tier, TierReason: tierWhy, Tracking: s.tracking(),
			Commits: s.commits, Failures: s.failures, FreezeAborts: s.aborts, PredictedFreezeMS: s.predicted(),
			Slowed: s.pace.Interval > 0, IntervalSeconds: s.interval(wall).Seconds()},
		LastCommit: s.lastCommit, LastError: s.problem, Progress: s.progress.get(), History: hist, Upkeep: s.upkeepStatus(),
		Failover: api.Failover{Priority: s.set.Failover.Priority, Never: s.set.Failover.Never(),
			LastHour: v.Failovers, MaxPerHour: s.set.Failover.MaxPerHour, AsksForPerson: s.asks},
		Gate:  api.Gate{Open: gateOpen, RemainingMS: gateLeft.Milliseconds(), Error: text(gateErr)},
		Guard: api.Guard{OK: guardErr == nil, Error: text(guardErr)},
	}
	if s.replica != nil {
		st.Replica = s.replica.status(now)
	}
	if !db.lastProbe.IsZero() {
		at := db.lastProbe
		st.Database.LastProbe = &at
	}
	if v.Holding {
		left := v.Deadline.Sub(now).Milliseconds()
		st.Lease.DeadlineInMS = &left
	} else if v.Loaded {
		left := max(v.ChallengeAt.Sub(now), 0).Milliseconds()
		st.Lease.ChallengeInMS = &left
	}
	if v.LastContact != 0 {
		ago := now.Sub(v.LastContact).Milliseconds()
		st.Lease.LastContactMS = &ago
	}
	st.Lease.Error = text(v.Err)
	if h := r.Head; h != nil {
		st.Head = &api.Head{ID: h.ID, Seq: h.Seq, Term: h.Term, Frozen: h.Frozen, AgeSeconds: wall.Sub(h.Frozen).Seconds()}
		if vol.Phase != volsync.PhaseLive {
			st.Local.BehindSnapshots = int64(h.Seq) - int64(vol.Base.Seq)
		}
	}
	if v.Holding && s.safeUntil != 0 {
		loss := now.Sub(s.safeUntil).Seconds()
		st.LossWindowSeconds = &loss
	}
	if s.decision.State == StatePrimary {
		next := wall.Add(s.nextSync.Sub(now))
		st.Sync.Next = &next
	}
	if c := st.LastCommit; c != nil && !v.Holding {
		// Of a term that is over: what matters is what the present primary commits.
		st.LastCommit = nil
	}
	for _, f := range forks {
		st.Forks = append(st.Forks, s.fork(f))
	}
	if err := errors.Join(forkErr, histErr); err != nil {
		st.Degraded = append(st.Degraded, err.Error())
	}
	return st, nil
}

// headComplete says that nobody can have acknowledged anything that head does not hold: nobody
// has held the term since head was made (a new cluster, an import, a rescue), or the last one
// handed everything over.
func headComplete(r lease.Record) bool {
	return r.Head != nil && (r.Holder.Instance == "" || r.Released && r.Complete)
}

func (s *Supervisor) fork(f volsync.Fork) api.Fork {
	return api.Fork{Name: f.Name, Path: f.Path, Reason: f.Reason, At: f.Time, Base: f.Base.ID, Term: f.LiveTerm,
		ExpiresAt: f.Time.Add(s.set.Sync.ForkKeep)}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Sync implements api.Agent.
func (s *Supervisor) Sync(ctx context.Context, report api.Report) (api.SyncResult, error) {
	if !s.lease.View().Holding {
		return api.SyncResult{}, s.notPrimary()
	}
	ch := make(chan syncOutcome, 1)
	s.mu.Lock()
	s.syncNext = append(s.syncNext, ch)
	delete(s.waiting, ActSnapshot)
	s.mu.Unlock()
	s.poke()
	for {
		select {
		case out := <-ch:
			return out.result, out.err
		case <-ctx.Done():
			return api.SyncResult{}, ctx.Err()
		case <-time.After(pollMove):
		}
		if p := s.progress.get(); p != nil {
			report(*p)
		}
		if !s.lease.View().Holding {
			return api.SyncResult{}, s.notPrimary()
		}
	}
}

func (s *Supervisor) notPrimary() error {
	p := s.lease.View().Record.Holder.Instance
	if p == "" {
		return api.WithHint(api.ErrNotPrimary, "no instance holds the lease yet")
	}
	return api.WithHint(api.ErrNotPrimary, "ask on instance "+p)
}

// Switchover implements api.Agent.
func (s *Supervisor) Switchover(ctx context.Context, req api.SwitchoverRequest, report api.Report) (api.MoveResult, error) {
	v := s.lease.View()
	switch {
	case !v.Loaded || v.Record.Term == 0:
		return api.MoveResult{}, s.notPrimary()
	case v.Record.Released:
		return api.MoveResult{}, api.WithHint(errors.New("nobody holds the term"), "the next instance takes it by itself; see `dbsupervisor status`")
	case req.To == v.Record.Holder.Instance:
		return api.MoveResult{}, fmt.Errorf("%s is the primary already", req.To)
	}
	if req.To != "" && req.To != s.set.Instance {
		if err := s.members.refresh(s.set.Instance); err != nil {
			return api.MoveResult{}, err
		}
		if _, ok := s.members.successor(req.To, "", s.memberWindow()); !ok {
			return api.MoveResult{}, api.WithHint(fmt.Errorf("%w: %s is not an eligible standby", api.ErrNoSuccessor, req.To), s.knownMembers())
		}
	}
	if req.To == "" && !v.Holding {
		req.To = s.set.Instance
	}
	if err := s.refuses(req.To); err != nil {
		return api.MoveResult{}, err
	}
	return s.order(ctx, lease.Order{ID: s.nonce(), Kind: lease.OrderSwitchover, Term: v.Record.Term, To: req.To}, report)
}

// refuses says why this instance, if it is the one named, can't take the term at all: the holder
// would let go of it for nothing.
func (s *Supervisor) refuses(to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if to != s.set.Instance || !s.set.Failover.Never() {
		return nil
	}
	return api.WithHint(fmt.Errorf("%w: %s never becomes primary", api.ErrNoSuccessor, to),
		"name another instance with --to, or change failover.nofailover and failover.priority here")
}

func (s *Supervisor) knownMembers() string {
	var names []string
	for _, m := range s.members.alive(s.memberWindow()) {
		names = append(names, fmt.Sprintf("%s (%s)", m.Instance, m.State))
	}
	if len(names) == 0 {
		return "no other instance has announced itself within " + s.memberWindow().String()
	}
	return "instances seen: " + strings.Join(names, ", ")
}

// Failover implements api.Agent.
func (s *Supervisor) Failover(ctx context.Context, req api.FailoverRequest, report api.Report) (api.MoveResult, error) {
	v := s.lease.View()
	if !v.Loaded || v.Record.Term == 0 {
		return api.MoveResult{}, s.notPrimary()
	}
	if req.To == "" && !v.Holding {
		req.To = s.set.Instance
	}
	if req.Terminated && v.Holding {
		return api.MoveResult{}, api.WithHint(errors.New("this instance is the primary, and it is here"), "leave --terminated out, or use `dbsupervisor switchover`, which loses nothing")
	}
	if req.To == v.Record.Holder.Instance {
		return api.MoveResult{}, api.WithHint(fmt.Errorf("%s is the primary already", req.To), "name the instance that shall take over: --to")
	}
	if req.To != "" && req.To != s.set.Instance {
		if err := s.members.refresh(s.set.Instance); err != nil {
			return api.MoveResult{}, err
		}
		if _, ok := s.members.successor(req.To, "", s.memberWindow()); !ok {
			return api.MoveResult{}, api.WithHint(fmt.Errorf("%w: %s is not an eligible standby", api.ErrNoSuccessor, req.To), s.knownMembers())
		}
	}
	if err := s.refuses(req.To); err != nil {
		return api.MoveResult{}, err
	}
	return s.order(ctx, lease.Order{ID: s.nonce(), Kind: lease.OrderFailover, Term: v.Record.Term, To: req.To, Terminated: req.Terminated}, report)
}

// order leaves the order in the register and waits until another term has begun.
func (s *Supervisor) order(ctx context.Context, o lease.Order, report api.Report) (api.MoveResult, error) {
	began, v0 := s.clock.Now(), s.lease.View().Record
	if err := s.lease.PutOrder(ctx, o); err != nil {
		return api.MoveResult{}, fmt.Errorf("leave %s order in the register: %w", o.Kind, err)
	}
	s.event("ordered", "", string(o.Kind)+" to "+orNobody(o.To))
	s.poke()
	for {
		v := s.lease.View()
		r := v.Record
		if r.Term > o.Term {
			res := api.MoveResult{Primary: r.Holder.Instance, Term: r.Term, DurationMS: ms(s.clock.Now().Sub(began))}
			res.Lossless = o.Kind == lease.OrderSwitchover && r.Term == o.Term+1 && r.Inherited
			if o.Kind == lease.OrderSwitchover && !res.Lossless {
				res.Note = "the old primary did not hand over in time: what it acknowledged after the last committed snapshot is lost or a fork on its disk"
			}
			if res.Primary == v0.Holder.Instance {
				return res, api.WithHint(fmt.Errorf("the term went back to %s (term %d): no other instance took it in time", res.Primary, res.Term),
					"see `dbsupervisor status` on the others; "+s.knownMembers())
			}
			if note := s.awaitServing(ctx, r, report); note != "" {
				res.Note = strings.TrimSpace(res.Note + "\n" + note)
			}
			return res, nil
		}
		if ok, err := answer(r, o.ID); ok {
			return api.MoveResult{}, err
		}
		if s.clock.Now().Sub(began) > movePatience {
			return api.MoveResult{}, fmt.Errorf("no other instance has taken the term within %s", movePatience)
		}
		report(api.Progress{Phase: fmt.Sprintf("waiting for another term than %d", o.Term)})
		if err := s.clock.WaitUntil(ctx, s.clock.Now().Add(pollMove)); err != nil {
			return api.MoveResult{}, err
		}
	}
}

// servingPatience is how long a command waits for a new primary's database to answer.
const servingPatience = 30 * time.Second

// awaitServing waits until the holder's health endpoint calls it primary: its database
// answers and lets clients in. It returns a remark if that can't be seen in time.
func (s *Supervisor) awaitServing(ctx context.Context, r lease.Record, report api.Report) string {
	if r.Holder.HTTP == "" {
		return ""
	}
	until := s.clock.Now().Add(servingPatience)
	for s.clock.Now() < until && s.lease.View().Record.Term == r.Term {
		rctx, cancel := context.WithTimeout(ctx, time.Second)
		req, err := http.NewRequestWithContext(rctx, http.MethodGet, "http://"+r.Holder.HTTP+"/primary", nil)
		if err != nil {
			cancel()
			return ""
		}
		res, err := http.DefaultClient.Do(req)
		cancel()
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return ""
			}
		}
		report(api.Progress{Phase: "database is starting on " + r.Holder.Instance})
		if s.clock.WaitUntil(ctx, s.clock.Now().Add(pollMove)) != nil {
			break
		}
	}
	return "its database does not answer yet; see `dbsupervisor status` there"
}

// Pause implements api.Agent.
func (s *Supervisor) Pause(ctx context.Context, paused bool) error {
	if err := s.lease.SetPaused(ctx, paused); err != nil {
		return fmt.Errorf("change paused flag: %w", err)
	}
	if paused {
		s.event("paused", "", "nobody takes over by itself until `dbsupervisor resume`")
	} else {
		s.event("resumed failover", "", "a standby takes over by itself again")
	}
	return nil
}

// Rollback implements api.Agent.
func (s *Supervisor) Rollback(ctx context.Context, req api.RollbackRequest, report api.Report) (api.RollbackResult, error) {
	v := s.lease.View()
	if !v.Loaded || v.Record.Term == 0 || v.Record.Released {
		return api.RollbackResult{}, s.notPrimary()
	}
	if v.Record.Head == nil {
		return api.RollbackResult{}, api.ErrNoSnapshot
	}
	ref, err := s.findSnapshot(ctx, v.Record, req.Snapshot)
	if err != nil {
		return api.RollbackResult{}, err
	}
	began := s.clock.Now()
	o := lease.Order{ID: s.nonce(), Kind: lease.OrderRollback, Term: v.Record.Term, Snapshot: req.Snapshot}
	if err := s.lease.PutOrder(ctx, o); err != nil {
		return api.RollbackResult{}, fmt.Errorf("leave rollback order in the register: %w", err)
	}
	s.poke()
	from := v.Record.Head.ID
	for {
		v := s.lease.View()
		r := v.Record
		if ok, err := answer(r, o.ID); ok {
			if err != nil {
				return api.RollbackResult{}, err
			}
			res := api.RollbackResult{Head: r.Head.ID, From: from, Frozen: ref.Frozen, DurationMS: ms(s.clock.Now().Sub(began))}
			// The state before is in the snapshot that the primary took on the way.
			if list, err := s.store.List(ctx, RefOf(r.Head), catalogOf(r)); err == nil && len(list) > 0 && list[0].Parent != "" {
				res.From = list[0].Parent
			}
			s.awaitServing(ctx, r, report)
			return res, nil
		}
		if r.Term != o.Term {
			return api.RollbackResult{}, errors.New("the term ended before the rollback was done")
		}
		report(api.Progress{Phase: "rolling back"})
		if err := s.clock.WaitUntil(ctx, s.clock.Now().Add(pollMove)); err != nil {
			return api.RollbackResult{}, err
		}
	}
}

// answer says what became of an order, if the holder has answered it.
func answer(r lease.Record, id string) (answered bool, err error) {
	if r.Answer == nil || r.Answer.Order != id {
		return false, nil
	}
	if r.Answer.Error == "" {
		return true, nil
	}
	return true, api.WithHint(errors.New(r.Answer.Error), r.Answer.Hint)
}

// Restarting says that Run ended because an operator asked for a restart.
func (s *Supervisor) Restarting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.restarting
}

// Restart implements api.Agent.
func (s *Supervisor) Restart(context.Context) error {
	s.mu.Lock()
	s.restarting = true
	s.mu.Unlock()
	// The answer goes out before the loop ends.
	time.AfterFunc(pollMove, s.poke)
	s.event("agent restart", "", "asked for; the database keeps running")
	return nil
}

// History implements api.Agent.
func (s *Supervisor) History(_ context.Context, n int) ([]api.Event, error) { return s.events.last(n) }

// Forks implements api.Agent.
func (s *Supervisor) Forks(context.Context) ([]api.Fork, error) {
	forks, err := s.volume.Forks()
	if err != nil {
		return nil, err
	}
	out := make([]api.Fork, 0, len(forks))
	for _, f := range forks {
		out = append(out, s.fork(f))
	}
	return out, nil
}
