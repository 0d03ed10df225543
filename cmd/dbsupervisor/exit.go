package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// Exit codes. They are part of the interface; docs and `help exit-codes` show this table.
const (
	exitOK       = 0
	exitError    = 1
	exitUsage    = 2
	exitRefused  = 3
	exitDamaged  = 4
	exitStandby  = 10
	exitDegraded = 11
	exitDown     = 12
)

const exitCodes = `Exit codes of dbsupervisor:

   0  done; for status: this instance is the primary and all is well
   1  failed; the error says what and the hint what to do
   2  wrong command line or configuration
   3  not confirmed, nothing was done
   4  snapshots verify: something is damaged or missing
  10  status: a standby that follows the primary
  11  status: degraded - starting, handing off, fenced, or a primary or standby whose
      duty is not wholly fulfilled; also a database that runs without an agent
  12  status: down - no agent and no database
`

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: strings.TrimSuffix(exitCodes, "\n")}
}

// explain shows an error and what to do about it, and returns the exit code.
func (a *app) explain(err error) int {
	var list config.Errors
	if errors.As(err, &list) {
		for _, e := range list {
			a.complain(e)
		}
		return exitUsage
	}
	a.complain(err)
	var usage *usageError
	switch {
	case errors.As(err, &usage), errors.Is(err, config.ErrInvalid):
		return exitUsage
	case errors.Is(err, errRefused):
		return exitRefused
	case errors.Is(err, errDamaged):
		return exitDamaged
	}
	return exitError
}

func (a *app) complain(err error) {
	fmt.Fprintf(a.err, "dbsupervisor: %s\n", err)
	if h := hint(err); h != "" {
		fmt.Fprintf(a.err, "hint: %s\n", h)
	}
}

// hint is the error's own advice, or what generally helps against its kind.
func hint(err error) string {
	if h := api.HintOf(err); h != "" {
		return h
	}
	for _, k := range []struct {
		is   error
		hint string
	}{
		{lease.ErrSeenCluster, "mount the share of the cluster that this instance knows"},
		{lease.ErrNotInitialised, "is the shared file system mounted? If this is to be a new cluster: dbsupervisor init"},
		{lease.ErrInitialised, "there is a cluster already: start the agent and it will join"},
		{lease.ErrWrongCluster, "check share and share_mount: another cluster's directory is mounted there"},
		{lease.ErrWentBack, "the share is an old copy (a restored backup or a replica): mount the right one, or make it a new cluster: dbsupervisor rescue"},
		{lease.ErrCorrupt, "stop all agents, then rebuild the register from the snapshots: dbsupervisor rescue"},
		{lease.ErrInstanceInUse, "every instance needs a name of its own: set instance in the configuration"},
		{lease.ErrNotYet, "another instance holds the lease, or held it a moment ago: stop its agent first"},
		{lease.ErrConflict, "another instance was faster; look with: dbsupervisor status"},
		{lease.ErrUnknown, "the shared file system did not answer in time; look with: dbsupervisor status"},
		{volsync.ErrVolumeLocked, "the agent of this instance is running: stop it first"},
		{volsync.ErrNotEmpty, "name a new or empty directory"},
		{volsync.ErrNoRoom, "make room on the local disk"},
		{volsync.ErrMissing, "find out what is whole with: dbsupervisor snapshots verify"},
		{volsync.ErrDamaged, "find out what is whole with: dbsupervisor snapshots verify"},
		{container.ErrUnavailable, "start it with: systemctl start docker"},
		{fs.ErrPermission, "run as root"},
		{context.DeadlineExceeded, "the shared file system does not answer: check the mount and the network"},
	} {
		if errors.Is(err, k.is) {
			return k.hint
		}
	}
	return ""
}
