//go:build !docker

package main

import (
	"context"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/supervisor"
)

// engineClient is the container engine as the agent uses it.
type engineClient interface {
	supervisor.Containers
	prober
}

func newDocker(hclog.Logger) (engineClient, error) {
	return nil, container.ErrUnavailable
}

func lookAtDocker(context.Context, *config.Config) (*container.Info, error) {
	return nil, container.ErrUnavailable
}
