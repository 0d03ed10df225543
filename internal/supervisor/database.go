package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/api"
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
	d := &database{cfg: cfg, set: set, clock: clock, log: log}
	d.st.probeFresh = 3*set.Database.ProbeInterval + set.Database.ProbeTimeout + engineAnswer
	return d
}

func (d *database) labels() map[string]string {
	return map[string]string{container.LabelCluster: d.set.Cluster, container.LabelInstance: d.set.Instance}
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
	id := c.ID
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

// probe asks the database once and keeps the answer.
func (d *database) probe(ctx context.Context) error {
	d.use.Lock()
	defer d.use.Unlock()
	id := d.state().id
	if id == "" {
		return errors.New("no container")
	}
	err := d.ask(ctx, id)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.st.id != id {
		return err // replaced meanwhile
	}
	d.st.healthy = err == nil
	d.st.lastProbe, d.st.probed = d.clock.Wall(), d.clock.Now()
	d.st.err = text(err)
	return err
}

// ask asks the database. A probe goes through Docker: when that is what does not answer, the
// database is not to blame, and clients go on as long as it takes their connections.
func (d *database) ask(ctx context.Context, id string) error {
	if d.state().engineErr == "" {
		pctx, cancel := context.WithTimeout(ctx, d.set.Database.ProbeTimeout)
		defer cancel()
		err := d.cfg.Probe(pctx, id)
		if err == nil || !d.engineHangs(ctx) {
			return err
		}
	}
	dctx, cancel := context.WithTimeout(ctx, engineAnswer)
	defer cancel()
	return d.dial(dctx)
}

// engineHangs asks Docker something quick.
func (d *database) engineHangs(ctx context.Context) bool {
	ectx, cancel := context.WithTimeout(ctx, engineAnswer)
	defer cancel()
	_, err := d.cfg.Docker.Find(ectx, d.labels())
	if err == nil || ctx.Err() != nil {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.engineFailed(err)
	return true
}

// dial connects to the database's own address, without Docker.
func (d *database) dial(ctx context.Context) error {
	d.mu.Lock()
	ip, g := d.st.ip, d.group
	d.mu.Unlock()
	if empty, err := g.Empty(); err != nil || empty || g.IsZero() || ip == "" || len(d.set.Database.Ports) == 0 {
		return errors.New("database can't be asked while Docker does not answer")
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(d.set.Database.Ports[0].Container)))
	if err != nil {
		return fmt.Errorf("connect to database while Docker does not answer: %w", err)
	}
	return c.Close()
}

// checkFences asks gate and guard how they are, for status.
func (d *database) checkFences(ctx context.Context) {
	cctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := d.cfg.Guard.Status(cctx)
	d.mu.Lock()
	d.guardErr = err
	d.mu.Unlock()
}

// fences is what status shows.
func (d *database) fences() (open bool, left time.Duration, gateErr, guardErr error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	left = max(d.gateTill.Sub(d.clock.Now()), 0)
	return d.st.serving && left > 0, left, d.gateErr, d.guardErr
}

// extend moves guard and gate to a new deadline after a renewal. An error means that the
// renewal may not be used: nobody would end the database in time.
func (d *database) extend(ctx context.Context, term uint64, deadline boottime.Instant) error {
	st := d.state()
	if !st.running && !st.guarded || st.term != term {
		return nil
	}
	err := d.cfg.Guard.Extend(ctx, term, deadline)
	if errors.Is(err, fence.ErrNotArmed) {
		err = d.arm(ctx, term, deadline)
	}
	d.mu.Lock()
	d.guardErr = err
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("extend guard: %w", err)
	}
	if !st.serving {
		return nil
	}
	return d.open(ctx, deadline)
}

func (d *database) open(ctx context.Context, deadline boottime.Instant) error {
	err := d.cfg.Gate.OpenUntil(ctx, deadline)
	d.mu.Lock()
	d.gateErr = err
	if err == nil {
		d.gateTill = deadline
	}
	d.mu.Unlock()
	if err != nil {
		return fmt.Errorf("open gate: %w", err)
	}
	return nil
}

func (d *database) arm(ctx context.Context, term uint64, deadline boottime.Instant) error {
	d.mu.Lock()
	r := fence.ArmRequest{Cluster: d.set.Cluster, Term: term, Container: d.st.id, Group: d.group, Deadline: deadline}
	d.mu.Unlock()
	if err := d.cfg.Guard.Arm(ctx, r); err != nil {
		return err
	}
	d.mu.Lock()
	d.st.guarded = d.st.id == r.Container
	d.mu.Unlock()
	return nil
}

// adopt takes over the container that an earlier start of the agent left running.
func (d *database) adopt(ctx context.Context, term uint64, deadline boottime.Instant) error {
	if err := d.look(ctx); err != nil {
		return err
	}
	st := d.state()
	if !st.running {
		return nil
	}
	if st.term != term {
		return fmt.Errorf("container %s belongs to term %d, not %d", st.name, st.term, term)
	}
	if err := d.arm(ctx, term, deadline); err != nil {
		return fmt.Errorf("arm guard: %w", err)
	}
	if err := d.probe(ctx); err != nil {
		d.log.Warn("adopted database does not answer yet", "error", err)
	}
	d.serve(true)
	return d.open(ctx, deadline)
}

func (d *database) serve(on bool) {
	d.mu.Lock()
	d.st.serving = on
	d.mu.Unlock()
}

// startRequest says for which term the database is started.
type startRequest struct {
	Term       uint64
	VolumeID   string
	VolumePath string
	Digest     string // of the image that last wrote the volume; "" if none did
	// Deadline is the lease's current deadline, and whether it is held at all.
	Deadline func() (boottime.Instant, bool)
	Progress func(string)
	Note     func(string)
}

var errTermOver = errors.New("term ended meanwhile")

// start creates and starts the container and lets clients in once it answers. On error
// nothing runs, or the caller's next fence ends it. One of this term that runs already,
// because Docker has started it later than it was waited for, is taken as it is.
func (d *database) start(ctx context.Context, r startRequest) error {
	if err := d.look(ctx); err != nil {
		return fmt.Errorf("look for old container: %w", err)
	}
	if st := d.state(); st.running && st.term == r.Term {
		d.setExpected(false)
		return d.admit(ctx, r)
	}
	image, err := d.image(ctx, r)
	if err != nil {
		return err
	}
	if err := d.removeDead(ctx); err != nil {
		return err
	}
	// The guard may still watch over the one that died.
	if err := d.disarm(ctx); err != nil {
		return api.WithHint(fmt.Errorf("no database without its guard: %w", err), "start the guard: systemctl start dbsupervisor-guard@"+d.set.Cluster)
	}
	if err := d.cfg.Gate.Install(ctx); err != nil {
		return fmt.Errorf("install gate: %w", err)
	}
	spec := d.cfg.Spec
	spec.Image = image
	spec.Labels = d.labels()
	spec.Labels[container.LabelTerm] = strconv.FormatUint(r.Term, 10)
	spec.Labels[container.LabelVolume] = r.VolumeID
	spec.Labels[container.LabelRole] = "primary"
	spec.Mounts = append([]container.Mount{{Source: r.VolumePath, Target: d.set.Database.DataPath}}, spec.Mounts...)
	if _, ok := r.Deadline(); !ok {
		return errTermOver
	}
	info, err := d.cfg.Docker.Create(ctx, spec)
	if err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	d.mu.Lock()
	d.expected = false
	d.group = cgroup.Group{}
	d.setInfo(info)
	d.mu.Unlock()
	// The guard comes first: a start that Docker does not confirm may still happen, even
	// after the term, and then the guard ends it.
	deadline, ok := r.Deadline()
	if !ok {
		return errTermOver
	}
	if err := d.arm(ctx, r.Term, deadline); err != nil {
		return fmt.Errorf("arm guard: %w", err)
	}
	if err := d.cfg.Docker.Start(ctx, info.ID); err != nil {
		return fmt.Errorf("start container: %w", err)
	}
	if info, err = d.cfg.Docker.Inspect(ctx, info.ID); err != nil {
		return fmt.Errorf("look at new container: %w", err)
	}
	d.mu.Lock()
	d.setInfo(info)
	d.mu.Unlock()
	return d.admit(ctx, r)
}

// admit lets clients in to a container that has been started, once it answers.
func (d *database) admit(ctx context.Context, r startRequest) error {
	deadline, ok := r.Deadline()
	if !ok {
		return errTermOver
	}
	// Armed anew, now with its control group. The gate is closed until now: no client has
	// reached the database.
	if err := d.arm(ctx, r.Term, deadline); err != nil {
		return errors.Join(fmt.Errorf("arm guard: %w", err), d.kill(ctx))
	}
	if err := d.waitReady(ctx, r); err != nil {
		return err
	}
	d.serve(true)
	if deadline, ok = r.Deadline(); !ok {
		return errTermOver
	}
	return d.open(ctx, deadline)
}

func (d *database) disarm(ctx context.Context) error {
	if err := d.cfg.Guard.Disarm(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	d.st.guarded = false
	d.mu.Unlock()
	return nil
}

// image finds the image to run: the very one that last wrote the volume if it can be had.
func (d *database) image(ctx context.Context, r startRequest) (string, error) {
	want := d.cfg.Spec.Image
	digest, err := d.cfg.Docker.EnsureImage(ctx, want, d.set.Database.Pull, r.Progress)
	if err != nil {
		return "", api.WithHint(fmt.Errorf("get image %s: %w", want, err), "can this machine reach the registry? is database.image right?")
	}
	if r.Digest == "" || digest == r.Digest {
		return want, nil
	}
	// A tag that has moved on must not upgrade a database in a failover.
	pinned := pin(want, r.Digest)
	if _, perr := d.cfg.Docker.EnsureImage(ctx, pinned, "missing", r.Progress); perr == nil {
		r.Note(fmt.Sprintf("%s is another image here (%s); running %s, which last wrote the volume", want, short(digest), short(r.Digest)))
		return pinned, nil
	}
	r.Note(fmt.Sprintf("the image that last wrote the volume (%s) can't be had here; running %s (%s)", short(r.Digest), want, short(digest)))
	return want, nil
}

// pin turns name:tag into what names exactly the image with this digest: name@digest for
// a registry's digest, the ID alone for an image that was never in a registry.
func pin(ref, digest string) string {
	if name, sum, ok := strings.Cut(digest, "@"); ok {
		return name + "@" + sum
	}
	_ = ref
	return digest
}

func short(digest string) string {
	if i := strings.Index(digest, "sha256:"); i >= 0 && len(digest) > i+19 {
		return digest[i : i+19]
	}
	return digest
}

// removeDead removes the dead container of before, so that the name is free.
func (d *database) removeDead(ctx context.Context) error {
	list, err := d.cfg.Docker.Find(ctx, d.labels())
	if err != nil {
		return fmt.Errorf("look for old container: %w", err)
	}
	for _, c := range list {
		if c.Running {
			return fmt.Errorf("container %s still runs", c.Name)
		}
		if err := d.cfg.Docker.Remove(ctx, c.ID); err != nil {
			return fmt.Errorf("remove old container: %w", err)
		}
	}
	return nil
}

// readyPoll is how often a starting database is probed.
const readyPoll = 100 * time.Millisecond

func (d *database) waitReady(ctx context.Context, r startRequest) error {
	until := d.clock.Now().Add(d.set.Database.StartTimeout)
	for {
		if _, ok := r.Deadline(); !ok {
			return errTermOver
		}
		err := d.probe(ctx)
		// Without Docker it can't be told whether this is the server that clients will meet.
		if err == nil && d.state().engineErr == "" {
			return nil
		}
		if lerr := d.look(ctx); lerr == nil && !d.state().running {
			return fmt.Errorf("database died while starting: %s", d.state().err)
		}
		if d.clock.Now() > until {
			return api.WithHint(errors.Join(fmt.Errorf("database does not answer after %s: %w", d.set.Database.StartTimeout, err), d.kill(ctx)),
				"see its output with `docker logs`; a long crash recovery needs a larger database.start_timeout")
		}
		if err := d.clock.WaitUntil(ctx, d.clock.Now().Add(readyPoll)); err != nil {
			return err
		}
	}
}

// stop asks the database to stop in the way its engine wants and waits for its time-out.
func (d *database) stop(ctx context.Context) error {
	d.use.Lock()
	defer d.use.Unlock()
	st := d.state()
	if !st.exists {
		return nil
	}
	d.setExpected(true)
	if st.running {
		if err := d.cfg.Docker.Stop(ctx, st.id, d.set.Database.StopTimeout); err != nil {
			d.setExpected(false)
			return fmt.Errorf("stop database: %w", err)
		}
	}
	return d.clear(ctx, st.id)
}

func (d *database) setExpected(on bool) {
	d.mu.Lock()
	d.expected = on
	d.mu.Unlock()
}

// clear closes the gate, disarms the guard and removes the dead container.
func (d *database) clear(ctx context.Context, id string) error {
	d.serve(false)
	err := d.cfg.Gate.Close(ctx)
	d.mu.Lock()
	d.gateTill = 0
	d.mu.Unlock()
	if gerr := d.disarm(ctx); gerr != nil {
		d.log.Warn("guard not disarmed", "error", gerr)
	}
	if rerr := d.cfg.Docker.Remove(ctx, id); rerr != nil {
		return errors.Join(err, fmt.Errorf("remove container: %w", rerr))
	}
	d.mu.Lock()
	d.gone()
	d.mu.Unlock()
	return err
}

// killTimeout bounds what is asked of Docker while fencing; the processes are killed
// without it first.
const killTimeout = 5 * time.Second

// kill ends the database at once: gate closed, processes killed through their control
// group, thawed if they were frozen. Docker comes last, because it may hang: it is no error
// if the processes are gone and only Docker's record of them is left. decide sees to that.
func (d *database) kill(ctx context.Context) error {
	base := context.WithoutCancel(ctx)
	ctx, cancel := context.WithTimeout(base, killTimeout)
	defer cancel()
	d.serve(false)
	d.mu.Lock()
	d.expected, d.gateTill = true, 0
	g, id := d.group, d.st.id
	d.mu.Unlock()
	gateErr := d.cfg.Gate.Close(ctx)
	dead := !g.IsZero()
	if dead {
		if err := g.Kill(ctx); err != nil {
			d.log.Error("control group not killed, asking the guard", "error", err)
			if err := d.cfg.Guard.Kill(ctx); err != nil {
				d.log.Error("guard did not kill", "error", err)
				dead = false
			}
		}
	}
	if id == "" {
		return gateErr
	}
	patience := killTimeout
	if dead {
		d.mu.Lock()
		d.st.running, d.st.healthy, d.group = false, false, cgroup.Group{}
		d.mu.Unlock()
		patience = 2 * engineAnswer // a forced failover waits for us, and needs no Docker
	}
	dctx, cancel := context.WithTimeout(base, patience)
	defer cancel()
	if err := d.cfg.Docker.Kill(dctx, id); err != nil {
		d.log.Warn("docker kill failed", "error", err)
	}
	err := d.clear(dctx, id)
	if dead && err != nil && (errors.Is(err, container.ErrUnavailable) || dctx.Err() != nil) {
		d.log.Warn("database is dead, its container is removed when docker answers", "error", err)
		err = nil
	}
	return errors.Join(gateErr, err)
}

// pids lists the database's processes.
func (d *database) pids() []int {
	d.mu.Lock()
	g := d.group
	d.mu.Unlock()
	if g.IsZero() {
		return nil
	}
	p, err := g.Pids()
	if err != nil {
		return nil
	}
	return p
}
