package supervisor

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	volsync "dbsupervisor/internal/sync"
)

func TestDecideReplica(t *testing.T) {
	standby := replicaObservation{Standby: true, Clean: true, Due: true}
	serving := standby
	serving.Serving, serving.Current = true, true
	with := func(o replicaObservation, edit func(*replicaObservation)) replicaObservation { edit(&o); return o }
	for _, tc := range []struct {
		name string
		o    replicaObservation
		want replicaAction
	}{
		{"nothing serves", standby, repStart},
		{"nothing serves, not even due", with(standby, func(o *replicaObservation) { o.Due = false }), repStart},
		{"no snapshot here yet", with(standby, func(o *replicaObservation) { o.Clean = false }), repNone},
		{"it failed just now", with(standby, func(o *replicaObservation) { o.Waiting = true }), repNone},
		{"not a standby yet", with(standby, func(o *replicaObservation) { o.Standby = false }), repNone},
		{"serves head", serving, repNone},
		{"head moved", with(serving, func(o *replicaObservation) { o.Current = false }), repStart},
		{"head moved, not due", with(serving, func(o *replicaObservation) { o.Current, o.Due = false, false }), repNone},
		{"head moved, old sessions", with(serving, func(o *replicaObservation) { o.Current, o.Draining = false, true }), repNone},
		{"head moved, it failed just now", with(serving, func(o *replicaObservation) { o.Current, o.Waiting = false, true }), repNone},
		{"old sessions over", with(serving, func(o *replicaObservation) { o.Draining, o.Quiet = true, true }), repEnd},
		{"old sessions too long", with(serving, func(o *replicaObservation) { o.Draining, o.Overdue = true, true }), repEnd},
		{"died", with(serving, func(o *replicaObservation) { o.ServingDead = true }), repDrop},
		{"died where the register can't be read", with(serving, func(o *replicaObservation) { o.ServingDead, o.Standby = true, false }), repDrop},
		{"taking over", with(serving, func(o *replicaObservation) { o.Standby, o.Holder = false, true }), repNone},
		{"taking over, head moved", with(serving, func(o *replicaObservation) { o.Standby, o.Holder, o.Current = false, true, false }), repNone},
		{"taking over with two", with(serving, func(o *replicaObservation) { o.Standby, o.Holder, o.Draining = false, true, true }), repEnd},
		{"primary", with(serving, func(o *replicaObservation) { o.Standby, o.Holder, o.Primary = false, true, true }), repRetire},
		{"primary, nothing left", replicaObservation{Holder: true, Primary: true}, repNone},
		{"stopped", with(serving, func(o *replicaObservation) { o.Stopping = true }), repStopAll},
		{"stopped, nothing left", with(standby, func(o *replicaObservation) { o.Stopping = true }), repNone},
	} {
		if got, why := decideReplica(tc.o); got != tc.want || why == "" {
			t.Errorf("%s: %q (%s), want %q", tc.name, got, why, tc.want)
		}
	}
}

// However the observation is: never a third database beside two, and nothing is begun that
// could hinder a primary.
func TestDecideReplicaNeverTooMany(t *testing.T) {
	for bits := range 1 << 12 {
		on := func(i int) bool { return bits&(1<<i) != 0 }
		o := replicaObservation{Standby: on(0), Holder: on(1), Primary: on(2), Stopping: on(3), Serving: on(4), ServingDead: on(5),
			Current: on(6), Draining: on(7), Quiet: on(8), Overdue: on(9), Clean: on(10), Due: on(11)}
		if o.Standby && o.Holder {
			continue
		}
		a, _ := decideReplica(o)
		switch {
		case a == repStart && (o.Draining || !o.Standby || o.Holder || o.Stopping || !o.Clean):
			t.Errorf("%+v: %s", o, a)
		case a == repRetire && o.Draining:
			t.Errorf("%+v: %s would forget the copy whose sessions go on", o, a)
		}
	}
}

func TestReadOnlySpec(t *testing.T) {
	base := container.Spec{Name: "db", Env: map[string]string{"PGDATA": "/data", "A": "1"}, User: "u", StopSignal: "SIGINT",
		Mounts: []container.Mount{{Source: "/s", Target: "/t"}}}
	ref := volsync.SnapshotRef{ID: "7-9-x", Term: 7, Seq: 9, Frozen: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	ro := config.ReadOnly{DefaultCommand: []string{"serve"}, Args: []string{"-c", "seq=$DBSUPERVISOR_SEQ", "at=${DBSUPERVISOR_FROZEN}", "cost=5$$", "$NOTHING"},
		Env: map[string]string{"B": "$A.$DBSUPERVISOR_TERM"}, User: "v", StopSignal: "SIGQUIT", Prepare: []string{"fix", "it"}}
	s := readOnlySpec(base, ro, ref)
	if want := []string{"serve", "-c", "seq=9", "at=2026-01-02T03:04:05Z", "cost=5$", ""}; !slices.Equal(s.Command, want) {
		t.Errorf("command %q, want %q", s.Command, want)
	}
	if s.Env["B"] != "1.7" || s.Env["DBSUPERVISOR_SNAPSHOT"] != "7-9-x" || len(base.Env) != 2 {
		t.Errorf("environment %v, the database's own %v", s.Env, base.Env)
	}
	if s.User != "v" || s.StopSignal != "SIGQUIT" || !s.Mounts[0].ReadOnly || base.Mounts[0].ReadOnly {
		t.Errorf("%+v from %+v", s, base)
	}
	base.Command = []string{"serve", "-x"}
	if s := readOnlySpec(base, ro, ref); s.Command[1] != "-x" || len(base.Command) != 2 {
		t.Errorf("the database's own command is not kept: %q", s.Command)
	}
	if p := prepareSpec(s, ro); !slices.Equal(p.Entrypoint, []string{"fix"}) || !slices.Equal(p.Command, []string{"it"}) || p.Network != "none" || p.Name == s.Name {
		t.Errorf("preparation: %+v", p)
	}
}

func TestWriteFiles(t *testing.T) {
	dir, data := t.TempDir(), t.TempDir()
	if os.Geteuid() == 0 {
		if err := os.Chown(data, 1234, 1235); err != nil {
			t.Fatal(err)
		}
	}
	ro := config.ReadOnly{Files: []config.ReadOnlyFile{{Path: "$PGDATA/standby.signal"}, {Path: "/etc/x.conf", Content: "a=$A", Mode: 0o600}}}
	mounts, err := writeFiles(ro, map[string]string{"PGDATA": "/data/pg", "A": "1"}, filepath.Join(dir, "files"), data, "/data")
	if err != nil || len(mounts) != 2 {
		t.Fatal(mounts, err)
	}
	for i, want := range []string{"/data/pg/standby.signal", "/etc/x.conf"} {
		if mounts[i].Target != want || !mounts[i].ReadOnly {
			t.Errorf("%+v, want it at %s, read-only", mounts[i], want)
		}
	}
	if b, err := os.ReadFile(mounts[1].Source); err != nil || string(b) != "a=1" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := writeFiles(config.ReadOnly{Files: []config.ReadOnlyFile{{Path: "$NOTHING"}}}, nil, filepath.Join(dir, "f2"), data, "/data"); err == nil {
		t.Error("a path of nothing was taken")
	}
}
