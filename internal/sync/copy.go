package sync

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// copyPoll is how often Copy looks whether the volume is free.
const copyPoll = 20 * time.Millisecond

// Copy puts the snapshot that a clean volume holds together in a directory of its own below
// the instance's directory, for somebody who will write to it. Files are cloned where the file
// system has reflinks (Stats.Copy is "clone"); else their blocks are copied, each checked
// against its hash, and what the directory has already is used: it may hold an older copy
// that was written to since. The store is asked only for what the volume turns out to lack.
//
// It waits for the volume, gives up when ctx ends, and then, as after any error, leaves a
// directory that is good for nothing but another Copy. It returns ErrPhase where the volume is
// not clean, and ErrNoRoom. The copy is not made durable.
func (v *Volume) Copy(ctx context.Context, s *Store, dir string, p Progress) (*Generation, error) {
	for !v.op.TryLock() {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("copy volume to %s: %w", dir, ctx.Err())
		case <-time.After(copyPoll):
		}
	}
	defer v.op.Unlock()
	g, err := v.copyTo(ctx, s, dir, p)
	if err != nil {
		return nil, fmt.Errorf("copy volume to %s: %w", dir, err)
	}
	return g, nil
}

func (v *Volume) copyTo(ctx context.Context, s *Store, dir string, p Progress) (*Generation, error) {
	if rel, err := filepath.Rel(v.cfg.Dir, dir); err != nil || !filepath.IsLocal(rel) || rel == "." {
		return nil, fmt.Errorf("%s is not below %s", dir, v.cfg.Dir)
	}
	st := v.State()
	if st.Phase != PhaseClean {
		return nil, fmt.Errorf("%w: it is %s", ErrPhase, st.Phase)
	}
	tree, err := v.loadTree(ctx, s, st.Base)
	if err != nil {
		return nil, err
	}
	clone, err := v.canClone()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, noRoom(err)
	}
	a := v.applier(s, tree, p)
	a.root, a.verb = dir, "copying"
	a.stage = dir + ".stage"
	if err := os.RemoveAll(a.stage); err != nil {
		return nil, err
	}
	var here *index
	a.base, a.baseIdx, here = v.localBase(ctx, s, st.Base)
	src, err := volumeSource(ctx, v.Path(), here, clone)
	if err != nil {
		return nil, err
	}
	a.sources = []*source{src}
	if err := a.plan(ctx); err != nil {
		return nil, err
	}
	g := &Generation{Ref: tree.Ref, Path: dir, Stats: HydrateStats{Staged: true, Copy: CopyTwo}}
	need := a.growth()
	if clone {
		g.Stats.Copy, need = CopyClone, a.total
	}
	if err := room(v.cfg.Dir, v.cfg.MinFree, need); err != nil {
		return nil, err
	}
	if err := a.direct(ctx, s); err != nil {
		return nil, noRoom(err)
	}
	if err := os.RemoveAll(a.stage); err != nil {
		return nil, err
	}
	g.Stats.LocalBytes = dataBytes(tree) - a.total
	g.Stats.ReusedBytes = a.reused.Load()
	g.Stats.FetchedBytes = a.total - g.Stats.ReusedBytes
	return g, nil
}
