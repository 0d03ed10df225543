package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/container"
)

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
	if err := d.prime(ctx); err != nil {
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
	if _, perr := d.cfg.Docker.EnsureImage(ctx, r.Digest, "missing", r.Progress); perr == nil {
		r.Note(fmt.Sprintf("%s is another image here (%s); running %s, which last wrote the volume", want, short(digest), short(r.Digest)))
		return r.Digest, nil
	}
	r.Note(fmt.Sprintf("the image that last wrote the volume (%s) can't be had here; running %s (%s)", short(r.Digest), want, short(digest)))
	return want, nil
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
