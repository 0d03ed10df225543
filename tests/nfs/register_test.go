package nfs_test

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/history"
	"dbsupervisor/internal/lease/leasetest"
)

// longTTL keeps leases from ending during a test.
const longTTL = 10 * time.Minute

// TestRegister: the contract of a register, and internal/lease's own tests of the file backend,
// on the mount (but those that leave files open); then two machines contend.
func TestRegister(t *testing.T) {
	p := build(t)
	s := newServer(t)
	gs := startGuests(t, p, s, "alpha", "beta")
	t.Run("contract", func(t *testing.T) {
		status := ask[int](gs[0], "Exec", Command{
			Args: []string{"/test/lease.test", "-test.v", "-test.timeout=3m",
				"-test.run=^(TestFileRegisterContract|TestContenders|TestPruneIsAscendingAndStops|TestLoadSurvivesPruning|TestDamagedRecordIsRefused|TestSleeperDoesNotWinPrunedNumber)$"},
			Env: []string{"TMPDIR=" + mountPoint, "LEASE_ROUNDS=3"},
		})
		if status != 0 {
			t.Errorf("exit status %d", status)
		}
	})
	id := ask[string](gs[0], "Init", longTTL)
	both[None](gs, "Open", func(i int) any { return Member{Name: gs[i].name, ClusterID: id, TTL: longTTL} })
	t.Run("contention", func(t *testing.T) {
		f := newFight(t, gs, id)
		for range 8 {
			f.round("Fight", 3)
		}
		f.check()
	})
	t.Run("duels", func(t *testing.T) { duel(t, gs, 60) })
}

// TestOneClientID: two machines with one NFS client ID, as cloned images have it. The server
// takes each for the other after a restart and throws its sessions away, again and again; the
// register must not care.
func TestOneClientID(t *testing.T) {
	p := build(t)
	s := newServer(t)
	gs := startGuests(t, p, s, "clone", "clone")
	id := insist[string](gs[0], "Init", longTTL)
	f := newFight(t, gs, id)
	sessions := func() int { return s.counts(t)["CREATE_SESSION"] }
	before := sessions()
	for range 6 {
		f.round("Race", 6)
	}
	f.check()
	// A record is made without an open file, so that a client that has lost its session just
	// asks again: no operation need fail.
	made := sessions() - before
	t.Logf("%d sessions were made anew meanwhile", made)
	if made == 0 {
		t.Error("no session was lost: the clients are not clones")
	}
}

// offset is what turns a guest's clock into this machine's: at least and at most.
type offset struct{ min, max time.Duration }

// measure compares the clocks a few times and takes the tightest bounds.
func measure(g *guest) offset {
	best := offset{min: -1 << 62, max: 1 << 62}
	for range 8 {
		before := boottime.Real{}.Now()
		there := ask[boottime.Instant](g, "Clock", None{})
		after := boottime.Real{}.Now()
		best.min, best.max = max(best.min, before.Sub(there)), min(best.max, after.Sub(there))
	}
	return best
}

// fight is what two guests did to one register.
type fight struct {
	t       *testing.T
	gs      []*guest
	first   lease.Record
	calls   [][]leasetest.Call // by fighter
	winner  map[uint64]int     // of a term
	records map[uint64]lease.Record
	errors  int // operations that certainly had no effect
}

func newFight(t *testing.T, gs []*guest, clusterID string) *fight {
	t.Helper()
	for _, g := range gs {
		insist[None](g, "OpenFighters", Member{Name: g.name, ClusterID: clusterID, TTL: longTTL})
	}
	return &fight{
		t: t, gs: gs, first: insist[lease.Record](gs[0], "Load", None{}),
		calls: make([][]leasetest.Call, contenders*len(gs)), winner: map[uint64]int{}, records: map[uint64]lease.Record{},
	}
}

// round lets all fighters do something a few times, and keeps what they saw.
func (f *fight) round(method string, tries int) {
	f.t.Helper()
	before := []offset{measure(f.gs[0]), measure(f.gs[1])}
	for i, rep := range both[Report](f.gs, method, func(int) any { return tries }) {
		// Clocks that drift apart between two looks at them were between the two.
		after := measure(f.gs[i])
		off := offset{min(before[i].min, after.min), max(before[i].max, after.max)}
		for k, cs := range rep.Calls {
			who := i*contenders + k
			for _, c := range cs {
				c.Begin, c.Return = c.Begin.Add(off.min), c.Return.Add(off.max)
				f.calls[who] = append(f.calls[who], c)
			}
			for _, term := range rep.Terms[k] {
				if other, taken := f.winner[term]; taken {
					f.t.Errorf("term %d has the holders %d and %d", term, other, who)
				}
				f.winner[term] = who
			}
		}
		for _, e := range rep.Errors {
			f.t.Logf("guest %s: without effect: %s", f.gs[i].name, e)
		}
		f.errors += len(rep.Errors)
	}
	for _, r := range insist[[]lease.Record](f.gs[0], "History", None{}) {
		f.records[r.Version] = r
	}
}

// check holds all that was seen against the protocol.
func (f *fight) check() {
	f.t.Helper()
	last := insist[lease.Record](f.gs[1], "Load", None{})
	var all []lease.Record
	for _, v := range slices.Sorted(maps.Keys(f.records)) {
		all = append(all, f.records[v])
	}
	if uint64(len(all)) != last.Version || uint64(len(f.winner)) != last.Term-f.first.Term {
		f.t.Errorf("%d records of %d were seen, %d terms were won, the register says %d", len(all), last.Version, len(f.winner), last.Term)
	}
	if bad := history.Check(all); len(bad) > 0 {
		f.t.Errorf("history: %v", bad)
	}
	n, unknown, swaps := 0, 0, make([]int, len(f.gs))
	for who, cs := range f.calls {
		n += len(cs)
		for _, c := range cs {
			if c.Outcome == "unknown" {
				unknown++
			}
			if c.Swap && c.Outcome == "ok" {
				swaps[who/contenders]++
			}
		}
	}
	if res := leasetest.Linearizable(f.first.Version, f.first.Nonce, f.calls); res != porcupine.Ok {
		f.t.Errorf("%d calls are not linearizable: %v", n, res)
	}
	f.t.Logf("%d versions, %d terms, %d calls, of them %d of unknown outcome, swaps won %v; %d operations without effect",
		last.Version, last.Term, n, unknown, swaps, f.errors)
	if slices.Contains(swaps, 0) {
		f.t.Error("one guest won nothing: this test shows little")
	}
}

// duel lets both guests swap the same record, again and again: one wins each time.
func duel(t *testing.T, gs []*guest, rounds int) {
	won := make([]int, len(gs))
	prev := ask[lease.Record](gs[0], "Load", None{})
	for range rounds {
		shots := both[Shot](gs, "Swap", func(int) any { return Duel{Prev: prev} })
		next := ask[lease.Record](gs[0], "Load", None{})
		other := ask[lease.Record](gs[1], "Load", None{})
		if next.Version != prev.Version+1 || next.Nonce != other.Nonce {
			t.Fatalf("after version %d the guests see %d %s and %d %s", prev.Version, next.Version, next.Nonce, other.Version, other.Nonce)
		}
		winners := 0
		for i, s := range shots {
			switch {
			case s.Outcome == "ok" && s.Record.Nonce != next.Nonce:
				t.Errorf("version %d: guest %d was told that it won, and has not", next.Version, i)
			case s.Outcome == "conflict" && s.Record.Nonce == next.Nonce:
				t.Errorf("version %d: guest %d was told that it lost, and has not", next.Version, i)
			}
			if s.Outcome == "ok" {
				winners++
				won[i]++
			}
		}
		if winners > 1 || winners == 0 && !slices.ContainsFunc(shots, func(s Shot) bool { return s.Outcome == "unknown" }) {
			t.Errorf("version %d: %d winners: %+v", next.Version, winners, shots)
		}
		prev = next
	}
	t.Logf("%d duels, won %v", rounds, won)
}
