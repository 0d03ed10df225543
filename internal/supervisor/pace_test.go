package supervisor

import (
	"testing"
	"time"

	"dbsupervisor/internal/config"
)

func TestPace(t *testing.T) {
	const s, ms = time.Second, time.Millisecond
	for _, tc := range []struct {
		name             string
		from             pace
		took             time.Duration
		configured, most time.Duration
		want             time.Duration
		over             bool
	}{
		{"quick", pace{}, 20 * ms, s, 60 * s, 0, false},
		{"just in time", pace{}, s, s, 60 * s, 0, false},
		{"longer than the interval", pace{}, 1500 * ms, s, 60 * s, 3 * s, false},
		{"as long as the bound", pace{}, 60 * s, s, 60 * s, 60 * s, false},
		{"longer than the bound", pace{}, 61 * s, s, 60 * s, 60 * s, true},
		{"bounded by what is configured", pace{}, 5 * s, 600 * s, 120 * s, 0, false},
		{"a slow one counts at once", pace{Interval: 4 * s, recent: 2 * s}, 10 * s, s, 60 * s, 20 * s, false},
		{"a quick one counts slowly", pace{Interval: 20 * s, recent: 10 * s}, 2 * s, s, 60 * s, 16 * s, false},
		{"not yet back", pace{Interval: 2 * s, recent: 800 * ms}, 800 * ms, s, 60 * s, 1600 * ms, false},
		{"back", pace{Interval: 2 * s, recent: 800 * ms}, 400 * ms, s, 60 * s, 0, false},
		{"back below the bound", pace{Interval: 60 * s, Over: true, recent: 61 * s}, s, s, 60 * s, 60 * s, false},
		{"no bound configured", pace{}, 3 * s, 2 * s, 0, 2 * s, true},
	} {
		got := tc.from.after(tc.took, tc.configured, tc.most)
		if got.Interval != tc.want || got.Over != tc.over {
			t.Errorf("%s: every %s, over %v; want %s, %v", tc.name, got.Interval, got.Over, tc.want, tc.over)
		}
	}
	// Whatever is configured and however slow: it comes back when the share is quick again.
	p := pace{}.after(time.Hour, s, 120*s)
	for n := 0; p != (pace{recent: p.recent}); n++ {
		if n > 100 {
			t.Fatalf("still every %s after %d quick snapshots", p.Interval, n)
		}
		p = p.after(20*ms, s, 120*s)
	}
}

func TestScheduled(t *testing.T) {
	wall := time.Date(2026, 1, 31, 14, 5, 3, 400e6, time.UTC)
	for text, want := range map[string]time.Duration{"@every 1s": time.Second, "@every 1m": time.Minute, "*/5 * * * *": 5 * time.Minute} {
		sched, err := config.ParseSchedule(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := scheduled(sched, wall); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}
