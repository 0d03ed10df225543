package sync

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	stdsync "sync"
	"sync/atomic"
)

// VerifyReport is what a Verify found.
type VerifyReport struct {
	Snapshots int
	Packs     int
	Bytes     int64 // of frames read
	Problems  []Problem
	// NewestWhole is the newest snapshot without any problem; nil if there is none.
	NewestWhole *SnapshotInfo
}

// Problem is one thing that is wrong with a store.
type Problem struct {
	Path      string   // the file, below the share
	What      string   // what is wrong with it
	Snapshots []string // IDs of those that can't be restored because of it, newest first
}

// badRange is a run of a pack's blocks that can't be read.
type badRange struct {
	from, to uint64 // to is not included
	problem  int
}

// verifier is the state of one Verify.
type verifier struct {
	s        *Store
	snaps    []SnapshotInfo // newest first
	report   VerifyReport
	mu       stdsync.Mutex
	bad      map[string][]badRange // by pack
	blocks   map[string]uint64     // blocks that whole packs have
	broken   map[string]bool       // IDs of snapshots that have a problem
	done     atomic.Int64
	total    int64
	progress Progress
}

// Verify checks everything that these snapshots (newest first, as from List) need: every
// manifest, every frame's hash, every block's hash and every reference from a tree into a
// pack. What is wrong is in the report; the error says that checking itself failed.
func (s *Store) Verify(ctx context.Context, snaps []SnapshotInfo, p Progress) (VerifyReport, error) {
	v := &verifier{s: s, snaps: snaps, bad: map[string][]badRange{}, blocks: map[string]uint64{},
		broken: map[string]bool{}, progress: p}
	v.report.Snapshots = len(snaps)
	packs := map[string]PackRef{}
	reach := map[string]uint64{} // the last block that any tree refers to, plus one
	err := v.eachTree(ctx, true, func(info *SnapshotInfo, t *Tree) {
		live := countLive(t)
		for i, ref := range t.Packs {
			if live[i] == 0 {
				continue
			}
			if o, ok := packs[ref.Path]; ok && o != ref {
				v.problem(info.Manifest, fmt.Sprintf("refers to %s with another hash or size than others do", ref.Path), info.ID)
			}
			packs[ref.Path] = ref
		}
		for _, in := range t.Inodes {
			for _, e := range in.Extents {
				if e.Kind == ExtentData {
					path := t.Packs[e.Pack].Path
					reach[path] = max(reach[path], e.PackBlock+e.Count)
				}
			}
		}
	})
	if err == nil {
		err = v.verifyPacks(ctx, packs)
	}
	if err != nil {
		return v.report, fmt.Errorf("verify store: %w", err)
	}
	for path, n := range reach {
		if have, ok := v.blocks[path]; ok && n > have {
			v.markBad(path, have, n, fmt.Sprintf("has %d blocks, but block %d is referred to", have, n-1))
		}
	}
	if len(v.bad) > 0 {
		if err := v.eachTree(ctx, false, v.blame); err != nil {
			return v.report, fmt.Errorf("verify store: %w", err)
		}
	}
	for i := range snaps {
		if !v.broken[snaps[i].ID] {
			info := snaps[i]
			v.report.NewestWhole = &info
			break
		}
	}
	for i := range v.report.Problems {
		slices.Reverse(v.report.Problems[i].Snapshots) // they came oldest first
	}
	slices.SortStableFunc(v.report.Problems, func(a, b Problem) int { return cmp.Compare(a.Path, b.Path) })
	return v.report, nil
}

// eachTree loads the snapshots' trees, oldest first, each from the one before where that is
// its parent. With note, those that can't be loaded become problems.
func (v *verifier) eachTree(ctx context.Context, note bool, f func(info *SnapshotInfo, t *Tree)) error {
	var last *Tree
	for _, info := range slices.Backward(v.snaps) {
		t, err := v.s.loadAfter(ctx, last, info.SnapshotRef)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			last = nil
			if note {
				path, what := describeProblem(info.Manifest, err)
				v.problem(path, what, info.ID)
			}
			continue
		}
		last = t
		f(&info, t)
	}
	return nil
}

// loadAfter is LoadTree with the help of the tree before.
func (s *Store) loadAfter(ctx context.Context, last *Tree, ref SnapshotRef) (*Tree, error) {
	if last != nil {
		m, err := s.readManifest(ctx, ref.Manifest, ref.Hash, false)
		if err != nil {
			return nil, err
		}
		if m.chain > 0 && m.chain == last.meta.chain+1 && m.parent == last.Ref {
			return assemble(last, []*manifest{m})
		}
	}
	return s.LoadTree(ctx, ref)
}

func describeProblem(path string, err error) (string, string) {
	var o *ObjectError
	if errors.As(err, &o) {
		if o.What == "" {
			return o.Path, "missing"
		}
		return o.Path, o.What
	}
	return path, "can't be read: " + err.Error()
}

// problem notes a problem once, with every snapshot that has it, and returns its number.
func (v *verifier) problem(path, what string, snapshot string) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := slices.IndexFunc(v.report.Problems, func(p Problem) bool { return p.Path == path && p.What == what })
	if i < 0 {
		i = len(v.report.Problems)
		v.report.Problems = append(v.report.Problems, Problem{Path: path, What: what})
	}
	if p := &v.report.Problems[i]; snapshot != "" && !slices.Contains(p.Snapshots, snapshot) {
		p.Snapshots = append(p.Snapshots, snapshot)
		v.broken[snapshot] = true
	}
	return i
}

func (v *verifier) markBad(pack string, from, to uint64, what string) {
	n := v.problem(pack, what, "")
	v.mu.Lock()
	defer v.mu.Unlock()
	v.bad[pack] = append(v.bad[pack], badRange{from: from, to: to, problem: n})
}

func (v *verifier) verifyPacks(ctx context.Context, packs map[string]PackRef) error {
	v.report.Packs = len(packs)
	for _, p := range packs {
		v.total += p.Size
	}
	return v.s.eachFrame(ctx, func(yield func(PackRef, []Want) bool) {
		for _, path := range slices.Sorted(maps.Keys(packs)) {
			if !yield(packs[path], nil) {
				return
			}
		}
	}, func(ref PackRef, p *packReader, err error) error {
		if err == nil {
			v.mu.Lock()
			v.blocks[ref.Path] = uint64(len(p.foot.hashes))
			v.mu.Unlock()
			if err = checkEnds(p, ref.Size); err == nil {
				return nil
			}
			// The blocks are fine, each proves itself; still it is not what was written.
			_, what := describeProblem(ref.Path, err)
			v.problem(ref.Path, what, "")
			return ctx.Err()
		}
		_, what := describeProblem(ref.Path, err)
		v.markBad(ref.Path, 0, packMaxBlocks, what)
		return cmp.Or(ctx.Err(), errSkipPack)
	}, func(j *frameJob, _ []byte, err error) error {
		fr := &j.pack.foot.frames[j.frame]
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			_, what := describeProblem(j.pack.path, err)
			v.markBad(j.pack.path, fr.first, fr.first+uint64(fr.blocks), what)
		}
		v.mu.Lock()
		v.report.Bytes += int64(fr.stored)
		v.mu.Unlock()
		if v.progress != nil {
			v.progress.Set("verifying", v.done.Add(int64(fr.stored)), v.total)
		}
		return nil
	})
}

// checkEnds checks what no hash covers: the pack's header, and that nothing follows its end.
func checkEnds(p *packReader, size int64) error {
	head := make([]byte, packHeader)
	if err := readAt(p.file, head, 0); err != nil {
		return err
	}
	if !bytes.Equal(head, packHead()) {
		return damaged(p.path, "does not begin as it should")
	}
	n, err := p.file.ReadAt(make([]byte, 1), size)
	if n > 0 {
		return damaged(p.path, "goes on after its end")
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// blame finds out which snapshots the bad blocks of packs hit.
func (v *verifier) blame(info *SnapshotInfo, t *Tree) {
	for _, in := range t.Inodes {
		for _, e := range in.Extents {
			if e.Kind != ExtentData {
				continue
			}
			for _, b := range v.bad[t.Packs[e.Pack].Path] {
				if e.PackBlock < b.to && b.from < e.PackBlock+e.Count {
					p := v.report.Problems[b.problem]
					v.problem(p.Path, p.What, info.ID)
				}
			}
		}
	}
}
