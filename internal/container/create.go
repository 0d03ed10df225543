package container

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/go-connections/nat"
	"github.com/docker/go-units"
)

// Run creates a container and starts it. If that fails, the container is removed again. After
// ErrUnavailable, or when ctx has ended, it may still be there or even start later: Info.ID,
// if set, is what to kill, and its labels are how to find it.
func (d *Docker) Run(ctx context.Context, s Spec) (Info, error) {
	info, err := d.Create(ctx, s)
	if err != nil {
		return info, err
	}
	if err = d.Start(ctx, info.ID); err == nil {
		var started Info
		if started, err = d.Inspect(ctx, info.ID); err == nil {
			return started, nil
		}
		return info, err
	}
	if ctx.Err() == nil && !errors.Is(err, ErrUnavailable) {
		if rerr := d.discard(ctx, info.ID); rerr != nil {
			err = errors.Join(err, rerr)
		} else {
			info.ID = ""
		}
	}
	return info, err
}

// Create makes a container without starting it, so that a guard can be armed with its ID
// first. The image must be here (see EnsureImage). On error nothing is left, but see Run.
func (d *Docker) Create(ctx context.Context, s Spec) (Info, error) {
	env, err := environment(s)
	if err != nil {
		return Info{}, fmt.Errorf("create container %s: %w", s.Name, err)
	}
	d.hide(env)
	digest, err := d.digest(ctx, s.Image)
	if err != nil {
		return Info{}, err
	}
	cfg, host, err := translate(s, env, digest)
	if err != nil {
		return Info{}, fmt.Errorf("create container %s: %w", s.Name, err)
	}
	bctx, cancel := d.bound(ctx, 0)
	defer cancel()
	res, err := d.cli.ContainerCreate(bctx, cfg, host, nil, nil, s.Name)
	what := "create container " + s.Name
	switch {
	case errdefs.IsConflict(err):
		return Info{}, d.fail(bctx, what, fmt.Errorf("%w (%w)", ErrNameTaken, err))
	case errdefs.IsInvalidArgument(err):
		return Info{}, d.fail(bctx, what, fmt.Errorf("%w (%w)", ErrInvalidSpec, err))
	case err != nil:
		return Info{}, d.fail(bctx, what, err)
	}
	for _, w := range res.Warnings {
		d.cfg.Log.Warn("docker warns about the container", "container", s.Name, "warning", w)
	}
	info := Info{ID: res.ID, Name: s.Name, ImageDigest: digest, Labels: cfg.Labels}
	if err := d.copyFiles(ctx, res.ID, s.Files); err != nil {
		if ctx.Err() == nil && !errors.Is(err, ErrUnavailable) {
			if rerr := d.discard(ctx, res.ID); rerr != nil {
				return info, errors.Join(err, rerr)
			}
			return Info{}, err
		}
		return info, err
	}
	return info, nil
}

// Start starts a container that was created. After ErrUnavailable it may start later.
func (d *Docker) Start(ctx context.Context, id string) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	err := d.cli.ContainerStart(ctx, id, container.StartOptions{})
	if err != nil && strings.Contains(err.Error(), "port is already allocated") {
		err = fmt.Errorf("%w; find out who uses it with ss -ltnp", err)
	}
	return d.fail(ctx, "start container "+short(id), err)
}

// discard removes what a failed creation left.
func (d *Docker) discard(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	return d.Remove(ctx, id)
}

// translate turns a Spec into what Docker wants.
func translate(s Spec, env []string, digest string) (*container.Config, *container.HostConfig, error) {
	labels := maps.Clone(s.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[LabelImage] = digest
	cfg := &container.Config{
		Image: s.Image, Entrypoint: s.Entrypoint, Cmd: s.Command, Env: env, Labels: labels,
		User: s.User, StopSignal: s.StopSignal, WorkingDir: s.WorkDir, Hostname: s.Hostname,
		ExposedPorts: nat.PortSet{},
	}
	if s.StopTimeout > 0 {
		sec := seconds(s.StopTimeout)
		cfg.StopTimeout = &sec
	}
	host := &container.HostConfig{
		// Never anything else: only the holder of the term may start a writer.
		RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled},
		NetworkMode:   container.NetworkMode(s.Network),
		PortBindings:  nat.PortMap{},
		CapAdd:        s.CapAdd, CapDrop: s.CapDrop, Sysctls: s.Sysctls, ShmSize: s.ShmSize,
	}
	if s.Network == "" {
		host.NetworkMode = "bridge"
	}
	host.Memory = s.Memory
	if s.CPUs < 0 {
		return nil, nil, fmt.Errorf("%g CPUs: %w", s.CPUs, ErrInvalidSpec)
	}
	host.NanoCPUs = int64(s.CPUs * 1e9)
	for _, p := range s.Ports {
		if err := addPort(cfg, host, p); err != nil {
			return nil, nil, err
		}
	}
	for _, m := range s.Mounts {
		if !path.IsAbs(m.Source) || !path.IsAbs(m.Target) {
			return nil, nil, fmt.Errorf("mount %q on %q: both must be absolute: %w", m.Source, m.Target, ErrInvalidSpec)
		}
		host.Mounts = append(host.Mounts, mount.Mount{Type: mount.TypeBind, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly})
	}
	for name, n := range s.Ulimits {
		if n < -1 || name == "" {
			return nil, nil, fmt.Errorf("ulimit %q of %d: %w", name, n, ErrInvalidSpec)
		}
		host.Ulimits = append(host.Ulimits, &units.Ulimit{Name: name, Soft: n, Hard: n})
	}
	sort.Slice(host.Ulimits, func(i, j int) bool { return host.Ulimits[i].Name < host.Ulimits[j].Name })
	return cfg, host, nil
}

func addPort(cfg *container.Config, host *container.HostConfig, p Port) error {
	proto := p.Protocol
	if proto == "" {
		proto = "tcp"
	}
	if p.Host == 0 {
		p.Host = p.Container
	}
	hostPort := strconv.Itoa(p.Host)
	if p.Host == PortAny {
		p.Host, hostPort = p.Container, "" // the engine chooses
	}
	if p.Container < 1 || p.Container > 65535 || p.Host < 1 || p.Host > 65535 {
		return fmt.Errorf("port %d to %d: %w", p.Host, p.Container, ErrInvalidSpec)
	}
	switch proto {
	case "tcp", "udp", "sctp": // the daemon takes others and fails at the start
	default:
		return fmt.Errorf("port %d/%s: protocol is not tcp, udp or sctp: %w", p.Container, proto, ErrInvalidSpec)
	}
	port, err := nat.NewPort(proto, strconv.Itoa(p.Container))
	if err != nil {
		return fmt.Errorf("port %d/%s: %w (%w)", p.Container, proto, ErrInvalidSpec, err)
	}
	cfg.ExposedPorts[port] = struct{}{}
	host.PortBindings[port] = append(host.PortBindings[port], nat.PortBinding{HostIP: p.Address, HostPort: hostPort})
	return nil
}

// seconds rounds up: Docker counts in whole seconds, and too long is better than too short.
func seconds(d time.Duration) int { return int((d + time.Second - 1) / time.Second) }

// copyFiles writes files into a container that has not started.
func (d *Docker) copyFiles(ctx context.Context, id string, files []File) error {
	if len(files) == 0 {
		return nil
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
			return fmt.Errorf("write file %q into container: path must be absolute and plain: %w", f.Path, ErrInvalidSpec)
		}
		mode := f.Mode
		if mode == 0 {
			mode = 0o600
		}
		h := &tar.Header{
			Name: strings.TrimPrefix(f.Path, "/"), Typeflag: tar.TypeReg, Mode: int64(mode & 0o7777),
			Size: int64(len(f.Data)), Uid: f.UID, Gid: f.GID,
		}
		err := w.WriteHeader(h)
		if err == nil {
			_, err = w.Write(f.Data)
		}
		if err != nil {
			return fmt.Errorf("write file %s into container: %w", f.Path, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write files into container: %w", err)
	}
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	return d.fail(ctx, "write files into container "+short(id), d.cli.CopyToContainer(ctx, id, "/", &b, container.CopyToContainerOptions{}))
}
