package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// storeAges is a catalog that grows by snapshots without files.
type storeAges struct {
	t   *testing.T
	c   *catalog
	seq uint64
	p   Policy
}

func (a *storeAges) add(frozen time.Time) {
	a.t.Helper()
	a.seq++
	o := objectName{kind: kindManifest, term: 1, seq: a.seq, rand: "0123456789abcdef"}
	m := &manifest{}
	m.info.SnapshotRef = SnapshotRef{ID: o.id(), Manifest: o.path(), Term: 1, Seq: a.seq, Frozen: frozen}
	next := &catalog{}
	if err := next.follow(a.c, []*manifest{m}); err != nil {
		a.t.Fatal(err)
	}
	next.expire(a.p)
	if err := next.trim(); err != nil {
		a.t.Fatal(err)
	}
	a.c = next
}

// ages are how long before the newest the others were frozen.
func (a *storeAges) ages() []time.Duration {
	newest := a.c.entries[len(a.c.entries)-1].info.Frozen
	var out []time.Duration
	for _, e := range slices.Backward(a.c.entries) {
		out = append(out, newest.Sub(e.info.Frozen))
	}
	return out
}

func storeCountAges(ages []time.Duration, from, to time.Duration) int {
	n := 0
	for _, a := range ages {
		if from <= a && a < to {
			n++
		}
	}
	return n
}

func storeDefaultPolicy() Policy {
	return Policy{All: time.Hour, Hourly: 24 * time.Hour, Daily: 7 * 24 * time.Hour}
}

func TestRetentionClasses(t *testing.T) {
	a := &storeAges{t: t, c: &catalog{}, p: storeDefaultPolicy()}
	now := time.Date(2024, 2, 25, 13, 37, 0, 0, time.UTC)
	check := func() {
		t.Helper()
		ages := a.ages()
		if n := storeCountAges(ages, 0, time.Hour+1); n != 61 {
			t.Fatalf("%d snapshots of the last hour: %v", n, ages)
		}
		for h := time.Hour; h < 24*time.Hour; h += time.Hour {
			if n := storeCountAges(ages, h, h+time.Hour+time.Minute); n < 1 || n > 3 {
				t.Fatalf("%d snapshots about %v old: %v", n, h, ages)
			}
		}
		for d := 24 * time.Hour; d < 6*24*time.Hour; d += 24 * time.Hour {
			if n := storeCountAges(ages, d, d+24*time.Hour); n < 1 || n > 2 {
				t.Fatalf("%d snapshots about %v old: %v", n, d, ages)
			}
		}
		if last := ages[len(ages)-1]; last > 7*24*time.Hour || len(ages) > 61+25+8 {
			t.Fatalf("%d snapshots, the oldest is %v old", len(ages), last)
		}
	}
	for i := range 9 * 24 * 60 {
		now = now.Add(time.Minute)
		a.add(now)
		if i > 8*24*60 && i%97 == 0 {
			check()
		}
	}
	check()
	// A quiet year ages the history by a day only.
	before := len(a.c.entries)
	now = now.Add(300 * 24 * time.Hour)
	a.add(now)
	if n := len(a.c.entries); n < 7 {
		t.Errorf("%d of %d snapshots are left after a quiet year", n, before)
	}
}

// TestRetentionWrongClock: one snapshot from a machine whose clock is years off must not
// cost the history, and must not stop its ageing.
func TestRetentionWrongClock(t *testing.T) {
	for name, wrong := range map[string]time.Time{
		"future": time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		"past":   time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		a := &storeAges{t: t, c: &catalog{}, p: storeDefaultPolicy()}
		now := time.Date(2024, 2, 25, 0, 0, 0, 0, time.UTC)
		run := func(n int) {
			for range n {
				now = now.Add(10 * time.Minute)
				a.add(now)
			}
		}
		run(3 * 24 * 6)
		a.add(wrong)
		run(2)
		days := map[string]bool{}
		for _, e := range a.c.entries {
			days[e.info.Frozen.Format(time.DateOnly)] = true
		}
		for _, d := range []string{"2024-02-25", "2024-02-26", "2024-02-27"} {
			if !days[d] {
				t.Errorf("%s: %s is lost: %v", name, d, days)
			}
		}
		run(9 * 24 * 6)
		for _, e := range a.c.entries {
			if e.info.Frozen.Equal(wrong) || e.info.Frozen.Before(now.Add(-9*24*time.Hour)) {
				t.Errorf("%s: %v is kept for ever", name, e.info.Frozen)
			}
		}
	}
}

func TestRetentionKeepsOnlyHead(t *testing.T) {
	a := &storeAges{t: t, c: &catalog{}}
	now := time.Date(2024, 2, 25, 0, 0, 0, 0, time.UTC)
	for range 5 {
		now = now.Add(time.Minute)
		a.add(now)
	}
	if n := len(a.c.entries); n != 1 {
		t.Errorf("%d snapshots are kept by an empty policy", n)
	}
}

// TestCondemnTwoSteps: nothing is removed before a sweep of a catalog that says so, and then
// only what that one says.
func TestCondemnTwoSteps(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 41)
	for range 12 {
		h.step(t, 15, 10*time.Minute)
	}
	list := func() []string {
		files, unknown, err := h.s.listFiles(ctx)
		if err != nil || unknown != 0 {
			t.Fatalf("%d unknown files: %v", unknown, err)
		}
		var out []string
		for _, f := range files {
			out = append(out, f.path())
		}
		slices.Sort(out)
		return out
	}
	before := list()
	cat, sum, err := h.s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{All: 20 * time.Minute}, h.now, h.term)
	if err != nil {
		t.Fatal(err)
	}
	if sum.Retained != 3 || sum.Packs == 0 || sum.Manifests == 0 || sum.New != sum.Packs+sum.Manifests || sum.Unchanged {
		t.Errorf("summary is %+v", sum)
	}
	if after := list(); len(after) != len(before)+1 {
		t.Errorf("Condemn left %d files of %d", len(after), len(before))
	}
	// An uncommitted catalog changes nothing: the old list still is complete.
	storeAllWhole(t, h)
	h.cat = cat
	storeAllWhole(t, h)
	// Snapshots that come after the condemnation are not its business.
	h.step(t, 15, time.Minute)
	st, err := h.s.Sweep(ctx, cat)
	if err != nil || st.Removed != sum.Packs+sum.Manifests || st.Gone != 0 {
		t.Errorf("sweep is %+v, %v; condemned were %+v", st, err, sum)
	}
	storeAllWhole(t, h)
	if st, err = h.s.Sweep(ctx, cat); err != nil || st.Removed != 0 || st.Gone != sum.Packs+sum.Manifests {
		t.Errorf("second sweep is %+v, %v", st, err)
	}
	if st, err := h.s.Sweep(ctx, CatalogRef{}); err != nil || st != (SweepStats{}) {
		t.Errorf("sweep of nothing is %+v, %v", st, err)
	}
	// What has been swept leaves the list of the condemned; then there is nothing to decide.
	next, sum, err := h.s.Condemn(ctx, h.head.Ref, h.cat, Policy{All: time.Hour}, h.now, h.term)
	if err != nil || sum.Unchanged || sum.New != 0 || sum.Packs+sum.Manifests != 0 {
		t.Fatalf("summary is %+v, %v", sum, err)
	}
	h.cat = next
	again, sum, err := h.s.Condemn(ctx, h.head.Ref, h.cat, Policy{All: time.Hour}, h.now, h.term)
	if err != nil || !sum.Unchanged || again != next {
		t.Errorf("summary is %+v, %v", sum, err)
	}
	storeAllWhole(t, h)
}

// TestCondemnOrphans: what is in flight stays, what can't be committed any more goes.
func TestCondemnOrphans(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 42)
	h.term = 5
	for range 3 {
		h.step(t, 15, time.Minute)
	}
	put := func(o objectName) string {
		if err := os.WriteFile(filepath.Join(dir, o.path()), []byte("half written"), 0o600); err != nil {
			t.Fatal(err)
		}
		return o.path()
	}
	gone := map[string]bool{}
	stay := map[string]bool{}
	for _, k := range []objectKind{kindPack, kindManifest} {
		gone[put(objectName{kind: k, term: 4, seq: 9, rand: "00000000000000aa"})] = true // older term, whatever sequence
		gone[put(objectName{kind: k, term: 5, seq: 3, rand: "00000000000000ab"})] = true // head has that sequence
		stay[put(objectName{kind: k, term: 5, seq: 4, rand: "00000000000000ac"})] = true // the next snapshot
		stay[put(objectName{kind: k, term: 6, seq: 1, rand: "00000000000000ad"})] = true // our successor's
	}
	gone[put(objectName{kind: kindCatalog, term: 4, seq: 9, rand: "00000000000000ae"})] = true
	gone[put(objectName{kind: kindCatalog, term: 5, seq: 2, rand: "00000000000000af"})] = true
	stay[put(objectName{kind: kindCatalog, term: 5, seq: 3, rand: "00000000000000ba"})] = true // head hasn't moved since
	for _, p := range []string{"packs/00/README", "manifests/.nfs0001", "lost+found"} {
		if err := os.WriteFile(filepath.Join(dir, p), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cat, sum, err := h.s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{All: time.Hour}, h.now, h.term)
	if err != nil || sum.Unknown != 2 {
		t.Fatalf("summary is %+v, %v", sum, err)
	}
	h.cat = cat
	c, err := h.s.readCatalog(ctx, cat)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range c.condemned {
		if !gone[p] {
			t.Errorf("%s is condemned", p)
		}
		delete(gone, p)
	}
	if len(gone) > 0 {
		t.Errorf("not condemned: %v", gone)
	}
	if _, err := h.s.Sweep(ctx, cat); err != nil {
		t.Fatal(err)
	}
	for p := range stay {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			t.Error(err)
		}
	}
	for _, p := range []string{"packs/00/README", "manifests/.nfs0001", "lost+found"} {
		if _, err := os.Stat(filepath.Join(dir, p)); err != nil {
			t.Error(err)
		}
	}
	storeAllWhole(t, h)
}

// TestCondemnWrongHead: a head that doesn't descend from the catalog's is refused.
func TestCondemnWrongHead(t *testing.T) {
	ctx := context.Background()
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 43)
	h.step(t, 10, time.Minute)
	first := h.head
	h.step(t, 10, time.Minute)
	cat, _, err := h.s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{All: time.Hour}, h.now, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.s.Condemn(ctx, first.Ref, cat, Policy{}, h.now, 1); !errors.Is(err, ErrDamaged) {
		t.Errorf("Condemn says %v", err)
	}
	if _, err := h.s.List(ctx, first.Ref, cat); !errors.Is(err, ErrDamaged) {
		t.Errorf("List says %v", err)
	}
	if got, sum, err := h.s.Condemn(ctx, SnapshotRef{}, CatalogRef{}, Policy{}, h.now, 1); err != nil || !sum.Unchanged || got.Name != "" {
		t.Errorf("Condemn without a head: %+v, %v", sum, err)
	}
}

// TestCatalogContradiction: a catalog that condemns what it retains is never followed.
func TestCatalogContradiction(t *testing.T) {
	ctx := context.Background()
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 44)
	h.step(t, 20, time.Minute)
	for _, victim := range []string{h.head.Ref.Manifest, h.head.Packs[0].Path} {
		ms, err := h.s.walk(ctx, h.head.Ref, SnapshotRef{}, true)
		if err != nil {
			t.Fatal(err)
		}
		c := &catalog{name: objectName{kind: kindCatalog, term: 1, seq: 1, rand: "0123456789abcde" + fmt.Sprint(len(victim)%10)}, head: h.head.Ref}
		if err := c.follow(&catalog{}, ms); err != nil {
			t.Fatal(err)
		}
		c.condemned = []string{victim}
		ref, err := h.s.writeCatalog(c, 0, &createdFiles{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.s.Sweep(ctx, ref); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), victim) {
			t.Errorf("Sweep says %v", err)
		}
	}
	storeAllWhole(t, h)
}

func TestScan(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 45)
	for range 5 {
		h.step(t, 15, 10*time.Minute)
	}
	// An attempt that was never committed, on top of the head's parent's successor.
	h.model.mutate(h.r, 5)
	lost, _, err := h.write()
	if err != nil {
		t.Fatal(err)
	}
	h.model = h.models[h.head.Ref.ID].clone()
	h.term++
	h.step(t, 15, time.Minute)
	r, err := h.s.Scan(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ids := func(infos []SnapshotInfo) (out []string) {
		for _, i := range infos {
			out = append(out, i.ID)
		}
		return out
	}
	all, err := h.s.List(ctx, h.head.Ref, CatalogRef{})
	if err != nil {
		t.Fatal(err)
	}
	// The head itself is not proven: nothing names it yet.
	if !slices.Equal(ids(r.Committed), ids(all[1:])) {
		t.Errorf("committed are %v instead of %v", ids(r.Committed), ids(all[1:]))
	}
	if !slices.Equal(ids(r.Unproven), []string{h.head.Ref.ID, lost.Ref.ID}) || r.Catalog.Name != "" || len(r.Problems) > 0 {
		t.Errorf("report is %+v", r)
	}
	// A catalog proves it, and says what the history is.
	cat, _, err := h.s.Condemn(ctx, h.head.Ref, CatalogRef{}, Policy{All: 15 * time.Minute}, h.now, h.term)
	if err != nil {
		t.Fatal(err)
	}
	h.cat = cat
	if _, err := h.s.Sweep(ctx, cat); err != nil {
		t.Fatal(err)
	}
	h.step(t, 15, time.Minute)
	h.step(t, 15, time.Minute)
	if err := os.WriteFile(filepath.Join(dir, objectName{kind: kindManifest, term: 9, seq: 9, rand: "0123456789abcdef"}.path()), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err = h.s.Scan(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if r.Catalog != cat || len(r.Problems) != 1 || len(r.Unproven) != 1 || r.Unproven[0].ID != h.head.Ref.ID ||
		r.Unproven[0].Parent != r.Committed[0].ID {
		t.Errorf("report is %+v", r)
	}
	// What a rescue would write into a new register works, whichever head it takes.
	for _, head := range []SnapshotRef{r.Committed[0].SnapshotRef, r.Unproven[0].SnapshotRef} {
		list, err := h.s.List(ctx, head, r.Catalog)
		if err != nil {
			t.Fatal(err)
		}
		rep, err := h.s.Verify(ctx, list, nil)
		if err != nil || len(rep.Problems) > 0 || rep.NewestWhole.ID != head.ID {
			t.Errorf("report is %+v, %v", rep, err)
		}
	}
	// Without any catalog left, a new one is made from what is there.
	if err := os.Remove(filepath.Join(dir, cat.Name)); err != nil {
		t.Fatal(err)
	}
	if _, err := h.s.List(ctx, h.head.Ref, CatalogRef{}); !errors.Is(err, ErrMissing) {
		t.Errorf("list without catalog: %v", err)
	}
	if h.cat, err = h.s.Recatalog(ctx, h.head.Ref, h.now, h.term); err != nil {
		t.Fatal(err)
	}
	list, err := h.s.List(ctx, h.head.Ref, h.cat)
	if err != nil || len(list) < 3 || list[0].ID != h.head.Ref.ID {
		t.Fatalf("list has %d snapshots: %v", len(list), err)
	}
	storeAllWhole(t, h)
	h.step(t, 15, time.Minute)
	if _, _, err := h.s.Condemn(ctx, h.head.Ref, h.cat, Policy{All: time.Hour}, h.now, h.term); err != nil {
		t.Error(err)
	}
}

// storeBigBase is a history whose full manifest is so large that deltas pile up.
func storeBigBase(t *testing.T) *storeHistory {
	h := newStoreHistory(t, newTestStore(t, nil, storeMemDir(t)), 46)
	for range 300 {
		h.model.add(fmt.Sprintf("file-%x", h.r.Int63()), Inode{Type: TypeRegular, MTime: h.r.Int63()})
	}
	h.step(t, 0, time.Minute)
	return h
}

// TestStoreChainIsBounded: a reader never has to go through more than the allowed deltas.
func TestStoreChainIsBounded(t *testing.T) {
	h := storeBigBase(t)
	var chains []int
	for range 10 {
		h.model.inodes[1].meta.MTime++
		h.step(t, 0, time.Minute)
		chains = append(chains, h.head.meta.chain)
	}
	if want := []int{1, 2, 3, 4, 5, 6, 0, 1, 2, 3}; !slices.Equal(chains, want) {
		t.Errorf("chains are %v instead of %v", chains, want)
	}
	storeAllWhole(t, h)
}

// TestCondemnDroppedPack: a pack that a delta stopped referring to is condemned although no
// full manifest has been written since.
func TestCondemnDroppedPack(t *testing.T) {
	ctx := context.Background()
	h := storeBigBase(t)
	f := h.model.inodes[h.model.add("f", Inode{Type: TypeRegular, Size: 2 * BlockSize})]
	f.blocks = []storeBlock{{ExtentData, strings.Repeat("a", BlockSize)}, {ExtentData, strings.Repeat("b", BlockSize)}}
	h.step(t, 0, time.Minute)
	pack := h.head.Packs[len(h.head.Packs)-1].Path
	for i, gone := range []bool{false, true} {
		f = h.model.inodes[h.model.names["f"]] // the second block goes last
		f.blocks[i] = storeBlock{ExtentData, strings.Repeat("c", BlockSize)}
		h.step(t, 0, time.Minute)
		if h.head.meta.chain == 0 {
			t.Fatal("the manifest is full")
		}
		cat, _, err := h.s.Condemn(ctx, h.head.Ref, h.cat, Policy{}, h.now, h.term)
		if err != nil {
			t.Fatal(err)
		}
		h.cat = cat
		c, err := h.s.readCatalog(ctx, cat)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(c.condemned, pack) != gone {
			t.Errorf("step %d: pack is condemned: %v", i, !gone)
		}
		if _, err := h.s.Sweep(ctx, cat); err != nil {
			t.Fatal(err)
		}
		storeAllWhole(t, h)
	}
}

// TestStoreShrinkAndGrow: what a shorter size cut off does not come back when later deltas
// are laid over a base, and a chain that would need it is refused.
func TestStoreShrinkAndGrow(t *testing.T) {
	dir := Inode{Type: TypeDir}
	file := func(blocks int64) Inode { return Inode{Type: TypeRegular, Size: blocks * BlockSize} }
	data := func(start, count, at uint64) []Extent {
		return []Extent{{Kind: ExtentData, Start: start, Count: count, PackBlock: at}}
	}
	for _, covered := range []bool{true, false} {
		b := buildFrom(nil)
		if err := b.apply(&treeChange{packs: make([]PackRef, 1), nextID: 2, names: map[string]FileID{"": 0, "f": 1},
			inodes: map[FileID]*inodeChange{0: {meta: dir}, 1: {meta: file(4), extents: data(0, 4, 0)}}}); err != nil {
			t.Fatal(err)
		}
		base, err := b.finish()
		if err != nil {
			t.Fatal(err)
		}
		b = buildFrom(base)
		for _, ch := range []*inodeChange{{meta: file(1)}, {meta: file(4)}} {
			if covered && ch.meta.Size > BlockSize {
				ch.extents = []Extent{{Kind: ExtentHole, Start: 1, Count: 3}}
			}
			if err := b.apply(&treeChange{nextID: 2, inodes: map[FileID]*inodeChange{1: ch}}); err != nil {
				t.Fatal(err)
			}
		}
		tree, err := b.finish()
		if !covered {
			if err == nil {
				t.Errorf("blocks came back: %v", tree.Inodes[1].Extents)
			}
			continue
		}
		want := []Extent{{Kind: ExtentData, Count: 1}, {Kind: ExtentHole, Start: 1, Count: 3}}
		if err != nil || !slices.Equal(tree.Inodes[1].Extents, want) || tree.meta.live[0] != 1 || base.meta.live[0] != 4 {
			t.Errorf("extents are %v, live %v: %v", tree.Inodes[1].Extents, tree.meta.live, err)
		}
	}
}
