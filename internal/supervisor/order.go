package supervisor

import (
	"time"

	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// goesFirst is the order in which standbys take over: whom a person named, whose volume has the
// last term's own data, the fresher copy, the higher priority, another zone than the lost
// primary's, and at last the name, so that any two instances agree.
func goesFirst(a, b Member, named, lost string) bool {
	away := func(m Member) bool { return lost != "" && m.Zone != "" && m.Zone != lost }
	switch {
	case named != "" && (a.Instance == named) != (b.Instance == named):
		return a.Instance == named
	case a.Newest != b.Newest:
		return a.Newest
	case a.BaseSeq != b.BaseSeq:
		return a.BaseSeq > b.BaseSeq
	case a.Priority != b.Priority:
		return a.Priority > b.Priority
	case away(a) != away(b):
		return away(a)
	}
	return a.Instance < b.Instance
}

// mostTurns bounds how many others an instance waits for, one step each, so that it takes over
// in bounded time whatever they do.
const mostTurns = 3

// turn is how long this instance leaves a free lease to others, and to whom first ("" if to
// nobody in particular). It only delays: the lease alone decides who gets it.
func turn(o Observation) (wait time.Duration, to string) {
	r := o.Record
	if r.Term == 0 || r.Released && r.Holder.Instance == o.Me.Instance {
		return 0, ""
	}
	if !warm(o) || o.Shaky {
		wait = time.Duration(r.TTL) / 2
	}
	if r.Released && r.Successor == o.Me.Instance {
		return wait, ""
	}
	named := ""
	if r.Order != nil && r.Order.Term == r.Term {
		named = r.Order.To
	}
	first, turns := o.Me, 0
	for _, m := range o.Others {
		if !m.Eligible || !goesFirst(m, o.Me, named, r.Holder.Zone) {
			continue
		}
		turns++
		if goesFirst(m, first, named, r.Holder.Zone) {
			first = m
		}
	}
	if turns > 0 {
		to = first.Instance
	}
	return wait + time.Duration(min(turns, mostTurns))*o.Step, to
}

// warm says that the volume needs nothing before the database can start on it.
func warm(o Observation) bool {
	r := o.Record
	return r.Head == nil || o.Volume.Phase == volsync.PhaseLive ||
		o.Volume.Phase == volsync.PhaseClean && o.Volume.Base.ID == r.Head.ID
}

// ownTerm says that the record's holder was this instance, on this volume.
func ownTerm(o Observation) bool { return o.Record.Continues(o.Me.Instance, o.Volume.ID) }

// spent says that there were so many failovers within the last hour that the next one takes a
// person.
func spent(o Observation) bool { return o.Failovers >= o.MostFailovers }

// needsPerson says that the lease is free and that this instance leaves it so until a person
// has looked: nobody handed it over, and automatic failovers are used up.
func needsPerson(o Observation) bool {
	r := o.Record
	return o.Known && !o.Holding && o.MayTake && r.Term > 0 && !r.Released && spent(o) &&
		!ownTerm(o) && !r.Asked(o.Me.Instance) && !o.Never
}

// awaits says that the others are being waited for: the holder of the record is silent, but its
// lease is not over yet or not for long. Then every standby announces itself more often.
func awaits(r lease.Record, silent time.Duration) bool {
	ttl := time.Duration(r.TTL)
	return r.Term > 0 && silent >= ttl/2 && silent < 3*ttl
}
