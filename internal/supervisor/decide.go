// Package supervisor is the agent's state machine: it looks at the register, the local
// volume and the database, decides with a pure function what to do next, and does it.
package supervisor

import (
	"time"

	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// State is what the agent is doing as far as an operator cares.
type State string

// The states of an agent. Only StatePrimary and StateHandoff ever have a database that
// takes writes.
const (
	StateJoining  State = "joining"  // the register has not been read yet
	StateStandby  State = "standby"  // someone else holds the term, or nobody yet
	StateTakeover State = "takeover" // holds the term, prepares volume and database
	StatePrimary  State = "primary"  // holds the term, the database runs
	StateHandoff  State = "handoff"  // holds the term, gives it up in a planned way
	StateFencing  State = "fencing"  // lost the term, ends the database
	StateStopped  State = "stopped"  // handed off or never held; the agent may exit
)

// Action is the next thing to do. At most one runs at a time.
type Action string

// The actions. ActFence and ActYield interrupt the others.
const (
	ActNone     Action = ""
	ActFence    Action = "fence"     // kill the database's container now
	ActAcquire  Action = "acquire"   // raise the term
	ActSetAside Action = "set aside" // move a fork out of the way
	ActHydrate  Action = "hydrate"   // bring the volume to head
	ActBaseline Action = "baseline"  // learn what head holds, so that a capture is a difference
	ActStart    Action = "start"     // start the database on the volume
	ActSnapshot Action = "snapshot"  // capture, ship, commit
	ActHandoff  Action = "handoff"   // stop, last snapshot, release
	ActYield    Action = "yield"     // forced failover: kill, release without a snapshot
	ActRollback Action = "rollback"  // a new head with an older snapshot's content
	ActRetain   Action = "retain"    // condemn or delete old snapshots
	ActExit     Action = "exit"      // nothing of ours runs any more
)

// Observation is everything that decide looks at, taken at one moment.
type Observation struct {
	Me     Member   // what this instance tells the others
	Others []Member // that live; only filled in while the lease is free

	// The register.
	Known     bool          // a record has been read
	Record    lease.Record  // the newest one seen
	Holding   bool          // our term, deadline ahead
	Expired   bool          // we held the term and must not act on it any more
	Resuming  bool          // an earlier start's term may still be ours; not settled yet
	MayTake   bool          // the lease's rules allow an acquisition now
	FreeFor   time.Duration // ... and have for so long; less than 0: they will, so much later
	Step      time.Duration // how long each instance that goes first is given
	Failovers int           // of the last hour that no person asked for

	// The volume.
	Volume   volsync.VolumeState
	Baseline bool // a capture would be computed against Record.Head

	// The database's container on this machine.
	Container  bool // one exists
	Running    bool // ... and runs
	OwnTerm    bool // ... and it belongs to the term that we hold
	Unserved   bool // it runs, but clients have not been let in
	TooManyDie bool // it died too often: the term shall go elsewhere
	CantStart  bool // it can't be started here, and another instance could take over
	CantHand   bool // ... nor can the term be handed over in a planned way
	Shaky      bool // the last attempt to start it here failed: others go first
	EngineDown bool // Docker can't be asked
	EngineLost bool // ... for longer than a restart of its daemon takes

	// Wishes.
	Stopping   bool // an explicit stop of the agent: hand off, then exit
	Restarting bool // the agent exits and leaves the database running
	SyncDue    bool
	RetainDue  bool

	// Attempts that failed a moment ago and are not to be repeated yet.
	Waiting map[Action]bool

	Never         bool   // this instance must not become primary
	MostFailovers int    // in an hour; then a person is asked
	Job           Action // what is under way
}

// Decision is decide's answer. Why goes into the log and the history.
type Decision struct {
	State  State
	Action Action
	Why    string
}

// decide is the whole policy. It is pure: the same observation always gives the same answer.
func decide(o Observation) Decision {
	d := func(s State, a Action, why string) Decision {
		// What is dead already is only cleared away: that can wait.
		interrupts := a == ActFence && (o.Running || !o.Waiting[a]) || a == ActYield && o.Job != ActYield ||
			// A copy that is being made is left half-made; the next start goes on with it.
			a == ActExit && !o.Holding && (o.Job == ActHydrate || o.Job == ActAcquire)
		if !interrupts && (o.Job != ActNone || o.Waiting[a]) {
			a = ActNone
		}
		return Decision{State: s, Action: a, Why: why}
	}
	if o.Restarting && o.Job == ActNone {
		return d(StateStopped, ActExit, "agent restarts and leaves the database as it is")
	}
	if o.Resuming && !o.Expired {
		return d(StateJoining, ActNone, "finding out whether the term of before the restart is still valid")
	}
	if o.Holding {
		return decideHolder(o, d)
	}
	// Not the holder: nothing of ours may run. This comes before everything else.
	if o.Expired && (o.Running || o.Container) {
		return d(StateFencing, ActFence, "term is over")
	}
	if !o.Known {
		if o.Stopping && !o.Running {
			return d(StateStopped, ActExit, "stopped before the register could be read")
		}
		return d(StateJoining, ActNone, "register not read yet")
	}
	if o.Running || o.Container {
		return d(StateFencing, ActFence, "a container is here without a term")
	}
	if o.Stopping {
		return d(StateStopped, ActExit, "stopped while not the holder")
	}
	return decideStandby(o, d)
}

type decider func(State, Action, string) Decision

func decideHolder(o Observation, d decider) Decision {
	order := o.Record.Order
	if order != nil && order.Term != o.Record.Term {
		order = nil
	}
	if spent(o) {
		// To move on its own account is a failover like any other: a person decides.
		o.TooManyDie, o.CantStart, o.EngineLost = false, false, false
	}
	if o.Container && !o.OwnTerm {
		return d(StateFencing, ActFence, "container belongs to another term")
	}
	switch {
	case order != nil && order.Kind == lease.OrderFailover:
		return d(StateHandoff, ActYield, "forced failover ordered")
	case o.Job == ActHandoff:
		return d(StateHandoff, ActNone, "handing off")
	case o.Stopping:
		return d(StateHandoff, ActHandoff, "agent is stopped")
	case order != nil && order.Kind == lease.OrderSwitchover && order.To != o.Me.Instance:
		if !o.Waiting[ActHandoff] {
			return d(StateHandoff, ActHandoff, "switchover ordered")
		}
	case o.TooManyDie:
		if !o.Waiting[ActHandoff] {
			return d(StateHandoff, ActHandoff, "database died too often")
		}
	case o.CantStart && o.CantHand:
		return d(StateHandoff, ActYield, "database can neither be started nor handed over here")
	case o.CantStart:
		if !o.Waiting[ActHandoff] {
			return d(StateHandoff, ActHandoff, "database can't be started here")
		}
	case o.EngineLost && !o.Running:
		if !o.Waiting[ActHandoff] {
			return d(StateHandoff, ActHandoff, "Docker does not come back")
		}
	}
	switch {
	case o.Job == ActStart:
		return d(StateTakeover, ActNone, "database is starting")
	case o.Job == ActRollback:
		return d(StatePrimary, ActNone, "rolling back")
	case !o.Running:
		return decideTakeover(o, d)
	case o.Unserved:
		return d(StateTakeover, ActStart, "database runs, but clients have not been let in")
	case !o.Baseline:
		return d(StatePrimary, ActBaseline, "volume's relation to head must be known before a snapshot")
	case order != nil && order.Kind == lease.OrderRollback && !o.Waiting[ActRollback]:
		return d(StatePrimary, ActRollback, "rollback ordered")
	case o.SyncDue:
		return d(StatePrimary, ActSnapshot, "snapshot due")
	case o.RetainDue:
		return d(StatePrimary, ActRetain, "retention due")
	}
	return d(StatePrimary, ActNone, "database runs")
}

// decideTakeover is for a holder whose database does not run.
func decideTakeover(o Observation, d decider) Decision {
	switch o.Volume.Phase {
	case volsync.PhaseLive:
		// Terms rise by one at each acquisition: if the volume was live in the term before
		// ours, or in ours, nobody else can have written since.
		if o.Volume.LiveTerm == o.Record.Term || o.Volume.LiveTerm+1 == o.Record.Term {
			return d(StateTakeover, ActStart, "volume continues from its own last term")
		}
		return d(StateTakeover, ActSetAside, "volume has writes that head does not descend from")
	case volsync.PhaseClean:
		if o.Record.Head != nil && o.Volume.Base.ID == o.Record.Head.ID {
			return d(StateTakeover, ActStart, "volume is at head")
		}
	case volsync.PhaseEmpty:
		if o.Record.Head == nil {
			return d(StateTakeover, ActStart, "new cluster")
		}
	}
	if o.Record.Head == nil {
		return d(StateTakeover, ActSetAside, "volume has data but the cluster has no snapshot")
	}
	return d(StateTakeover, ActHydrate, "volume is behind head")
}

func decideStandby(o Observation, d decider) Decision {
	r, own := o.Record, ownTerm(o)
	if o.Volume.Phase == volsync.PhaseLive && !(own && o.Volume.LiveTerm == r.Term) {
		return d(StateStandby, ActSetAside, "another instance has held the term since this volume was written")
	}
	// Paused forbids what happens by itself, not what a person asks for.
	named := r.Released && r.Successor == o.Me.Instance
	eligible := !o.Never && !o.EngineDown && (!r.Paused || own || named || r.Asked(o.Me.Instance)) && !needsPerson(o)
	wait, to := turn(o)
	if eligible && o.MayTake && !o.Waiting[ActHydrate] && o.FreeFor >= wait {
		// An acquisition doesn't touch the volume, so it need not wait for a hydration
		// that is under way; but the slot is taken then, and that is reported as ActNone.
		return d(StateStandby, ActAcquire, "lease is free")
	}
	if !warm(o) {
		return d(StateStandby, ActHydrate, "following head")
	}
	switch {
	case eligible && o.MayTake && to != "":
		return d(StateStandby, ActNone, "leaves the free lease to "+to)
	case needsPerson(o):
		return d(StateStandby, ActNone, "lease is free, but a person must ask for the next failover")
	}
	return d(StateStandby, ActNone, "warm")
}
