package main

import (
	stdbytes "bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/api"
)

var update = flag.Bool("update", false, "write the golden files anew")

func ptr[T any](v T) *T { return &v }

// statuses are what status must be able to show; each has two golden files.
func statuses() map[string]api.Status {
	now := time.Date(2026, 1, 31, 14, 5, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	primary := api.Status{
		Role: api.RolePrimary, State: "serving", Source: "agent", At: now, Version: "1.2.3",
		Cluster: "shop", ClusterID: "c0ffee", Instance: "db-1", Incarnation: "i-1", Zone: "eu-1a",
		Term: 7, Primary: api.Primary{Instance: "db-1", Address: "10.0.0.1:5432", HTTP: "10.0.0.1:8008", Zone: "eu-1a", Self: true},
		Lease:             api.Lease{Holding: true, DeadlineInMS: ptr(int64(7200)), TTLMS: 10000, Version: 812, LastContactMS: ptr(int64(400))},
		Head:              &api.Head{ID: "7-93-ab12", Seq: 93, Term: 7, Frozen: ago(12 * time.Second), AgeSeconds: 12},
		LastCommit:        &api.LastCommit{ID: "7-93-ab12", At: ago(11 * time.Second), FreezeMS: 8.25, ChangedBytes: 4 << 20, StoredBytes: 1 << 20, DurationMS: 420},
		LossWindowSeconds: ptr(12.3),
		Local:             api.Local{VolumeID: "v-1", Phase: "live", Base: "7-93-ab12", FreeBytes: ptr(int64(80 << 30))},
		Database:          api.Database{Container: "dbsupervisor-shop-db-1", Image: "sha256:1", Running: true, Healthy: true, LastProbe: ptr(ago(time.Second))},
		Sync:              api.Sync{Schedule: "@every 1m", Next: ptr(now.Add(48 * time.Second)), Tier: "hashed", Commits: 93, IntervalSeconds: 60},
		Forks:             []api.Fork{}, Gate: api.Gate{Open: true, RemainingMS: 7100}, Guard: api.Guard{OK: true},
		History: []api.Event{
			{At: ago(2 * time.Hour), Term: 7, Kind: "acquired", Text: "db-2 was silent"},
			{At: ago(2*time.Hour - 3*time.Second), Term: 7, Kind: "state", From: "takeover", To: "primary", Text: "database runs"},
		},
	}
	standby := primary
	standby.Role, standby.State, standby.Instance, standby.Zone = api.RoleStandby, "following", "db-2", "eu-1b"
	standby.Primary.Self = false
	standby.Lease = api.Lease{ChallengeInMS: ptr(int64(9600)), TTLMS: 10000, Version: 812, LastContactMS: ptr(int64(400))}
	standby.LossWindowSeconds, standby.LastCommit = nil, nil
	standby.Local = api.Local{VolumeID: "v-2", Phase: "applying", Base: "7-90-cd34", BehindSnapshots: 3, BehindBytes: 12 << 20,
		Refreshed: "in place", RefreshReason: "no room for a second copy"}
	standby.Database, standby.Gate, standby.History = api.Database{}, api.Gate{}, nil
	standby.Sync.Next = nil
	standby.Progress = &api.Progress{Phase: "fetching", Done: 3 << 20, Total: 12 << 20, Started: ago(2 * time.Second), BytesPerSecond: ptr(1.5 * (1 << 20)), RemainingSeconds: ptr(6.0)}
	standby.Forks = []api.Fork{{Name: "20260131T120000Z"}}

	reads := standby
	reads.Local = api.Local{VolumeID: "v-2", Phase: "clean", Base: "7-93-ab12"}
	reads.Progress = nil
	reads.Replica = &api.Replica{
		Ports:    []int{5433},
		Serving:  &api.ReplicaCopy{Container: "dbsupervisor-shop-db-2-r-1", Snapshot: "7-92-ef56", Term: 7, Seq: 92, Frozen: ago(14 * time.Second), AgeSeconds: ptr(16.2), Healthy: true, Sessions: 12},
		Draining: &api.ReplicaCopy{Container: "dbsupervisor-shop-db-2-r-0", Snapshot: "7-90-cd34", Term: 7, Seq: 90, Frozen: ago(44 * time.Second), Sessions: 1},
		Phase:    "warming the copy", Refreshes: 40, Failures: 1, ConsecutiveFailures: 1, LastError: "copy ended with status 1", RefreshSeconds: 2.5, Copy: "clone",
	}

	trouble := primary
	trouble.Degraded = []string{"snapshots fail", "the register can't be reached"}
	trouble.Paused = true
	trouble.LossWindowSeconds = ptr(754.2)
	trouble.Lease.Error, trouble.Lease.LastContactMS, trouble.Lease.DeadlineInMS = "input/output error", ptr(int64(6100)), ptr(int64(1900))
	trouble.Sync.Slowed, trouble.Sync.IntervalSeconds, trouble.Sync.FreezeAborts = true, 84, 12
	trouble.Sync.ConsecutiveFailures, trouble.Sync.LastError = 12, "no space left on device"
	trouble.Database.Healthy, trouble.Database.Error, trouble.Database.Restarts = false, "probe exited 2: connection refused", 2
	trouble.Guard = api.Guard{Error: "connection refused"}
	trouble.LastError = &api.Problem{What: "ship snapshot: no space left on device", Hint: "make room in the shared directory", At: ago(30 * time.Second)}

	handoff := primary
	handoff.Role, handoff.State, handoff.Released, handoff.Successor = api.RoleHandoff, "handoff", true, "db-2"
	handoff.LossWindowSeconds, handoff.Lease.DeadlineInMS = nil, ptr(int64(0))

	fresh := api.Status{
		Role: api.RoleStarting, State: "takeover", Source: "agent", At: now, Cluster: "shop", Instance: "db-1", Term: 1,
		Lease: api.Lease{TTLMS: 10000}, Local: api.Local{Phase: "empty"}, Sync: api.Sync{Schedule: "@every 1m"},
		Forks: []api.Fork{}, Guard: api.Guard{OK: true},
	}

	noAgent := api.Status{
		Role: api.RoleDown, State: "no agent", Source: "register", At: now, Cluster: "shop", Instance: "db-1", Term: 7,
		Degraded: []string{"no agent is running", "the database still runs; the guard ends it when its lease is over"},
		Primary:  primary.Primary, Head: primary.Head,
		Lease: api.Lease{TTLMS: 10000, Version: 812, LastContactMS: ptr(int64(0))}, Local: api.Local{Phase: "not known"},
		Database: api.Database{Container: "dbsupervisor-shop-db-1", Running: true}, Sync: api.Sync{Schedule: "@every 1m"}, Forks: []api.Fork{},
		LastError: &api.Problem{What: "no agent is running", Hint: "look at: systemctl status 'dbsupervisor*'", At: now},
	}
	empty := noAgent
	empty.Degraded, empty.Term, empty.Primary, empty.Head, empty.Database = []string{"no agent is running"}, 0, api.Primary{}, nil, api.Database{}
	empty.Lease = api.Lease{Error: "no cluster is initialised here"}
	rescued := noAgent
	rescued.Degraded, rescued.Primary, rescued.HeadComplete, rescued.Database = []string{"no agent is running"}, api.Primary{}, true, api.Database{}
	unborn := fresh
	unborn.Role, unborn.State, unborn.Lease.LastContactMS = api.RoleStandby, "waiting", ptr(int64(10))
	return map[string]api.Status{
		"primary": primary, "standby": standby, "reads": reads, "trouble": trouble, "handoff": handoff, "fresh": fresh, "noagent": noAgent, "empty": empty,
		"unborn": unborn, "rescued": rescued,
	}
}

func TestStatusScreen(t *testing.T) {
	for name, s := range statuses() {
		t.Run(name, func(t *testing.T) {
			var screen, asJSON stdbytes.Buffer
			if err := renderStatus(&screen, s); err != nil {
				t.Fatal(err)
			}
			if err := printJSON(&asJSON, s); err != nil {
				t.Fatal(err)
			}
			golden(t, name+".txt", screen.String())
			golden(t, name+".json", asJSON.String())
			if lines := strings.Count(screen.String(), "\n"); lines > 40 {
				t.Errorf("%d lines are more than a screen", lines)
			}
			var back api.Status
			if err := json.Unmarshal(asJSON.Bytes(), &back); err != nil {
				t.Fatal(err)
			}
			var again stdbytes.Buffer
			if err := renderStatus(&again, back); err != nil || again.String() != screen.String() {
				t.Errorf("does not survive JSON: %v\n%s", err, again.String())
			}
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("%s differs (run with -update if that is wanted)\n--- got\n%s--- want\n%s", name, got, want)
	}
}

func TestStatusCode(t *testing.T) {
	all := statuses()
	for name, want := range map[string]int{
		"primary": exitOK, "standby": exitStandby, "trouble": exitDegraded, "handoff": exitDegraded, "fresh": exitDegraded,
		"noagent": exitDegraded, "empty": exitDown,
	} {
		if got := statusCode(all[name]); got != want {
			t.Errorf("%s: %d, want %d", name, got, want)
		}
	}
	s := all["standby"]
	s.Degraded = []string{"disk full"}
	if got := statusCode(s); got != exitDegraded {
		t.Errorf("a standby that can't follow: %d", got)
	}
	s = all["primary"]
	s.Role = api.RoleFenced
	if got := statusCode(s); got != exitDegraded {
		t.Errorf("fenced: %d", got)
	}
}

// Every code of the table must be explained, and the documentation must have this table.
func TestExitCodesAreExplained(t *testing.T) {
	for _, code := range []int{exitOK, exitError, exitUsage, exitRefused, exitDamaged, exitStandby, exitDegraded, exitDown} {
		if strings.Count(exitCodes, fmt.Sprintf("\n%4d  ", code)) != 1 {
			t.Errorf("code %d is not explained once", code)
		}
	}
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "CLI.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(doc), exitCodes) {
		t.Error("docs/CLI.md has another table")
	}
}

func TestFailoverSaysWhatIsLost(t *testing.T) {
	all := statuses()
	for _, tc := range []struct {
		name string
		s    api.Status
		req  api.FailoverRequest
		want []string
	}{
		{"at the primary", all["primary"], api.FailoverRequest{}, []string{"from db-1 to another instance", "last 12s"}},
		{"at a standby", all["standby"], api.FailoverRequest{}, []string{"from db-1 to db-2", "after 2026-01-31 14:04:48 UTC (12s ago)", "old lease is over (10s)"}},
		{"terminated", all["standby"], api.FailoverRequest{To: "db-3", Terminated: true}, []string{"to db-3", "TWO databases"}},
		{"nothing committed", all["empty"], api.FailoverRequest{}, []string{"LOST: everything. No snapshot"}},
	} {
		got := failoverCost(tc.s, tc.req)
		for _, w := range tc.want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in\n%s", tc.name, w, got)
			}
		}
	}
}

func TestChoice(t *testing.T) {
	now := time.Date(2026, 1, 31, 14, 5, 0, 0, time.UTC)
	list := testSnapshots(now)
	for _, tc := range []struct {
		c    choice
		want string
		err  string
	}{
		{choice{}, "2-3-c", ""},
		{choice{id: "1-2-b"}, "1-2-b", ""},
		{choice{id: "9-9-x"}, "", "no such snapshot"},
		{choice{at: "1m"}, "2-3-c", ""},
		{choice{at: "2026-01-31 14:04:00"}, "2-3-c", ""},
		{choice{at: "14:03:59"}, "1-2-b", ""},
		{choice{at: "2026-01-31T15:03:00+01:00"}, "1-2-b", ""},
		{choice{at: "1h"}, "", "no such snapshot at or before 2026-01-31T13:05:00Z"},
		{choice{at: "yesterday"}, "", "not understood"},
		{choice{at: "1m", id: "1-2-b"}, "", "not both"},
	} {
		got, err := tc.c.find(list, now)
		if tc.err == "" {
			if err != nil || got.ID != tc.want {
				t.Errorf("%+v: %s, %v", tc.c, got.ID, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%+v: %v, want %s", tc.c, err, tc.err)
		}
	}
	if _, err := (choice{}).find(nil, now); err == nil || api.HintOf(err) == "" {
		t.Errorf("no snapshots: %v", err)
	}
}

func TestSince(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 8250 * time.Microsecond: "8ms", 1234 * time.Millisecond: "1.2s", 12*time.Second + 999*time.Millisecond: "12s",
		5 * time.Minute: "5m", 5*time.Minute + 3*time.Second: "5m3s", 2 * time.Hour: "2h", 2*time.Hour + 90*time.Second: "2h1m",
		10 * time.Minute: "10m", 10 * time.Hour: "10h", 20 * time.Second: "20s", 100 * time.Hour: "4 days", 40 * time.Minute: "40m",
	} {
		if got := since(d); got != want {
			t.Errorf("since(%s) = %q, want %q", d, got, want)
		}
	}
}
