package main

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
)

// newDocker connects to the Docker engine of this machine. $DOCKER_HOST is followed only to
// another socket: a container on another machine could be neither frozen nor killed.
func newDocker(log hclog.Logger) (*container.Docker, error) {
	host := os.Getenv("DOCKER_HOST")
	if !strings.HasPrefix(host, "unix://") {
		host = ""
	}
	return container.New(container.Config{Host: host, Log: log.Named("docker")})
}

// lookAtDocker finds this instance's container; nil if there is none.
func lookAtDocker(ctx context.Context, cfg *config.Config) (info *container.Info, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	d, err := newDocker(hclog.NewNullLogger())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	found, err := d.Find(ctx, map[string]string{container.LabelCluster: cfg.Cluster, container.LabelInstance: cfg.Instance,
		container.LabelRole: container.RolePrimary})
	if errors.Is(err, context.DeadlineExceeded) {
		err = container.ErrUnavailable
	}
	if err != nil || len(found) == 0 {
		return nil, err
	}
	for i := range found {
		if found[i].Running {
			return &found[i], nil
		}
	}
	return &found[0], nil
}
