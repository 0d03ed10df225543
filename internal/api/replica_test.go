package api

import (
	"encoding/json"
	"net/http/httptest"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
)

func TestReplicaWishes(t *testing.T) {
	clock := boottime.NewFake()
	now := clock.Now()
	live := func(fresh boottime.Instant, limit time.Duration) Live {
		return Live{Role: RoleStandby, ServesReads: true, Term: 9, Beat: now,
			Replica: &LiveReplica{Snapshot: "7-93-x", Term: 7, Seq: 93, FreshAt: fresh, MaxAge: limit}}
	}
	old := now.Add(-30 * time.Second)
	for _, tc := range []struct {
		name  string
		live  Live
		query string
		want  int
	}{
		{"any", live(old, 0), "", 200},
		{"young enough", live(old, 0), "max_age=30s", 200},
		{"plain seconds", live(old, 0), "max_age=31", 200},
		{"too old", live(old, 0), "max_age=29s", 503},
		{"unknown age, asked for", live(0, 0), "max_age=1h", 503},
		{"unknown age, not asked for", live(0, 0), "", 200},
		{"its own limit", live(old, 20*time.Second), "", 503},
		{"its own limit is stricter", live(old, 20*time.Second), "max_age=1m", 503},
		{"its own limit, unknown age", live(0, time.Hour), "", 503},
		{"has it", live(old, 0), "at_least=7.93", 200},
		{"has more", live(old, 0), "at_least=6.80", 200},
		{"not yet", live(old, 0), "at_least=7.94", 503},
		{"of a term to come", live(old, 0), "at_least=8.93", 503},
		{"both", live(old, 0), "at_least=7.93&max_age=10s", 503},
		{"no duration", live(old, 0), "max_age=x", 400},
		{"negative", live(old, 0), "max_age=-5s", 400},
		{"no token", live(old, 0), "at_least=7", 400},
		{"nothing known of what is served", Live{Role: RoleStandby, ServesReads: true}, "max_age=1h", 503},
	} {
		w := httptest.NewRecorder()
		newHealth(&fakeAgent{live: tc.live}, clock).Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/replica?"+tc.query, nil))
		if w.Code != tc.want {
			t.Errorf("%s: %d, want %d: %s", tc.name, w.Code, tc.want, w.Body)
		}
	}
	w := httptest.NewRecorder()
	newHealth(&fakeAgent{live: live(old, 0)}, clock).Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/replica", nil))
	if w.Header().Get(HeaderAge) != "30.000" || w.Header().Get(HeaderToken) != "7.93" || w.Header().Get(HeaderSnapshot) != "7-93-x" {
		t.Errorf("headers %v", w.Header())
	}
	var v verdict
	if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil || v.AgeMS == nil || *v.AgeMS != 30000 || v.Token != "7.93" || v.Term != 9 {
		t.Errorf("%+v, %v", v, err)
	}
	// A primary has the newest data there are.
	w = httptest.NewRecorder()
	primary := Live{Role: RolePrimary, Deadline: now.Add(time.Second), DatabaseAnswers: true}
	newHealth(&fakeAgent{live: primary}, clock).Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/read-only?max_age=1ms&at_least=99.99", nil))
	if w.Code != 200 {
		t.Errorf("/read-only of a primary: %d", w.Code)
	}
}

func TestTokenEndpoint(t *testing.T) {
	ask := func(a *fakeAgent, query string) (int, tokenAnswer) {
		w := httptest.NewRecorder()
		newHealth(a, boottime.NewFake()).Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/token"+query, nil))
		var v tokenAnswer
		if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
			t.Error(err)
		}
		return w.Code, v
	}
	if code, v := ask(&fakeAgent{}, ""); code != 200 || v.Token != "3.7" || v.Term != 3 || v.Seq != 7 {
		t.Errorf("%d %+v", code, v)
	}
	if code, v := ask(&fakeAgent{err: ErrNotPrimary}, ""); code != 503 || v.Reason == "" {
		t.Errorf("not primary: %d %+v", code, v)
	}
	if code, _ := ask(&fakeAgent{}, "?wait=never"); code != 400 {
		t.Errorf("bad wait: %d", code)
	}
	if tok, err := ParseToken(Token{Term: 7, Seq: 93}.String()); err != nil || tok != (Token{7, 93}) {
		t.Errorf("%v, %v", tok, err)
	}
}
