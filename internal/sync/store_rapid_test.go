package sync

import (
	"context"
	"errors"
	"flag"
	"os"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestStoreHistories drives a store through random histories: snapshots, attempts that are
// never committed, takeovers, condemnations, commits that were under way during one, sweeps
// and rollbacks. Whatever is listed must be whole and be what it was.
func TestStoreHistories(t *testing.T) {
	storeChecks(t, 12)
	shm := storeMemDir(t)
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(shm, "")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir) //nolint:errcheck // the test's own directory
		h := newStoreHistory(t, newTestStore(t, nil, dir), rapid.Int64().Draw(rt, "seed"))
		ctx := context.Background()
		policy := Policy{All: 20 * time.Minute, Hourly: 3 * time.Hour, Daily: 48 * time.Hour}
		var pending *Tree // written on top of head, not committed yet
		var pendingModel *storeModel
		k := h.s.NewKeeper()
		later := func() {
			d := rapid.SampledFrom([]time.Duration{time.Minute, time.Minute, 30 * time.Minute, 5 * time.Hour, -time.Hour}).Draw(rt, "later")
			h.now = h.now.Add(d)
		}
		discard := func() {
			if pending != nil && h.head != nil {
				h.model = h.models[h.head.Ref.ID].clone()
			}
			pending = nil
		}
		rt.Repeat(map[string]func(*rapid.T){
			"snapshot": func(rt *rapid.T) {
				discard()
				later()
				h.model.mutate(h.r, rapid.IntRange(0, 15).Draw(rt, "changes"))
				h.moves = k.Moves()
				tree, _, err := h.write()
				if err != nil {
					rt.Fatal(err)
				}
				if err := h.s.CheckNotCondemned(ctx, tree, h.cat); err != nil {
					rt.Fatalf("a moved pack was condemned: %v", err)
				}
				h.commit(tree)
				k.Took(h.moves)
				h.moves = nil
			},
			"compact": func(rt *rapid.T) {
				if h.head == nil {
					rt.Skip("no head")
				}
				if _, err := k.Compact(ctx, CompactRequest{Head: h.head, Catalog: h.cat, Term: h.term,
					Below: rapid.IntRange(20, 101).Draw(rt, "below")}); err != nil {
					rt.Fatal(err)
				}
			},
			"begin": func(rt *rapid.T) {
				if h.head == nil {
					rt.Skip("no head")
				}
				discard()
				h.model.mutate(h.r, rapid.IntRange(0, 15).Draw(rt, "changes"))
				tree, _, err := h.write()
				if err != nil {
					rt.Fatal(err)
				}
				pending, pendingModel = tree, h.model.clone()
			},
			"finish": func(rt *rapid.T) {
				if pending == nil {
					rt.Skip("nothing pending")
				}
				if err := h.s.CheckNotCondemned(ctx, pending, h.cat); err != nil {
					rt.Fatalf("a snapshot in flight was condemned: %v", err)
				}
				h.model = pendingModel
				h.commit(pending)
				pending = nil
			},
			"takeover": func(*rapid.T) {
				discard()
				h.term++
				k.Close()
				k = h.s.NewKeeper()
			},
			"condemn": func(rt *rapid.T) {
				if h.head == nil {
					rt.Skip("no head")
				}
				before, err := h.s.List(ctx, h.head.Ref, h.cat)
				if err != nil {
					rt.Fatal(err)
				}
				k.listed = k.listed && rapid.Bool().Draw(rt, "from memory")
				cat, sum, err := k.Condemn(ctx, CondemnRequest{Head: h.head.Ref, Catalog: h.cat, Policy: policy, Now: h.now, Term: h.term})
				if err != nil {
					rt.Fatal(err)
				}
				if rapid.IntRange(0, 3).Draw(rt, "committed") == 0 {
					return // the catalog is left over
				}
				h.cat = cat
				after, err := h.s.List(ctx, h.head.Ref, h.cat)
				if err != nil {
					rt.Fatal(err)
				}
				if !sum.Unchanged && len(after) != sum.Retained {
					rt.Fatalf("%d snapshots are listed, %d retained", len(after), sum.Retained)
				}
				known := map[string]bool{}
				for _, i := range before {
					known[i.ID] = true
				}
				for _, i := range after {
					if !known[i.ID] {
						rt.Fatalf("%s came back", i.ID)
					}
				}
			},
			"sweep": func(rt *rapid.T) {
				if _, err := k.Sweep(ctx, h.cat, 0); err != nil {
					rt.Fatal(err)
				}
			},
			"rollback": func(rt *rapid.T) {
				if h.head == nil {
					rt.Skip("no head")
				}
				discard()
				list, err := h.s.List(ctx, h.head.Ref, h.cat)
				if err != nil {
					rt.Fatal(err)
				}
				to := list[rapid.IntRange(0, len(list)-1).Draw(rt, "to")]
				target, err := h.s.LoadTree(ctx, to.SnapshotRef)
				if err != nil {
					rt.Fatal(err)
				}
				tree, _, err := h.s.WriteRollback(ctx, RollbackRequest{Head: h.head.Ref, Catalog: h.cat, Target: target,
					Term: h.term, Seq: h.seq(), Frozen: h.now})
				if err != nil {
					rt.Fatal(err)
				}
				h.model = h.models[to.ID].clone()
				h.model.next = tree.NextID
				h.commit(tree)
			},
			"": func(rt *rapid.T) {
				if h.head == nil {
					return
				}
				got, err := h.s.LoadTree(ctx, h.head.Ref)
				if err != nil {
					rt.Fatal(err)
				}
				if err := storeSameTrees(got, h.head); err != nil {
					rt.Fatal(err)
				}
				if pending != nil {
					if err := pendingModel.same(h.s, pending); err != nil {
						rt.Fatalf("the snapshot in flight: %v", err)
					}
				}
			},
		})
		if h.head == nil {
			return
		}
		storeAllWhole(t, h)
		// Two rounds of condemning and sweeping under a new term leave nothing but what is
		// listed, and the two catalogs.
		h.term++
		for range 3 {
			cat, _, err := h.s.Condemn(ctx, h.head.Ref, h.cat, policy, h.now, h.term)
			if err != nil {
				rt.Fatal(err)
			}
			h.cat = cat
			if _, err := h.s.Sweep(ctx, h.cat); err != nil {
				rt.Fatal(err)
			}
		}
		storeAllWhole(t, h)
		storeNoLitter(rt, h)
	})
}

// storeChecks lowers the number of a property's checks, unless it was asked for.
func storeChecks(t *testing.T, n int) {
	f := flag.Lookup("rapid.checks")
	if f == nil || f.Value.String() != f.DefValue {
		return
	}
	if err := f.Value.Set(strconv.Itoa(n)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Value.Set(f.DefValue) })
}

// storeMemDir is a directory in memory where there is one: for tests that are about what is
// written, not about durability.
func storeMemDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "store-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// storeNoLitter checks that the store has no file that nothing listed needs.
func storeNoLitter(t interface{ Fatalf(string, ...any) }, h *storeHistory) {
	ctx := context.Background()
	list, err := h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	needed := map[string]bool{}
	for _, info := range list {
		for next := info.SnapshotRef; ; {
			m, err := h.s.readManifest(ctx, next.Manifest, next.Hash, true)
			if err != nil {
				t.Fatalf("manifest: %v", err)
			}
			needed[next.Manifest] = true
			if m.chain == 0 {
				break
			}
			next = m.parent
		}
		tree, err := h.s.LoadTree(ctx, info.SnapshotRef)
		if err != nil {
			t.Fatalf("load: %v", err)
		}
		for i, n := range countLive(tree) {
			if n > 0 {
				needed[tree.Packs[i].Path] = true
			}
		}
	}
	files, _, err := h.s.listFiles(ctx)
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	catalogs := 0
	for _, f := range files {
		if f.kind == kindCatalog {
			catalogs++
		} else if !needed[f.path()] {
			t.Fatalf("%s is not needed any more", f.path())
		}
	}
	if catalogs > 3 {
		t.Fatalf("%d catalogs", catalogs)
	}
}

// TestStoreExtents lays random extents over each other and compares with plain arrays.
func TestStoreExtents(t *testing.T) {
	gen := rapid.Custom(func(t *rapid.T) []Extent {
		var out []Extent
		var at uint64
		for range rapid.IntRange(0, 8).Draw(t, "n") {
			e := Extent{Kind: ExtentKind(rapid.IntRange(1, 3).Draw(t, "kind")),
				Start: at + rapid.Uint64Range(0, 3).Draw(t, "gap"), Count: rapid.Uint64Range(1, 5).Draw(t, "count")}
			if e.Kind == ExtentData {
				e.Pack = PackID(rapid.IntRange(0, 2).Draw(t, "pack"))
				e.PackBlock = rapid.Uint64Range(0, 9).Draw(t, "block")
			}
			out = append(out, e)
			at = e.Start + e.Count
		}
		return out
	})
	paint := func(m map[uint64]Extent, exts []Extent) {
		for _, e := range exts {
			for i := range e.Count {
				m[e.Start+i] = slice(e, e.Start+i, e.Start+i+1)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		base, over := gen.Draw(t, "base"), gen.Draw(t, "over")
		blocks := rapid.Uint64Range(0, 60).Draw(t, "blocks")
		got := overlay(base, over, blocks)
		want, have := map[uint64]Extent{}, map[uint64]Extent{}
		paint(want, base)
		paint(want, over)
		for b := range want {
			if b >= blocks {
				delete(want, b)
			}
		}
		paint(have, got)
		if len(want) != len(have) {
			t.Fatalf("covers %d blocks instead of %d: %v", len(have), len(want), got)
		}
		for b, e := range want {
			if have[b] != e {
				t.Fatalf("block %d is %v instead of %v", b, have[b], e)
			}
		}
		if err := checkExtents(got, blocks); err != nil {
			t.Fatal(err)
		}
		again, err := parseExtents(nil, appendExtents(nil, got), 3)
		if err != nil {
			t.Fatal(err)
		}
		if len(again) != len(got) {
			t.Fatalf("%v is read back as %v", got, again)
		}
		for i := range got {
			if got[i] != again[i] {
				t.Fatalf("%v is read back as %v", got, again)
			}
		}
		for i := 1; i < len(got); i++ {
			if len(appendExtent([]Extent{got[i-1]}, got[i])) == 1 {
				t.Fatalf("%v and %v are not joined", got[i-1], got[i])
			}
		}
	})
}

func TestStoreIndexes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gen := rapid.Custom(func(t *rapid.T) []uint32 {
			return union(rapid.SliceOf(rapid.Uint32Range(0, 50)).Draw(t, "idx"), nil)
		})
		a, b := gen.Draw(t, "a"), gen.Draw(t, "b")
		got, err := parseIndexes(appendIndexes(nil, a), 51)
		if err != nil || len(minus(a, got))+len(minus(got, a)) > 0 {
			t.Fatalf("%v is read back as %v, %v", a, got, err)
		}
		if c := union(minus(a, minus(a, b)), minus(b, a)); len(minus(c, b))+len(minus(b, c)) > 0 {
			t.Fatalf("from %v to %v gives %v", a, b, c)
		}
		if len(a) > 0 {
			if _, err := parseIndexes(appendIndexes(nil, a), int(a[len(a)-1])); !errors.Is(err, errIndexes) {
				t.Fatalf("a number beyond the limit: %v", err)
			}
		}
	})
}
