package supervisor

import (
	"fmt"
	"time"

	"github.com/robfig/cron/v3"
)

// pace is how far apart snapshots are: as configured, or further, because the share or the
// disk is too slow for that. Nothing queues: what falls due while a snapshot is under way is
// one snapshot.
type pace struct {
	// Interval is the time from the begin of one snapshot to the next; 0 means as configured.
	Interval time.Duration
	// Over says that a snapshot takes longer than the longest interval that is allowed.
	Over bool
	// recent is how long snapshots take: the last one if it took longer than those before,
	// else an average that falls slowly.
	recent time.Duration
}

// after returns the pace after a snapshot that took so long. configured is the interval that
// the schedule asks for, most the longest that may be chosen.
//
// It slows down when a snapshot takes longer than the interval, to twice what it takes, so
// that the share and the disk are free half of the time. It goes back only when a snapshot
// takes less than three quarters of the interval, so that it does not swing between the two.
func (p pace) after(took, configured, most time.Duration) pace {
	most = max(most, configured)
	p.recent = max(took, (3*p.recent+took)/4)
	limit := configured
	if p.Interval > 0 {
		limit = configured * 3 / 4
	}
	p.Over = p.recent > most
	p.Interval = 0
	if p.recent > limit {
		p.Interval = min(max(2*p.recent, configured).Round(100*time.Millisecond), most)
	}
	return p
}

// scheduled is the time from one regular snapshot to the next, as the schedule has it from
// that moment on.
func scheduled(s cron.Schedule, wall time.Time) time.Duration {
	next := s.Next(wall)
	return s.Next(next).Sub(next)
}

// armSchedule computes the next regular snapshot, for one that begins now. Wall time only says
// how long to wait. s.mu is held, or nothing runs yet.
func (s *Supervisor) armSchedule() {
	now, wall := s.clock.Now(), s.clock.Wall()
	s.nextSync = max(now.Add(s.schedule.Next(wall).Sub(wall)), now.Add(s.pace.Interval))
}

// keepPace learns from a snapshot that was taken. It returns what to tell, if there is news.
// s.mu is held.
func (s *Supervisor) keepPace(took time.Duration) (text string) {
	old := s.pace
	s.pace = old.after(took, scheduled(s.schedule, s.clock.Wall()), s.set.Sync.MaxInterval)
	s.nextSync = max(s.nextSync, s.clock.Now().Add(s.pace.Interval-took))
	configured := s.set.Sync.Schedule
	switch p := s.pace; {
	case p.Over && !old.Over:
		return fmt.Sprintf("a snapshot takes %s, longer than sync.max_interval (%s): the share or the disk is too slow", round(p.recent), s.set.Sync.MaxInterval)
	case p.Interval > 0 && old.Interval == 0:
		return fmt.Sprintf("a snapshot takes %s: one every %s instead of %s", round(p.recent), p.Interval, configured)
	case p.Interval == 0 && old.Interval > 0:
		return "back to " + configured
	case old.Over && !p.Over:
		return fmt.Sprintf("a snapshot takes %s again: one every %s", round(p.recent), p.Interval)
	}
	return ""
}

func round(d time.Duration) time.Duration {
	if d < 10*time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(time.Second)
}

// interval is the time between two snapshots that is kept now. s.mu is held.
func (s *Supervisor) interval(wall time.Time) time.Duration {
	if s.pace.Interval > 0 {
		return s.pace.Interval
	}
	return scheduled(s.schedule, wall)
}
