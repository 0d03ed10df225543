package sync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
)

// fill gives a file blocks that no compressor makes smaller, at the places given.
func (r *pinRig) fill(name string, at ...int) {
	f := r.model.inodes[r.model.names[name]]
	for _, i := range at {
		f.blocks[i] = storeBlock{kind: ExtentData, data: noise(r.r)}
	}
}

func upTo(from, to int) []int {
	var out []int
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}

// headPacks are the packs that the head refers to.
func (r *pinRig) headPacks() map[string]PackRef {
	out := map[string]PackRef{}
	for i, n := range liveOf(r.head) {
		if n > 0 {
			out[r.head.Packs[i].Path] = r.head.Packs[i]
		}
	}
	return out
}

// TestMergeSmallPacks: a database that only grows never makes a pack poor. When there are very
// many, those of one size are brought together, the larger ones are left alone, and what the
// head refers to becomes few.
func TestMergeSmallPacks(t *testing.T) {
	r := newPinRig(t, 65)
	r.s.cfg.packBlocks, r.s.cfg.frameBlocks, r.s.cfg.maxChain = 4096, 16, 64
	r.policy = Policy{All: 20 * time.Second}
	r.bigFile("large", 160)
	r.snapshot(time.Second) // one pack beyond 1 MiB
	big := r.headPacks()
	grow := func() {
		id, ok := r.model.names["log"]
		if !ok {
			id = r.model.add("log", Inode{Type: TypeRegular})
		}
		f := r.model.inodes[id]
		f.blocks = append(f.blocks, storeBlock{kind: ExtentData, data: noise(r.r)})
		f.meta.Size += BlockSize
		r.snapshot(time.Second)
	}
	for range mergeLeast - 2 {
		grow()
	}
	r.condemn()
	if !r.compact() || r.keeper.Moves() != nil {
		t.Fatalf("%d packs are brought together already", len(r.headPacks()))
	}
	for range 8 {
		grow()
	}
	r.condemn()
	before := r.headPacks()
	if len(before) < mergeLeast {
		t.Fatalf("the head refers to only %d packs", len(before))
	}
	if !r.compact() || r.keeper.Moves() == nil {
		t.Fatal("nothing is brought together")
	}
	if st := r.snapshot(time.Second); !st.Moved {
		t.Error("the pack is not taken")
	}
	after := r.headPacks()
	if len(after) > 4 {
		t.Errorf("the head refers to %d packs, %d before", len(after), len(before))
	}
	for path := range big {
		if _, ok := after[path]; !ok {
			t.Errorf("%s was large and is not needed any more", path)
		}
	}
	storeAllWhole(t, r.storeHistory)
	// The small ones go when no snapshot needs them any more.
	_, packs := storeBytes(t, r.dir)
	r.policy = Policy{}
	for range 3 {
		grow()
		r.condemn()
		r.clock.Advance(2 * time.Minute)
		r.sweep()
	}
	if _, left := storeBytes(t, r.dir); left > 8 {
		t.Errorf("%d packs are left of %d", left, packs)
	}
	storeNoLitter(t, r.storeHistory)
	storeAllWhole(t, r.storeHistory)
}

// staleHead is a history with a pack of which few blocks are live.
func staleHead(t *testing.T, seed int64) *pinRig {
	r := newPinRig(t, seed)
	r.s.cfg.packBlocks, r.s.cfg.frameBlocks = 256, 4
	r.policy = Policy{All: 30 * time.Minute}
	r.bigFile("f", 60)
	r.bigFile("g", 20)
	r.snapshot(time.Minute)
	r.fill("f", upTo(0, 42)...)
	r.fill("g", upTo(0, 18)...)
	r.snapshot(time.Hour)
	r.fill("f", upTo(42, 55)...) // a snapshot that is retained needs what is rewritten here
	r.snapshot(time.Minute)
	r.condemn()
	return r
}

// half begins to compact and stops in the midst of it.
func (r *pinRig) half() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	waiting, err := r.keeper.Compact(ctx, CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50, Rate: 1,
		Progress: progressFunc(func(string, int64, int64) { cancel() })})
	if waiting || err != nil && !errors.Is(err, context.Canceled) {
		r.t.Fatalf("half of a compaction: waiting %v, %v", waiting, err)
	}
	if r.keeper.job == nil || r.keeper.job.done() {
		r.t.Fatal("it is not in the midst of anything")
	}
}

// rollBack makes an older snapshot's content the head.
func (r *pinRig) rollBack(to SnapshotRef) {
	r.t.Helper()
	target, err := r.s.LoadTree(context.Background(), to)
	if err != nil {
		r.t.Fatal(err)
	}
	tree, _, err := r.s.WriteRollback(context.Background(), RollbackRequest{Head: r.headRef(), Catalog: r.cat, Target: target,
		Term: r.term, Seq: r.seq(), Frozen: r.now})
	if err != nil {
		r.t.Fatal(err)
	}
	m := r.models[to.ID].clone()
	m.next = tree.NextID
	r.model = m
	r.commit(tree)
}

// TestCompactionOfStaleHead: between the plan and the commit the head becomes something else
// than what the plan was made of. Whatever it is, every snapshot is what it was written as, and
// in the end nothing is left that nobody needs.
func TestCompactionOfStaleHead(t *testing.T) {
	old := func(r *pinRig) SnapshotRef {
		list, err := r.s.List(context.Background(), r.headRef(), r.cat)
		if err != nil || len(list) < 2 {
			r.t.Fatalf("%d snapshots, %v", len(list), err)
		}
		return list[len(list)-1].SnapshotRef
	}
	for _, c := range []struct {
		name string
		do   func(r *pinRig)
		used bool // the next snapshot has a use for the new pack
	}{
		{"everything is rewritten", func(r *pinRig) {
			r.fill("f", upTo(0, 60)...)
			r.fill("g", upTo(0, 20)...)
			r.snapshot(time.Second)
		}, false},
		{"some of it is", func(r *pinRig) {
			r.fill("f", upTo(50, 58)...)
			r.snapshot(time.Second)
		}, true},
		{"a file is removed", func(r *pinRig) {
			delete(r.model.names, "f")
			r.model.prune()
			r.snapshot(time.Second)
		}, true},
		{"all are removed", func(r *pinRig) {
			delete(r.model.names, "f")
			delete(r.model.names, "g")
			r.model.prune()
			r.snapshot(time.Second)
		}, false},
		{"a file is cut and grows again", func(r *pinRig) {
			f := r.model.inodes[r.model.names["f"]]
			r.model.resize(r.r, f, 10*BlockSize)
			r.snapshot(time.Second)
			r.model.resize(r.r, f, 60*BlockSize)
			r.snapshot(time.Second)
		}, true},
		{"rolled back", func(r *pinRig) { r.rollBack(old(r)) }, true},
		{"rolled back and on", func(r *pinRig) {
			r.rollBack(old(r))
			r.fill("g", upTo(5, 20)...)
			r.snapshot(time.Second)
		}, true},
		{"a snapshot that took it was not committed, another was", func(r *pinRig) {
			m := r.keeper.Moves()
			d, src := r.model.diff(r.models[r.head.Ref.ID], r.headRef(), r.r)
			if _, _, err := r.s.Write(context.Background(), WriteRequest{Base: r.head, Delta: d, Blocks: src, Term: r.term,
				Seq: r.seq(), Frozen: r.now, Moves: m}); err != nil {
				r.t.Fatal(err)
			}
			r.fill("g", 3)
			r.snapshotWithout()
		}, true},
	} {
		for _, when := range []string{"in its midst", "complete"} {
			t.Run(c.name+", "+when, func(t *testing.T) {
				r := staleHead(t, 66)
				r.t = t
				if when == "complete" {
					if _, err := r.keeper.Compact(context.Background(), CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50}); err != nil {
						t.Fatal(err)
					}
					if r.keeper.Moves() == nil {
						t.Fatal("nothing to compact")
					}
					m := r.keeper.Moves()
					defer func() {
						if r.keeper.Moves() == m {
							t.Error("it is offered for ever")
						}
					}()
				} else {
					r.half()
				}
				pack := r.keeper.job.name.path()
				c.do(r)
				storeAllWhole(t, r.storeHistory)
				if _, err := r.keeper.Compact(context.Background(), CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50}); err != nil {
					t.Fatal(err)
				}
				r.bigFile("new", 1)
				r.snapshot(time.Second)
				if _, used := r.headPacks()[pack]; used != c.used {
					t.Errorf("the head refers to the new pack: %v", used)
				}
				storeAllWhole(t, r.storeHistory)
				r.policy = Policy{}
				r.keeper.listed = false // to find what was not committed
				for range 3 {
					r.snapshot(time.Minute)
					r.condemn()
					r.clock.Advance(2 * time.Minute)
					r.sweep()
				}
				storeAllWhole(t, r.storeHistory)
				storeNoLitter(t, r.storeHistory)
			})
		}
	}
}

// TestCompactionDelaysNothing: while compaction waits for a share that doesn't answer, what a
// snapshot needs of the keeper, a condemnation and a deletion go on. Only the order counts: none
// of them waits for it.
func TestCompactionDelaysNothing(t *testing.T) {
	r := staleHead(t, 67)
	entered, release := make(chan struct{}), make(chan struct{})
	var hang string
	r.s.cfg.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		if op == fsx.OpWrite && hang == "" && strings.HasSuffix(path, ".pack") {
			hang = path
			close(entered)
			<-release
		}
		return nil
	}}
	ended := make(chan error, 1)
	req := CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50}
	go func() {
		_, err := r.keeper.Compact(context.Background(), req)
		ended <- err
	}()
	<-entered
	for range 3 {
		r.fill("f", 3, 30, 57)
		if st := r.snapshot(time.Minute); st.Moved {
			t.Error("a pack that is not complete is taken")
		}
		r.condemn()
		r.clock.Advance(2 * time.Minute)
		r.sweep()
		_ = r.keeper.Report()
	}
	select {
	case err := <-ended:
		t.Fatalf("compaction did not wait: %v", err)
	default:
	}
	close(release)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	r.fill("f", 4)
	if st := r.snapshot(time.Minute); !st.Moved {
		t.Error("the complete pack is not taken")
	}
	storeAllWhole(t, r.storeHistory)
}

// TestCompactionOfMixedFrames: frames that are stored as they are and frames that are compressed
// follow each other in the packs that are rewritten.
func TestCompactionOfMixedFrames(t *testing.T) {
	r := newPinRig(t, 68)
	r.s.cfg.packBlocks, r.s.cfg.frameBlocks = 256, 4
	row := func(i int) storeBlock {
		return storeBlock{kind: ExtentData, data: strings.Repeat(fmt.Sprint("row ", i, " "), BlockSize)[:BlockSize]}
	}
	for _, name := range []string{"a", "b", "c"} {
		r.bigFile(name, 48)
		f := r.model.inodes[r.model.names[name]]
		for i := range 48 {
			if i/4%2 == 1 {
				f.blocks[i] = row(i)
			}
		}
	}
	r.snapshot(time.Minute)
	r.fill("a", upTo(0, 48)...)
	r.fill("c", upTo(0, 48)...)
	r.snapshot(time.Hour)
	r.snapshot(time.Minute)
	r.condemn()
	if _, err := r.keeper.Compact(context.Background(), CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50}); err != nil {
		t.Fatal(err)
	}
	r.fill("a", 1)
	if st := r.snapshot(time.Minute); !st.Moved {
		t.Error("nothing was compacted")
	}
	storeAllWhole(t, r.storeHistory)
}

// TestCompactionOfDamaged: a pack that is damaged is told of once, and left alone then; the
// others are compacted.
func TestCompactionOfDamaged(t *testing.T) {
	r := newPinRig(t, 69)
	r.s.cfg.packBlocks, r.s.cfg.frameBlocks = 64, 4
	for _, name := range []string{"a", "b"} { // a pack each
		r.bigFile(name, 60)
		r.snapshot(time.Minute)
	}
	first := r.headPacks()
	r.fill("a", upTo(4, 60)...)
	r.snapshot(time.Hour)
	r.fill("b", upTo(4, 60)...)
	r.snapshot(time.Minute)
	r.snapshot(time.Hour)
	r.condemn()
	var hurt string
	for path := range first {
		if hurt == "" || path < hurt {
			hurt = path
		}
	}
	file := filepath.Join(r.dir, hurt)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(whole)
	p, err := r.s.openPack(first[hurt])
	if err != nil {
		t.Fatal(err)
	}
	_ = p.file.Close()                // only read
	for _, f := range p.foot.frames { // in whatever order they were written
		bad[f.offset+1] ^= 1
	}
	if err := os.WriteFile(file, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	req := CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 50}
	if _, err := r.keeper.Compact(context.Background(), req); !errors.Is(err, ErrDamaged) {
		t.Fatalf("a damaged pack: %v", err)
	}
	if _, err := r.keeper.Compact(context.Background(), req); err != nil {
		t.Fatalf("again: %v", err)
	}
	m := r.keeper.Moves()
	if m == nil || len(m.from) != 1 || m.from[hurt] != nil {
		t.Fatalf("compacted is %+v", m)
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	r.fill("a", 59)
	if st := r.snapshot(time.Minute); !st.Moved {
		t.Error("the pack is not taken")
	}
	storeAllWhole(t, r.storeHistory)
}
