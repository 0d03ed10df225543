package sync

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// compare finds out which blocks of every file have to be written. Blocks are compared by
// what they hold, not by where the store has them: compaction moves them.
func (a *applier) compare(ctx context.Context) error {
	same := a.samePacks()
	need := map[PackID]bool{}
	var jobs []*target
	for _, t := range a.order {
		if t.in.Type != TypeRegular || t.in.Size == 0 {
			continue
		}
		from, node := a.cloneSource(t)
		t.had = nil
		switch {
		case t.trust:
			t.had = a.idx.files[t.id].codes
		case t.handle == "" && node != nil:
			t.clone, t.size, t.alloc = from.path(node), node.key.Size, node.alloc
			t.had = from.codes(t.id, node)
		}
		if t.size == 0 && len(a.sources) == 0 {
			t.todo = diffExtents(&Inode{}, nil, t.in) // all but the holes
			continue
		}
		for _, e := range a.unknown(t, same) {
			if e.Kind == ExtentData {
				need[e.Pack] = true
			}
		}
		jobs = append(jobs, t)
	}
	if a.store != nil {
		packs := make([]PackRef, 0, len(need))
		for id := range need {
			packs = append(packs, a.tree.Packs[id])
		}
		if err := a.foots.load(ctx, a.store, packs); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(a.workers, 1))
	var read atomic.Int64
	for _, t := range jobs {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			want, err := a.wantCodes(t, same)
			if err != nil {
				return fmt.Errorf("snapshot %q: %q: %w", a.tree.Ref.ID, t.names[0], err)
			}
			if t.had == nil && t.size > 0 {
				path := t.handle
				if path == "" {
					path = t.clone
				}
				if t.had, err = readCodes(gctx, path, t.size, t.alloc); err != nil {
					return err
				}
				if a.progress != nil {
					a.progress.Set("comparing", read.Add(t.size), 0)
				}
			}
			t.codes = resizeCodes(t.had, blocksOf(t.in.Size))
			if t.todo = diffCodes(t.codes, want, t.in); len(t.todo) > 0 {
				t.want = want
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, t := range a.order {
		a.total += dataOf(t.todo)
	}
	return ctx.Err()
}

func dataOf(exts []Extent) int64 {
	var n int64
	for _, e := range exts {
		if e.Kind == ExtentData {
			n += int64(e.Count) * BlockSize
		}
	}
	return n
}

// samePacks translates the base's packs to the tree's.
func (a *applier) samePacks() map[PackID]PackID {
	same := map[PackID]PackID{}
	if a.base == nil || a.baseIdx == nil {
		return same
	}
	packs := make(map[PackRef]PackID, len(a.tree.Packs))
	for i, p := range a.tree.Packs {
		packs[p] = PackID(i)
	}
	for i, p := range a.base.Packs {
		if id, ok := packs[p]; ok {
			same[PackID(i)] = id
		}
	}
	return same
}

// unknown lists the extents whose codes the base doesn't tell.
func (a *applier) unknown(t *target, same map[PackID]PackID) []Extent {
	if old, _ := a.baseOf(t); old != nil {
		return diffExtents(old, same, t.in)
	}
	return t.in.Extents
}

// baseOf is what the base says of an inode, or nil.
func (a *applier) baseOf(t *target) (*Inode, []code) {
	if a.base == nil || a.baseIdx == nil {
		return nil, nil
	}
	in, f := a.base.Inodes[t.id], a.baseIdx.files[t.id]
	if in == nil || f == nil || in.Type != TypeRegular || uint64(len(f.codes)) != blocksOf(in.Size) {
		return nil, nil
	}
	return in, f.codes
}

// wantCodes lists the codes that a file shall have.
func (a *applier) wantCodes(t *target, same map[PackID]PackID) ([]code, error) {
	n := blocksOf(t.in.Size)
	_, codes := a.baseOf(t)
	want := resizeCodes(codes, n)
	for _, e := range a.unknown(t, same) {
		if e.Start+e.Count > n || e.Start+e.Count < e.Start {
			return nil, fmt.Errorf("extent [%d,+%d) is outside of the file", e.Start, e.Count)
		}
		part := want[e.Start : e.Start+e.Count]
		if e.Kind != ExtentData {
			c := codeHole
			if e.Kind == ExtentZero {
				c = codeZero
			}
			for i := range part {
				part[i] = c
			}
			continue
		}
		foot := a.foots.get(a.tree.Packs[e.Pack])
		if foot == nil || e.PackBlock+e.Count > uint64(len(foot.hashes)) || e.PackBlock+e.Count < e.PackBlock {
			return nil, fmt.Errorf("extent refers to blocks of a pack that doesn't have them: block %d of %s", e.PackBlock+e.Count-1, a.tree.Packs[e.Pack].Path)
		}
		for i := range part {
			part[i] = codeOf(foot.hashes[e.PackBlock+uint64(i)])
		}
	}
	return want, nil
}

// readCodes reads a local file.
func readCodes(ctx context.Context, path string, size, alloc int64) ([]code, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	codes := make([]code, blocksOf(size))
	err = readBlocks(ctx, f, size, alloc, 0, uint64(len(codes)), func(first uint64, c []code, _ []byte) error {
		copy(codes[first:], c)
		return nil
	})
	return codes, err
}

func resizeCodes(old []code, n uint64) []code {
	out := make([]code, n) // holes
	copy(out, old)
	return out
}

// diffExtents lists the extents of new that a file with the content of old, truncated to
// new's size, doesn't have. packs translates old's packs; those it lacks are not in new.
func diffExtents(old *Inode, packs map[PackID]PackID, new *Inode) []Extent {
	var out []Extent
	i := 0
	for _, e := range new.Extents {
		end := e.Start + e.Count
		for at := e.Start; at < end; {
			for i < len(old.Extents) && old.Extents[i].Start+old.Extents[i].Count <= at {
				i++
			}
			n, same := end-at, e.Kind == ExtentHole // behind the old end there is nothing
			if i < len(old.Extents) {
				o := old.Extents[i]
				n = min(n, o.Start+o.Count-at)
				same = o.Kind == e.Kind
				if same && e.Kind == ExtentData {
					p, ok := packs[o.Pack]
					same = ok && p == e.Pack && o.PackBlock+(at-o.Start) == e.PackBlock+(at-e.Start)
				}
			}
			if !same {
				out = append(out, part(e, at, n))
			}
			at += n
		}
	}
	return out
}

// diffCodes lists the extents of in whose blocks are not as a local file has them.
func diffCodes(have, want []code, in *Inode) []Extent {
	var out []Extent
	same := func(b uint64) bool {
		if b < uint64(len(have)) {
			return have[b] == want[b]
		}
		return want[b] == codeHole
	}
	for _, e := range in.Extents {
		end := e.Start + e.Count
		for at := e.Start; at < end; {
			n := uint64(1)
			for at+n < end && same(at+n) == same(at) {
				n++
			}
			if !same(at) {
				out = append(out, part(e, at, n))
			}
			at += n
		}
	}
	return out
}

func part(e Extent, at, n uint64) Extent {
	return Extent{Kind: e.Kind, Start: at, Count: n, Pack: e.Pack, PackBlock: e.PackBlock + at - e.Start}
}
