package supervisor

import (
	"testing"
	"time"

	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

const (
	ttl  = 10 * time.Second
	step = 2 * time.Second
)

// Observations are built from a few words.
type with func(*Observation)

func observation(ws ...with) Observation {
	o := Observation{
		Me: Member{Instance: "a", BaseSeq: 1, Priority: 100}, Known: true, Waiting: map[Action]bool{},
		Step: step, MostFailovers: 4,
		Record: lease.Record{Term: 7, TTL: lease.Duration(ttl), Holder: lease.Holder{Instance: "b", VolumeID: "vb"}, Head: &lease.Head{ID: "7-1-x", Seq: 1}},
		Volume: volsync.VolumeState{ID: "va", Phase: volsync.PhaseClean, Base: volsync.SnapshotRef{ID: "7-1-x", Seq: 1}},
	}
	for _, w := range ws {
		w(&o)
	}
	return o
}

func holding(o *Observation) {
	o.Holding = true
	o.Record.Holder = lease.Holder{Instance: "a", VolumeID: "va"}
}

func running(o *Observation) {
	o.Container, o.Running, o.OwnTerm = true, true, true
	o.Volume.Phase, o.Volume.LiveTerm = volsync.PhaseLive, o.Record.Term
	o.Baseline = true
}

func live(term uint64) with {
	return func(o *Observation) { o.Volume.Phase, o.Volume.LiveTerm = volsync.PhaseLive, term }
}

func phase(p volsync.Phase, base string) with {
	return func(o *Observation) { o.Volume.Phase, o.Volume.Base.ID = p, base }
}

func noHead(o *Observation)      { o.Record.Head = nil }
func mayTake(o *Observation)     { o.MayTake = true }
func mayTakeLate(o *Observation) { o.MayTake, o.FreeFor = true, ttl/2 }
func expired(o *Observation)     { o.Expired = true }
func stopping(o *Observation)    { o.Stopping = true }
func syncDue(o *Observation)     { o.SyncDue = true }
func paused(o *Observation)      { o.Record.Paused = true }
func never(o *Observation)       { o.Never = true }
func used(o *Observation)        { o.Failovers = o.MostFailovers }
func ours(o *Observation)        { o.Record.Holder = lease.Holder{Instance: "a", VolumeID: "va"} }

// rival adds a standby that lives, as fit as we are.
func rival(name string, edits ...func(*Member)) with {
	return func(o *Observation) {
		m := o.Me
		m.Instance, m.Eligible = name, true
		for _, e := range edits {
			e(&m)
		}
		o.Others = append(o.Others, m)
	}
}

func prio(n int) func(*Member)     { return func(m *Member) { m.Priority = n } }
func seq(n uint64) func(*Member)   { return func(m *Member) { m.BaseSeq = n } }
func zone(z string) func(*Member)  { return func(m *Member) { m.Zone = z } }
func unfit(m *Member)              { m.Eligible = false }
func newest(m *Member)             { m.Newest = true }
func me(e func(*Member)) with      { return func(o *Observation) { e(&o.Me) } }
func lostIn(z string) with         { return func(o *Observation) { o.Record.Holder.Zone = z } }
func freeFor(d time.Duration) with { return func(o *Observation) { o.MayTake, o.FreeFor = true, d } }
func released(to string) with {
	return func(o *Observation) { o.Record.Released, o.Record.Successor = true, to }
}

func engineDown(o *Observation) { o.EngineDown = true }
func engineLost(o *Observation) { o.EngineLost = true }

func job(a Action) with   { return func(o *Observation) { o.Job = a } }
func waits(a Action) with { return func(o *Observation) { o.Waiting[a] = true } }
func order(k lease.OrderKind, to string, term uint64) with {
	return func(o *Observation) { o.Record.Order = &lease.Order{Kind: k, To: to, Term: term} }
}

func TestDecide(t *testing.T) {
	for _, c := range []struct {
		name   string
		o      Observation
		state  State
		action Action
	}{
		{"nothing known", observation(func(o *Observation) { o.Known = false }), StateJoining, ActNone},
		{"resuming leaves a running database alone", observation(running, func(o *Observation) { o.Resuming = true }), StateJoining, ActNone},
		{"agent restart leaves it, too", observation(holding, running, func(o *Observation) { o.Restarting = true }), StateStopped, ActExit},
		{"agent restart waits for the job", observation(holding, running, job(ActSnapshot), func(o *Observation) { o.Restarting = true }), StatePrimary, ActNone},

		{"resuming holder is left alone until its database is adopted", observation(holding, running, func(o *Observation) { o.Resuming = true }), StateJoining, ActNone},
		{"expired while resuming", observation(running, expired, func(o *Observation) { o.Resuming = true }), StateFencing, ActFence},
		{"can't be started here, handed over", observation(holding, live(7), func(o *Observation) { o.CantStart = true }), StateHandoff, ActHandoff},
		{"nor handed over: given up", observation(holding, live(7), func(o *Observation) { o.CantStart, o.CantHand = true, true }), StateHandoff, ActYield},
		{"one that could not start it lets others go first", observation(mayTake, func(o *Observation) { o.Shaky = true }), StateStandby, ActNone},
		{"but takes it if nobody else does", observation(mayTakeLate, func(o *Observation) { o.Shaky = true }), StateStandby, ActAcquire},
		{"stopped standby does not wait for its copy", observation(stopping, phase(volsync.PhaseClean, "old"), job(ActHydrate)), StateStopped, ActExit},

		{"warm standby", observation(), StateStandby, ActNone},
		{"standby behind follows", observation(phase(volsync.PhaseClean, "old")), StateStandby, ActHydrate},
		{"half-applied copy is completed", observation(phase(volsync.PhaseApplying, "7-1-x")), StateStandby, ActHydrate},
		{"cold standby hydrates", observation(phase(volsync.PhaseEmpty, "")), StateStandby, ActHydrate},
		{"warm standby takes a free lease", observation(mayTake), StateStandby, ActAcquire},
		{"cold standby leaves a free lease to warm ones", observation(phase(volsync.PhaseEmpty, ""), mayTake), StateStandby, ActHydrate},
		{"cold standby takes it when nobody else did", observation(phase(volsync.PhaseEmpty, ""), mayTakeLate), StateStandby, ActAcquire},
		{"one that can't read the share doesn't take it", observation(phase(volsync.PhaseEmpty, ""), mayTakeLate, waits(ActHydrate)), StateStandby, ActNone},
		{"nobody takes it while paused", observation(mayTakeLate, paused), StateStandby, ActNone},
		{"a planned move is not stopped by pause", observation(mayTake, paused, func(o *Observation) { o.Record.Released, o.Record.Successor = true, "a" }), StateStandby, ActAcquire},
		{"but the same instance goes on while paused", observation(mayTakeLate, paused, ours, live(7)), StateStandby, ActAcquire},
		{"nofailover never takes it", observation(mayTakeLate, never), StateStandby, ActNone},
		{"nor when it is asked to", observation(mayTakeLate, never, order(lease.OrderFailover, "a", 7)), StateStandby, ActNone},

		{"a rival with the same copy and a later name is not waited for", observation(mayTake, rival("b")), StateStandby, ActAcquire},
		{"one with a higher priority goes first", observation(mayTake, rival("b", prio(101))), StateStandby, ActNone},
		{"but not for long", observation(freeFor(step), rival("b", prio(101))), StateStandby, ActAcquire},
		{"each that goes first has a step of its own", observation(freeFor(step), rival("b", prio(101)), rival("c", prio(102))), StateStandby, ActNone},
		{"up to a bound", observation(freeFor(3*step), rival("b", prio(101)), rival("c", prio(101)), rival("d", prio(101)), rival("e", prio(101))), StateStandby, ActAcquire},
		{"one that could not is not waited for", observation(mayTake, rival("b", prio(101), unfit)), StateStandby, ActAcquire},
		{"the fresher copy comes before the priority", observation(mayTake, rival("b", prio(101), seq(0))), StateStandby, ActAcquire},
		{"a fresher rival goes first whatever its priority", observation(mayTakeLate, phase(volsync.PhaseClean, "old"), me(seq(0)), rival("b", prio(1), seq(1))), StateStandby, ActHydrate},
		{"the last holder's own volume goes before all", observation(mayTake, rival("b", newest)), StateStandby, ActNone},
		{"another zone than the lost primary's goes first", observation(mayTake, lostIn("z1"), me(zone("z1")), rival("b", zone("z2"))), StateStandby, ActNone},
		{"priority comes before the zone", observation(mayTake, lostIn("z1"), me(zone("z1")), rival("b", zone("z2"), prio(99))), StateStandby, ActAcquire},
		{"an unknown zone is no other zone", observation(mayTake, lostIn("z1"), me(zone("z1")), rival("b")), StateStandby, ActAcquire},
		{"the successor that was named waits for nobody", observation(mayTake, released("a"), rival("b", prio(101))), StateStandby, ActAcquire},
		{"whom a person named goes first", observation(mayTake, order(lease.OrderFailover, "b", 7), rival("b", prio(1))), StateStandby, ActNone},
		{"and does not wait itself", observation(mayTake, order(lease.OrderFailover, "a", 7), rival("b", prio(101))), StateStandby, ActAcquire},
		{"an order of an earlier term names nobody", observation(mayTake, order(lease.OrderFailover, "b", 6), rival("b", prio(1))), StateStandby, ActAcquire},
		{"the first term has no order", observation(mayTake, noHead, phase(volsync.PhaseEmpty, ""), rival("b", prio(101)), func(o *Observation) { o.Record = lease.Record{} }), StateStandby, ActAcquire},

		{"too many failovers: a person is asked", observation(mayTakeLate, used), StateStandby, ActNone},
		{"it follows head meanwhile", observation(mayTakeLate, used, phase(volsync.PhaseClean, "old")), StateStandby, ActHydrate},
		{"and takes over when it is asked to", observation(mayTakeLate, used, order(lease.OrderFailover, "a", 7)), StateStandby, ActAcquire},
		{"not when another one is", observation(mayTakeLate, used, order(lease.OrderFailover, "b", 7)), StateStandby, ActNone},
		{"a release needs no person", observation(mayTakeLate, used, released("b")), StateStandby, ActAcquire},
		{"nor does going on with its own data", observation(mayTakeLate, used, ours, live(7)), StateStandby, ActAcquire},
		{"nor the first term of all", observation(mayTake, noHead, phase(volsync.PhaseEmpty, ""), func(o *Observation) { o.Record, o.MostFailovers = lease.Record{}, 0 }), StateStandby, ActAcquire},
		{"a person asks while paused", observation(mayTakeLate, paused, order(lease.OrderFailover, "a", 7)), StateStandby, ActAcquire},
		{"database dies too often, but failovers are used up", observation(holding, live(7), used, func(o *Observation) { o.TooManyDie = true }), StateTakeover, ActStart},
		{"can't be started here, but failovers are used up", observation(holding, live(7), used, func(o *Observation) { o.CantStart, o.CantHand = true, true }), StateTakeover, ActStart},
		{"Docker is lost, but failovers are used up", observation(holding, live(7), used, engineDown, engineLost), StateTakeover, ActStart},
		{"a switchover is done all the same", observation(holding, running, used, order(lease.OrderSwitchover, "b", 7)), StateHandoff, ActHandoff},
		{"and so is a stop", observation(holding, running, used, stopping), StateHandoff, ActHandoff},
		{"a fork is set aside before anything else", observation(mayTakeLate, live(6)), StateStandby, ActSetAside},
		{"a fork of the same term but another volume, too", observation(mayTakeLate, live(7)), StateStandby, ActSetAside},
		{"own newest data stays", observation(ours, live(7)), StateStandby, ActNone},
		{"own newest data goes on", observation(ours, live(7), mayTake), StateStandby, ActAcquire},
		{"container without a term is ended", observation(running), StateFencing, ActFence},
		{"container after expiry is ended", observation(running, expired), StateFencing, ActFence},
		{"also when the register is gone", observation(running, expired, func(o *Observation) { o.Known = false }), StateFencing, ActFence},
		{"ending it interrupts a job", observation(running, expired, job(ActSnapshot)), StateFencing, ActFence},
		{"dead container is removed before acquiring", observation(mayTake, func(o *Observation) { o.Container = true }), StateFencing, ActFence},
		{"stopped standby exits", observation(stopping), StateStopped, ActExit},
		{"stopped, but a container is still here", observation(stopping, running), StateFencing, ActFence},

		{"holder at head starts", observation(holding), StateTakeover, ActStart},
		{"holder behind head hydrates", observation(holding, phase(volsync.PhaseClean, "old")), StateTakeover, ActHydrate},
		{"holder with half a copy hydrates", observation(holding, phase(volsync.PhaseApplying, "7-1-x")), StateTakeover, ActHydrate},
		{"new cluster starts on the empty volume", observation(holding, noHead, phase(volsync.PhaseEmpty, "")), StateTakeover, ActStart},
		{"data without any snapshot is not served", observation(holding, noHead, phase(volsync.PhaseClean, "x")), StateTakeover, ActSetAside},
		{"holder goes on from its own term", observation(holding, live(7)), StateTakeover, ActStart},
		{"holder goes on from its own term before", observation(holding, live(6)), StateTakeover, ActStart},
		{"two terms back somebody else may have written", observation(holding, live(5)), StateTakeover, ActSetAside},
		{"start is not repeated at once", observation(holding, waits(ActStart)), StateTakeover, ActNone},
		{"while it starts", observation(holding, running, job(ActStart)), StateTakeover, ActNone},

		{"primary", observation(holding, running), StatePrimary, ActNone},
		{"baseline first", observation(holding, running, syncDue, func(o *Observation) { o.Baseline = false }), StatePrimary, ActBaseline},
		{"snapshot due", observation(holding, running, syncDue), StatePrimary, ActSnapshot},
		{"retention after snapshots", observation(holding, running, func(o *Observation) { o.RetainDue = true }), StatePrimary, ActRetain},
		{"container of another term is ended", observation(holding, running, func(o *Observation) { o.OwnTerm = false }), StateFencing, ActFence},
		{"died, restarted in place", observation(holding, running, func(o *Observation) { o.Running = false }), StateTakeover, ActStart},
		{"died too often, handed over", observation(holding, live(7), func(o *Observation) { o.TooManyDie = true }), StateHandoff, ActHandoff},
		{"nobody to hand it to: restarted all the same", observation(holding, live(7), waits(ActHandoff), func(o *Observation) { o.TooManyDie = true }), StateTakeover, ActStart},
		{"stop hands off", observation(holding, running, stopping), StateHandoff, ActHandoff},
		{"handing off", observation(holding, running, stopping, job(ActHandoff)), StateHandoff, ActNone},
		{"switchover order", observation(holding, running, order(lease.OrderSwitchover, "b", 7)), StateHandoff, ActHandoff},
		{"order of an earlier term is ignored", observation(holding, running, order(lease.OrderSwitchover, "b", 6)), StatePrimary, ActNone},
		{"order to move here is ignored", observation(holding, running, order(lease.OrderSwitchover, "a", 7)), StatePrimary, ActNone},
		{"forced failover interrupts a snapshot", observation(holding, running, job(ActSnapshot), order(lease.OrderFailover, "b", 7)), StateHandoff, ActYield},
		{"rollback order", observation(holding, running, order(lease.OrderRollback, "", 7)), StatePrimary, ActRollback},
		{"not let in yet: the start is completed", observation(holding, running, syncDue, func(o *Observation) { o.Unserved = true }), StateTakeover, ActStart},
		{"but not beside one that is under way", observation(holding, running, job(ActStart), func(o *Observation) { o.Unserved = true }), StateTakeover, ActNone},
		{"standby without Docker leaves the lease to others", observation(mayTakeLate, engineDown), StateStandby, ActNone},
		{"but follows head", observation(phase(volsync.PhaseClean, "old"), engineDown), StateStandby, ActHydrate},
		{"primary without Docker goes on", observation(holding, running, syncDue, engineDown, engineLost), StatePrimary, ActSnapshot},
		{"dead without Docker: waits for a restart of its daemon", observation(holding, live(7), engineDown), StateTakeover, ActStart},
		{"dead without Docker for long: handed over", observation(holding, live(7), engineDown, engineLost), StateHandoff, ActHandoff},
		{"a dead container that can't be removed is not tried again at once", observation(func(o *Observation) { o.Container = true }, waits(ActFence)), StateFencing, ActNone},
		{"a running one is, whatever failed before", observation(running, waits(ActFence)), StateFencing, ActFence},
		{"rollback has stopped the database", observation(holding, live(7), job(ActRollback)), StatePrimary, ActNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := decide(c.o)
			if got.State != c.state || got.Action != c.action {
				t.Errorf("got %s/%q (%s), want %s/%q", got.State, got.Action, got.Why, c.state, c.action)
			}
		})
	}
}

// TestDecideInvariants goes through every combination of what can be observed and checks
// what must never happen, whatever the table above says.
func TestDecideInvariants(t *testing.T) {
	bools := []bool{false, true}
	phases := []volsync.Phase{volsync.PhaseEmpty, volsync.PhaseApplying, volsync.PhaseClean, volsync.PhaseLive}
	jobs := []Action{ActNone, ActAcquire, ActHydrate, ActSnapshot, ActStart, ActHandoff, ActFence, ActYield}
	orders := []*lease.Order{nil, {Kind: lease.OrderFailover, Term: 7}, {Kind: lease.OrderSwitchover, Term: 7}, {Kind: lease.OrderRollback, Term: 7}}
	n := 0
	for mask := range 1 << 12 {
		bit := func(i int) bool { return mask>>i&1 == 1 }
		for _, ph := range phases {
			for liveTerm := uint64(5); liveTerm <= 7; liveTerm++ {
				for _, jb := range jobs {
					for _, or := range orders {
						for _, own := range bools {
							o := observation()
							o.Known, o.Holding = bit(0), bit(1)
							o.Expired = bit(2) && !o.Holding
							o.Container = bit(3)
							o.Running = bit(4) && o.Container
							o.OwnTerm = bit(5) && o.Container
							o.Stopping, o.MayTake = bit(6), bit(7)
							if bit(8) {
								o.FreeFor = ttl / 2
								used(&o)
								rival("b", prio(101))(&o)
							}
							o.SyncDue, o.Baseline, o.Record.Paused = bit(9), bit(10), bit(11)
							o.Volume.Phase, o.Volume.LiveTerm = ph, liveTerm
							if bit(8) {
								o.Volume.Base.ID = "old"
							}
							o.Job, o.Record.Order = jb, or
							if own || o.Holding {
								ours(&o)
							}
							if o.Holding {
								o.Known = true
							}
							d := decide(o)
							n++
							bad := func(why string) { t.Fatalf("%s: %+v -> %+v", why, o, d) }
							descends := ph == volsync.PhaseLive && liveTerm >= 6 ||
								ph == volsync.PhaseClean && o.Volume.Base.ID == "7-1-x"
							switch d.Action {
							case ActStart:
								if !o.Holding {
									bad("starts a database without the lease")
								}
								if o.Running {
									bad("starts a second database")
								}
								if !descends {
									bad("starts a database on data that is not head's")
								}
							case ActAcquire:
								if o.Holding || o.Container || !o.MayTake {
									bad("acquires when it must not")
								}
								if bit(8) && !o.Record.Continues("a", "va") && (o.Record.Order == nil || o.Record.Order.Kind == lease.OrderRollback) {
									bad("takes over although a person must ask")
								}
								if ph == volsync.PhaseLive && !(liveTerm == 7 && o.Record.Holder.VolumeID == "va") {
									bad("acquires with a fork in the volume")
								}
							case ActHydrate:
								if ph == volsync.PhaseLive || o.Running {
									bad("writes over live data")
								}
							case ActSnapshot, ActRetain, ActRollback:
								if !o.Holding || !o.Baseline {
									bad("commits without lease or baseline")
								}
							case ActSetAside:
								if o.Running {
									bad("moves the volume under a running database")
								}
							case ActExit:
								if o.Running {
									bad("leaves a running database behind")
								}
							}
							if o.Running && !o.Holding && o.Known && d.Action != ActFence {
								bad("lets a database run without the lease")
							}
							if o.Job != ActNone && d.Action != ActNone && d.Action != ActFence && d.Action != ActYield && d.Action != ActExit {
								bad("begins a second job")
							}
						}
					}
				}
			}
		}
	}
	t.Logf("%d observations", n)
}
