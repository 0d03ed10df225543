package supervisor

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// TestOrderIsOne: any instances agree on who goes first, so that exactly one of those with the
// same view waits for nobody, and whoever waits does so for a bounded time.
func TestOrderIsOne(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var all []Member
		for i := range 1 + r.IntN(6) {
			all = append(all, Member{
				Instance: fmt.Sprint("i", i), Eligible: true, Newest: r.IntN(8) == 0, BaseSeq: r.Uint64N(3),
				Priority: 1 + r.IntN(3), Zone: []string{"", "z1", "z2"}[r.IntN(3)],
			})
		}
		lost, named := []string{"", "z1", "z2"}[r.IntN(3)], []string{"", "i0", "i3"}[r.IntN(3)]
		at := map[time.Duration]int{}
		for i, m := range all {
			o := observation(mayTake, lostIn(lost))
			if named != "" {
				order(lease.OrderFailover, named, 7)(&o)
			}
			o.Me, o.Others = m, slices.Delete(slices.Clone(all), i, i+1)
			wait, to := turn(o)
			if wait > mostTurns*step {
				t.Fatalf("%+v waits for %s", m, wait)
			}
			if (wait == 0) != (to == "") {
				t.Fatalf("waits %s for %q", wait, to)
			}
			at[wait]++
			for _, b := range all {
				if m.Instance != b.Instance && goesFirst(m, b, named, lost) == goesFirst(b, m, named, lost) {
					t.Fatalf("no order between %+v and %+v (lost %q, named %q)", m, b, lost, named)
				}
			}
		}
		if at[0] != 1 {
			t.Fatalf("%d instances wait for nobody: %+v (lost %q, named %q)", at[0], all, lost, named)
		}
	}
}

// What is not ready yet, or has just failed, leaves the lease to anybody for half a TTL.
func TestTurnOfTheUnprepared(t *testing.T) {
	for name, c := range map[string]struct {
		o    Observation
		want time.Duration
	}{
		"warm":                   {observation(mayTake), 0},
		"cold":                   {observation(mayTake, phase(volsync.PhaseEmpty, "")), ttl / 2},
		"cold, beside another":   {observation(mayTake, phase(volsync.PhaseEmpty, ""), me(seq(0)), rival("b", seq(1))), ttl/2 + step},
		"shaky":                  {observation(mayTake, func(o *Observation) { o.Shaky = true }), ttl / 2},
		"cold, named":            {observation(mayTake, released("a"), phase(volsync.PhaseEmpty, ""), rival("b", seq(9))), ttl / 2},
		"own release comes back": {observation(mayTake, released("b"), ours, phase(volsync.PhaseEmpty, ""), rival("b", seq(9))), 0},
	} {
		if got, _ := turn(c.o); got != c.want {
			t.Errorf("%s: waits %s, want %s", name, got, c.want)
		}
	}
}

// A planned move goes to another zone, and how old a beat is does not decide.
func TestSuccessor(t *testing.T) {
	share, clock := t.TempDir(), boottime.NewFake()
	a := newMembers(fsx.OS{}, share, clock)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(a.beat(Member{Instance: "a"}, "n"))
	for i, m := range []Member{
		{Instance: "b", Eligible: true, BaseSeq: 9, Follows: true, Priority: 100, Zone: "z1"},
		{Instance: "c", Eligible: true, BaseSeq: 7, Follows: true, Priority: 100, Zone: "z2"},
		{Instance: "d", Eligible: true, BaseSeq: 3, Priority: 900, Zone: "z2"},
		{Instance: "e", Eligible: true, BaseSeq: 8, Follows: true, Priority: 90, Zone: "z2"},
	} {
		must(newMembers(fsx.OS{}, share, clock).beat(m, fmt.Sprint("n", i)))
	}
	must(a.refresh("a"))
	for zone, want := range map[string]string{"z1": "c", "z2": "b", "": "b"} {
		if m, ok := a.successor("", zone, time.Minute); !ok || m.Instance != want {
			t.Errorf("successor of an instance in %q is %q, want %q", zone, m.Instance, want)
		}
	}
}

func TestMuster(t *testing.T) {
	r := lease.Record{Term: 1, TTL: lease.Duration(ttl)}
	for silent, want := range map[time.Duration]bool{0: false, ttl/2 - 1: false, ttl / 2: true, ttl: true, 3*ttl - 1: true, 3 * ttl: false} {
		if awaits(r, silent) != want {
			t.Errorf("silent for %s: %v, want %v", silent, !want, want)
		}
	}
	if awaits(lease.Record{TTL: lease.Duration(ttl)}, ttl) {
		t.Error("nobody is waited for before the first term")
	}
}
