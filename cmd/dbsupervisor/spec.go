package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
)

// containerSpec is the database's container as the configuration describes it, without what
// changes from term to term.
func containerSpec(cfg *config.Config) (container.Spec, error) {
	d := cfg.Database
	env, err := d.Environment()
	if err != nil {
		return container.Spec{}, err
	}
	s := container.Spec{
		Name:  "dbsupervisor-" + cfg.Cluster + "-" + cfg.Instance,
		Image: d.Image, Entrypoint: d.Entrypoint, Command: d.Command, Env: env, User: d.User,
		ShmSize: int64(d.ShmSize), Memory: int64(d.Memory), CPUs: d.CPUs, Ulimits: d.Ulimits,
		CapAdd: d.CapAdd, CapDrop: d.CapDrop, Sysctls: d.Sysctls, Network: d.Network,
		StopSignal: d.StopSignal, StopTimeout: d.StopTimeout,
	}
	for _, m := range d.Mounts {
		s.Mounts = append(s.Mounts, container.Mount{Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly})
	}
	for _, path := range slices.Sorted(maps.Keys(d.Files)) {
		s.Files = append(s.Files, container.File{Path: path, Data: []byte(d.Files[path]), Mode: 0o644})
	}
	for _, p := range d.Ports {
		s.Ports = append(s.Ports, container.Port{Container: p.Container, Host: p.Host, Address: p.Address})
	}
	return s, nil
}

// replicaSpec is the container of a read-only copy: the database's, with limits of its own, and
// with ports on loopback that the engine chooses. The stable read ports lead to it.
func replicaSpec(cfg *config.Config) (container.Spec, error) {
	s, err := containerSpec(cfg)
	if err != nil {
		return s, err
	}
	r := cfg.Replica
	if r.Memory > 0 {
		s.Memory = int64(r.Memory)
	}
	if r.CPUs > 0 {
		s.CPUs = r.CPUs
	}
	s.Ports = nil
	for _, p := range r.Ports {
		s.Ports = append(s.Ports, container.Port{Container: p.Container, Host: container.PortAny, Address: "127.0.0.1"})
	}
	return s, nil
}

// prober is what a probe needs of the container engine.
type prober interface {
	Exec(ctx context.Context, id string, cmd []string) (container.ExecResult, error)
	Inspect(ctx context.Context, id string) (container.Info, error)
}

// newProbe asks the database a real question: the configured command in the container, or a
// connection to its main port. The connection goes to the container's own address: the
// published port is behind the gate, which opens only after the probe was answered.
func newProbe(docker prober, cfg *config.Config, cmd []string) func(context.Context, string) error {
	if len(cmd) == 0 {
		port := strconv.Itoa(cfg.Database.Ports[0].Container)
		return func(ctx context.Context, id string) error { return probeTCP(ctx, docker, id, port) }
	}
	return func(ctx context.Context, id string) error {
		res, err := docker.Exec(ctx, id, cmd)
		if err != nil {
			return fmt.Errorf("run probe: %w", err)
		}
		if res.ExitCode != 0 {
			return fmt.Errorf("probe exited %d: %s", res.ExitCode, firstLine(res.Stderr, res.Stdout))
		}
		return nil
	}
}

var errNoAddress = errors.New("container has no address of its own")

func probeTCP(ctx context.Context, docker prober, id, port string) error {
	info, err := docker.Inspect(ctx, id)
	if err != nil {
		return fmt.Errorf("find container's address: %w", err)
	}
	if info.IP == "" {
		return fmt.Errorf("probe port %s: %w", port, errNoAddress)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(info.IP, port))
	if err != nil {
		return fmt.Errorf("probe port: %w", err)
	}
	return c.Close()
}

// firstLine is the first line that says something.
func firstLine(texts ...string) string {
	for _, t := range texts {
		for line := range strings.Lines(t) {
			if line = strings.TrimSpace(line); line != "" {
				return line
			}
		}
	}
	return "it said nothing"
}
