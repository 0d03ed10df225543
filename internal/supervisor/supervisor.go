package supervisor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/robfig/cron/v3"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// Config is what a Supervisor is made of. It owns none of the parts; the caller closes
// them after Run has returned.
type Config struct {
	Settings *config.Config
	Clock    boottime.Clock
	Log      hclog.Logger
	FS       fsx.FS
	Rand     io.Reader // randomness for names; nil: crypto/rand
	Version  string    // of the program
	// Lease is a lease.Config without Extend, which the supervisor sets.
	Lease    lease.Config
	Store    *volsync.Store
	Volume   *volsync.Volume
	Database DatabaseConfig
	// Replica is what reads are served with while this instance is a standby; nil: never. Where
	// replica.enabled is not set, what earlier settings left is cleared away.
	Replica *ReplicaConfig
	// Notify tells the service manager ("READY=1", "WATCHDOG=1", "STATUS=..."); nil: nobody.
	Notify func(state string)
	// Proxies learn of a planned handoff before the database stops; nil: there are none.
	Proxies Proxies
	// Reload delivers new settings; only what can change without a restart is taken over.
	Reload <-chan *config.Config
}

// Supervisor is one agent. Make it with New, run it once with Run.
type Supervisor struct {
	cfg     Config
	set     *config.Config
	log     hclog.Logger
	clock   boottime.Clock
	lease   *lease.Lease
	store   *volsync.Store
	volume  *volsync.Volume
	db      *database
	members *members
	events  *events
	wake    chan struct{}

	mu        sync.Mutex
	decision  Decision
	beat      boottime.Instant
	job       Action // under way
	interrupt Action // under way beside it: ActFence or ActYield
	stopJob   context.CancelFunc
	waiting   map[Action]boottime.Instant // not to be repeated before
	fails     map[Action]int              // in a row
	progress  progress
	problem   *api.Problem
	copied    string // how the volume was kept while it followed head last
	copiedWhy string // why it was in place

	engineUps  int // Docker's recoveries so far
	resuming   bool
	stopping   bool
	restarting bool
	fatal      error            // the lease can't work; ends Run once nothing of ours runs
	yielded    boottime.Instant // when this incarnation last gave the term up
	muster     bool             // the holder is silent: standbys announce themselves more often
	asks       bool             // the lease is free, and a person is waited for

	schedule   cron.Schedule
	nextSync   boottime.Instant
	pace       pace
	capturing  boottime.Instant // when the snapshot under way began; 0: none is
	syncWanted bool
	syncNext   []chan syncOutcome // whoever waits for the next snapshot to begin
	retainAt   boottime.Instant
	upkeep     upkeep
	ages       ages
	replica    *replica           // nil: none
	tokens     []chan syncOutcome // whoever waits for the next snapshot to begin by itself

	baseline   string // ID of the head that captures are computed against
	hasBase    bool
	safeUntil  boottime.Instant // every write before is in a committed snapshot; 0: unknown
	cleanSeen  bool             // safeUntil has moved without a new head, and no record says so yet
	lastCommit *api.LastCommit
	commits    int64
	failures   int64
	syncErr    string
	aborts     int64 // freezes that would have taken too long
	aborted    int   // ... in a row
	alarmed    bool  // the history says that snapshots keep failing
	failedFor  int   // snapshots in a row that failed

	servedAt   boottime.Instant // when clients were last let in, or the term began
	termCtx    context.Context
	termCancel context.CancelFunc
	term       uint64
}

type syncOutcome struct {
	result api.SyncResult
	token  api.Token // of the head that holds what was captured
	err    error
}

// hopeless is how many attempts to get the database going must have failed in a row before
// the term is given to another instance, if there is one.
const hopeless = 3

// tick is how often the loop looks by itself; everything urgent wakes it.
const tick = 200 * time.Millisecond

// New checks the parts and puts them together. It starts nothing.
func New(cfg Config) (*Supervisor, error) {
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Notify == nil {
		cfg.Notify = func(string) {}
	}
	if cfg.Proxies == nil {
		cfg.Proxies = api.NewProxies()
	}
	s := &Supervisor{
		cfg: cfg, set: cfg.Settings, log: cfg.Log.Named("supervisor"), clock: cfg.Clock,
		store: cfg.Store, volume: cfg.Volume,
		members: newMembers(cfg.FS, cfg.Settings.Share, cfg.Clock),
		events:  newEvents(filepath.Join(cfg.Settings.Dir, "state")),
		wake:    make(chan struct{}, 1),
		waiting: map[Action]boottime.Instant{},
		fails:   map[Action]int{},
	}
	s.progress.clock = cfg.Clock
	s.upkeep.checker = cfg.Store.NewChecker(cfg.FS, filepath.Join(cfg.Settings.Dir, "state", "checked.json"))
	sched, err := config.ParseSchedule(cfg.Settings.Sync.Schedule)
	if err != nil {
		return nil, err
	}
	s.schedule = sched
	s.db = newDatabase(cfg.Database, cfg.Settings, cfg.Clock, cfg.Log.Named("database"))
	s.db.note = func(kind, text string) { s.event(kind, "", text) }
	lc := cfg.Lease
	lc.Self.VolumeID = cfg.Volume.State().ID
	lc.Extend, lc.Vouch = s.db.extend, s.vouch
	if cfg.Replica != nil {
		if s.replica, err = s.newReplica(*cfg.Replica); err != nil {
			return nil, err
		}
	}
	if s.lease, err = lease.New(lc); err != nil {
		return nil, fmt.Errorf("set up lease: %w", err)
	}
	return s, nil
}

// Run works until ctx ends, which is an explicit stop: a holder hands off first. It returns
// nil after an orderly end.
func (s *Supervisor) Run(ctx context.Context) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var wg sync.WaitGroup
	spawn := func(f func()) {
		wg.Add(1)
		go func() { defer wg.Done(); f() }()
	}
	s.resuming = true
	s.armSchedule()
	s.event("agent started", "", "version "+s.cfg.Version)
	if !s.awaitEngine(ctx) {
		return nil
	}
	if err := s.db.install(base); err != nil {
		return err
	}
	spawn(func() { s.resume(base) })
	spawn(func() { s.db.monitor(base, s.poke) })
	spawn(func() { s.pruneForks(base) })
	if s.replica != nil {
		spawn(func() { s.replica.run(base) })
	}
	go s.runUpkeep(base) // waits for the share, too
	// The share may hang: nothing that waits for it is waited for at the end.
	go s.members.run(base, s.beatEvery, s.member, s.nonce, s.memberFailed)

	stop := ctx.Done()
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			stop = nil
			s.mu.Lock()
			s.stopping = true
			s.mu.Unlock()
			s.cfg.Notify("STOPPING=1")
		case <-s.lease.Changed():
		case <-s.wake:
		case <-ticker.C:
		case set := <-s.cfg.Reload:
			s.reload(set)
		}
		if s.step(base) {
			break
		}
	}
	cancel()
	wg.Wait()
	s.endReplica(base)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fatal
}

// engineRetry is how often Docker is asked while nothing can begin without it.
const engineRetry = time.Second

// awaitEngine waits until Docker says which containers there are; without that nothing is
// safe to begin. It returns false if ctx ended first. A database that runs meanwhile ends at its
// deadline: nothing renews the lease.
func (s *Supervisor) awaitEngine(ctx context.Context) bool {
	for waiting := false; ; waiting = true {
		lctx, cancel := context.WithTimeout(ctx, max(s.set.Database.ProbeTimeout, engineAnswer))
		err := s.db.look(lctx)
		cancel()
		if err == nil || ctx.Err() != nil {
			if waiting {
				s.log.Info("docker answers, the agent goes on", "error", err)
			}
			return err == nil
		}
		s.mu.Lock()
		s.beat = s.clock.Now()
		s.mu.Unlock()
		if !waiting {
			const why = "waiting for Docker to answer"
			s.mu.Lock()
			s.decision = Decision{State: StateJoining, Why: why}
			s.problem = &api.Problem{What: "look for the database's container: " + err.Error(), At: s.clock.Wall(),
				Hint: "is the Docker engine running? (systemctl status docker)"}
			s.mu.Unlock()
			s.event("waiting", "", "Docker does not answer: "+err.Error())
			s.cfg.Notify("READY=1")
			s.cfg.Notify("STATUS=" + why)
		}
		s.cfg.Notify("WATCHDOG=1")
		if s.clock.WaitUntil(ctx, s.clock.Now().Add(engineRetry)) != nil {
			return false
		}
	}
}

// resume finds out whether the term of before an agent restart is still ours, then lets
// the lease run.
func (s *Supervisor) resume(ctx context.Context) {
	err := s.lease.Resume(ctx)
	var adopting sync.WaitGroup
	defer adopting.Wait()
	switch {
	case err == nil:
		// Beside the renewals, which must not wait for a database that is slow to answer.
		// Until it is done the loop leaves everything as it is.
		adopting.Go(func() { s.adopt(ctx); s.resumed() })
	case errors.Is(err, lease.ErrNotYet), ctx.Err() != nil:
		s.resumed()
	default:
		s.log.Warn("term of before the restart not resumed", "error", err)
		s.resumed()
	}
	if err := s.lease.Run(ctx); err != nil && ctx.Err() == nil {
		if errors.Is(err, lease.ErrInstanceInUse) {
			err = api.WithHint(err, "give every machine its own name: set `instance` in the configuration, or leave it out to use the host's name")
		}
		s.mu.Lock()
		s.fatal = err
		s.mu.Unlock()
		s.poke()
	}
}

// adopt takes over the database of before the restart.
func (s *Supervisor) adopt(ctx context.Context) {
	v := s.lease.View()
	s.event("resumed", "", fmt.Sprintf("agent restarted inside term %d", v.Record.Term))
	if err := s.db.adopt(ctx, v.Record.Term, v.Deadline); err != nil {
		s.log.Warn("container of this term not adopted", "error", err)
	}
	s.mu.Lock()
	s.syncWanted = true // what the last commit missed is not known: take a new one
	s.mu.Unlock()
}

// resumed lets the loop act.
func (s *Supervisor) resumed() {
	s.mu.Lock()
	s.resuming = false
	s.mu.Unlock()
	s.poke()
}

// pruneEvery is how often expired forks are looked for.
const pruneEvery = time.Hour

// pruneForks removes what has been kept as a fork for long enough.
func (s *Supervisor) pruneForks(ctx context.Context) {
	ages := newForkAges(s.cfg.FS, filepath.Join(s.set.Dir, "state"))
	for {
		s.mu.Lock()
		keep := s.set.Sync.ForkKeep
		s.mu.Unlock()
		gone, err := s.expireForks(ages, keep)
		if err != nil {
			s.fail("old forks not removed", err)
		}
		for _, f := range gone {
			s.event("fork removed", "", f+" was older than "+keep.String())
		}
		if s.clock.WaitUntil(ctx, s.clock.Now().Add(pruneEvery)) != nil {
			return
		}
	}
}

// poke wakes the loop.
func (s *Supervisor) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// step is one round: observe, decide, act. It returns true when the agent may exit.
func (s *Supervisor) step(base context.Context) bool {
	s.mu.Lock()
	s.beat = s.clock.Now()
	o := s.observe()
	s.followTerm(base, o)
	d := decide(o)
	old := s.decision
	s.decision = d
	asks := needsPerson(o)
	asked := asks != s.asks
	s.asks = asks
	s.mu.Unlock()
	s.cfg.Notify("WATCHDOG=1")
	if old.State == d.State && old.Why != d.Why && d.State == StateStandby && o.MayTake {
		s.log.Info("lease is free", "term", o.Record.Term, "why", d.Why)
	}
	if d.State == StateStandby && d.Action == ActNone {
		// Its turn is not noticed by the next tick, but when it comes.
		if wait, _ := turn(o); wait > o.FreeFor && wait-o.FreeFor < tick {
			time.AfterFunc(wait-o.FreeFor, s.poke)
		}
	}
	if asked && asks {
		s.event("asks for a person", "", fmt.Sprintf("%s fell silent after %d failovers within the last hour (failover.max_per_hour is %d): `dbsupervisor failover` or `dbsupervisor resume`",
			o.Record.Holder.Instance, o.Failovers, o.MostFailovers))
		s.log.Error("failovers of this hour are used up, a person must ask for the next", "silent", o.Record.Holder.Instance, "failovers", o.Failovers)
	}
	if old.State != d.State {
		s.transition(old.State, d, o.Record.Term)
	}
	switch d.Action {
	case ActNone:
	case ActExit:
		return true
	case ActFence, ActYield:
		s.run(base, d.Action)
	case ActAcquire, ActHydrate, ActSetAside, ActHandoff:
		// A handoff outlives the term: its last step is the release.
		s.run(base, d.Action)
	default:
		s.mu.Lock()
		ctx := s.termCtx
		s.mu.Unlock()
		s.run(ctx, d.Action)
	}
	return false
}

// followTerm keeps one context per term that we hold: work done as primary ends with it.
// s.mu is held.
func (s *Supervisor) followTerm(base context.Context, o Observation) {
	if s.termCancel != nil && (!o.Holding || o.Record.Term != s.term) {
		s.termCancel()
		s.termCancel, s.termCtx = nil, nil
		go s.upkeep.keeper.Close() // may wait for the share
		s.upkeep.keeper = nil
		s.baseline, s.hasBase, s.safeUntil = "", false, 0
	}
	if (o.Holding || o.Stopping) && s.replica != nil {
		s.replica.interrupt()
	}
	if o.Holding && s.termCancel == nil {
		s.termCtx, s.termCancel = context.WithCancel(base)
		s.term = o.Record.Term
		s.servedAt = s.clock.Now()
		s.retainAt = s.clock.Now().Add(s.retainPause())
		s.upkeep.keeper = s.store.NewKeeper()
		go s.proveTracker(s.termCtx)
		s.db.forgive()
	}
}

// observe collects what decide looks at. s.mu is held. It does no I/O.
func (s *Supervisor) observe() Observation {
	now := s.clock.Now()
	v := s.lease.View()
	s.ages.note(v)
	db := s.db.state()
	o := Observation{
		Me: s.me(v.Record), Known: v.Loaded, Record: v.Record,
		Holding: v.Holding, Expired: v.Expired, Resuming: s.resuming,
		Volume:    s.volume.State(),
		Container: db.exists, Running: db.running, OwnTerm: db.exists && db.term == v.Record.Term,
		TooManyDie: db.tooMany,
		Stopping:   s.stopping || s.fatal != nil, Restarting: s.restarting,
		Never: s.set.Failover.Never(), Failovers: v.Failovers, MostFailovers: s.set.Failover.MaxPerHour,
		Job: s.job, Waiting: map[Action]bool{},
	}
	o.Unserved = db.running && !db.serving
	o.Shaky = s.fails[ActStart] > 0
	if db.serving {
		s.servedAt = now
	}
	if v.Holding && !db.serving && s.fails[ActStart]+s.fails[ActHydrate]+s.fails[ActSetAside] >= hopeless &&
		now.Sub(s.servedAt) > time.Duration(v.Record.TTL) {
		_, o.CantStart = s.members.successor("", s.set.Zone, s.memberWindow())
		o.CantHand = s.fails[ActHandoff] >= 2
	}
	o.EngineDown, o.EngineLost = db.engineErr != "", db.engineLost(now)
	if db.engineUps != s.engineUps {
		// What failed for want of Docker is tried again at once.
		s.engineUps = db.engineUps
		clear(s.waiting)
	}
	headID := ""
	if v.Record.Head != nil {
		headID = v.Record.Head.ID
	}
	o.Baseline = s.hasBase && s.baseline == headID
	if s.interrupt != ActNone {
		o.Job = s.interrupt
	}
	for a, until := range s.waiting {
		o.Waiting[a] = now < until
	}
	if v.Loaded && !v.Holding {
		at := v.ChallengeAt
		ttl := time.Duration(v.Record.TTL)
		if s.yielded != 0 && v.Record.Released && v.Record.Holder.Incarnation == s.lease.Incarnation() {
			// Whoever gave the term up lets the others try first.
			at = max(at, s.yielded.Add(ttl+ttl/2))
		}
		o.MayTake, o.Step = now >= at, s.set.Lease.RenewInterval
		o.FreeFor = now.Sub(max(at, v.SeenSince))
		if o.MayTake {
			o.Others = s.members.alive(s.rivalWindow(v.Record))
		}
	}
	if muster := v.Loaded && !v.Holding && awaits(v.Record, now.Sub(v.SeenSince)); muster != s.muster {
		s.muster = muster
		if muster {
			s.members.changed()
		}
	}
	o.SyncDue = s.syncWanted || len(s.syncNext) > 0 || now >= s.nextSync
	o.RetainDue = now >= s.retainAt
	return o
}

// transition tells the log, the history and the service manager.
func (s *Supervisor) transition(from State, d Decision, term uint64) {
	s.members.changed()
	s.log.Info("state changed", "from", string(from), "to", string(d.State), "term", term, "why", d.Why)
	s.event("state", string(from)+" -> "+string(d.State), d.Why)
	s.cfg.Notify(fmt.Sprintf("STATUS=%s, term %d: %s", d.State, term, d.Why))
	if d.State == StateStandby || d.State == StatePrimary {
		s.cfg.Notify("READY=1")
	}
}

func (s *Supervisor) event(kind, move, text string) {
	ev := api.Event{At: s.clock.Wall(), Instance: s.set.Instance, Term: s.lease.View().Record.Term, Kind: kind, Text: text}
	if from, to, ok := strings.Cut(move, " -> "); ok {
		ev.From, ev.To = from, to
	}
	if err := s.events.add(ev); err != nil {
		s.log.Warn("history not written", "error", err)
	}
}

// fail remembers the last error for status; the log has had it once.
func (s *Supervisor) fail(what string, err error) {
	s.log.Error(what, "error", err)
	p := &api.Problem{What: what + ": " + err.Error(), Hint: api.HintOf(err), At: s.clock.Wall()}
	s.mu.Lock()
	s.problem = p
	s.mu.Unlock()
}

func (s *Supervisor) nonce() string {
	var b [8]byte
	if _, err := io.ReadFull(s.cfg.Rand, b[:]); err != nil {
		// Randomness that fails is a broken machine; names would collide.
		panic(fmt.Sprintf("read randomness: %v", err))
	}
	return hex.EncodeToString(b[:])
}

// reload takes over what can change while the agent runs.
func (s *Supervisor) reload(set *config.Config) {
	if set == nil {
		return
	}
	sched, err := config.ParseSchedule(set.Sync.Schedule)
	if err != nil {
		s.fail("configuration not reloaded", err)
		return
	}
	s.mu.Lock()
	s.schedule = sched
	// A copy: others may hold the old one.
	merged := *s.set
	merged.Sync, merged.Retention, merged.Failover, merged.Handoff = set.Sync, set.Retention, set.Failover, set.Handoff
	merged.Replica.NoLoadBalance = set.Replica.NoLoadBalance
	s.set = &merged
	s.pace.Interval = 0 // learnt anew from the next snapshot
	s.armSchedule()
	s.mu.Unlock()
	s.log.Info("configuration reloaded", "schedule", set.Sync.Schedule)
	s.event("reloaded", "", "sync, retention and failover settings and replica.noloadbalance taken from the configuration file; others need an agent restart")
}

// Close gives up what New has taken (the instance's lock). It tells the register nothing.
func (s *Supervisor) Close() error { return s.lease.Close() }
