package api

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
)

func newHealth(a Agent, clock boottime.Clock) *Health {
	return &Health{cfg: HealthConfig{Cluster: "shop", Instance: "db-1", Version: "1.2.3", Agent: a, Clock: clock, Log: hclog.NewNullLogger()}}
}

func TestHealthAnswers(t *testing.T) {
	clock := boottime.NewFake()
	now := clock.Now()
	soon := now.Add(time.Second)
	primary := Live{Role: RolePrimary, Term: 3, Deadline: soon, DatabaseAnswers: true, Beat: now}
	with := func(l Live, edit func(*Live)) Live { edit(&l); return l }
	standby := Live{Role: RoleStandby, Term: 3, Beat: now}
	const yes, no = 200, 503
	for _, tc := range []struct {
		name                                                string
		live                                                Live
		primary, replica, readOnly, health, ready, liveness int
	}{
		{"primary", primary, yes, no, yes, yes, yes, yes},
		{"lease over", with(primary, func(l *Live) { l.Deadline = now }), no, no, no, no, no, yes},
		{"never held", with(primary, func(l *Live) { l.Deadline = 0 }), no, no, no, no, no, yes},
		{"database silent", with(primary, func(l *Live) { l.DatabaseAnswers = false }), no, no, no, no, no, yes},
		{"snapshots fail", with(primary, func(l *Live) { l.Failing = "snapshots fail" }), yes, no, yes, no, no, yes},
		{"loop stuck", with(primary, func(l *Live) { l.Beat = now.Add(-staleBeat - 1) }), yes, no, yes, no, no, no},
		{"loop unknown", with(primary, func(l *Live) { l.Beat = 0 }), yes, no, yes, yes, yes, yes},
		{"starting", with(primary, func(l *Live) { l.Role = RoleStarting }), no, no, no, no, no, yes},
		{"handoff", with(primary, func(l *Live) { l.Role = RoleHandoff }), no, no, no, no, no, yes},
		{"fenced", with(primary, func(l *Live) { l.Role = RoleFenced }), no, no, no, no, no, yes},
		{"down", with(primary, func(l *Live) { l.Role = RoleDown }), no, no, no, no, no, yes},
		{"standby", standby, no, no, no, yes, yes, yes},
		{"standby that serves reads", with(standby, func(l *Live) { l.ServesReads = true }), no, yes, yes, yes, yes, yes},
		{"standby that can't follow", with(standby, func(l *Live) { l.Failing = "disk full" }), no, no, no, no, no, yes},
		{"replica not for load balancers", with(standby, func(l *Live) { l.ServesReads, l.NoLoadBalance = true, true }), no, no, no, yes, yes, yes},
		{"primary does not count as replica", with(primary, func(l *Live) { l.ServesReads = true }), yes, no, yes, yes, yes, yes},
	} {
		h := newHealth(&fakeAgent{live: tc.live}, clock).Handler()
		for path, want := range map[string]int{
			"/": tc.primary, "/primary": tc.primary, "/master": tc.primary, "/leader": tc.primary, "/read-write": tc.primary,
			"/replica": tc.replica, "/read-only": tc.readOnly, "/health": tc.health, "/readiness": tc.ready, "/liveness": tc.liveness,
		} {
			for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
				w := httptest.NewRecorder()
				h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
				if w.Code != want {
					t.Errorf("%s: %s %s = %d, want %d", tc.name, method, path, w.Code, want)
				}
				var v verdict
				if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil || v.OK != (want == yes) || v.OK != (v.Reason == "") {
					t.Errorf("%s: %s: body %s, %v", tc.name, path, w.Body, err)
				}
				if w.Header().Get("Cache-Control") != "no-store" {
					t.Errorf("%s may be cached", path)
				}
			}
		}
	}
}

// The deadline is looked at when the question is asked: a supervisor that says nothing new
// because it hangs does not go on being primary.
func TestPrimaryEndsWithTheDeadline(t *testing.T) {
	clock := boottime.NewFake()
	h := newHealth(&fakeAgent{live: Live{Role: RolePrimary, Deadline: clock.Now().Add(time.Second), DatabaseAnswers: true}}, clock).Handler()
	ask := func() int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/primary", nil))
		return w.Code
	}
	if c := ask(); c != 200 {
		t.Fatalf("before: %d", c)
	}
	clock.Advance(time.Second - 1)
	if c := ask(); c != 200 {
		t.Errorf("one nanosecond before: %d", c)
	}
	clock.Advance(1)
	if c := ask(); c != 503 {
		t.Errorf("at the deadline: %d", c)
	}
}

func TestHealthIsReadOnly(t *testing.T) {
	h := newHealth(&fakeAgent{live: Live{Role: RoleStandby}}, boottime.NewFake()).Handler()
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, "/health", nil))
		if w.Code != http.StatusMethodNotAllowed {
			t.Errorf("%s = %d", method, w.Code)
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", pathStatus, nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("the socket's paths are served over TCP: %d", w.Code)
	}
}

func TestHealthServes(t *testing.T) {
	cfg := HealthConfig{Listen: "127.0.0.1:0", Agent: &fakeAgent{live: Live{Role: RoleStandby}}, Clock: boottime.NewFake(), Log: hclog.NewNullLogger()}
	h, err := NewHealth(cfg)
	if err != nil {
		t.Fatal(err)
	}
	taken := cfg
	taken.Listen = h.Addr().String()
	if _, err := NewHealth(taken); err == nil || HintOf(err) == "" {
		t.Errorf("port taken: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	resp, err := http.Get("http://" + h.Addr().String() + "/health") //nolint:noctx // a test
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("%d %s %v", resp.StatusCode, body, err)
	}
	cancel()
	if err := <-done; err == nil || ctx.Err() == nil {
		t.Errorf("Run = %v", err)
	}
}
