package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/fence"
)

// Containers is what the supervisor asks of the container engine (container.Docker).
type Containers interface {
	EnsureImage(ctx context.Context, ref, pull string, progress func(string)) (digest string, err error)
	Create(ctx context.Context, spec container.Spec) (container.Info, error)
	Start(ctx context.Context, id string) error
	Inspect(ctx context.Context, id string) (container.Info, error)
	Find(ctx context.Context, labels map[string]string) ([]container.Info, error)
	Stop(ctx context.Context, id string, timeout time.Duration) error
	Kill(ctx context.Context, id string) error
	Remove(ctx context.Context, id string) error
	Exec(ctx context.Context, id string, cmd []string) (container.ExecResult, error)
	LastLogs(ctx context.Context, id string, n int) ([]string, error)
}

// DatabaseConfig is what the supervisor drives the database with.
type DatabaseConfig struct {
	Docker Containers
	Gate   *fence.Gate
	Guard  *fence.Guard
	// Spec is the container without what changes from term to term (labels, volume).
	Spec container.Spec
	// Probe asks the database a real question; nil error means that it answered.
	Probe func(ctx context.Context, id string) error
}

// database is the one container of this instance, with its fences.
type database struct {
	cfg   DatabaseConfig
	set   *config.Config
	clock boottime.Clock
	log   hclog.Logger

	// note tells the history; set before anything else is called, called without a lock.
	note func(kind, text string)

	// use serialises what must not meet a frozen container: exec, stop.
	use sync.Mutex

	mu       sync.Mutex
	st       dbState
	group    cgroup.Group
	deaths   []boottime.Instant
	expected bool // the container is being ended by us
	gateErr  error
	guardErr error
	gateTill boottime.Instant
}

// dbState is what is known of the container without asking anybody.
type dbState struct {
	exists, running bool
	serving         bool // started, answered once, and let through the gate
	guarded         bool // the guard is armed with it
	id, name, ip    string
	term            uint64
	digest          string
	pid             int
	healthy         bool
	lastProbe       time.Time
	probed          boottime.Instant
	probeFresh      time.Duration
	err             string
	restarts        int
	tooMany         bool

	engineErr  string           // why Docker can't be asked; "" when it answered the last time
	engineDown boottime.Instant // since when
	engineUps  int              // how often it has begun to answer again
}

// engineLost says that Docker has not answered for so long that it is no restart.
func (d dbState) engineLost(now boottime.Instant) bool {
	return d.engineErr != "" && now.Sub(d.engineDown) > enginePatience
}

const (
	// enginePatience is how long a restart of the Docker daemon may take.
	enginePatience = time.Minute
	// engineAnswer is how long Docker may take for a quick question before it counts as hung.
	engineAnswer = time.Second
)

// answers says that the last probe was answered and is not too old.
func (d dbState) answers(now boottime.Instant) bool {
	return d.running && d.healthy && now.Sub(d.probed) <= d.probeFresh
}

func newDatabase(cfg DatabaseConfig, set *config.Config, clock boottime.Clock, log hclog.Logger) *database {
	d := &database{cfg: cfg, set: set, clock: clock, log: log, note: func(string, string) {}}
	d.st.probeFresh = 3*set.Database.ProbeInterval + set.Database.ProbeTimeout + engineAnswer
	return d
}

func (d *database) labels() map[string]string {
	return map[string]string{container.LabelCluster: d.set.Cluster, container.LabelInstance: d.set.Instance,
		container.LabelRole: container.RolePrimary}
}

func (d *database) state() dbState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.st
}

// install puts the closed gate in place, unless a container is running whose term may
// still be valid: then the gate is left as it is, timer included.
func (d *database) install(ctx context.Context) error {
	if d.state().running {
		return nil
	}
	if err := d.cfg.Gate.Install(ctx); err != nil {
		return fmt.Errorf("install gate: %w", err)
	}
	return nil
}

// look refreshes what is known of the container.
func (d *database) look(ctx context.Context) error {
	list, err := d.cfg.Docker.Find(ctx, d.labels())
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			d.engineFailed(err)
		}
		return err
	}
	if d.st.engineErr != "" {
		d.log.Info("docker answers again", "after", d.clock.Now().Sub(d.st.engineDown).String())
		d.st.engineErr = ""
		d.st.engineUps++
	}
	if len(list) == 0 {
		d.gone()
		return nil
	}
	// One that runs counts before one that is dead; more than one can only be a leftover.
	c := list[0]
	for _, o := range list {
		if o.Running {
			c = o
		}
	}
	d.setInfo(c)
	return nil
}

// engineFailed notes that Docker can't be asked. d.mu is held.
func (d *database) engineFailed(err error) {
	if d.st.engineErr == "" {
		d.st.engineDown = d.clock.Now()
		d.log.Warn("docker does not answer", "error", err)
	}
	d.st.engineErr = err.Error()
}

// gone forgets the container. d.mu is held.
func (d *database) gone() {
	d.st.exists, d.st.running, d.st.serving, d.st.healthy = false, false, false, false
	d.st.id, d.st.name, d.st.ip, d.st.pid, d.st.term = "", "", "", 0, 0
	d.st.guarded = false
	d.group = cgroup.Group{}
}

// setInfo takes over what Docker says. d.mu is held.
func (d *database) setInfo(c container.Info) {
	d.st.exists, d.st.id, d.st.name, d.st.ip, d.st.pid = true, c.ID, c.Name, c.IP, c.Pid
	d.st.digest = c.ImageDigest
	d.st.term, _ = strconv.ParseUint(c.Labels[container.LabelTerm], 10, 64)
	was := d.st.running
	d.st.running = c.Running
	if c.Running && c.Pid > 0 && d.group.IsZero() {
		if g, err := cgroup.Of(c.Pid); err == nil {
			if g, err = g.Within(c.ID); err == nil {
				d.group = g
			}
		}
	}
	if was && !c.Running {
		d.died(c)
	}
}

// died keeps count of deaths that nobody asked for. d.mu is held.
func (d *database) died(c container.Info) {
	d.st.serving, d.st.healthy, d.st.guarded = false, false, false
	d.group = cgroup.Group{}
	if d.expected {
		return
	}
	now := d.clock.Now()
	d.deaths = append(d.deaths, now)
	for len(d.deaths) > 0 && now.Sub(d.deaths[0]) > d.set.Database.RestartWindow {
		d.deaths = d.deaths[1:]
	}
	d.st.restarts++
	d.st.tooMany = len(d.deaths) > d.set.Database.MaxRestarts
	d.st.err = fmt.Sprintf("exited with status %d", c.ExitCode)
	if c.OOMKilled {
		d.st.err += " (killed: out of memory; raise database.memory)"
	}
	id, why := c.ID, fmt.Sprintf("%s; %d within %s", d.st.err, len(d.deaths), d.set.Database.RestartWindow)
	go d.note("database died", why)
	d.log.Error("database died", "container", c.Name, "exit_code", c.ExitCode, "out_of_memory", c.OOMKilled, "deaths_in_window", len(d.deaths))
	go d.logTail(id)
}

// tailLines is how much of a dead database's output goes into our log.
const tailLines = 20

func (d *database) logTail(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	lines, err := d.cfg.Docker.LastLogs(ctx, id, tailLines)
	if err != nil {
		d.log.Warn("last words of the database not available", "error", err)
		return
	}
	for _, l := range lines {
		d.log.Error("database said", "line", l)
	}
}

// forgive starts the count of deaths anew: a new term.
func (d *database) forgive() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deaths, d.st.tooMany, d.st.restarts = nil, false, 0
}

// monitor keeps looking at the container and probes it, until ctx ends.
func (d *database) monitor(ctx context.Context, changed func()) {
	for d.clock.WaitUntil(ctx, d.clock.Now().Add(d.set.Database.ProbeInterval)) == nil {
		before := d.state()
		lctx, cancel := context.WithTimeout(ctx, d.set.Database.ProbeTimeout)
		if err := d.look(lctx); err != nil && ctx.Err() == nil {
			d.lookWithoutDocker() // status says what Docker's error is
		}
		cancel()
		if st := d.state(); st.running && st.serving {
			_ = d.probe(ctx) // kept in the state, for status and health checks
		}
		d.checkFences(ctx)
		after := d.state()
		if before.running != after.running || before.healthy != after.healthy || before.exists != after.exists ||
			before.engineUps != after.engineUps {
			changed()
		}
	}
}

// lookWithoutDocker sees from the control group whether the database has died.
func (d *database) lookWithoutDocker() {
	d.mu.Lock()
	g := d.group
	d.mu.Unlock()
	if g.IsZero() {
		return
	}
	if empty, err := g.Empty(); err == nil && empty {
		d.mu.Lock()
		if d.st.running {
			d.st.running = false
			d.died(container.Info{ID: d.st.id, Name: d.st.name, ExitCode: -1})
		}
		d.mu.Unlock()
	}
}
