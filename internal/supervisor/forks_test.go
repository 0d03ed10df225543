package supervisor

import (
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	volsync "dbsupervisor/internal/sync"
)

// TestForkAges: forks age by the clock of this machine that nobody sets, and only a little by
// the time of day, for the time between two agents.
func TestForkAges(t *testing.T) {
	dir := t.TempDir()
	forks := []volsync.Fork{{Name: "a"}}
	wall := time.Date(2026, 1, 31, 14, 0, 0, 0, time.UTC)
	agent := newForkAges(fsx.OS{}, dir)
	now := boottime.Instant(time.Hour)
	age := func(want time.Duration) {
		t.Helper()
		ages, err := agent.count(forks, now, wall)
		if err != nil {
			t.Fatal(err)
		}
		if ages["a"] != want {
			t.Fatalf("age %s, want %s", ages["a"], want)
		}
	}
	age(0)
	now = now.Add(time.Hour)
	wall = wall.AddDate(10, 0, 0) // somebody sets the clock
	age(time.Hour)
	agent, now = newForkAges(fsx.OS{}, dir), boottime.Instant(time.Second) // the machine boots
	wall = wall.Add(3 * time.Hour)
	age(4 * time.Hour)
	agent, wall = newForkAges(fsx.OS{}, dir), wall.AddDate(10, 0, 0) // again, with a wrong clock
	age(28 * time.Hour)
	agent, wall = newForkAges(fsx.OS{}, dir), wall.AddDate(-20, 0, 0)
	age(28 * time.Hour)
	now = now.Add(time.Hour)
	forks = append(forks, volsync.Fork{Name: "b"})
	age(29 * time.Hour)
	forks = forks[1:]
	now = now.Add(time.Hour)
	if ages, err := agent.count(forks, now, wall); err != nil || ages["b"] != time.Hour || len(ages) != 1 {
		t.Errorf("%v, %v", ages, err)
	}
}
