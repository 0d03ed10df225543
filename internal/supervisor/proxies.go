package supervisor

import (
	"context"
	"fmt"
	"time"

	"dbsupervisor/internal/api"
)

// Proxies are the clients' proxies that follow this agent (api.Proxies).
type Proxies interface {
	// Hold tells them to keep new connections waiting, and returns when the connections that
	// they have are over or idle, or after most.
	Hold(ctx context.Context, name string, most time.Duration) api.Drained
	// Resume ends that; it is idempotent.
	Resume()
}

// holdProxies comes right before the database is stopped in a planned way, so that whoever
// opens a connection per transaction sees a pause and no error. The caller sees to Resume.
func (s *Supervisor) holdProxies(ctx context.Context) {
	s.mu.Lock()
	most := s.set.Handoff.Drain
	s.mu.Unlock()
	began := s.clock.Now()
	d := s.cfg.Proxies.Hold(ctx, s.nonce(), most)
	if d.Proxies == 0 {
		return
	}
	text := fmt.Sprintf("%d proxies let new connections wait after %s", d.Proxies-d.Silent, round(s.clock.Now().Sub(began)))
	if d.Open > 0 || d.Silent > 0 {
		text += fmt.Sprintf("; cut off: %d connections (%d in use), %d proxies did not answer", d.Open, d.Busy, d.Silent)
	}
	s.event("proxies", "", text)
}
