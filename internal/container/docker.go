package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"
	"github.com/hashicorp/go-hclog"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits of calls where ctx allows longer.
const (
	defaultTimeout = 30 * time.Second
	defaultStall   = 2 * time.Minute
	cleanUpTimeout = 10 * time.Second
)

// engine is all that is asked of Docker's client.
type engine interface {
	Ping(ctx context.Context) (types.Ping, error)
	ImageInspect(ctx context.Context, ref string, opts ...client.ImageInspectOption) (image.InspectResponse, error)
	ImagePull(ctx context.Context, ref string, opts image.PullOptions) (io.ReadCloser, error)
	ContainerCreate(ctx context.Context, c *container.Config, h *container.HostConfig, n *network.NetworkingConfig, p *ocispec.Platform, name string) (container.CreateResponse, error)
	CopyToContainer(ctx context.Context, id, path string, content io.Reader, opts container.CopyToContainerOptions) error
	ContainerStart(ctx context.Context, id string, opts container.StartOptions) error
	ContainerStop(ctx context.Context, id string, opts container.StopOptions) error
	ContainerKill(ctx context.Context, id, signal string) error
	ContainerPause(ctx context.Context, id string) error
	ContainerUnpause(ctx context.Context, id string) error
	ContainerRemove(ctx context.Context, id string, opts container.RemoveOptions) error
	ContainerInspect(ctx context.Context, id string) (container.InspectResponse, error)
	ContainerList(ctx context.Context, opts container.ListOptions) ([]container.Summary, error)
	ContainerWait(ctx context.Context, id string, cond container.WaitCondition) (<-chan container.WaitResponse, <-chan error)
	ContainerLogs(ctx context.Context, id string, opts container.LogsOptions) (io.ReadCloser, error)
	ContainerExecCreate(ctx context.Context, id string, opts container.ExecOptions) (container.ExecCreateResponse, error)
	ContainerExecAttach(ctx context.Context, id string, opts container.ExecAttachOptions) (types.HijackedResponse, error)
	ContainerExecInspect(ctx context.Context, id string) (container.ExecInspect, error)
	Close() error
}

var _ engine = (*client.Client)(nil)

// Config configures the connection to the Docker daemon of this machine.
type Config struct {
	// Host is the daemon's address; "" means unix:///var/run/docker.sock. It must be a daemon
	// of this machine: its containers are frozen and killed without asking it.
	Host string
	// Timeout bounds each call that is expected to be quick; default 30 s.
	Timeout time.Duration
	// PullStall ends a pull in which nothing happens for so long; default 2 min.
	PullStall time.Duration
	// RegistryAuth, if set, returns the credentials for pulling an image, encoded as Docker's
	// X-Registry-Auth header wants them.
	RegistryAuth func(ctx context.Context, ref string) (string, error)
	// Log defaults to a null logger.
	Log hclog.Logger
}

// Docker is a connection to the Docker daemon, safe for concurrent use. Close ends it and
// leaves containers alone.
type Docker struct {
	cfg Config
	cli engine

	mu  sync.Mutex
	env []string // "NAME=value" of all containers made here, to be hidden in errors
}

// New returns a connection; the daemon is not asked for anything yet (see Ping).
func New(cfg Config) (*Docker, error) {
	if cfg.Host == "" {
		cfg.Host = client.DefaultDockerHost
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.PullStall == 0 {
		cfg.PullStall = defaultStall
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	cli, err := client.NewClientWithOpts(client.WithHost(cfg.Host), client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, fmt.Errorf("connect to docker: %w", err)
	}
	return &Docker{cfg: cfg, cli: cli}, nil
}

// Close frees the connection.
func (d *Docker) Close() error {
	if err := d.cli.Close(); err != nil {
		return fmt.Errorf("close connection to docker: %w", err)
	}
	return nil
}

// Ping asks whether the daemon answers.
func (d *Docker) Ping(ctx context.Context) error {
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	_, err := d.cli.Ping(ctx)
	return d.fail(ctx, "ping docker", err)
}

// bound limits a call to the configured time and extra.
func (d *Docker) bound(ctx context.Context, extra time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, d.cfg.Timeout+extra)
}

// hide remembers variables whose values must not appear in errors.
func (d *Docker) hide(env []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range env {
		if !slices.Contains(d.env, e) {
			d.env = append(d.env, e)
		}
	}
}

// fail names what was tried and tells a daemon that is not there from one that says no.
func (d *Docker) fail(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded) || isDown(err):
		err = fmt.Errorf("%w (%w)", ErrUnavailable, err)
	case ctx.Err() != nil:
		err = ctx.Err()
	case errdefs.IsNotFound(err):
		err = fmt.Errorf("%w (%w)", ErrNotFound, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return redact(fmt.Errorf("%s: %w", what, err), d.env)
}

// isDown says that the error is the connection's, not an answer.
func isDown(err error) bool {
	if client.IsErrConnectionFailed(err) {
		return true
	}
	for _, e := range []error{
		context.DeadlineExceeded, io.EOF, io.ErrUnexpectedEOF,
		syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, syscall.ENOENT,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// short is how a container is called in messages.
func short(id string) string {
	if len(id) == 64 {
		return id[:12]
	}
	return strings.TrimPrefix(id, "/")
}
