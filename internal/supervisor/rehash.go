package supervisor

import (
	"context"
	"time"
)

// rehashEvery is how often a little of the volume is read to prove the tracker.
const rehashEvery = time.Second

// proveTracker reads sync.rehash bytes of the volume a second while the term is held.
func (s *Supervisor) proveTracker(ctx context.Context) {
	failed := false
	for {
		at := s.clock.Now().Add(rehashEvery)
		if err := s.clock.WaitUntil(ctx, at); err != nil {
			return
		}
		s.mu.Lock()
		rate := int64(s.set.Sync.Rehash)
		s.mu.Unlock()
		if rate == 0 {
			continue
		}
		err := s.volume.Rehash(ctx, rate)
		if err != nil && !failed && ctx.Err() == nil {
			s.log.Warn("the volume can't be read to prove the tracker", "error", err)
		}
		failed = err != nil
	}
}

// noteAlarm puts a tracker that was found wrong into the history.
func (s *Supervisor) noteAlarm(before string) {
	if now := s.volume.Tracking().Alarm; now != "" && now != before {
		s.event("tracking alarm", "", now)
	}
}
