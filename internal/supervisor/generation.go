package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/fsx"
	volsync "dbsupervisor/internal/sync"
)

// generation is one read-only copy: a directory of its own and a container on it. The exported
// part is kept in the directory, for an agent that is started anew.
type generation struct {
	ID     string              `json:"id"`
	Ref    volsync.SnapshotRef `json:"snapshot"`
	BootID string              `json:"boot_id"`
	// FreshAt: when its data were certainly up to date, on this boot's clock; 0: not known.
	FreshAt boottime.Instant `json:"fresh_at"`

	dir   string // holds data/, files/ and generation.json
	ports []int  // in the container
	info  container.Info
	group cgroup.Group

	dead, healthy bool
	probed        boottime.Instant
	err           string
	drainFrom     boottime.Instant
	busyAt        boottime.Instant // when it was last seen with sessions while it drained
	savedFresh    boottime.Instant
	savedAt       boottime.Instant
}

const (
	generationFile = "generation.json"
	// spareData is a copy that nobody uses, for the next one to start from, where the file
	// system can't clone.
	spareData = "spare"
	// maxGenerationFile bounds what is read of one.
	maxGenerationFile = 64 << 10
)

func (g *generation) data() string { return filepath.Join(g.dir, "data") }

func (g *generation) save() error {
	b, err := json.Marshal(g)
	if err != nil {
		return fmt.Errorf("encode generation: %w", err)
	}
	if err := fsx.ReplaceLocal(fsx.OS{}, filepath.Join(g.dir, generationFile), b); err != nil {
		return fmt.Errorf("write generation: %w", err)
	}
	return nil
}

func loadGeneration(dir string) (*generation, error) {
	b, err := fsx.ReadFile(fsx.OS{}, filepath.Join(dir, generationFile), maxGenerationFile)
	if err != nil {
		return nil, fmt.Errorf("read generation: %w", err)
	}
	g := &generation{dir: dir}
	if err := json.Unmarshal(b, g); err != nil {
		return nil, fmt.Errorf("read generation: %w", err)
	}
	return g, nil
}

// sessions counts the connections that readers have.
func (g *generation) sessions() (int, error) {
	if g.info.Pid == 0 {
		return 0, nil
	}
	return container.Sessions(g.info.Pid, g.ports)
}

// gone says whether its processes have ended; an error means that it can't be told.
func (g *generation) gone() (bool, error) {
	if g.group.IsZero() {
		return false, errors.New("control group is not known")
	}
	return g.group.Empty()
}

// found takes over what Docker says of its container.
func (g *generation) found(info container.Info) {
	g.info = info
	if !info.Running || info.Pid == 0 {
		return
	}
	if c, err := cgroup.Of(info.Pid); err == nil {
		if c, err = c.Within(info.ID); err == nil {
			g.group = c
		}
	}
}

// bringUp makes a copy and starts a container on it, up to the point at which it may get
// readers. On error the generation that it returns, if any, must be cleared away.
func (r *replica) bringUp(ctx context.Context) (*generation, volsync.HydrateStats, error) {
	var stats volsync.HydrateStats
	set := r.config()
	g := &generation{ID: r.nonce(), BootID: r.bootID}
	g.dir = filepath.Join(r.dir, g.ID)
	for _, p := range r.cfg.Spec.Ports {
		g.ports = append(g.ports, p.Container)
	}
	if err := os.MkdirAll(g.dir, 0o700); err != nil {
		return nil, stats, fmt.Errorf("make directory of a copy: %w", err)
	}
	r.at("copying the local snapshot")
	// What the copy before has is most of what this one needs, where nothing can be cloned.
	if err := os.Rename(filepath.Join(r.dir, spareData), g.data()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return g, stats, fmt.Errorf("take the spare copy: %w", err)
	}
	made, err := r.volume.Copy(ctx, r.store, g.data(), nil)
	if err != nil {
		return g, stats, err
	}
	g.Ref, stats = made.Ref, made.Stats
	r.mu.Lock()
	r.freshAt(g)
	r.mu.Unlock()
	if err := r.create(ctx, g); err != nil {
		return g, stats, err
	}
	if err := r.docker.Start(ctx, g.info.ID); err != nil {
		return g, stats, fmt.Errorf("start copy: %w", err)
	}
	r.at("starting the copy")
	if err := r.awaitReady(ctx, g); err != nil {
		return g, stats, err
	}
	if ready := set.Replica.ReadOnly.Ready; len(ready) > 0 {
		if err := r.exec(ctx, g, ready); err != nil {
			return g, stats, fmt.Errorf("make copy ready: %w", err)
		}
	}
	r.warm(ctx, g)
	// It has been warmed by commands of the operator's: it must still be what it was.
	if err := r.probe(ctx, g); err != nil {
		return g, stats, fmt.Errorf("probe copy: %w", err)
	}
	if len(r.targets(g)) == 0 {
		return g, stats, fmt.Errorf("copy has no address in its network (%q)", g.info.IP)
	}
	return g, stats, nil
}

func (r *replica) at(phase string) {
	r.mu.Lock()
	r.phase = phase
	r.mu.Unlock()
}

// create makes the container, after its files and what prepares the copy.
func (r *replica) create(ctx context.Context, g *generation) error {
	set := r.config()
	image, err := r.image(ctx, r.at)
	if err != nil {
		return err
	}
	ro := set.Replica.ReadOnly
	spec := readOnlySpec(r.cfg.Spec, ro, g.Ref)
	spec.Image = image
	spec.Name += "-r-" + g.ID
	spec.Labels = r.labels()
	spec.Labels[container.LabelGeneration] = g.ID
	mounts, err := writeFiles(ro, spec.Env, filepath.Join(g.dir, "files"), g.data(), set.Database.DataPath)
	if err != nil {
		return err
	}
	volume := container.Mount{Source: g.data(), Target: set.Database.DataPath}
	further := spec.Mounts
	if len(ro.Prepare) > 0 {
		p := prepareSpec(spec, ro)
		p.Mounts = append([]container.Mount{volume}, further...)
		if err := r.prepare(ctx, p); err != nil {
			return err
		}
	}
	volume.ReadOnly = ro.VolumeReadOnly
	spec.Mounts = append(append([]container.Mount{volume}, further...), mounts...)
	info, err := r.docker.Create(ctx, spec)
	g.info = info // also where it failed: it may exist
	if err != nil {
		return fmt.Errorf("create copy: %w", err)
	}
	return nil
}

// prepare runs a container to its end.
func (r *replica) prepare(ctx context.Context, spec container.Spec) error {
	r.at("preparing the copy")
	info, err := r.docker.Create(ctx, spec)
	if err != nil {
		return fmt.Errorf("prepare copy: %w", err)
	}
	end := func() error {
		ectx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
		defer cancel()
		if err := r.docker.Kill(ectx, info.ID); err != nil {
			return err
		}
		return r.docker.Remove(ectx, info.ID)
	}
	if err := r.docker.Start(ctx, info.ID); err != nil {
		return errors.Join(fmt.Errorf("prepare copy: %w", err), end())
	}
	until := r.clock.Now().Add(r.config().Database.StartTimeout)
	for {
		now, err := r.docker.Inspect(ctx, info.ID)
		switch {
		case err != nil:
			return errors.Join(fmt.Errorf("prepare copy: %w", err), end())
		case !now.Running && now.ExitCode != 0:
			return errors.Join(fmt.Errorf("prepare copy: exit status %d: %s", now.ExitCode, r.said(ctx, info.ID)), end())
		case !now.Running:
			return end()
		case r.clock.Now() > until:
			return errors.Join(errors.New("prepare copy: not done within database.start_timeout"), end())
		}
		if err := r.clock.WaitUntil(ctx, r.clock.Now().Add(readyPoll)); err != nil {
			return errors.Join(err, end())
		}
	}
}

// said is the last line of a container's output, for an error.
func (r *replica) said(ctx context.Context, id string) string {
	lines, err := r.docker.LastLogs(ctx, id, 1)
	if err != nil || len(lines) == 0 {
		return "it said nothing"
	}
	return lines[len(lines)-1]
}

// awaitReady waits until a started copy answers.
func (r *replica) awaitReady(ctx context.Context, g *generation) error {
	until := r.clock.Now().Add(r.config().Database.StartTimeout)
	for {
		info, err := r.docker.Inspect(ctx, g.info.ID)
		if err != nil {
			return fmt.Errorf("look at copy: %w", err)
		}
		g.found(info)
		if !info.Running {
			return fmt.Errorf("copy ended with status %d while starting: %s", info.ExitCode, r.said(ctx, g.info.ID))
		}
		perr := r.probe(ctx, g)
		if perr == nil {
			return nil
		}
		if r.clock.Now() > until {
			return fmt.Errorf("copy does not answer within database.start_timeout: %w", perr)
		}
		if err := r.clock.WaitUntil(ctx, r.clock.Now().Add(readyPoll)); err != nil {
			return err
		}
	}
}

func (r *replica) probe(ctx context.Context, g *generation) error {
	pctx, cancel := context.WithTimeout(ctx, r.config().Database.ProbeTimeout)
	defer cancel()
	return r.cfg.Probe(pctx, g.info.ID)
}

func (r *replica) exec(ctx context.Context, g *generation, cmd []string) error {
	res, err := r.docker.Exec(ctx, g.info.ID, cmd)
	if err != nil {
		return err
	}
	if res.ExitCode != 0 {
		return fmt.Errorf("exit status %d: %s", res.ExitCode, firstOf(res.Stderr, res.Stdout))
	}
	return nil
}

// firstOf is the beginning of the first text that is not empty, for an error.
func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t[:min(len(t), 200)]
		}
	}
	return ""
}

// warm fills caches. It is a kindness to readers, and no reason to go without a refresh.
func (r *replica) warm(ctx context.Context, g *generation) {
	set := r.config().Replica
	if len(set.Warm) == 0 {
		return
	}
	r.at("warming the copy")
	wctx, cancel := context.WithTimeout(ctx, set.WarmTimeout)
	defer cancel()
	for i, cmd := range set.Warm {
		if err := r.exec(wctx, g, cmd); err != nil && ctx.Err() == nil {
			r.log.Warn("warming command failed", "number", i+1, "error", err)
		}
	}
}

// clearAway ends a copy and removes all that is left of it. It is idempotent.
func (r *replica) clearAway(base context.Context, g *generation) error {
	if g == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(base), replicaStop+killTimeout)
	defer cancel()
	r.mu.Lock()
	dead := g.dead
	r.mu.Unlock()
	if g.info.ID != "" {
		if n, err := g.sessions(); err == nil && n > 0 && !dead {
			// Those that are left learn why, if the engine says so.
			if err := r.docker.Stop(ctx, g.info.ID, replicaStop); err != nil {
				r.log.Warn("copy not stopped, it is killed", "error", err)
			}
		}
		if err := r.docker.Kill(ctx, g.info.ID); err != nil {
			return fmt.Errorf("end copy: %w", err)
		}
		if err := r.docker.Remove(ctx, g.info.ID); err != nil {
			return fmt.Errorf("remove copy: %w", err)
		}
	}
	r.mu.Lock()
	keep := r.stats.Copy == volsync.CopyTwo
	r.mu.Unlock()
	if keep {
		if _, err := os.Lstat(filepath.Join(r.dir, spareData)); errors.Is(err, fs.ErrNotExist) {
			if err := os.Rename(g.data(), filepath.Join(r.dir, spareData)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("keep the copy's files: %w", err)
			}
		}
	}
	if err := os.RemoveAll(g.dir); err != nil {
		return fmt.Errorf("remove copy's files: %w", err)
	}
	return nil
}

// adopt finds what an earlier start of the agent left: the copy that has the read port goes on
// serving, one with sessions goes on until they end, everything else is cleared away.
func (r *replica) adopt(ctx context.Context) error {
	set := r.config()
	fctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	list, err := r.docker.Find(fctx, r.labels())
	if err != nil {
		return fmt.Errorf("look for copies: %w", err)
	}
	leads, err := r.cfg.Switch.Leads(ctx)
	if err != nil {
		return err
	}
	serves := func(info container.Info) bool {
		for _, t := range leads {
			if t.To.Addr().String() == info.IP {
				return true
			}
		}
		return false
	}
	var keep []string
	for _, info := range list {
		id := filepath.Base(info.Labels[container.LabelGeneration]) // "." without one
		g, err := loadGeneration(filepath.Join(r.dir, id))
		usable := err == nil && info.Running && g.BootID == r.bootID && g.ID == id && set.Replica.Enabled
		if err != nil {
			g = &generation{dir: filepath.Join(r.dir, "of-"+id)} // what is left of it goes below
		}
		for _, p := range r.cfg.Spec.Ports {
			g.ports = append(g.ports, p.Container)
		}
		g.found(info)
		n, serr := g.sessions()
		r.mu.Lock()
		switch {
		case usable && serves(info) && r.serving == nil:
			r.serving = g
			g.savedFresh = g.FreshAt
			keep = append(keep, g.ID)
			r.mu.Unlock()
			r.note("replica adopted", "snapshot "+g.Ref.ID)
			continue
		case usable && serr == nil && n > 0 && r.draining == nil:
			r.draining = g
			g.drainFrom = r.clock.Now()
			keep = append(keep, g.ID)
			r.mu.Unlock()
			continue
		}
		r.mu.Unlock()
		if err := r.clearAway(ctx, g); err != nil {
			return err
		}
	}
	return r.tidy(ctx, keep, len(leads) > 0)
}

// tidy removes directories that no copy uses and brings the switch in line.
func (r *replica) tidy(ctx context.Context, keep []string, leads bool) error {
	entries, err := os.ReadDir(r.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list copies: %w", err)
	}
	for _, e := range entries {
		if slices.Contains(keep, e.Name()) || e.Name() == spareData && r.config().Replica.Enabled {
			continue
		}
		if err := os.RemoveAll(filepath.Join(r.dir, e.Name())); err != nil {
			return fmt.Errorf("remove files of a copy: %w", err)
		}
	}
	r.mu.Lock()
	g := r.serving
	r.mu.Unlock()
	switch {
	case !r.config().Replica.Enabled:
		if leads {
			return r.cfg.Switch.Remove(ctx)
		}
		return nil
	case g == nil:
		return r.cfg.Switch.Lead(ctx)
	}
	return r.cfg.Switch.Lead(ctx, r.targets(g)...)
}

// replicaDir is where the copies are, on the volume's file system.
func replicaDir(dir string) string { return filepath.Join(dir, "replica") }
