package sync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
)

// What is worth compacting.
const (
	// compactGain is how many bytes of the store there must be to win before packs are
	// rewritten; many small packs are worth it for their number.
	compactGain = 4 << 20
	// mergeFan is how many packs of one size class are brought together. A reader opens each
	// pack that it needs, and a database that only grows never makes one of them poor.
	mergeFan = 64
	// mergeLeast is how many packs a head may refer to before that begins.
	mergeLeast = 256
	// unionTrees is how many old snapshots' trees are read for one decision.
	unionTrees = 8
)

// mergeClasses are the sizes below which packs are brought together, each with its like.
func mergeClasses() []int64 { return []int64{64 << 10, 1 << 20, 16 << 20} }

// CompactRequest says what to compact.
type CompactRequest struct {
	Head    *Tree // the head's, as the volume has it
	Catalog CatalogRef
	Term    uint64
	// Below is the share of live blocks, in percent, below which a pack is poor. 0: never.
	Below int
	// Rate bounds the bytes per second read from and written to the share; 0: no bound.
	Rate     int64
	Progress Progress // may be nil
}

// Compact brings the head's blocks of packs that are mostly dead into a new pack, at its
// leisure: ctx may end at any time, and the next call goes on. When the pack is complete,
// Moves returns it for the next snapshot, whose commit is the only one that it takes.
//
// A pack is poor when few of its blocks are live in the head or in any retained snapshot: as
// long as an old snapshot needs the rest, rewriting the head's part wins nothing. Old
// snapshots go on using the old packs until they expire; then those go as a whole.
//
// It says whether a pack is waiting to be taken, or there is nothing to do.
func (k *Keeper) Compact(ctx context.Context, r CompactRequest) (waiting bool, err error) {
	k.working.Lock()
	defer k.working.Unlock()
	k.mu.Lock()
	if k.taken {
		k.job, k.taken = nil, false
	}
	k.mu.Unlock()
	if k.job == nil {
		if k.idle == r.Catalog {
			return true, nil // nothing has changed since there was nothing to do
		}
		if k.job, err = k.plan(ctx, r); err != nil || k.job == nil {
			return true, err
		}
		k.protect()
	}
	if k.job.done() {
		return true, nil
	}
	var pace *pacer
	if r.Rate > 0 {
		pace = &pacer{clock: k.clock, rate: r.Rate}
	}
	for !k.job.done() {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, err := k.job.step(ctx)
		k.protect() // its name may have changed
		if err != nil && ctx.Err() == nil {
			k.drop(err)
			var o *ObjectError
			if errors.As(err, &o) {
				k.bad[o.Path] = true // the others are worth it all the same
			}
			return false, fmt.Errorf("compact packs: %w", err)
		}
		if r.Progress != nil {
			r.Progress.Set("compacting", int64(k.job.at)*BlockSize, int64(k.job.total)*BlockSize) //nolint:gosec // far below
		}
		if k.job.done() {
			break
		}
		if err := pace.wait(ctx, n); err != nil {
			return false, err
		}
	}
	k.mu.Lock()
	k.ready = k.job.moves
	k.mu.Unlock()
	k.s.log.Info("packs compacted, the next snapshot takes the new one", "pack", k.job.name.path(),
		"packs", len(k.job.old), "bytes", k.job.moves.pack.Size)
	return true, nil
}

// protect keeps the new pack from being condemned: no manifest names it yet.
func (k *Keeper) protect() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.spare[k.job.name.path()] = true
}

// drop gives the job up. What is left of it is condemned the next time.
func (k *Keeper) drop(cause error) {
	if k.job == nil {
		return
	}
	k.job.abandon(cause)
	k.mu.Lock()
	if path := k.job.name.path(); k.spare[path] {
		delete(k.spare, path)
		k.known = append(k.known, path)
	}
	k.ready = nil
	k.mu.Unlock()
	k.job = nil
}

// Moves returns what a Compact has completed and no snapshot has taken yet, or nil. It never
// waits.
func (k *Keeper) Moves() *Moves {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ready
}

// Took tells that a snapshot was committed that was written with these moves.
func (k *Keeper) Took(m *Moves) {
	if m == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ready != m {
		return
	}
	// If nothing of it is needed any more, it goes like any file that no snapshot needs.
	delete(k.spare, m.pack.Path)
	k.known = append(k.known, m.pack.Path)
	k.ready = nil
	k.taken = true
	k.compacted += int64(len(m.from))
}

// Close gives up what is under way, at the end of the term.
func (k *Keeper) Close() {
	k.working.Lock()
	defer k.working.Unlock()
	k.drop(nil)
}

// plan decides which packs are rewritten next; nil: none.
func (k *Keeper) plan(ctx context.Context, r CompactRequest) (*compaction, error) {
	if r.Below <= 0 || r.Head == nil || r.Catalog.Name == "" {
		return nil, nil
	}
	c, err := k.s.knownCatalog(ctx, r.Catalog)
	if err != nil {
		return nil, fmt.Errorf("compact packs: %w", err)
	}
	packs, err := k.choose(ctx, r, c)
	if err != nil || len(packs) == 0 {
		return nil, err
	}
	job, err := k.s.newCompaction(r.Head, packs, r.Term)
	if err != nil {
		return nil, err
	}
	k.s.log.Debug("packs to be compacted", "packs", len(packs), "blocks", job.total)
	return job, nil
}

// choose picks poor packs, the poorest first, or small ones.
func (k *Keeper) choose(ctx context.Context, r CompactRequest, c *catalog) ([]PackID, error) {
	oldest := oldestUsers(c)
	live := liveOf(r.Head)
	var poor, all []PackID
	for i, n := range live {
		if n == 0 || k.bad[r.Head.Packs[i].Path] {
			continue
		}
		if _, ok := oldest[r.Head.Packs[i].Path]; !ok {
			continue // too young: not in a catalog yet
		}
		all = append(all, PackID(i)) //nolint:gosec // far below
		blocks, err := k.blocksOf(ctx, r.Head.Packs[i])
		if err != nil {
			return nil, fmt.Errorf("compact packs: %w", err)
		}
		if n*100 < blocks*uint64(r.Below) { //nolint:gosec // percent
			poor = append(poor, PackID(i)) //nolint:gosec // far below
		}
	}
	share := func(p PackID) float64 { return float64(live[p]) / float64(k.blocks[r.Head.Packs[p].Path]) }
	slices.SortFunc(poor, func(a, b PackID) int { return cmp.Compare(share(a), share(b)) })
	var out []PackID
	var gain int64
	trees := 0
	room := k.s.cfg.packBlocks
	for _, p := range poor {
		ref := r.Head.Packs[p]
		n, known, err := k.union(ctx, ref, oldest[ref.Path], &trees)
		if err != nil {
			return nil, err
		}
		if !known || max(n, live[p])*100 >= k.blocks[ref.Path]*uint64(r.Below) || live[p] > room { //nolint:gosec // percent
			continue
		}
		room -= live[p]
		out = append(out, p)
		gain += int64(float64(ref.Size) * (1 - share(p)))
	}
	if gain < k.gain() && len(out) < mergeFan {
		out = merge(r.Head, live, all, k.s.cfg.packBlocks)
	}
	if len(out) == 0 && trees <= unionTrees {
		k.idle = r.Catalog
	}
	return out, nil
}

// gain is compactGain, or what tests with small packs have instead.
func (k *Keeper) gain() int64 {
	return min(compactGain, int64(k.s.cfg.packBlocks)*BlockSize/16) //nolint:gosec // 256 MiB
}

// merge picks small packs of one size, if there are very many.
func merge(head *Tree, live []uint64, all []PackID, room uint64) []PackID {
	if len(all) < mergeLeast {
		return nil
	}
	var least int64
	for _, most := range mergeClasses() {
		var out []PackID
		left := room
		for _, p := range all {
			if size := head.Packs[p].Size; size >= least && size < most && live[p] <= left {
				out, left = append(out, p), left-live[p]
			}
		}
		if len(out) >= mergeFan {
			return out
		}
		least = most
	}
	return nil
}

// oldestUsers finds for each pack the oldest retained snapshot that refers to it.
func oldestUsers(c *catalog) map[string]*catalogEntry {
	out := make(map[string]*catalogEntry, len(c.packs))
	for i := range slices.Backward(c.entries) {
		for _, p := range c.entries[i].packs {
			out[c.packs[p].Path] = &c.entries[i]
		}
	}
	return out
}

// union is how many blocks of a pack any retained snapshot refers to. All blocks of a pack
// are of one age, and a block that is dead stays dead: so these are those of the oldest
// snapshot that has any. (A rollback to an older one that is gone by now may add to them.
// That makes a rewriting less useful, not wrong.)
func (k *Keeper) union(ctx context.Context, ref PackRef, e *catalogEntry, trees *int) (n uint64, known bool, err error) {
	u, ok := k.unions[e.info.ID]
	if !ok {
		if *trees++; *trees > unionTrees {
			return 0, false, nil // the next time
		}
		t, err := k.s.LoadTree(ctx, e.info.SnapshotRef)
		if err != nil {
			return 0, false, fmt.Errorf("compact packs: %w", err)
		}
		u = map[string]uint64{}
		for i, n := range liveOf(t) {
			u[t.Packs[i].Path] = n
		}
		if len(k.unions) >= 4*unionTrees {
			clear(k.unions)
		}
		k.unions[e.info.ID] = u
	}
	return u[ref.Path], true, nil
}

// blocksOf is how many blocks a pack has.
func (k *Keeper) blocksOf(ctx context.Context, ref PackRef) (uint64, error) {
	if n, ok := k.blocks[ref.Path]; ok {
		return n, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	foot, err := k.s.footerOf(ref)
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrMissing) {
		k.blocks[ref.Path] = 1 // not poor; verification tells about it
		return 1, nil
	}
	if err != nil {
		return 0, err
	}
	if len(k.blocks) >= math.MaxUint16 {
		clear(k.blocks)
	}
	n := uint64(len(foot.hashes))
	k.blocks[ref.Path] = n
	return n, nil
}
