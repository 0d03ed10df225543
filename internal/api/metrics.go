package api

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsHandler serves what Prometheus asks for.
func metricsHandler(cfg HealthConfig) http.Handler {
	return promhttp.HandlerFor(newRegistry(cfg), promhttp.HandlerOpts{Timeout: 8 * time.Second})
}

// newRegistry makes a registry of its own: nothing global, so that tests and a second
// agent in one process don't meet.
func newRegistry(cfg HealthConfig) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	labelled := prometheus.WrapRegistererWith(prometheus.Labels{"cluster": cfg.Cluster, "instance_name": cfg.Instance}, reg)
	labelled.MustRegister(&statusCollector{agent: cfg.Agent, version: cfg.Version})
	return reg
}

// statusCollector turns the status into metrics when they are asked for.
type statusCollector struct {
	agent   Agent
	version string
}

// Describe sends nothing: the set of metrics depends on the role.
func (*statusCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *statusCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	send := func(kind prometheus.ValueType, name, help string, v float64, labels ...string) {
		var names, values []string
		for i := 0; i+1 < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("dbsupervisor_"+name, help, names, nil), kind, v, values...)
	}
	gauge := func(name, help string, v float64, labels ...string) {
		send(prometheus.GaugeValue, name, help, v, labels...)
	}
	counter := func(name, help string, v float64) { send(prometheus.CounterValue, name, help, v) }

	gauge("build_info", "Always 1; the version is a label.", 1, "version", c.version)
	s, err := c.agent.Status(ctx)
	gauge("status_ok", "1 if the agent could say how it is.", flag(err == nil))
	if err != nil {
		return
	}
	for _, r := range []Role{RolePrimary, RoleStandby, RoleStarting, RoleHandoff, RoleFenced, RoleDown} {
		gauge("role", "1 for the role that this instance has.", flag(s.Role == r), "role", string(r))
	}
	gauge("degraded", "How many things keep the role's duty from being wholly fulfilled.", float64(len(s.Degraded)))
	gauge("term", "The newest known term of the cluster.", float64(s.Term))
	gauge("paused", "1 while automatic failover is switched off.", flag(s.Paused))
	gauge("failovers_last_hour", "Failovers of the cluster within the last hour that no person asked for.", float64(s.Failover.LastHour))
	gauge("failovers_max_per_hour", "With so many of them a person is asked for the next.", float64(s.Failover.MaxPerHour))
	gauge("failover_asks_for_person", "1 while the primary is silent and nobody takes over before a person asks for it.", flag(s.Failover.AsksForPerson))
	gauge("failover_priority", "This instance's priority among equally fresh standbys; 0: it never becomes primary.", float64(priority(s.Failover)))
	if d := s.Lease.DeadlineInMS; d != nil {
		gauge("lease_seconds_left", "Time until this instance must have stopped writing.", float64(*d)/1000)
	}
	if d := s.Lease.LastContactMS; d != nil {
		gauge("register_last_contact_seconds", "Time since the register was last reached.", float64(*d)/1000)
	}
	if w := s.LossWindowSeconds; w != nil {
		gauge("loss_window_seconds", "Seconds of writes that would be lost if this primary were lost now.", *w)
	}
	if h := s.Head; h != nil {
		gauge("head_age_seconds", "Time since the freeze of the newest committed snapshot.", h.AgeSeconds)
		gauge("head_sequence", "Sequence number of the newest committed snapshot.", float64(h.Seq))
	}
	if l := s.LastCommit; l != nil {
		gauge("snapshot_last_commit_timestamp_seconds", "When this agent committed its last snapshot.", float64(l.At.UnixMilli())/1000)
		gauge("snapshot_last_duration_seconds", "How long the last snapshot took in all.", l.DurationMS/1000)
		gauge("snapshot_last_freeze_seconds", "How long the database stood still for the last snapshot.", l.FreezeMS/1000)
		gauge("snapshot_last_changed_bytes", "Bytes of the volume that the last snapshot found changed.", float64(l.ChangedBytes))
		gauge("snapshot_last_stored_bytes", "Bytes that the last snapshot wrote to the share.", float64(l.StoredBytes))
	}
	gauge("sync_tier", "1 for the way in which change is found.", 1, "tier", s.Sync.Tier)
	collectTracking(s, gauge, counter)
	counter("snapshots_total", "Snapshots committed since the agent started.", float64(s.Sync.Commits))
	counter("snapshot_failures_total", "Snapshots that failed since the agent started.", float64(s.Sync.Failures))
	gauge("snapshot_consecutive_failures", "Snapshots that failed since the last one that was committed.", float64(s.Sync.ConsecutiveFailures))
	gauge("snapshot_interval_seconds", "Time between two snapshots that is kept now.", s.Sync.IntervalSeconds)
	gauge("snapshot_slowed", "1 while snapshots are further apart than the schedule asks for.", flag(s.Sync.Slowed))
	counter("snapshot_freeze_aborts_total", "Snapshots given up since the agent started because the freeze would have been too long.", float64(s.Sync.FreezeAborts))
	if f := s.Sync.PredictedFreezeMS; f != nil {
		gauge("snapshot_predicted_freeze_seconds", "How long the next freeze is expected to last.", *f/1000)
	}
	if p := s.Progress; p != nil && p.Total > 0 {
		gauge("progress_ratio", "How far the work under way has come.", float64(p.Done)/float64(p.Total), "phase", p.Phase)
		if r := p.BytesPerSecond; r != nil {
			gauge("progress_bytes_per_second", "How fast the work under way goes.", *r, "phase", p.Phase)
		}
		if r := p.RemainingSeconds; r != nil {
			gauge("progress_remaining_seconds", "How long the work under way still takes at that rate.", *r, "phase", p.Phase)
		}
	}
	gauge("store_condemned_files", "Files of the store that wait to be deleted.", float64(s.Upkeep.CondemnedFiles))
	counter("store_compacted_packs_total", "Packs whose live blocks were brought together in this term.", float64(s.Upkeep.CompactedPacks))
	gauge("store_check_files", "Files of the store that this instance knows of.", float64(s.Upkeep.CheckFiles))
	gauge("store_checked_files", "Of them, files that this instance has verified at least once.", float64(s.Upkeep.CheckedFiles))
	gauge("store_oldest_check_seconds", "Time since the file was verified, or first seen, that waits longest.", s.Upkeep.OldestCheckSeconds)
	counter("store_checked_bytes_total", "Bytes of the store that were read to verify it since the agent started.", float64(s.Upkeep.CheckedBytes))
	gauge("store_damaged_files", "Files of the store that verification found damaged or missing.", float64(len(s.Upkeep.Damaged)))
	gauge("local_behind_snapshots", "Snapshots that the local copy is behind the newest.", float64(s.Local.BehindSnapshots))
	gauge("local_behind_bytes", "Bytes that the local copy is behind the newest snapshot, as far as known.", float64(s.Local.BehindBytes))
	if f := s.Local.FreeBytes; f != nil {
		gauge("local_free_bytes", "Room left on the local disk.", float64(*f))
	}
	gauge("database_up", "1 if the database's container runs and its last probe was answered.", flag(s.Database.Running && s.Database.Healthy))
	gauge("database_restarts", "Deaths of the database in this term that were answered by a restart.", float64(s.Database.Restarts))
	collectReplica(s.Replica, gauge, counter)
	gauge("gate_open", "1 while the kernel lets clients reach the write port.", flag(s.Gate.Open))
	gauge("guard_ok", "1 if the guard process answers.", flag(s.Guard.OK))
	gauge("forks", "Volumes that were set aside because history went on without them.", float64(len(s.Forks)))
}

func priority(f Failover) int {
	if f.Never {
		return 0
	}
	return f.Priority
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// collectReplica sends what is known of the read-only copies.
func collectReplica(r *Replica, gauge func(string, string, float64, ...string), counter func(string, string, float64)) {
	if r == nil {
		return
	}
	gauge("replica_serving", "1 while a read-only copy has the read port and answers.", flag(r.Serving != nil && r.Serving.Healthy))
	gauge("replica_draining", "1 while sessions of the copy before go on.", flag(r.Draining != nil))
	counter("replica_refreshes_total", "Read-only copies that were given the read port since the agent started.", float64(r.Refreshes))
	counter("replica_refresh_failures_total", "Refreshes that failed since the agent started.", float64(r.Failures))
	gauge("replica_consecutive_failures", "Refreshes that failed since the last one that succeeded.", float64(r.ConsecutiveFailures))
	gauge("replica_refresh_seconds", "How long the last refresh took.", r.RefreshSeconds)
	gauge("replica_fetched_bytes", "Bytes that the last refresh read of the share beyond what the local copy had.", float64(r.FetchedBytes))
	if c := r.Serving; c != nil {
		gauge("replica_term", "Term of the snapshot that is served.", float64(c.Term))
		gauge("replica_sequence", "Sequence number of the snapshot that is served.", float64(c.Seq))
		gauge("replica_sessions", "Connections of readers to the copy that serves.", float64(c.Sessions))
		if c.AgeSeconds != nil {
			gauge("replica_age_seconds", "How old the data that are served may be at most.", *c.AgeSeconds)
		}
	}
	if c := r.Draining; c != nil {
		gauge("replica_draining_sessions", "Connections of readers to the copy before.", float64(c.Sessions))
	}
}
