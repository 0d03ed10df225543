package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
)

func (a *app) failoverCmd() *cobra.Command {
	var req api.FailoverRequest
	yes := false
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Move the database by force; what is not in a snapshot is lost",
		Long:  "Move the database by force, for a primary that is broken. It says what will be lost and\nasks. Use switchover while the primary works: that loses nothing.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.confirm(yes, failoverCost(s, req)); err != nil {
				return err
			}
			m := newMeter(a.err)
			res, err := c.Failover(cmd.Context(), req, m.report)
			m.done()
			if err != nil {
				return err
			}
			return a.moved(res)
		},
	}
	cmd.Flags().StringVar(&req.To, "to", "", "instance that shall take over (default: this one, or whoever is ready)")
	cmd.Flags().BoolVar(&req.Terminated, "terminated", false, "the old primary's machine is known to be gone for good: don't wait for its lease to end")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "don't ask")
	return cmd
}

// failoverCost says in plain words what a forced takeover will cost.
func failoverCost(s api.Status, req api.FailoverRequest) string {
	var b strings.Builder
	old := s.Primary.Instance
	if old == "" {
		old = "(nobody)"
	}
	to := req.To
	if to == "" {
		to = "another instance"
		if !s.Primary.Self {
			to = s.Instance
		}
	}
	fmt.Fprintf(&b, "Forced failover of cluster %s from %s to %s (term %d).\n", s.Cluster, old, to, s.Term)
	switch {
	case s.LossWindowSeconds != nil:
		fmt.Fprintf(&b, "LOST: everything written in the last %s, up to the moment when %s stops.\n", since(seconds(*s.LossWindowSeconds)), old)
	case s.Head != nil:
		fmt.Fprintf(&b, "LOST: everything that %s wrote after %s (%s ago).\n", old, s.Head.Frozen.UTC().Format("2006-01-02 15:04:05 UTC"), since(seconds(s.Head.AgeSeconds)))
	default:
		b.WriteString("LOST: everything. No snapshot has ever been committed.\n")
	}
	fmt.Fprintf(&b, "It stays as a fork on the disk of %s for as long as that lives.", old)
	if !s.Primary.Self && !req.Terminated && s.Lease.TTLMS > 0 {
		fmt.Fprintf(&b, "\nWhoever takes over waits first until the old lease is over (%s).", time.Duration(s.Lease.TTLMS)*time.Millisecond)
	}
	if req.Terminated {
		fmt.Fprintf(&b, "\nYou say that the machine of %s is gone for good. If it is not, TWO databases may take writes.", old)
	}
	return b.String()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func (a *app) pauseCmd() *cobra.Command {
	return a.pauseOrResume("pause", "Switch automatic failover off for the whole cluster", true,
		"automatic failover is off; switch it on again with: dbsupervisor resume")
}

func (a *app) resumeCmd() *cobra.Command {
	return a.pauseOrResume("resume", "Switch automatic failover on again", false, "automatic failover is on")
}

func (a *app) pauseOrResume(use, short string, paused bool, done string) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			if err := c.Pause(ctx, paused); err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.out, done)
			return err
		},
	}
}
