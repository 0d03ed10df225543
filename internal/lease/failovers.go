package lease

import (
	"time"

	"dbsupervisor/internal/boottime"
)

// FailoverWindow is how long the register remembers a failover that no person asked for.
const FailoverWindow = time.Hour

// MostFailovers is how many of them it remembers: the newest.
const MostFailovers = 10

// Asked says that a person's order, left for this term, lets instance take it over.
func (r Record) Asked(instance string) bool {
	o := r.Order
	return o != nil && o.Term == r.Term && (o.Kind == OrderFailover || o.Kind == OrderSwitchover) && (o.To == "" || o.To == instance)
}

// Continues says that instance, with this volume, would only go on where it stopped itself.
func (r Record) Continues(instance, volumeID string) bool {
	return r.Holder.Instance == instance && r.Holder.VolumeID == volumeID && volumeID != ""
}

// unasked says that next's holder takes over from one that fell silent, and that neither that
// one nor a person has asked for it.
func unasked(cur, next Record) bool {
	return cur.Term > 0 && !cur.Released && !cur.Asked(next.Holder.Instance) && !cur.Continues(next.Holder.Instance, next.Holder.VolumeID)
}

// older returns ages after some more time has passed, without what is out of the window. Each
// writer adds what passed on its own clock since it saw, or wrote, the record before, so no two
// clocks are compared; time in which nobody looked is not counted.
func older(ages []Duration, by time.Duration) []Duration {
	var out []Duration
	for _, a := range ages {
		if a += Duration(max(by, 0).Truncate(time.Millisecond)); a < Duration(FailoverWindow) {
			out = append(out, a)
		}
	}
	return out
}

// carried is what a record that follows prev says after some more time: the ages that it took
// over from there, older, and then what it adds.
func carried(prev, next []Duration, by time.Duration) []Duration {
	n := min(len(prev), len(next))
	out := append(older(next[:n], by), next[n:]...)
	return out[max(0, len(out)-MostFailovers):]
}

// recentFailovers is how many failovers the newest record knows at a moment. l.mu is held.
func (l *Lease) recentFailovers(now boottime.Instant) int {
	return len(older(l.rec.Failovers, now.Sub(l.knownAt)))
}
