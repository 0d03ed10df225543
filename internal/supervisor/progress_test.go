package supervisor

import (
	"testing"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
)

func TestProgress(t *testing.T) {
	clock := boottime.NewFake()
	p := &progress{clock: clock}
	if p.get() != nil {
		t.Error("progress of nothing")
	}
	set := func(phase string, done int64) { p.set(api.Progress{Phase: phase, Done: done, Total: 1000}) }
	set("restoring", 0)
	if g := p.get(); g.BytesPerSecond != nil || g.RemainingSeconds != nil || g.Started.IsZero() {
		t.Errorf("a rate of nothing: %+v", g)
	}
	started := p.get().Started
	for i := range int64(20) { // 10 a second
		clock.Advance(time.Second)
		set("restoring", 10*(i+1))
	}
	g := p.get()
	if g.BytesPerSecond == nil || *g.BytesPerSecond != 10 || *g.RemainingSeconds != 80 || !g.Started.Equal(started) {
		t.Errorf("after 200 of 1000 at 10/s: %+v", g)
	}
	for i := range int64(15) { // it speeds up, and what was before is forgotten
		clock.Advance(time.Second)
		set("restoring", 200+40*(i+1))
	}
	if g = p.get(); *g.BytesPerSecond != 40 || *g.RemainingSeconds != 5 {
		t.Errorf("after 800 of 1000 at 40/s: %v %v", *g.BytesPerSecond, *g.RemainingSeconds)
	}
	clock.Advance(30 * time.Second) // it hangs
	if g = p.get(); *g.BytesPerSecond != 10 || *g.RemainingSeconds != 20 {
		t.Errorf("hanging: %v %v", *g.BytesPerSecond, *g.RemainingSeconds)
	}
	set("verifying", 0)
	if g = p.get(); g.BytesPerSecond != nil || !g.Started.After(started) {
		t.Errorf("a new phase: %+v", g)
	}
	p.clear()
	if p.get() != nil {
		t.Error("progress after the end")
	}
}
