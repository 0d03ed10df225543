package lease_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/history"
)

// seedsEnv sets how many random runs TestRandomRuns does (default 16).
const seedsEnv = "LEASE_SEEDS"

// TestRandomRuns lets three instances do whatever they may, in any order, over a share that
// loses replies, hangs and is slow, with agents that are killed and machines that reboot, and
// checks after every step what everything else relies on.
func TestRandomRuns(t *testing.T) {
	seeds := 16
	if s := os.Getenv(seedsEnv); s != "" {
		var err error
		seeds, err = strconv.Atoi(s)
		must(t, err)
	}
	var mu sync.Mutex
	terms, commits := uint64(0), 0
	t.Run("runs", func(t *testing.T) {
		for seed := range seeds {
			t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, uint64(seed))
				for range 150 {
					w.act()
					w.check()
				}
				mu.Lock()
				defer mu.Unlock()
				terms += w.records[len(w.records)-1].Term
				commits += w.commits
			})
		}
	})
	t.Logf("%d terms, %d commits", terms, commits)
	if !t.Failed() && (terms < uint64(seeds) || commits < seeds) {
		t.Errorf("only %d terms and %d commits: these runs show nothing", terms, commits)
	}
}

type world struct {
	t       *testing.T
	rand    *rand.Rand
	share   lease.FileConfig
	reader  *lease.FileRegister
	nodes   []*actor
	records []lease.Record // the whole history
	commits int
	trace   []string
}

// actor is an instance and what its database does.
type actor struct {
	*node
	basis lease.Record // of a snapshot that is being shipped
	boots int
	// alive is until when the database may write, as the guard knows it; 0: it was stopped.
	alive boottime.Instant
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, rand: rand.New(rand.NewPCG(seed, 7)), share: newShare(t, quickFS{})}
	w.reader = mustOpen(t, w.share)
	for i := range 3 {
		a := &actor{}
		a.node = newNode(t, w.share, string(rune('a'+i)), func(c *lease.Config) {
			c.OpTimeout = 50 * time.Millisecond // the only real time here
			c.Extend = func(_ context.Context, _ uint64, at boottime.Instant) error {
				if w.rand.IntN(20) == 0 {
					return errors.New("the guard does not answer")
				}
				a.alive = at
				return nil
			}
		})
		w.nodes = append(w.nodes, a)
	}
	return w
}

// now is one moment for all: every machine counts the same seconds since the start.
func (w *world) now() boottime.Instant { return w.nodes[0].clock.Now() }

func (w *world) advance(d time.Duration) {
	for _, n := range w.nodes {
		n.clock.Advance(d)
	}
}

func (w *world) fault(n *actor) string {
	switch w.rand.IntN(24) {
	case 0:
		n.share.LoseReply()
		return "lose reply"
	case 1:
		n.share.RepeatRequest()
		return "repeat request"
	case 2:
		n.share.Hang()
		return "hang"
	case 3:
		d := time.Duration(w.rand.IntN(9000)) * time.Millisecond
		n.share.set(func(op fsx.Op, _ string) error {
			if op == fsx.OpSymlink {
				w.advance(d)
			}
			return nil
		}, nil)
		return "slow"
	case 4:
		var left atomic.Int32              // a swap that was given up may still be at work
		left.Store(int32(w.rand.IntN(20))) //nolint:gosec // small
		n.share.set(func(fsx.Op, string) error {
			if left.Add(-1) == 0 {
				return syscall.EIO
			}
			return nil
		}, nil)
		return "one error"
	case 5:
		n.share.set(func(op fsx.Op, _ string) error {
			if op == fsx.OpSymlink {
				return syscall.EIO
			}
			return nil
		}, nil)
		return "no links"
	case 6, 7, 8, 9, 10, 11, 12:
		n.share.Heal()
		return "heal"
	}
	return ""
}

// act does one random thing.
func (w *world) act() {
	n := w.nodes[w.rand.IntN(len(w.nodes))]
	for _, o := range w.nodes {
		if o.View().Holding && w.rand.IntN(2) == 0 {
			n = o
		}
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	if fault := w.fault(n); fault != "" {
		w.trace = append(w.trace, n.cfg.Self.Instance+": "+fault)
		if fault == "hang" {
			cancel()
			ctx, cancel = context.WithTimeout(w.t.Context(), 20*time.Millisecond)
		}
	}
	defer cancel()
	v := n.View()
	var what string
	var err error
	switch k := w.rand.IntN(20); {
	case k < 4:
		d := time.Duration(w.rand.IntN(2500)) * time.Millisecond
		if w.rand.IntN(6) == 0 {
			d += ttl
		}
		what = "advance " + d.String()
		w.advance(d)
	case k < 8:
		what, err = "step", n.Step(ctx)
	case k < 11:
		before := make([]boottime.Instant, len(w.nodes))
		for i, o := range w.nodes {
			before[i] = o.alive
		}
		what, err = "acquire", n.Acquire(ctx, nil)
		if err == nil {
			// Rule 4: long before anybody else acquires, the fence has acted.
			for i, o := range w.nodes {
				if o != n && before[i].Add(margin) > w.now() {
					w.fail("%s acquired while the database of %s may live", n.cfg.Self.Instance, o.cfg.Self.Instance)
				}
			}
		}
	case k < 12:
		what, n.basis = "begin snapshot", v.Record.Clone()
	case k < 16:
		b := n.basis
		if b.Version == 0 || w.rand.IntN(3) > 0 {
			b = v.Record
		}
		seq := uint64(1)
		if b.Head != nil {
			seq = b.Head.Seq + 1
		}
		h := headOf(b.Term, seq)
		gc := w.rand.IntN(4) == 0
		var rec lease.Record
		what = "commit"
		rec, err = n.Commit(ctx, b, func(r *lease.Record) {
			if gc {
				r.GCSeq, r.Catalog = b.GCSeq+1, "catalogs/"+h.ID
			} else {
				r.Head = h
			}
		})
		if err == nil {
			w.commits++
			if !gc && (rec.Head == nil || rec.Head.ID != h.ID) {
				w.fail("committed %s, the record has %+v", h.ID, rec.Head)
			}
		}
	case k < 17:
		succ := []string{"", "a", "b", "c"}[w.rand.IntN(4)]
		if v.Holding {
			n.alive = 0 // the database was stopped before
			what, err = "release to "+succ, n.Release(ctx, succ)
		}
	case k < 18:
		switch w.rand.IntN(4) {
		case 0:
			n.Relinquish()
			what, n.alive = "relinquish", 0
		case 1:
			what, err = "order", n.PutOrder(ctx, lease.Order{ID: "o", Kind: lease.OrderFailover, Term: v.Record.Term})
		case 2:
			what, err = "pause", n.SetPaused(ctx, !v.Record.Paused)
		case 3:
			what, err = "prune", n.cfg.Register.(*lease.FileRegister).Prune(ctx)
		}
	case k < 19:
		n.restart(w.t)
		what, n.basis = "restart", lease.Record{}
		err = n.Resume(ctx)
	default:
		n.boots++
		n.cfg.BootID = fmt.Sprint(n.cfg.Self.Instance, n.boots)
		n.restart(w.t)
		what, n.basis, n.alive = "reboot", lease.Record{}, 0
	}
	w.trace = append(w.trace, fmt.Sprintf("%s: %s: %v (at %s)", n.cfg.Self.Instance, what, err, time.Duration(w.now())))
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	for _, line := range w.trace {
		w.t.Log(line)
	}
	w.t.Fatalf(format, args...)
}

func (w *world) check() {
	holders := 0
	for _, n := range w.nodes {
		if v := n.View(); v.Holding {
			holders++
			if v.Deadline > n.alive {
				w.fail("%s counts on a deadline that the fence does not have", n.cfg.Self.Instance)
			}
		}
	}
	if holders > 1 {
		w.fail("%d holders", holders)
	}
	recs, err := w.reader.History(w.t.Context())
	if err != nil {
		w.fail("history: %v", err)
	}
	for _, r := range recs {
		if len(w.records) == 0 || r.Version > w.records[len(w.records)-1].Version {
			w.records = append(w.records, r)
		}
	}
	if last := w.records[len(w.records)-1]; last.Nonce != recs[len(recs)-1].Nonce {
		w.fail("newest record %d was replaced", last.Version)
	}
	if bad := history.Check(w.records); len(bad) > 0 {
		w.fail("%v", bad)
	}
}
