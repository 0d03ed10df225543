package api

import (
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
)

func scrape(t *testing.T, a Agent) string {
	t.Helper()
	w := httptest.NewRecorder()
	newHealth(a, boottime.NewFake()).Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	lease, contact, loss, free := int64(7200), int64(400), 12.5, int64(99)
	predicted, rate, left := 12.0, 5.0, 15.0
	a := &fakeAgent{status: Status{
		Role: RolePrimary, Term: 7, Paused: true, Degraded: []string{"a", "b"}, LossWindowSeconds: &loss,
		Lease:      Lease{DeadlineInMS: &lease, LastContactMS: &contact},
		Head:       &Head{Seq: 93, AgeSeconds: 12},
		LastCommit: &LastCommit{At: time.Unix(1000, 0), FreezeMS: 8, DurationMS: 420, ChangedBytes: 5, StoredBytes: 6},
		Local:      Local{BehindSnapshots: 2, BehindBytes: 3, FreeBytes: &free},
		Database:   Database{Running: true, Healthy: true, Restarts: 4},
		Sync:       Sync{ConsecutiveFailures: 1, Commits: 93, Failures: 9, IntervalSeconds: 2.5, Slowed: true, FreezeAborts: 4, PredictedFreezeMS: &predicted},
		Progress:   &Progress{Phase: "reading", Done: 25, Total: 100, BytesPerSecond: &rate, RemainingSeconds: &left},
		Forks:      []Fork{{}}, Gate: Gate{Open: true}, Guard: Guard{OK: true},
	}}
	got := scrape(t, a)
	const labels = `cluster="shop",instance_name="db-1"`
	for name, value := range map[string]string{
		"term": "7", "paused": "1", "degraded": "2", "loss_window_seconds": "12.5", "lease_seconds_left": "7.2",
		"register_last_contact_seconds": "0.4", "head_sequence": "93", "head_age_seconds": "12",
		"snapshot_last_commit_timestamp_seconds": "1000", "snapshot_last_duration_seconds": "0.42", "snapshot_last_freeze_seconds": "0.008",
		"snapshot_last_changed_bytes": "5", "snapshot_last_stored_bytes": "6", "snapshots_total": "93", "snapshot_failures_total": "9",
		"snapshot_interval_seconds": "2.5", "snapshot_slowed": "1", "snapshot_freeze_aborts_total": "4", "snapshot_predicted_freeze_seconds": "0.012",
		"snapshot_consecutive_failures": "1", "local_behind_snapshots": "2", "local_behind_bytes": "3", "local_free_bytes": "99",
		"database_up": "1", "database_restarts": "4", "gate_open": "1", "guard_ok": "1", "forks": "1", "status_ok": "1",
	} {
		if line := "dbsupervisor_" + name + "{" + labels + "} " + value + "\n"; !strings.Contains(got, line) {
			t.Errorf("no line %s", line)
		}
	}
	for _, line := range []string{
		`dbsupervisor_role{` + labels + `,role="primary"} 1`, `dbsupervisor_role{` + labels + `,role="standby"} 0`,
		`dbsupervisor_progress_ratio{` + labels + `,phase="reading"} 0.25`, `dbsupervisor_progress_bytes_per_second{` + labels + `,phase="reading"} 5`,
		`dbsupervisor_progress_remaining_seconds{` + labels + `,phase="reading"} 15`,
		`dbsupervisor_build_info{` + labels + `,version="1.2.3"} 1`, "# TYPE dbsupervisor_snapshots_total counter", "go_goroutines ",
	} {
		if !strings.Contains(got, line) {
			t.Errorf("no line %s in\n%s", line, got)
		}
	}
}

// What is not known must be absent, not zero: a loss window of 0 would be good news.
func TestMetricsOfTheUnknownAreAbsent(t *testing.T) {
	got := scrape(t, &fakeAgent{status: Status{Role: RoleStandby}})
	for _, name := range []string{"loss_window", "lease_seconds_left", "last_contact", "head_age", "snapshot_last", "snapshot_predicted", "progress_", "local_free"} {
		if strings.Contains(got, "dbsupervisor_"+name) {
			t.Errorf("%s is there", name)
		}
	}
	got = scrape(t, &fakeAgent{err: errors.New("stuck")})
	if !strings.Contains(got, "dbsupervisor_status_ok{cluster=\"shop\",instance_name=\"db-1\"} 0\n") || strings.Contains(got, "dbsupervisor_term") {
		t.Errorf("an agent that can't answer:\n%s", got)
	}
}
