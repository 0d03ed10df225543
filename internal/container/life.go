package container

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/cgroup"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
)

// Inspect returns what Docker knows of a container, by ID or name; ErrNotFound.
func (d *Docker) Inspect(ctx context.Context, id string) (Info, error) {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	c, err := d.cli.ContainerInspect(ctx, id)
	if err != nil {
		return Info{}, d.fail(ctx, "inspect container "+short(id), err)
	}
	return d.info(c), nil
}

func (d *Docker) info(c container.InspectResponse) Info {
	out := Info{Labels: map[string]string{}}
	if c.ContainerJSONBase != nil {
		out.ID, out.Name, out.ImageDigest = c.ID, strings.TrimPrefix(c.Name, "/"), c.Image
		if s := c.State; s != nil {
			out.Running, out.Paused, out.OOMKilled = s.Running, s.Paused, s.OOMKilled
			out.ExitCode, out.Pid = s.ExitCode, s.Pid
			out.StartedAt, out.FinishedAt = parseTime(s.StartedAt), parseTime(s.FinishedAt)
			d.mu.Lock()
			out.Error = clean(s.Error, d.env)
			d.mu.Unlock()
		}
		if c.HostConfig != nil {
			out.Restart = string(c.HostConfig.RestartPolicy.Name)
		}
	}
	if c.Config != nil {
		for k, v := range c.Config.Labels {
			out.Labels[k] = v
		}
	}
	if l := out.Labels[LabelImage]; l != "" {
		out.ImageDigest = l
	}
	if c.NetworkSettings != nil {
		for port, bindings := range c.NetworkSettings.Ports {
			for _, b := range bindings {
				if n, err := strconv.Atoi(b.HostPort); err == nil && port.Proto() == "tcp" {
					if out.Published == nil {
						out.Published = map[int]int{}
					}
					out.Published[port.Int()] = n
				}
			}
		}
		for _, n := range c.NetworkSettings.Networks {
			if n != nil && n.IPAddress != "" {
				out.IP = n.IPAddress
				break
			}
		}
	}
	return out
}

// parseTime reads Docker's times; "never" is written as the year 1.
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 1970 {
		return time.Time{}
	}
	return t
}

// Find returns all containers, running or not, that have these labels, sorted by name.
func (d *Docker) Find(ctx context.Context, labels map[string]string) ([]Info, error) {
	if len(labels) == 0 {
		return nil, errors.New("find containers: no labels given")
	}
	f := filters.NewArgs()
	for k, v := range labels {
		f.Add("label", k+"="+v)
	}
	bctx, cancel := d.bound(ctx, 0)
	defer cancel()
	list, err := d.cli.ContainerList(bctx, container.ListOptions{All: true, Filters: f})
	if err != nil {
		return nil, d.fail(bctx, "find containers", err)
	}
	var out []Info
	for _, c := range list {
		info, err := d.Inspect(ctx, c.ID)
		if errors.Is(err, ErrNotFound) { // removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, info)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// Stop sends the container's stop signal and waits; after the timeout (in whole seconds,
// rounded up) Docker kills it. A container that does not run is no error. It must not be frozen.
func (d *Docker) Stop(ctx context.Context, id string, timeout time.Duration) error {
	ctx, cancel := d.bound(ctx, timeout)
	defer cancel()
	sec := seconds(timeout)
	return d.fail(ctx, "stop container "+short(id), d.cli.ContainerStop(ctx, id, container.StopOptions{Timeout: &sec}))
}

// Kill ends a container at once, frozen and paused ones too, and returns when none of its
// processes is left. It kills by control group before it asks the daemon, and with a full ID
// it succeeds without a daemon if that found anything to kill. One that does not run, or does
// not exist, is no error.
func (d *Docker) Kill(ctx context.Context, id string) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	what := "kill container " + short(id)
	full := id
	if len(full) != 64 {
		info, err := d.Inspect(ctx, id)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		full = info.ID
	}
	groups, err := cgroup.Find(full)
	if err != nil {
		d.cfg.Log.Debug("can't search control groups", "error", err)
	}
	for _, g := range groups {
		if err := g.Kill(ctx); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	// Now the daemon, which may know of a start that is under way, and for its own state.
	err = d.killByDaemon(ctx, full)
	if err = d.fail(ctx, what, err); errors.Is(err, ErrUnavailable) && len(groups) > 0 {
		d.cfg.Log.Warn("container was killed without the docker daemon", "container", short(full), "error", err)
		return nil
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func (d *Docker) killByDaemon(ctx context.Context, id string) error {
	err := d.cli.ContainerKill(ctx, id, "KILL")
	if err != nil && !errdefs.IsConflict(err) { // conflict: it does not run
		return err
	}
	res, errs := d.cli.ContainerWait(ctx, id, container.WaitConditionNotRunning)
	select {
	case <-res:
		return nil
	case err := <-errs:
		return err
	}
}

// Pause freezes a container through Docker. Prefer the fence's freezer, which is faster and
// guarded.
func (d *Docker) Pause(ctx context.Context, id string) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	return d.fail(ctx, "pause container "+short(id), d.cli.ContainerPause(ctx, id))
}

// Unpause undoes Pause. A container that is not paused is no error.
func (d *Docker) Unpause(ctx context.Context, id string) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	err := d.cli.ContainerUnpause(ctx, id)
	if err != nil && strings.Contains(err.Error(), "is not paused") {
		return nil
	}
	return d.fail(ctx, "unpause container "+short(id), err)
}

// Remove removes a container that does not run, with the anonymous volumes that its image
// asked for. One that does not exist is no error.
func (d *Docker) Remove(ctx context.Context, id string) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	err := d.cli.ContainerRemove(ctx, id, container.RemoveOptions{RemoveVolumes: true})
	if errdefs.IsConflict(err) && strings.Contains(err.Error(), "already in progress") {
		// Asked for before, of a daemon that did not answer then.
		err = d.waitRemoved(ctx, id)
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return d.fail(ctx, "remove container "+short(id), err)
}

// waitRemoved waits for a removal that is under way, and for its outcome.
func (d *Docker) waitRemoved(ctx context.Context, id string) error {
	res, errs := d.cli.ContainerWait(ctx, id, container.WaitConditionRemoved)
	select {
	case r := <-res:
		if r.Error != nil {
			return errors.New(r.Error.Message)
		}
		return nil
	case err := <-errs:
		return err
	}
}

// Wait returns a container's exit code when it does not run any more, at once if it doesn't.
// It lasts as long as ctx lets it. ErrUnavailable when the daemon goes away meanwhile: that
// says nothing about the container.
func (d *Docker) Wait(ctx context.Context, id string) (exit int, err error) {
	what := "wait for container " + short(id)
	res, errs := d.cli.ContainerWait(ctx, id, container.WaitConditionNotRunning)
	select {
	case r := <-res:
		if r.Error != nil {
			return 0, d.fail(ctx, what, errors.New(r.Error.Message))
		}
		return int(r.StatusCode), nil
	case err := <-errs:
		if ctx.Err() != nil { // it just runs on
			return 0, fmt.Errorf("%s: %w", what, ctx.Err())
		}
		return 0, d.fail(ctx, what, err)
	}
}
