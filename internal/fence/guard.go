package fence

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/fsx"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

const (
	guardStateFormat = 1
	maxGuardState    = 1 << 20
	// killTry bounds one attempt to kill, so that the guard's loop keeps turning.
	killTry = time.Second
	// retryEvery is the pause between attempts to kill that failed.
	retryEvery = 20 * time.Millisecond
	// sweepEvery is how often a killed container is looked after: a start that was asked of
	// the container runtime before the deadline may come after it.
	sweepEvery = time.Second
	// rethawEvery is how often a group is thawed again whose freeze ran out of budget: a
	// stopped agent may go on and freeze it late.
	rethawEvery = 100 * time.Millisecond
	// idleWait is how long the loop sleeps when there is nothing to wait for.
	idleWait = time.Hour
)

// GuardConfig configures the guard process.
type GuardConfig struct {
	// RunDir has the socket, the lock and the state file. It must not outlive this boot.
	RunDir string
	// BootID of this boot: a state file of another one is ignored.
	BootID string
	Clock  boottime.Clock // default boottime.Real
	FS     fsx.FS         // default fsx.OS
	Log    hclog.Logger   // default a null logger
	// OwnProcess says that the process is a guard and nothing else; as root it then tells the
	// kernel's out-of-memory killer to spare it.
	OwnProcess bool
	// Watchdog, if its path is set, is pinged while the guard is able to do its work.
	Watchdog WatchdogConfig
}

// guardState is what survives a restart of the guard.
type guardState struct {
	Format int    `json:"format"`
	BootID string `json:"boot_id"`
	Armed  bool   `json:"armed"`
	ArmRequest
	Fired bool `json:"fired,omitempty"`
}

// over reports whether it is time to kill.
func (s guardState) over(now boottime.Instant) bool {
	return s.Armed && (s.Fired || now >= s.Deadline)
}

// guard is the running server. Its loop kills; connections change what it waits for.
type guard struct {
	cfg  GuardConfig
	log  hclog.Logger
	wake chan struct{} // capacity 1: the state changed

	op sync.Mutex // one change (with its write to disk) at a time; never held by the loop while it kills

	mu        sync.Mutex // the fields below; held only for moments
	state     guardState
	killed    bool
	latency   time.Duration
	killErr   error
	killDone  chan struct{} // closed when killed becomes true
	kills     int           // how often the guard began to kill
	freeze    *freezeWatch  // the newest freeze, if it has not ended
	connGroup sync.WaitGroup
}

// RunGuard serves until ctx ends (its error then). It kills the armed container at its
// deadline, and only then: never because the agent went away. A deadline that was already over
// when the guard starts is acted on before anything else. Ending the guard ends the
// protection, not the database: the state file lets the next one continue.
func RunGuard(ctx context.Context, cfg GuardConfig) error {
	if cfg.Clock == nil {
		cfg.Clock = boottime.Real{}
	}
	if cfg.FS == nil {
		cfg.FS = fsx.OS{}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.BootID == "" {
		return errors.New("run guard: no boot id given")
	}
	if err := os.MkdirAll(cfg.RunDir, 0o700); err != nil {
		return fmt.Errorf("run guard: %w", err)
	}
	lock, err := lockFile(filepath.Join(cfg.RunDir, "guard.lock"))
	if err != nil {
		return fmt.Errorf("run guard: %w", err)
	}
	defer lock.Close()
	if cfg.OwnProcess && os.Geteuid() == 0 {
		if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
			cfg.Log.Warn("can't protect the guard from the out-of-memory killer", "error", err)
		}
	}
	g := &guard{cfg: cfg, log: cfg.Log, wake: make(chan struct{}, 1), killDone: make(chan struct{})}
	g.load()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dog, err := newWatchdogs(cfg.Watchdog)
	if err != nil {
		return fmt.Errorf("run guard: %w", err)
	}
	defer dog.close()
	g.fire(ctx, cfg.Clock.Now())
	loopDone := make(chan struct{})
	go func() { defer close(loopDone); g.loop(ctx, dog) }()

	l, err := listen(SocketPath(cfg.RunDir))
	if err == nil {
		dog.ready()
		g.log.Info("guard is ready", "socket", SocketPath(cfg.RunDir), "armed", g.snapshot().Armed)
		err = g.serve(ctx, l)
	}
	cancel()
	<-loopDone
	g.connGroup.Wait()
	if err != nil {
		return fmt.Errorf("run guard: %w", err)
	}
	return nil
}

// lockFile takes the lock that only one guard can have; closing the file gives it up.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrGuardRunning
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// listen makes the socket, in the place of one that a dead guard left. Only the owner can use it.
func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

func (g *guard) statePath() string { return filepath.Join(g.cfg.RunDir, "guard.json") }

// load takes over what the last guard knew. A group that it watched may have been left frozen.
func (g *guard) load() {
	g.state = guardState{Format: guardStateFormat, BootID: g.cfg.BootID}
	b, err := fsx.ReadFile(g.cfg.FS, g.statePath(), maxGuardState)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var s guardState
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err == nil && s.Format != guardStateFormat {
		err = fmt.Errorf("format %d is not known", s.Format)
	}
	if err != nil {
		// Nobody knows what to kill. The agent notices at its next renewal and arms anew.
		g.log.Error("guard's state can't be read, starting unarmed", "path", g.statePath(), "error", err)
		return
	}
	if s.BootID != g.cfg.BootID {
		g.log.Info("guard's state is of another boot, starting unarmed")
		return
	}
	g.state = s
	if s.Armed {
		for _, grp := range g.groups(s.ArmRequest) {
			if err := grp.Thaw(); err != nil {
				g.log.Warn("can't thaw control group", "path", grp.FreezerPath, "error", err)
			}
		}
	}
}

// save makes a state durable. The caller holds g.op.
func (g *guard) save(s guardState) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode guard's state: %w", err)
	}
	if err := fsx.ReplaceLocal(g.cfg.FS, g.statePath(), b); err != nil {
		return fmt.Errorf("save guard's state: %w", err)
	}
	return nil
}

func (g *guard) snapshot() guardState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state
}

// groups lists what belongs to the armed container: the group that was given, if it really is
// the container's, and those that its ID leads to.
func (g *guard) groups(r ArmRequest) []cgroup.Group {
	var out []cgroup.Group
	if !r.Group.IsZero() {
		if grp, err := r.Group.Within(r.Container); err == nil {
			out = append(out, grp)
		}
	}
	found, err := cgroup.Find(r.Container)
	if err != nil {
		g.log.Warn("can't search control groups", "error", err)
	}
	for _, f := range found {
		if len(out) == 0 || f.FreezerPath != out[0].FreezerPath {
			out = append(out, f)
		}
	}
	return out
}

// loop waits for the deadline and kills.
func (g *guard) loop(ctx context.Context, dog *watchdogs) {
	for ctx.Err() == nil {
		now := g.cfg.Clock.Now()
		s := g.snapshot()
		dog.ping(s.over(now) && !g.isKilled() && now.Sub(s.Deadline) > dog.grace())
		at := now.Add(idleWait)
		switch {
		case s.over(now):
			g.fire(ctx, now)
			at = g.cfg.Clock.Now().Add(sweepEvery)
			if !g.isKilled() {
				at = g.cfg.Clock.Now().Add(retryEvery)
			}
		case s.Armed:
			at = s.Deadline
		}
		if every := dog.interval(); every > 0 && at.Sub(now) > every {
			at = now.Add(every)
		}
		g.waitUntil(ctx, at)
	}
}

// waitUntil returns at a moment, when the state changes, or when ctx ends.
func (g *guard) waitUntil(ctx context.Context, at boottime.Instant) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-g.wake:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := g.cfg.Clock.WaitUntil(ctx, at)
	failed := err != nil && ctx.Err() == nil
	cancel()
	<-done
	if failed {
		g.log.Error("clock failed", "error", err)
		<-time.After(10 * time.Millisecond) // the loop must not spin; polling is the fallback
	}
}

func (g *guard) isKilled() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.killed
}

// fire kills the armed container if its deadline is over, once more if it did before.
func (g *guard) fire(ctx context.Context, now boottime.Instant) {
	g.mu.Lock()
	if !g.state.over(now) { // extended since the caller looked
		g.mu.Unlock()
		return
	}
	first := !g.state.Fired
	g.state.Fired = true
	g.kills++
	s := g.state
	again := g.killed
	g.mu.Unlock()
	if first {
		g.log.Warn("deadline is over, killing the database", "term", s.Term, "container", s.Container)
	}
	err := g.kill(ctx, s.ArmRequest)
	g.mu.Lock()
	news := err == nil && !again || errText(err) != errText(g.killErr)
	g.killErr = err
	if err == nil && !g.killed && g.state.Fired {
		g.killed = true
		g.latency = g.cfg.Clock.Now().Sub(s.Deadline)
		close(g.killDone)
	}
	latency := g.latency
	g.mu.Unlock()
	switch {
	case !news:
	case err != nil:
		g.log.Error("can't kill the database, trying again", "error", err)
	default:
		g.log.Warn("database is dead", "term", s.Term, "after_deadline", latency)
	}
	if first {
		g.op.Lock()
		defer g.op.Unlock()
		// Without this a restarted guard finds the deadline over all the same.
		if cur := g.snapshot(); cur.Fired {
			if err := g.save(cur); err != nil {
				g.log.Error("can't save guard's state", "error", err)
			}
		}
	}
}

// kill kills everything of a container, the group that was armed first. It bounds itself.
func (g *guard) kill(ctx context.Context, r ArmRequest) error {
	ctx, cancel := context.WithTimeout(ctx, killTry)
	defer cancel()
	var errs []error
	var known string
	if !r.Group.IsZero() {
		grp, err := r.Group.Within(r.Container)
		if err == nil {
			err = grp.Kill(ctx)
		}
		if err != nil {
			errs = append(errs, err)
		}
		known = grp.FreezerPath
	}
	found, err := cgroup.Find(r.Container)
	if err != nil && known == "" {
		errs = append(errs, err)
	}
	for _, grp := range found {
		if grp.FreezerPath == known {
			continue
		}
		if err := grp.Kill(ctx); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// change replaces the state: on disk, then in memory, then for the loop. edit sees the state
// of the moment at which the change takes effect and may refuse.
func (g *guard) change(edit func(s *guardState, now boottime.Instant) error) error {
	next := g.snapshot()
	if err := edit(&next, g.cfg.Clock.Now()); err != nil {
		return err
	}
	if err := g.save(next); err != nil {
		return err
	}
	g.mu.Lock()
	// The deadline may have come while the file was written: what counts is the memory that
	// the loop sees, so the change is tried on it again.
	cur := g.state
	err := edit(&cur, g.cfg.Clock.Now())
	if err == nil {
		if cur.Armed && !cur.Fired && g.killed {
			g.killed, g.killDone = false, make(chan struct{})
			g.latency = 0
		}
		if !cur.Armed || !cur.Fired {
			g.killErr = nil
		}
		g.state = cur
	}
	cur = g.state
	g.mu.Unlock()
	if err != nil {
		if serr := g.save(cur); serr != nil {
			return errors.Join(err, serr)
		}
		return err
	}
	select {
	case g.wake <- struct{}{}:
	default:
	}
	return nil
}

func (g *guard) arm(ctx context.Context, r ArmRequest) error {
	if len(r.Container) < 12 || r.Deadline <= 0 {
		return errors.New("arm needs a full container id and a deadline")
	}
	if !r.Group.IsZero() {
		grp, err := r.Group.Within(r.Container)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrWrongGroup, err)
		}
		r.Group = grp
	}
	g.op.Lock()
	defer g.op.Unlock()
	accept := func(s *guardState, now boottime.Instant) error {
		same := s.Cluster == r.Cluster
		switch {
		case now >= r.Deadline:
			return ErrExpired
		case same && r.Term < s.Term:
			return fmt.Errorf("%w: armed for term %d before", ErrStaleTerm, s.Term)
		case same && r.Term == s.Term && s.over(now):
			return fmt.Errorf("%w: the deadline of term %d is over", ErrStaleTerm, s.Term)
		}
		s.Armed, s.Fired, s.ArmRequest = true, false, r
		return nil
	}
	if old := g.snapshot(); old.Armed && old.Container != r.Container {
		if err := accept(&old, g.cfg.Clock.Now()); err != nil {
			return err
		}
		// One writer: whatever is left of the last container goes first.
		if err := g.kill(ctx, g.snapshot().ArmRequest); err != nil {
			return fmt.Errorf("%w: %w", ErrStillRunning, err)
		}
	}
	if err := g.change(accept); err != nil {
		return err
	}
	g.log.Info("armed", "cluster", r.Cluster, "term", r.Term, "container", r.Container)
	return nil
}

func (g *guard) extend(term uint64, deadline boottime.Instant) error {
	g.op.Lock()
	defer g.op.Unlock()
	return g.change(func(s *guardState, now boottime.Instant) error {
		switch {
		case !s.Armed || s.Term != term:
			return ErrNotArmed
		case s.over(now) || now >= deadline:
			return ErrExpired
		}
		s.Deadline = max(s.Deadline, deadline)
		return nil
	})
}

func (g *guard) disarm() error {
	g.op.Lock()
	defer g.op.Unlock()
	s := g.snapshot()
	if !s.Armed {
		return nil
	}
	for _, grp := range g.groups(s.ArmRequest) {
		empty, err := grp.Empty()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrStillRunning, err)
		}
		if !empty {
			return ErrStillRunning
		}
	}
	err := g.change(func(s *guardState, _ boottime.Instant) error {
		s.Armed = false // the term stays, to refuse older ones
		return nil
	})
	if err == nil {
		g.log.Info("disarmed", "term", s.Term)
	}
	return err
}

// killNow makes the deadline come now.
func (g *guard) killNow(ctx context.Context) error {
	g.op.Lock()
	armed := false
	err := g.change(func(s *guardState, now boottime.Instant) error {
		if armed = s.Armed; armed && s.Deadline > now {
			s.Deadline = now
		}
		return nil
	})
	g.op.Unlock()
	if err != nil || !armed {
		return err
	}
	g.mu.Lock()
	done := g.killDone
	g.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *guard) status() *GuardStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &GuardStatus{
		PID: os.Getpid(), BootID: g.cfg.BootID, Armed: g.state.Armed, ArmRequest: g.state.ArmRequest,
		Fired: g.state.Fired, Killed: g.state.Fired && g.killed, Latency: g.latency,
		KillError: errText(g.killErr), Freezing: g.freeze != nil,
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
