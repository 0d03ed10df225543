package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// Errors of a Lease. Test them with errors.Is.
var (
	// ErrNotYet: the current record has not been watched for its TTL; View.ChallengeAt
	// says when it will have been. Resume returns it when there is nothing to resume.
	ErrNotYet = errors.New("the lease may not be taken yet")
	// ErrNotHeld: the operation needs the lease, and it is not held (any more).
	ErrNotHeld = errors.New("the lease is not held")
	// ErrHeld: Acquire or Resume was called while the lease is held.
	ErrHeld = errors.New("the lease is already held")
	// ErrStale: term, incarnation, head or gcseq are not those that the operation was
	// computed from. Compute it again, or give it up.
	ErrStale = errors.New("computed from an older record")
	// ErrInstanceInUse: another running agent uses this instance name.
	ErrInstanceInUse = errors.New("another agent runs under this instance name")
	// ErrClosed: the lease was closed.
	ErrClosed = errors.New("lease is closed")
)

// Config is what a Lease needs. All durations are checked by New.
type Config struct {
	Register Register
	Clock    boottime.Clock
	Log      hclog.Logger
	Rand     io.Reader // incarnations; crypto/rand.Reader
	// Self describes this instance in the records that it writes. New sets Incarnation.
	Self Holder

	// TTL is how long a challenger waits; Margin is what the holder stops earlier (the
	// fence's latency, the kill and the two clocks' rate error). A renewal is sent every
	// RenewInterval, and no operation on the register takes longer than OpTimeout.
	TTL, RenewInterval, Margin, OpTimeout time.Duration

	// SeenFile is this instance's memory of the register, on its own durable disk; "" means
	// none (a tool that never acquires).
	SeenFile string
	// RunFile lets an agent that is restarted on this boot resume its term. It belongs on
	// /run, and its lock (RunFile + ".lock") refuses a second agent; "" means neither.
	RunFile string
	FS      fsx.FS // for SeenFile and RunFile
	BootID  string

	// Extend, if set, is called with the new deadline after each swap that proves validity
	// and before it is reported, never twice at once. On error the fence did not take it,
	// the old deadline stays and View.FenceErr says why. It must honour ctx, and of the
	// Lease's methods it may call only View and Relinquish.
	Extend func(ctx context.Context, term uint64, deadline boottime.Instant) error
	// Vouch, if set, fills in what the holder knows of head at this moment (HeadAge, CleanSeq)
	// in each record that it makes for its term. It is called again for a swap that is repeated,
	// and may call only View.
	Vouch func(next *Record)
}

func (c Config) check() error {
	switch {
	case c.Register == nil || c.Clock == nil || c.Rand == nil || c.FS == nil:
		return errors.New("register, clock, rand and fs are required")
	case c.Self.Instance == "":
		return errors.New("instance name is empty")
	case c.TTL <= 0 || c.RenewInterval <= 0 || c.Margin <= 0 || c.OpTimeout <= 0:
		return errors.New("ttl, renew interval, margin and operation timeout must be positive")
	case c.RenewInterval >= c.TTL/2:
		return fmt.Errorf("renew interval %s must be less than half of the ttl %s", c.RenewInterval, c.TTL)
	case c.OpTimeout > c.RenewInterval:
		return fmt.Errorf("operation timeout %s must not exceed the renew interval %s", c.OpTimeout, c.RenewInterval)
	case c.Margin+c.RenewInterval+c.OpTimeout >= c.TTL:
		return fmt.Errorf("margin %s, renew interval %s and operation timeout %s together must be less than the ttl %s", c.Margin, c.RenewInterval, c.OpTimeout, c.TTL)
	case c.RunFile != "" && c.BootID == "":
		return errors.New("a run file needs the boot id")
	}
	return nil
}

// Lease is the single-writer lease above a Register. All methods are safe for concurrent
// use. Close it when it is not used any more.
type Lease struct {
	cfg    Config
	log    hclog.Logger
	self   Holder // with Incarnation
	memory *memory
	lock   *os.File // nil without a RunFile

	op      chan struct{} // one slot: operations on the register follow one another
	changed chan struct{}
	rearm   chan struct{} // a new tenure: wakes the watchdog

	mu          sync.Mutex
	rec         Record
	loaded      bool
	seenSince   boottime.Instant
	lookedAt    boottime.Instant // when the last look began that returned rec
	unseenAt    boottime.Instant // when the last look began that returned an older one; 0: none did
	madeAfter   boottime.Instant // the same of the version before rec
	knownAt     boottime.Instant // rec was already written then, as far as this clock can tell
	lastContact boottime.Instant
	err         error
	fenceErr    error
	blocked     error // the last look showed a register that must not be written
	duplicate   error // somebody else runs under our name, or under our incarnation
	held        *tenure
	deadline    boottime.Instant // of the current or the last tenure
	expired     bool
	claim       uint64 // term of an acquisition of unknown outcome
	epoch       uint64 // raised by Release and Relinquish: what was under way does not count
	offered     []Record
	moves       int // how often a foreign incarnation with our name renewed before our eyes
	holdings    int // tenures of this incarnation so far
	closed      bool
}

// tenure is one holding of the lease. It is never revived: after its deadline only a new
// acquisition helps.
type tenure struct {
	term     uint64
	deadline boottime.Instant
}

// New checks the configuration, draws this start's incarnation, takes the lock beside
// RunFile (ErrInstanceInUse if another agent has it) and reads the memory of the register.
func New(cfg Config) (*Lease, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configure lease: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	l := &Lease{
		cfg:     cfg,
		log:     cfg.Log,
		self:    cfg.Self,
		op:      make(chan struct{}, 1),
		changed: make(chan struct{}, 1),
		rearm:   make(chan struct{}, 1),
	}
	inc, err := (&idSource{r: cfg.Rand}).next()
	if err != nil {
		return nil, fmt.Errorf("configure lease: %w", err)
	}
	l.self.Incarnation = inc
	fsid := ""
	if r, ok := cfg.Register.(interface{ FSID() string }); ok {
		fsid = r.FSID()
	}
	if l.memory, err = openMemory(cfg.FS, cfg.SeenFile, fsid); err != nil {
		return nil, fmt.Errorf("configure lease: %w", err)
	}
	if cfg.RunFile != "" {
		if err := cfg.FS.MkdirAll(filepath.Dir(cfg.RunFile)); err != nil {
			return nil, fmt.Errorf("configure lease: %w", err)
		}
		if l.lock, err = lockInstance(cfg.RunFile+".lock", cfg.Self.Instance); err != nil {
			return nil, fmt.Errorf("configure lease: %w", err)
		}
	}
	return l, nil
}

// Close gives up the instance's lock and waits for the memory to be written. It tells the
// register nothing: a lease that is held runs out, or is resumed by the next agent.
func (l *Lease) Close() error {
	l.mu.Lock()
	closed := l.closed
	l.closed, l.held = true, nil
	l.mu.Unlock()
	if closed {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.cfg.TTL)
	defer cancel()
	err := l.memory.flush(ctx)
	if l.lock != nil {
		err = errors.Join(err, l.lock.Close())
	}
	if err != nil {
		return fmt.Errorf("close lease: %w", err)
	}
	return nil
}

// Incarnation identifies this start of the agent in the records that it writes.
func (l *Lease) Incarnation() string { return l.self.Incarnation }

// View is a snapshot of what the lease knows. Pointers in Record are shared: treat them as
// read-only.
type View struct {
	Record Record
	Loaded bool // Record was read at least once
	// SeenSince is when this very version was first seen here.
	SeenSince boottime.Instant
	// MadeAfter is a moment on this instance's clock before which Record was certainly not
	// made: its maker knew the version before it, and a look that began then had not shown that
	// version yet. 0: not known.
	MadeAfter boottime.Instant
	// ChallengeAt is the earliest moment at which this instance may acquire; 0 = at once.
	// It means nothing while Loaded is false or Holding is true.
	ChallengeAt boottime.Instant
	// Holding: this incarnation is the holder and its deadline has not passed, right now.
	Holding bool
	// Expired: this incarnation held, and the deadline passed or somebody else holds.
	Expired bool
	// Deadline is the end of the current tenure or, when not Holding, of the last one.
	Deadline boottime.Instant
	// LastContact is when the register last answered.
	LastContact boottime.Instant
	Err         error // why the last operation on the register failed; nil after a success
	FenceErr    error // why the fence did not take the last extension
	// Unknown: an own swap may or may not take effect yet. No file whose name was offered
	// in it (see Offered) may be removed.
	Unknown bool
	// Failovers is how many failovers of the last hour are known that no person asked for.
	Failovers int
}

// View returns what is known now. Holding and Expired are computed from the clock, so they
// are right even if nothing of the lease runs any more.
func (l *Lease) View() View {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.cfg.Clock.Now()
	v := View{
		Record:      l.rec,
		Loaded:      l.loaded,
		SeenSince:   l.seenSince,
		MadeAfter:   l.madeAfter,
		Holding:     l.held != nil && now < l.held.deadline,
		Expired:     l.expired || (l.held != nil && now >= l.held.deadline),
		Deadline:    l.deadline,
		LastContact: l.lastContact,
		Err:         l.err,
		FenceErr:    l.fenceErr,
		Unknown:     len(l.offered) > 0,
	}
	if l.loaded {
		v.ChallengeAt = l.challengeAt()
		v.Failovers = l.recentFailovers(now)
	}
	return v
}

// Changed delivers a value after something in View has changed. Several changes may be
// coalesced into one; there should be one reader.
func (l *Lease) Changed() <-chan struct{} { return l.changed }

// Offered returns the records of own swaps whose outcome is still unknown.
func (l *Lease) Offered() []Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Record, 0, len(l.offered))
	for _, r := range l.offered {
		out = append(out, r.Clone())
	}
	return out
}

// challengeAt applies rule 2: everybody waits for the TTL written in the version that is
// being watched, except where nobody can be holding: before the first term, and after a
// release for the one that it names (or for all, if it names none), or where a person says so.
// l.mu is held.
func (l *Lease) challengeAt() boottime.Instant {
	r := l.rec
	if o := r.Order; o != nil && o.Kind == OrderFailover && o.Terminated && o.Term == r.Term && o.To == l.self.Instance {
		return 0
	}
	if r.Term == 0 || (r.Released && (r.Successor == "" || r.Successor == l.self.Instance)) {
		return 0
	}
	return l.seenSince.Add(time.Duration(r.TTL))
}

func (l *Lease) notify() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// begin takes the slot for operations on the register; end frees it.
func (l *Lease) begin(ctx context.Context) error {
	select {
	case l.op <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	l.mu.Lock()
	closed := l.closed
	l.mu.Unlock()
	if closed {
		l.end()
		return ErrClosed
	}
	return nil
}

func (l *Lease) end() { <-l.op }

// Refresh loads the newest record now.
func (l *Lease) Refresh(ctx context.Context) error {
	if err := l.begin(ctx); err != nil {
		return fmt.Errorf("refresh lease: %w", err)
	}
	defer l.end()
	if err := l.load(ctx); err != nil {
		return fmt.Errorf("refresh lease: %w", err)
	}
	return nil
}

// load has the slot.
func (l *Lease) load(ctx context.Context) error {
	octx, cancel := context.WithTimeout(ctx, l.cfg.OpTimeout)
	defer cancel()
	began := l.cfg.Clock.Now()
	rec, err := l.cfg.Register.Load(octx)
	if err == nil {
		err = l.checkMemory(octx, rec)
	}
	if err != nil {
		l.failed(err)
		return err
	}
	return l.observe(rec, began, false)
}

// checkMemory compares the first record after a start with what earlier starts saw.
func (l *Lease) checkMemory(ctx context.Context, rec Record) error {
	l.mu.Lock()
	loaded := l.loaded
	l.mu.Unlock()
	if loaded {
		return nil
	}
	seen := l.memory.get()
	if err := seen.checkCluster(rec.ClusterID, l.memory.fsid); err != nil {
		return err
	}
	if err := seen.checkRecord(rec); err != nil {
		return err
	}
	// A register that went back and was then used again may have caught up. As long as the
	// remembered version is still there, it must be the remembered record.
	h, ok := l.cfg.Register.(interface {
		Record(context.Context, uint64) (Record, error)
	})
	if !ok || seen == nil || seen.Version == 0 || seen.Version == rec.Version {
		return nil
	}
	old, err := h.Record(ctx, seen.Version)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if old.Nonce != seen.Nonce {
		return fmt.Errorf("version %d is another record than before: %w", seen.Version, ErrWentBack)
	}
	return nil
}

// failed notes an error of the register for View.
func (l *Lease) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	if errors.Is(err, ErrWentBack) || errors.Is(err, ErrWrongCluster) {
		l.blocked = err
	}
	l.notify()
}

// observe takes over what the register answered: by a look, or (own) by a swap of ours, that
// began then.
func (l *Lease) observe(rec Record, began boottime.Instant, own bool) error {
	now := l.cfg.Clock.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.notify()
	l.lastContact = now
	if l.loaded {
		// Operations follow one another, so an older answer is not a matter of order.
		var err error
		switch {
		case rec.ClusterID != l.rec.ClusterID:
			err = fmt.Errorf("cluster id is %s, was %s: %w", rec.ClusterID, l.rec.ClusterID, ErrWrongCluster)
		case rec.Version < l.rec.Version || rec.Term < l.rec.Term:
			err = fmt.Errorf("version %d term %d after version %d term %d: %w", rec.Version, rec.Term, l.rec.Version, l.rec.Term, ErrWentBack)
		case rec.Version == l.rec.Version && rec.Nonce != l.rec.Nonce:
			err = fmt.Errorf("version %d is another record than before: %w", rec.Version, ErrWentBack)
		}
		if err != nil {
			l.err, l.blocked = err, err
			return err
		}
	}
	l.err, l.blocked = nil, nil
	l.place(rec, began)
	if !l.loaded || rec.Version != l.rec.Version {
		l.watchNames(rec, own)
		if rec.Term != l.rec.Term && l.loaded {
			l.log.Info("term changed", "term", rec.Term, "holder", rec.Holder.Instance, "version", rec.Version)
		}
		l.rec, l.loaded, l.seenSince, l.knownAt = rec, true, now, now
		l.memory.note(rec)
		l.settle()
	}
	if l.held != nil && (rec.Term != l.held.term || rec.Holder.Incarnation != l.self.Incarnation || rec.Released) {
		l.expire("replaced in the register")
	}
	// The other agent is gone when its last renewal has outlived its TTL.
	if l.moves > 0 && now >= l.seenSince.Add(time.Duration(l.rec.TTL)) {
		l.moves, l.duplicate = 0, nil
	}
	l.err = l.duplicate
	return l.duplicate
}

// place notes between which looks a record was made. l.mu is held, l.rec is the record before.
func (l *Lease) place(rec Record, began boottime.Instant) {
	if l.loaded && rec.Version != l.rec.Version {
		if rec.Version == l.rec.Version+1 {
			l.madeAfter = l.unseenAt
		} else {
			l.madeAfter = l.lookedAt // that look had not shown the version before it either
		}
		l.unseenAt = l.lookedAt
	}
	l.lookedAt = began
}

// settle forgets what was offered: every offer was for the number after the record known
// then, so any newer record has decided it. l.mu is held.
func (l *Lease) settle() {
	l.offered = nil
	if l.claim != 0 && !l.mine(l.rec, l.claim) {
		l.claim = 0
	}
}

// mine says whether the record gives this incarnation the term.
func (l *Lease) mine(rec Record, term uint64) bool {
	return rec.Term == term && rec.Holder.Incarnation == l.self.Incarnation && !rec.Released
}

// watchNames finds out whether another running agent uses our name: a foreign incarnation
// that keeps renewing, or our own incarnation writing what we did not write (a machine that
// was cloned with its memory). One renewal may be the last one of our dead predecessor that
// the share delivered late; two are somebody alive. l.mu is held, l.rec is the record before.
func (l *Lease) watchNames(rec Record, own bool) {
	if own {
		l.moves, l.duplicate = 0, nil
		return
	}
	inc := l.self.Incarnation
	if rec.By == inc {
		for _, o := range l.offered {
			if o.Nonce == rec.Nonce {
				return
			}
		}
		l.duplicate = fmt.Errorf("version %d was written in this agent's name: %w", rec.Version, ErrInstanceInUse)
		if l.held != nil {
			l.expire("another agent has the same incarnation")
		}
		return
	}
	foreign := rec.Holder.Instance == l.self.Instance && rec.Holder.Incarnation != inc && !rec.Released
	if !foreign || !l.loaded || rec.Holder.Incarnation != l.rec.Holder.Incarnation {
		l.moves, l.duplicate = 0, nil
		return
	}
	if rec.By == rec.Holder.Incarnation {
		l.moves++
	}
	if l.moves >= 2 {
		l.duplicate = fmt.Errorf("instance %q is renewed by incarnation %s: %w", rec.Holder.Instance, rec.Holder.Incarnation, ErrInstanceInUse)
	}
}

// expire ends the current tenure without asking anybody. l.mu is held.
func (l *Lease) expire(reason string) {
	l.log.Warn("lease lost", "term", l.held.term, "reason", reason)
	l.held, l.expired = nil, true
	l.notify()
}
