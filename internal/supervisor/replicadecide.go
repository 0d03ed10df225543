package supervisor

// replicaAction is the next thing to do about this instance's read-only copies.
type replicaAction string

const (
	repNone    replicaAction = ""
	repStart   replicaAction = "start"    // bring up a copy of head and give it the read port
	repDrop    replicaAction = "drop"     // the copy that serves is dead: close the port, clear away
	repRetire  replicaAction = "retire"   // close the port and let its sessions end
	repEnd     replicaAction = "end"      // end the copy whose sessions were let go on
	repStopAll replicaAction = "stop all" // end everything at once
)

// replicaObservation is what decideReplica looks at.
type replicaObservation struct {
	Standby  bool // this instance follows head
	Holder   bool // it holds the term, or is taking it
	Primary  bool // ... and its own database serves
	Stopping bool // the agent is stopped for good

	Serving     bool // a copy has the read port
	ServingDead bool // ... but its container is gone
	Current     bool // ... and it is of the snapshot that the volume holds
	Draining    bool // the copy before it still runs
	Quiet       bool // ... without sessions
	Overdue     bool // ... for longer than they were given

	Clean   bool // the volume is a snapshot
	Due     bool // interval and schedule allow a refresh
	Waiting bool // the last attempt failed a moment ago
}

// decideReplica is the policy of replica mode. It is pure, and apart from decide: a refresh
// takes as long as it takes and holds nothing up that matters for the primary.
//
// At most two databases run on this machine: the copy that serves, and one other. That is the
// one before it, or the one that shall follow it, or, after a takeover, the primary.
func decideReplica(o replicaObservation) (replicaAction, string) {
	switch {
	case o.Stopping:
		if o.Serving || o.Draining {
			return repStopAll, "the agent is stopped"
		}
		return repNone, "stopped"
	case o.Draining && o.Holder:
		return repEnd, "this instance takes over: memory is for the primary"
	case o.Draining && (o.Quiet || o.Overdue):
		return repEnd, "its sessions are over"
	case o.Serving && o.ServingDead:
		return repDrop, "its container has died"
	case o.Serving && o.Primary && !o.Draining:
		return repRetire, "this instance is primary"
	case !o.Standby:
		return repNone, "not a standby"
	case o.Draining:
		return repNone, "sessions of the copy before go on"
	case !o.Clean:
		return repNone, "the local copy is no snapshot"
	case o.Waiting:
		return repNone, "the last attempt failed a moment ago"
	case !o.Serving:
		return repStart, "nothing serves"
	case !o.Current && o.Due:
		return repStart, "head has moved"
	}
	return repNone, "serves"
}
