package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"dbsupervisor/internal/fsx"
)

// HydrateStats counts what bringing a volume to a snapshot took.
type HydrateStats struct {
	FetchedBytes int64 // blocks read from the store
	ReusedBytes  int64 // blocks copied from a fork on this disk
	LocalBytes   int64 // blocks that the volume had already
	Staged       bool  // everything was fetched and verified before anything was changed
}

// Hydrate brings an empty, clean or half-applied volume to a snapshot; it is clean at that
// snapshot then. A clean volume stays untouched until everything that it lacks has been
// fetched and verified; ErrMissing and ErrDamaged name what the store lacks. After an
// error or a crash in a later step the volume is "applying", and the next Hydrate, to
// whatever snapshot, fetches only what its files don't have yet. An empty volume takes
// blocks from the newest fork where they are the same.
//
// It returns ErrNoRoom and ErrPhase.
func (v *Volume) Hydrate(ctx context.Context, s *Store, ref SnapshotRef, p Progress) (HydrateStats, error) {
	v.op.Lock()
	defer v.op.Unlock()
	st, err := v.hydrate(ctx, s, ref, p)
	if err != nil {
		return st, fmt.Errorf("hydrate volume to snapshot %s: %w", ref.ID, err)
	}
	return st, nil
}

func (v *Volume) hydrate(ctx context.Context, s *Store, ref SnapshotRef, p Progress) (HydrateStats, error) {
	var stats HydrateStats
	st := v.State()
	switch st.Phase {
	case PhaseClean, PhaseApplying:
	case PhaseEmpty:
		empty, err := dirEmpty(v.Path())
		if err != nil {
			return stats, err
		}
		if !empty {
			return stats, fmt.Errorf("%w: %s has files that nothing is known about: set them aside first", ErrNotEmpty, v.Path())
		}
	default:
		return stats, fmt.Errorf("%w: a database has run on it since snapshot %q; set it aside first", ErrPhase, st.Base.ID)
	}
	v.dropWork()
	tree, err := s.LoadTree(ctx, ref)
	if err != nil {
		return stats, err
	}
	a := &applier{
		fs: v.fs, root: v.Path(), stage: v.stageDir(), tree: tree, workers: v.cfg.Workers, progress: p,
		hashes: func(ctx context.Context) (map[PackID][]uint64, error) { return s.BlockHashes(ctx, tree) },
	}
	if st.Phase == PhaseClean {
		a.base, a.idx = v.localBase(ctx, s, st.Base)
	}
	if st.Phase != PhaseClean {
		if a.donors, err = v.donors(); err != nil {
			return stats, err
		}
	}
	if err := a.plan(ctx); err != nil {
		return stats, err
	}
	stats.FetchedBytes = a.total
	stats.LocalBytes = dataBytes(tree) - a.total
	stats.Staged = st.Phase == PhaseClean
	if st.Phase == PhaseClean && a.nothing() {
		return stats, v.hydrated(ctx, a)
	}
	if stats.Staged {
		err = v.applyStaged(ctx, s, a)
	} else {
		err = v.applyDirect(ctx, s, a)
		stats.ReusedBytes = a.reused.Load()
		stats.FetchedBytes -= stats.ReusedBytes
	}
	if err != nil {
		return stats, err
	}
	return stats, v.hydrated(ctx, a)
}

// localBase finds what is known of a clean volume's content. nil means that it has to be
// read.
func (v *Volume) localBase(ctx context.Context, s *Store, ref SnapshotRef) (*Tree, *index) {
	if v.base != nil && v.idx != nil && v.base.Ref.Hash == ref.Hash {
		return v.base, v.idx
	}
	idx := v.loadIndex(ref)
	if idx == nil {
		return nil, nil
	}
	tree, err := s.LoadTree(ctx, ref)
	if err != nil || !idx.fits(tree) {
		v.log.Info("the volume's own snapshot can't be loaded; its files will be read instead", "snapshot", ref.ID, "error", err)
		return nil, nil
	}
	return tree, idx
}

// donors are directories on this disk that may have blocks of a snapshot.
func (v *Volume) donors() ([]string, error) {
	forks, err := v.Forks()
	if err != nil || len(forks) == 0 {
		return nil, err
	}
	return []string{forks[0].Path}, nil
}

// applyStaged fetches everything first and then changes the volume.
func (v *Volume) applyStaged(ctx context.Context, s *Store, a *applier) error {
	if err := v.room(a.total + a.growth()); err != nil {
		return err
	}
	sp, err := v.newSpool()
	if err != nil {
		return err
	}
	defer sp.close()
	if err := a.stageBlocks(ctx, s, sp); err != nil {
		return err
	}
	if err := v.markApplying(); err != nil {
		return err
	}
	if err := a.applyNames(ctx); err != nil {
		return err
	}
	if err := a.applyStaged(ctx, sp); err != nil {
		return err
	}
	return a.applyMeta(ctx)
}

// applyDirect changes the volume as blocks arrive: there is nothing in it to lose.
func (v *Volume) applyDirect(ctx context.Context, s *Store, a *applier) error {
	if err := v.room(a.growth()); err != nil {
		return err
	}
	if err := v.markApplying(); err != nil {
		return err
	}
	return a.direct(ctx, s)
}

func (a *applier) direct(ctx context.Context, s *Store) error {
	if err := a.applyNames(ctx); err != nil {
		return err
	}
	if err := a.applyDirect(ctx, s); err != nil {
		return err
	}
	return a.applyMeta(ctx)
}

// markApplying records, before the first change, that the volume is no snapshot any more.
func (v *Volume) markApplying() error {
	v.base, v.idx = nil, nil
	return v.setState(func(st *VolumeState) { st.Phase, st.Base, st.LiveTerm = PhaseApplying, SnapshotRef{}, 0 })
}

// hydrated makes what has been applied durable and the new baseline.
func (v *Volume) hydrated(ctx context.Context, a *applier) error {
	if err := os.RemoveAll(a.stage); err != nil {
		return err
	}
	det := &statDetector{root: v.Path(), sync: v.SyncFS}
	rd, err := det.begin(ctx, false) // a syncfs
	if err != nil {
		return err
	}
	// Stats only: the metadata has been compared.
	found, err := scan(ctx, v.Path(), scanConfig{known: func(statKey, FileType) *Inode { return &Inode{} }})
	if err != nil {
		return err
	}
	idx := newIndex()
	rec := indexRecord{To: a.tree.Ref.Hash}
	append2 := a.idx != nil && a.idx.logged > 0
	if append2 {
		rec.From, idx.logged = a.base.Ref.Hash, a.idx.logged
	}
	for _, n := range found.nodes {
		t := a.at(n.names[0])
		if t == nil || t.in.Type != n.typ {
			return fmt.Errorf("%s is not what was just written: something else writes it", a.abs(n.names[0]))
		}
		f := &indexed{typ: n.typ, key: n.key, settled: rd.settled(n.key), codes: t.codes}
		idx.set(t.id, f)
		if append2 {
			var old *indexed
			var codes []code
			if old = a.idx.files[t.id]; old != nil {
				codes = old.codes
			}
			if fr := indexFileOf(t.id, f, codes); old == nil || old.key != f.key || old.settled != f.settled || len(fr.Runs) > 0 {
				rec.Files = append(rec.Files, fr)
			}
		}
	}
	if append2 {
		for id := range a.idx.files {
			if a.tree.Inodes[id] == nil {
				rec.Removed = append(rec.Removed, id)
			}
		}
	}
	v.base, v.idx = a.tree, idx
	if err := v.setState(func(st *VolumeState) { st.Phase, st.Base, st.LiveTerm = PhaseClean, a.tree.Ref, 0 }); err != nil {
		return err
	}
	v.logIndex(rec)
	return nil
}

// fits says whether an index describes the inodes of a tree.
func (x *index) fits(t *Tree) bool {
	if len(x.files) != len(t.Inodes) {
		return false
	}
	for id, in := range t.Inodes {
		f := x.files[id]
		if f == nil || f.typ != in.Type || in.Type == TypeRegular && uint64(len(f.codes)) != blocksOf(in.Size) {
			return false
		}
	}
	return true
}

func dataBytes(t *Tree) int64 {
	var n int64
	for _, in := range t.Inodes {
		for _, e := range in.Extents {
			if e.Kind == ExtentData {
				n += int64(e.Count) * BlockSize
			}
		}
	}
	return n
}

// RestoreOptions are optional.
type RestoreOptions struct {
	FS       fsx.FS   // for labelled points
	Workers  int      // 0 means one per CPU
	MinFree  int64    // bytes to leave free
	Progress Progress // may be nil
}

// Restore writes a snapshot into a directory, which must be new (its parent exists) or
// empty (else ErrNotEmpty). After an error the directory has a part of the snapshot and
// must not be used.
func Restore(ctx context.Context, s *Store, ref SnapshotRef, dir string, opts RestoreOptions) error {
	if err := restore(ctx, s, ref, dir, opts); err != nil {
		return fmt.Errorf("restore snapshot %s to %s: %w", ref.ID, dir, err)
	}
	return nil
}

func restore(ctx context.Context, s *Store, ref SnapshotRef, dir string, opts RestoreOptions) error {
	if opts.FS == nil {
		opts.FS = fsx.OS{}
	}
	if opts.Workers <= 0 {
		opts.Workers = runtime.NumCPU()
	}
	tree, err := s.LoadTree(ctx, ref)
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if empty, err := dirEmpty(dir); err != nil {
		return err
	} else if !empty {
		return ErrNotEmpty
	}
	a := &applier{fs: opts.FS, root: dir, tree: tree, workers: opts.Workers, progress: opts.Progress}
	if err := a.plan(ctx); err != nil {
		return err
	}
	if err := room(dir, opts.MinFree, a.growth()); err != nil {
		return err
	}
	if err := a.direct(ctx, s); err != nil {
		return err
	}
	return syncFS(ctx, dir)
}
