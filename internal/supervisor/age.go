package supervisor

import (
	"sync"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
)

// ages remembers for each head since when, at the earliest, its data may have been outdated, on
// this machine's clock and without comparing it with another one: a record that vouches for
// its head was made after a moment that is known here (lease.View.MadeAfter), and says how long
// before that the head held everything that had been written. The age is an upper bound, and a
// primary that is silent adds nothing: the age grows.
type ages struct {
	mu    sync.Mutex
	fresh map[string]boottime.Instant
	order []string // of their IDs, oldest first
}

// keepAges is how many heads are remembered; a replica serves one of the last few.
const keepAges = 64

// note takes over what the newest record says.
func (a *ages) note(v lease.View) {
	r := v.Record
	if !v.Loaded || r.Head == nil || r.HeadAge <= 0 || v.MadeAfter == 0 || r.By != r.Holder.Incarnation {
		return
	}
	at := v.MadeAfter.Add(-time.Duration(r.HeadAge))
	a.mu.Lock()
	defer a.mu.Unlock()
	old, known := a.fresh[r.Head.ID]
	if known && at <= old {
		return
	}
	if a.fresh == nil {
		a.fresh = map[string]boottime.Instant{}
	}
	a.fresh[r.Head.ID] = at
	if known {
		return
	}
	a.order = append(a.order, r.Head.ID)
	for len(a.order) > keepAges {
		delete(a.fresh, a.order[0])
		a.order = a.order[1:]
	}
}

// of is the moment at which a snapshot's data were certainly up to date; false: not known.
func (a *ages) of(id string) (boottime.Instant, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.fresh[id]
	return at, ok
}

// vouch tells in a record of ours how old head is (lease.Config.Vouch).
func (s *Supervisor) vouch(next *lease.Record) {
	s.mu.Lock()
	safe, clean := s.safeUntil, s.cleanSeen
	s.cleanSeen = false
	s.mu.Unlock()
	if next.Head == nil || safe == 0 {
		return
	}
	next.HeadAge = ageSince(s.clock.Now(), safe)
	if clean {
		next.CleanSeq++
	}
}

// ageSince rounds up to whole milliseconds and is never 0, which would mean "not known".
func ageSince(now, then boottime.Instant) lease.Duration {
	return lease.Duration(max(now.Sub(then), 0).Truncate(time.Millisecond) + time.Millisecond)
}
