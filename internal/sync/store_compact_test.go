package sync

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
)

// storeBytes is how much the share holds.
func storeBytes(t *testing.T, dir string) (bytes int64, packs int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, packDir, "*", "*.pack"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		st, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		bytes += st.Size()
	}
	return bytes, len(files)
}

// bigFile gives the model a file of incompressible blocks.
func (r *pinRig) bigFile(name string, blocks int) *storeFile {
	id := r.model.add(name, Inode{Type: TypeRegular, Size: int64(blocks) * BlockSize})
	f := r.model.inodes[id]
	for range blocks {
		f.blocks = append(f.blocks, storeBlock{kind: ExtentData, data: noise(r.r)})
	}
	return f
}

func noise(r *rand.Rand) string {
	b := make([]byte, BlockSize)
	r.Read(b)
	return string(b)
}

// rewrite changes n random blocks of a file. Files of models are copied with them.
func (r *pinRig) rewrite(name string, n int) {
	f := r.model.inodes[r.model.names[name]]
	for range n { // some parts more often than others, as databases do
		f.blocks[int(float64(len(f.blocks))*r.r.Float64()*r.r.Float64()*r.r.Float64())] = storeBlock{kind: ExtentData, data: noise(r.r)}
	}
}

func (r *pinRig) compact() bool {
	r.t.Helper()
	waiting, err := r.keeper.Compact(context.Background(), CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 30})
	if err != nil {
		r.t.Fatal(err)
	}
	return waiting
}

// snapshot is one with what compaction has ready.
func (r *pinRig) snapshot(later time.Duration) WriteStats {
	r.t.Helper()
	r.now = r.now.Add(later)
	m := r.keeper.Moves()
	var old *storeModel
	if r.head != nil {
		old = r.models[r.head.Ref.ID]
	}
	d, src := r.model.diff(old, r.headRef(), r.r)
	tree, stats, err := r.s.Write(context.Background(), WriteRequest{Base: r.head, Delta: d, Blocks: src, Term: r.term,
		Seq: r.seq(), Frozen: r.now, Moves: m})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.s.CheckNotCondemned(context.Background(), tree, r.cat); err != nil {
		r.t.Fatal(err)
	}
	r.commit(tree)
	r.keeper.Took(m)
	return stats
}

// TestCompaction lets a file be rewritten at random for a long time. Without compaction nearly
// every pack is held by a few blocks; with it the store stays near what is live, and what is
// retained stays what it was.
func TestCompaction(t *testing.T) {
	const blocks = 512
	run := func(compact bool) (bytes int64, packs, moved int, written int64) {
		r := newPinRig(t, 61)
		r.s.cfg.packBlocks, r.s.cfg.frameBlocks, r.s.cfg.maxChain = 256, 16, 64
		r.policy = Policy{All: 10 * time.Minute}
		r.bigFile("hot", blocks)
		r.bigFile("cold", 16)
		for i := range 240 {
			r.rewrite("hot", 24)
			if i%40 == 0 {
				cold := r.model.inodes[r.model.names["cold"]]
				cold.blocks[r.r.Intn(16)] = storeBlock{kind: ExtentData, data: noise(r.r)}
			}
			st := r.snapshot(time.Minute)
			if st.Moved {
				moved++
			}
			if i%5 == 4 {
				r.condemn()
				r.clock.Advance(2 * time.Minute)
				r.sweep()
				if compact && r.compact() && r.keeper.Moves() != nil {
					written += r.keeper.Moves().pack.Size
				}
			}
		}
		storeAllWhole(t, r.storeHistory)
		bytes, packs = storeBytes(t, r.dir)
		if compact {
			// When all but the head has gone, so have the packs that were compacted.
			r.policy = Policy{}
			for range 3 {
				r.snapshot(time.Minute)
				r.condemn()
				r.clock.Advance(2 * time.Minute)
				r.sweep()
			}
			storeNoLitter(t, r.storeHistory)
			storeAllWhole(t, r.storeHistory)
		}
		return bytes, packs, moved, written
	}
	without, packsWithout, _, _ := run(false)
	with, packsWith, moved, written := run(true)
	live := int64(blocks+16) * BlockSize
	t.Logf("live %d KiB, and ten minutes of changes %d KiB; on the share without compaction %d KiB in %d packs, with it %d KiB in %d; %d snapshots took over a pack, %d KiB were rewritten for 240 snapshots of 192 KiB",
		live>>10, 10*24*8, without>>10, packsWithout, with>>10, packsWith, moved, written>>10)
	if moved == 0 || with*2 > without || with > 3*live {
		t.Errorf("%d bytes with compaction, %d without", with, without)
	}
}

// TestCompactionIsInterrupted stops it at every step, lets snapshots overtake it, and expects
// the same result.
func TestCompactionIsInterrupted(t *testing.T) {
	r := newPinRig(t, 62)
	r.s.cfg.packBlocks, r.s.cfg.frameBlocks = 256, 4
	r.bigFile("f", 200)
	r.snapshot(time.Minute)
	for i := range 200 {
		if i%7 != 0 {
			r.model.inodes[r.model.names["f"]].blocks[i] = storeBlock{kind: ExtentData, data: noise(r.r)}
		}
	}
	r.snapshot(time.Hour)
	r.snapshot(time.Minute)
	r.condemn()
	steps := 0
	for r.keeper.Moves() == nil {
		if steps++; steps > 100 {
			t.Fatal("never done")
		}
		// The context ends while the first frame is paid for.
		ctx, cancel := context.WithCancel(context.Background())
		_, err := r.keeper.Compact(ctx, CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 30, Rate: 1,
			Progress: progressFunc(func(string, int64, int64) { cancel() })})
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if r.keeper.Moves() != nil {
			break
		}
		// Meanwhile the file changes, blocks that are being moved among them.
		f := r.model.inodes[r.model.names["f"]]
		f.blocks[steps*7%200] = storeBlock{kind: ExtentData, data: noise(r.r)}
		if st := r.snapshot(time.Second); st.Moved {
			t.Fatal("an unfinished pack was taken")
		}
		if steps == 3 { // also a collector that lists must not take it
			r.keeper.listed = false
		}
		r.condemn()
		r.clock.Advance(2 * time.Minute)
		r.sweep()
	}
	if steps < 5 {
		t.Errorf("done after %d steps", steps)
	}
	pack := r.keeper.Moves().pack.Path
	r.keeper.listed = false
	r.condemn()
	r.clock.Advance(2 * time.Minute)
	r.sweep()
	// A shorter file, a removed one: what moved of them is not needed.
	f := r.model.inodes[r.model.names["f"]]
	r.model.resize(r.r, f, 150*BlockSize+77)
	if st := r.snapshot(time.Second); !st.Moved {
		t.Error("the pack was not taken")
	}
	if r.keeper.Moves() != nil {
		t.Error("the pack is offered again")
	}
	storeAllWhole(t, r.storeHistory)
	used := false
	for i, n := range liveOf(r.head) {
		used = used || n > 0 && r.head.Packs[i].Path == pack
	}
	if !used {
		t.Error("the head does not refer to the new pack")
	}
}

type progressFunc func(phase string, done, total int64)

func (f progressFunc) Set(phase string, done, total int64) { f(phase, done, total) }

// TestCompactionOfCondemned: a pack that retention took for an orphan is never committed.
func TestCompactionOfCondemned(t *testing.T) {
	r := newPinRig(t, 63)
	r.bigFile("f", 32)
	r.snapshot(time.Minute)
	for i := range 31 {
		r.model.inodes[r.model.names["f"]].blocks[i] = storeBlock{kind: ExtentData, data: noise(r.r)}
	}
	r.snapshot(time.Hour)
	r.snapshot(time.Minute)
	r.condemn()
	if !r.compact() || r.keeper.Moves() == nil {
		t.Fatal("nothing is compacted")
	}
	m := r.keeper.Moves()
	r.snapshotWithout()
	// As somebody would who doesn't know of it: with an older sequence it is an orphan.
	cat, _, err := r.s.Condemn(context.Background(), r.headRef(), r.cat, r.policy, r.now, r.term)
	if err != nil {
		t.Fatal(err)
	}
	r.cat = cat
	tree, stats, err := r.s.Write(context.Background(), WriteRequest{Base: r.head, Delta: &Delta{Base: r.headRef(), NextID: r.head.NextID},
		Term: r.term, Seq: r.seq(), Frozen: r.now, Moves: m})
	if err != nil || !stats.Moved {
		t.Fatalf("%+v, %v", stats, err)
	}
	if err := r.s.CheckNotCondemned(context.Background(), tree, r.cat); !errors.Is(err, ErrCondemned) {
		t.Errorf("a snapshot that refers to a condemned pack: %v", err)
	}
}

// snapshotWithout is a snapshot that does not take what compaction has ready.
func (r *pinRig) snapshotWithout() {
	r.t.Helper()
	r.step(r.t, 0, time.Second)
}

// TestCompactionFails: an error on the way leaves nothing behind, and it begins anew.
func TestCompactionFails(t *testing.T) {
	r := newPinRig(t, 64)
	r.bigFile("f", 32)
	r.snapshot(time.Minute)
	for i := range 31 {
		r.model.inodes[r.model.names["f"]].blocks[i] = storeBlock{kind: ExtentData, data: noise(r.r)}
	}
	r.snapshot(time.Hour)
	r.snapshot(time.Minute)
	r.condemn()
	_, before := storeBytes(t, r.dir)
	for _, op := range []fsx.Op{fsx.OpCreate, fsx.OpWrite, fsx.OpSync, fsx.OpClose, fsx.OpSyncDir} {
		broken := fmt.Errorf("no %s today", op)
		r.s.cfg.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(o fsx.Op, path string) error {
			if o == op && (strings.HasSuffix(path, ".pack") || o == fsx.OpSyncDir) {
				if o == fsx.OpClose && !strings.Contains(path, fmt.Sprintf("-%d-", r.head.Ref.Seq+1)) {
					return nil // packs that are read
				}
				return broken
			}
			return nil
		}}
		_, err := r.keeper.Compact(context.Background(), CompactRequest{Head: r.head, Catalog: r.cat, Term: r.term, Below: 30})
		if !errors.Is(err, broken) || r.keeper.Moves() != nil {
			t.Errorf("%s: %v", op, err)
		}
		if _, packs := storeBytes(t, r.dir); packs != before {
			t.Errorf("%s: %d packs instead of %d", op, packs, before)
		}
	}
	r.s.cfg.FS = fsx.OS{}
	if !r.compact() || r.keeper.Moves() == nil {
		t.Error("it does not begin anew")
	}
	r.keeper.Close()
	if r.keeper.Moves() != nil {
		t.Error("a closed keeper offers a pack")
	}
}
