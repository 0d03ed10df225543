package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/robfig/cron/v3"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/fence"
	volsync "dbsupervisor/internal/sync"
)

// ReplicaConfig is what a standby serves reads with.
type ReplicaConfig struct {
	// Switch leads the stable read ports to the copy that serves.
	Switch *fence.Switch
	// Spec is the container without what changes from copy to copy. Its ports are published
	// on loopback.
	Spec container.Spec
	// Probe asks a copy whether it answers and is read-only.
	Probe func(ctx context.Context, id string) error
}

const (
	// replicaTick is how often the copies are looked at.
	replicaTick = 200 * time.Millisecond
	// drainGrace is how long a copy must have been without connections to be ended: one that was
	// made at the moment of a switch may take a while to show up behind Docker's proxy.
	drainGrace = 2 * time.Second
	// replicaStop is how long a copy may take to end when its sessions are cut.
	replicaStop = 5 * time.Second
	// correctEvery is how often it is looked whether the kernel still leads the read ports to
	// the copy that serves.
	correctEvery = 10 * time.Second
	// freshEvery is how often the age of what is served is written down for the next agent.
	freshEvery = 5 * time.Second
)

// replica is this instance's read-only copies: at most two, of which one has the read port.
// One goroutine (run) changes them; another (watch) asks whether the one that serves answers.
type replica struct {
	cfg    ReplicaConfig
	docker Containers
	volume *volsync.Volume
	store  *volsync.Store
	clock  boottime.Clock
	log    hclog.Logger
	dir    string
	bootID string
	nonce  func() string
	ages   *ages
	image  func(ctx context.Context, progress func(string)) (string, error)
	look   func() replicaObservation // the supervisor's part of an observation
	note   func(kind, text string)
	fail   func(what string, err error)

	schedule cron.Schedule // nil: any time

	// switching holds the kernel's state and serving together: correct looks at both.
	switching sync.Mutex

	mu       sync.Mutex
	set      *config.Config
	serving  *generation
	draining *generation
	busy     context.CancelFunc // ends what is being brought up; nil: nothing is
	phase    string             // of what is being brought up
	began    boottime.Instant   // of the last refresh
	next     time.Time          // by the schedule; zero: none has been awaited
	retryAt  boottime.Instant
	fails    int // in a row
	lastErr  string
	done     int64 // refreshes that succeeded
	failed   int64
	took     time.Duration // by the last refresh
	stats    volsync.HydrateStats
	kick     chan struct{}
}

// labels are those of all copies of this instance.
func (r *replica) labels() map[string]string {
	return map[string]string{container.LabelCluster: r.set.Cluster, container.LabelInstance: r.set.Instance,
		container.LabelRole: container.RoleReplica}
}

// run keeps a copy of head behind the read port until ctx ends. It leaves containers running:
// shutdown ends them.
func (r *replica) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := r.adopt(ctx)
		if err == nil {
			break
		}
		if ctx.Err() == nil {
			r.fail("replicas of before not found out", err)
		}
		_ = r.clock.WaitUntil(ctx, r.clock.Now().Add(engineRetry)) // ctx ended, or it is time
	}
	if !r.config().Replica.Enabled {
		return
	}
	var watching sync.WaitGroup
	watching.Go(func() { r.watch(ctx) })
	defer watching.Wait()
	for ctx.Err() == nil {
		r.step(ctx)
		select {
		case <-r.kick:
		case <-time.After(replicaTick):
		case <-ctx.Done():
		}
	}
}

func (r *replica) config() *config.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.set
}

// step is one round.
func (r *replica) step(ctx context.Context) {
	o := r.observe()
	a, why := decideReplica(o)
	var err error
	switch a {
	case repStart:
		err = r.refresh(ctx)
	case repDrop:
		r.note("replica died", "it is replaced")
		err = r.drop(ctx)
	case repRetire:
		err = r.retire(ctx)
	case repEnd:
		err = r.endDraining(ctx)
	case repStopAll:
		err = r.shutdown(ctx)
	}
	if a != repNone {
		r.log.Info("replica changed", "action", string(a), "why", why, "succeeded", err == nil)
	}
	if err != nil && ctx.Err() == nil && a != repStart {
		r.fail("replica: "+string(a)+" failed", err)
		_ = r.clock.WaitUntil(ctx, r.clock.Now().Add(engineRetry)) // ctx ended, or it is time
	}
	r.keepFresh()
}

// observe adds what is known of the copies.
func (r *replica) observe() replicaObservation {
	o := r.look()
	st := r.volume.State()
	now := r.clock.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	o.Clean = st.Phase == volsync.PhaseClean
	if g := r.serving; g != nil {
		o.Serving, o.ServingDead, o.Current = true, g.dead, g.Ref.ID == st.Base.ID
	}
	if g := r.draining; g != nil {
		o.Draining = true
		o.Overdue = now.Sub(g.drainFrom) > r.set.Replica.Drain
		if n, err := g.sessions(); err != nil || n > 0 {
			g.busyAt = now
		}
		o.Quiet = now.Sub(max(g.drainFrom, g.busyAt)) > drainGrace
	}
	o.Waiting = now < r.retryAt
	o.Due = r.due(now)
	return o
}

// due says whether a refresh may begin now. r.mu is held.
func (r *replica) due(now boottime.Instant) bool {
	if r.began != 0 && now.Sub(r.began) < r.set.Replica.Interval {
		return false
	}
	if r.schedule == nil {
		return true
	}
	wall := r.clock.Wall()
	if r.next.IsZero() {
		r.next = r.schedule.Next(wall)
	}
	return !wall.Before(r.next)
}

// interrupt gives up what is being brought up: the machine is needed for something else.
func (r *replica) interrupt() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.busy != nil {
		r.busy()
	}
	r.poke()
}

// poke makes the next round come at once.
func (r *replica) poke() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// refresh brings up a copy of the volume's snapshot, gives it the read port, and lets the
// sessions of the one before go on.
func (r *replica) refresh(base context.Context) error {
	ctx, cancel := context.WithCancel(base)
	defer cancel()
	began := r.clock.Now()
	r.mu.Lock()
	r.busy, r.began = cancel, began
	if r.schedule != nil {
		r.next = r.schedule.Next(r.clock.Wall())
	}
	first := r.serving == nil
	r.mu.Unlock()
	g, stats, err := r.bringUp(ctx)
	if err == nil {
		err = r.switchTo(ctx, g)
	}
	r.mu.Lock()
	r.busy, r.phase = nil, ""
	if err == nil {
		r.done++
		r.took, r.stats = r.clock.Now().Sub(began), stats
		again := r.fails > 0
		r.fails, r.lastErr, r.retryAt = 0, "", 0
		took := r.took
		r.mu.Unlock()
		if first || again {
			r.note("replica serves", fmt.Sprintf("snapshot %s, brought up in %s", g.Ref.ID, took.Round(time.Millisecond)))
		}
		r.log.Info("replica refreshed", "generation", g.ID, "snapshot", g.Ref.ID, "took", took.String(), "copy", stats.Copy,
			"fetched_bytes", stats.FetchedBytes, "reused_bytes", stats.ReusedBytes)
		return nil
	}
	r.mu.Unlock()
	r.correct(base) // whatever the kernel took of a switch that failed
	cerr := r.clearAway(base, g)
	if ctx.Err() != nil {
		return errors.Join(err, cerr) // given up
	}
	r.failedRefresh(base, err)
	return errors.Join(err, cerr)
}

// failedRefresh keeps the books, and ends the copy that serves if that is wanted.
func (r *replica) failedRefresh(ctx context.Context, err error) {
	r.mu.Lock()
	r.fails++
	r.failed++
	r.lastErr = err.Error()
	n := r.fails
	r.retryAt = r.clock.Now().Add(min(retryAfter<<min(n-1, 10), retryMost))
	stop := r.set.Replica.OnFailure == "stop" && r.serving != nil && r.draining == nil
	r.mu.Unlock()
	r.fail("replica not refreshed", err)
	if n == 1 {
		what := "the copy before goes on"
		if stop {
			what = "the copy before is stopped (replica.on_failure)"
		}
		r.note("replica not refreshed", what+": "+err.Error())
	}
	if stop {
		if err := r.retire(ctx); err != nil {
			r.fail("replica not stopped", err)
		}
	}
}

// switchTo gives a copy the read port, in one transaction of the kernel's.
func (r *replica) switchTo(ctx context.Context, g *generation) error {
	if err := g.save(); err != nil {
		return err
	}
	r.switching.Lock()
	defer r.switching.Unlock()
	if err := r.cfg.Switch.Lead(ctx, r.targets(g)...); err != nil {
		return err
	}
	now := r.clock.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.serving; old != nil {
		old.drainFrom = now
		r.draining = old
	}
	g.healthy, g.probed = true, now
	r.serving = g
	return nil
}

// targets are where the stable ports lead with this copy.
func (r *replica) targets(g *generation) []fence.Target {
	var out []fence.Target
	if g == nil {
		return nil
	}
	ip, err := netip.ParseAddr(g.info.IP)
	if err != nil {
		return nil
	}
	for _, p := range r.set.Replica.Ports {
		//nolint:gosec // ports were checked with the configuration, or come from the engine
		out = append(out, fence.Target{Port: uint16(p.Host), To: netip.AddrPortFrom(ip, uint16(p.Container)), Near: uint16(g.info.Published[p.Container])})
	}
	return out
}

// correct makes the kernel lead the read ports to the copy that serves, if it does not:
// somebody has flushed the rules, or a switch failed half-way.
func (r *replica) correct(ctx context.Context) {
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
	defer cancel()
	r.switching.Lock()
	defer r.switching.Unlock()
	r.mu.Lock()
	g := r.serving
	r.mu.Unlock()
	want := r.targets(g)
	have, err := r.cfg.Switch.Leads(cctx)
	if err == nil && slices.Equal(have, want) {
		return
	}
	if err == nil {
		r.log.Warn("read ports do not lead where they should, leading them anew", "have", fmt.Sprint(have), "want", fmt.Sprint(want))
		err = r.cfg.Switch.Lead(cctx, want...)
	}
	if err != nil {
		r.log.Error("read ports not corrected", "error", err)
	}
}

// retire closes the read port and lets the sessions end.
func (r *replica) retire(ctx context.Context) error {
	r.switching.Lock()
	defer r.switching.Unlock()
	if err := r.cfg.Switch.Lead(ctx); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.serving != nil {
		r.serving.drainFrom = r.clock.Now()
		r.draining, r.serving = r.serving, nil
	}
	return nil
}

// drop clears a dead copy away.
func (r *replica) drop(ctx context.Context) error {
	r.switching.Lock()
	err := r.cfg.Switch.Lead(ctx)
	r.mu.Lock()
	g := r.serving
	if err == nil {
		r.serving = nil
	}
	r.mu.Unlock()
	r.switching.Unlock()
	if err != nil {
		return err
	}
	return r.clearAway(ctx, g)
}

func (r *replica) endDraining(ctx context.Context) error {
	r.mu.Lock()
	g := r.draining
	r.mu.Unlock()
	if err := r.clearAway(ctx, g); err != nil {
		return err
	}
	r.mu.Lock()
	r.draining = nil
	r.mu.Unlock()
	return nil
}

// shutdown ends all copies and closes the read port.
func (r *replica) shutdown(ctx context.Context) error {
	err := r.cfg.Switch.Remove(ctx)
	r.mu.Lock()
	all := []*generation{r.serving, r.draining}
	r.serving, r.draining = nil, nil
	r.mu.Unlock()
	for _, g := range all {
		err = errors.Join(err, r.clearAway(ctx, g))
	}
	return err
}

// watch asks the copy that serves, again and again, whether it answers.
func (r *replica) watch(ctx context.Context) {
	corrected := r.clock.Now()
	for r.clock.WaitUntil(ctx, r.clock.Now().Add(r.config().Database.ProbeInterval)) == nil {
		r.mu.Lock()
		g := r.serving
		r.mu.Unlock()
		if now := r.clock.Now(); now.Sub(corrected) >= correctEvery {
			corrected = now
			r.correct(ctx)
		}
		if g == nil {
			continue
		}
		alive, err := r.ask(ctx, g)
		if ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		g.dead = g.dead || !alive
		g.healthy, g.err = alive && err == nil, text(err)
		g.probed = r.clock.Now()
		r.mu.Unlock()
		if !alive {
			r.poke()
		}
	}
}

// ask probes a copy. alive is false only where its processes are known to be gone.
func (r *replica) ask(ctx context.Context, g *generation) (alive bool, err error) {
	set := r.config()
	pctx, cancel := context.WithTimeout(ctx, set.Database.ProbeTimeout)
	defer cancel()
	err = r.cfg.Probe(pctx, g.info.ID)
	if err == nil {
		return true, nil
	}
	if empty, gerr := g.gone(); gerr == nil && empty {
		return false, err
	}
	if !errors.Is(err, container.ErrUnavailable) && pctx.Err() == nil {
		return true, err
	}
	// Docker may be what does not answer: readers go on as long as their connections are taken.
	dctx, dcancel := context.WithTimeout(ctx, engineAnswer)
	defer dcancel()
	if _, ierr := r.docker.Inspect(dctx, g.info.ID); ierr == nil {
		return true, err // it is the database
	}
	dctx2, dcancel2 := context.WithTimeout(ctx, engineAnswer)
	defer dcancel2()
	var dialer net.Dialer
	c, derr := dialer.DialContext(dctx2, "tcp", net.JoinHostPort(g.info.IP, strconv.Itoa(set.Replica.Ports[0].Container)))
	if derr != nil {
		return true, err
	}
	return true, c.Close()
}

// freshAt is since when, at the earliest, a copy's data may have been outdated. r.mu is held.
func (r *replica) freshAt(g *generation) boottime.Instant {
	if at, ok := r.ages.of(g.Ref.ID); ok && at > g.FreshAt {
		g.FreshAt = at
	}
	return g.FreshAt
}

// keepFresh writes the age of what is served down, so that an agent that is started anew
// knows it.
func (r *replica) keepFresh() {
	now := r.clock.Now()
	r.mu.Lock()
	g := r.serving
	if g == nil || r.freshAt(g) == g.savedFresh || g.savedFresh != 0 && now.Sub(g.savedAt) < freshEvery {
		r.mu.Unlock()
		return
	}
	copied := *g
	g.savedFresh, g.savedAt = g.FreshAt, now
	r.mu.Unlock()
	if err := copied.save(); err != nil {
		r.log.Warn("age of the replica not written down", "error", err)
	}
}

// live is what load balancers ask for; nil while nothing serves.
func (r *replica) live(now boottime.Instant) (serves bool, out *api.LiveReplica) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.serving
	if g == nil {
		return false, nil
	}
	fresh := 3*r.set.Database.ProbeInterval + r.set.Database.ProbeTimeout + 2*engineAnswer
	serves = !g.dead && g.healthy && now.Sub(g.probed) <= fresh
	return serves, &api.LiveReplica{Snapshot: g.Ref.ID, Term: g.Ref.Term, Seq: g.Ref.Seq, Frozen: g.Ref.Frozen,
		FreshAt: r.freshAt(g), MaxAge: r.set.Replica.MaxAge}
}

// status is what people see.
func (r *replica) status(now boottime.Instant) *api.Replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.set.Replica.Enabled {
		return nil
	}
	out := &api.Replica{Refreshes: r.done, Failures: r.failed, ConsecutiveFailures: r.fails, LastError: r.lastErr,
		Phase: r.phase, RefreshSeconds: r.took.Seconds(), Copy: r.stats.Copy,
		FetchedBytes: r.stats.FetchedBytes, CopiedBytes: r.stats.ReusedBytes}
	for _, p := range r.set.Replica.Ports {
		out.Ports = append(out.Ports, p.Host)
	}
	show := func(g *generation) *api.ReplicaCopy {
		if g == nil {
			return nil
		}
		c := &api.ReplicaCopy{Container: g.info.Name, Snapshot: g.Ref.ID, Term: g.Ref.Term, Seq: g.Ref.Seq, Frozen: g.Ref.Frozen,
			Healthy: g.healthy && !g.dead, Error: g.err}
		if at := r.freshAt(g); at != 0 {
			age := now.Sub(at).Seconds()
			c.AgeSeconds = &age
		}
		if n, err := g.sessions(); err == nil {
			c.Sessions = n
		}
		return c
	}
	out.Serving, out.Draining = show(r.serving), show(r.draining)
	return out
}

// degraded says why reads are not served as they should be.
func (r *replica) degraded() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.fails > 0:
		return fmt.Sprintf("replica can't be refreshed (%d failures in a row): %s", r.fails, r.lastErr)
	case r.serving != nil && !r.serving.healthy:
		return "replica does not answer"
	}
	return ""
}
