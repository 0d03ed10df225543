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

// newDocker connects to the Docker engine.
func newDocker(hclog.Logger) (engineClient, error) {
	return nil, container.ErrUnavailable
}

// lookAtDocker finds this instance's container; nil if there is none.
func lookAtDocker(context.Context, *config.Config) (*container.Info, error) {
	return nil, container.ErrUnavailable
}
