package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// HydrateStats counts what bringing a volume to a snapshot took.
type HydrateStats struct {
	FetchedBytes int64  // blocks read from the store
	ReusedBytes  int64  // blocks copied from elsewhere on this disk
	LocalBytes   int64  // blocks that were in place already
	Staged       bool   // the volume stayed as it was until everything had been fetched and verified
	Copy         string // how it was kept meanwhile: "clone", "two copies" or "in place"
	Why          string // why it was done in place
}

// Hydrate brings an empty, clean or half-applied volume to a snapshot; it is clean at that
// snapshot then. A clean volume stays whole and usable until the snapshot is: the snapshot
// is put together in a second directory (see Prepare), which then takes the volume's place.
// Where that can't be, everything that the volume lacks is fetched and verified first, and
// then the volume is changed in place: after an error or a crash from there on it is
// "applying". Whatever happened, the next Hydrate, to whatever snapshot, fetches only what
// is not there yet. ErrMissing and ErrDamaged name what the store lacks. An empty volume
// takes blocks from the newest fork where they are the same.
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
	if err := v.mayHydrate(); err != nil {
		return HydrateStats{}, err
	}
	v.dropWork()
	tree, err := v.loadTree(ctx, s, ref)
	if err != nil {
		return HydrateStats{}, err
	}
	st, why := v.State(), ""
	if st.Phase == PhaseClean && st.Base.Hash != ref.Hash || st.Phase == PhaseEmpty && st.Spare.Phase == PhaseClean {
		g, err := v.prepare(ctx, s, tree, p)
		var no *noSpareError
		switch {
		case err == nil:
			return g.Stats, v.swap(g)
		case errors.As(err, &no):
			why = no.why
		default:
			return HydrateStats{}, err
		}
	}
	stats, err := v.inPlace(ctx, s, tree, p)
	stats.Copy, stats.Why = CopyInPlace, why
	return stats, err
}

// mayHydrate says whether the volume may become a snapshot.
func (v *Volume) mayHydrate() error {
	switch st := v.State(); st.Phase {
	case PhaseClean, PhaseApplying:
		return nil
	case PhaseEmpty:
		empty, err := dirEmpty(v.Path())
		if err == nil && !empty {
			err = fmt.Errorf("%w: %s has files that nothing is known about: set them aside first", ErrNotEmpty, v.Path())
		}
		return err
	default:
		return fmt.Errorf("%w: a database has run on it since snapshot %q; set it aside first", ErrPhase, st.Base.ID)
	}
}

// loadTree reads a snapshot's tree, as far as it differs from one that is in memory.
func (v *Volume) loadTree(ctx context.Context, s *Store, ref SnapshotRef) (*Tree, error) {
	return s.LoadTreeFrom(ctx, ref, v.base, v.spare.tree)
}

// inPlace changes the volume itself.
func (v *Volume) inPlace(ctx context.Context, s *Store, tree *Tree, p Progress) (HydrateStats, error) {
	var stats HydrateStats
	st := v.State()
	a := v.applier(s, tree, p)
	defer runtime.KeepAlive(a) // whose indexes have the codes that it uses
	a.root, a.stage = v.Path(), v.stageDir()
	if st.Phase == PhaseClean {
		a.base, a.baseIdx, a.idx = v.localBase(ctx, s, st.Base)
		a.idxAt = st.Base.Hash
	} else {
		a.idx = v.half
		donors, err := v.donors()
		if err != nil {
			return stats, err
		}
		for _, d := range donors {
			a.sources = append(a.sources, forkSource(d))
		}
	}
	if err := a.plan(ctx); err != nil {
		return stats, err
	}
	stats.LocalBytes = dataBytes(tree) - a.total
	stats.Staged = st.Phase == PhaseClean
	if stats.Staged && a.nothing() {
		return stats, v.hydrated(ctx, a)
	}
	v.half = nil
	var err error
	if stats.Staged {
		err = v.applyStaged(ctx, s, a)
	} else {
		err = v.applyDirect(ctx, s, a)
	}
	stats.ReusedBytes = a.reused.Load()
	stats.FetchedBytes = a.total - stats.ReusedBytes
	if err != nil {
		if v.State().Phase == PhaseApplying {
			v.half = a.partial()
		}
		return stats, err
	}
	return stats, v.hydrated(ctx, a)
}

func (v *Volume) applier(s *Store, tree *Tree, p Progress) *applier {
	return &applier{fs: v.fs, tree: tree, workers: v.cfg.Workers, progress: p, verb: "restoring", store: s, foots: newFooters()}
}

// localBase finds what is known of a clean volume's content: the tree, the codes of its
// blocks, and what its files have. Without an index of this boot everything has to be read;
// without the tree, which the store may have given up, more has to be asked of the store.
func (v *Volume) localBase(ctx context.Context, s *Store, ref SnapshotRef) (*Tree, *index, *index) {
	if v.base != nil && v.idx != nil && v.base.Ref.Hash == ref.Hash {
		return v.base, v.idx, v.idx
	}
	idx := v.loadIndex(ref)
	if idx == nil {
		return nil, nil, nil
	}
	tree, err := s.LoadTreeFrom(ctx, ref, v.spare.tree)
	if err != nil || !idx.fits(tree) {
		v.log.Info("the volume's own snapshot can't be loaded; the store's hashes will be read instead", "snapshot", ref.ID, "error", err)
		return nil, nil, idx
	}
	return tree, idx, idx
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
	v.stopFollowing()
	v.base, v.idx = nil, nil
	return v.setState(func(st *VolumeState) { st.Phase, st.Base, st.LiveTerm = PhaseApplying, SnapshotRef{}, 0 })
}

// hydrated makes what has been applied durable and the new baseline.
func (v *Volume) hydrated(ctx context.Context, a *applier) error {
	idx, record, err := v.indexOf(ctx, a)
	if err != nil {
		return err
	}
	v.base, v.idx = a.tree, idx
	if err := v.setState(func(st *VolumeState) { st.Phase, st.Base, st.LiveTerm = PhaseClean, a.tree.Ref, 0 }); err != nil {
		return err
	}
	record(v.State().Copy)
	return nil
}

// indexOf makes what has been applied durable, and an index of it. record logs that as the
// index of one of the volume's copies, continuing the log of the one before.
func (v *Volume) indexOf(ctx context.Context, a *applier) (idx *index, record func(copied string), err error) {
	if err := os.RemoveAll(a.stage); err != nil {
		return nil, nil, err
	}
	det := &statDetector{root: a.root, sync: v.SyncFS}
	rd, err := det.begin(ctx, false) // a syncfs
	if err != nil {
		return nil, nil, err
	}
	// Stats only: the metadata has been compared.
	found, err := scan(ctx, a.root, scanConfig{known: func(statKey, FileType) *Inode { return &Inode{} }})
	if err != nil {
		return nil, nil, err
	}
	idx = newIndex()
	for _, n := range found.nodes {
		t := a.at(n.names[0])
		if t == nil || t.in.Type != n.typ {
			return nil, nil, fmt.Errorf("%s is not what was just written: something else writes it", a.abs(n.names[0]))
		}
		idx.set(t.id, &indexed{typ: n.typ, key: n.key, settled: rd.settled(n.key), codes: idx.take(t.codes)})
	}
	from := ""
	if a.idx != nil && a.idx.logged > 0 {
		from, idx.logged = a.idxAt, a.idx.logged
	}
	return idx, func(copied string) {
		log := v.logIndex(copied, idx, from, a.tree.Ref.Hash)
		if !log.anew {
			a.logDifference(idx, log)
		}
		log.end()
	}, nil
}

// logDifference logs how an index differs from the one that the applier began with.
func (a *applier) logDifference(idx *index, log *indexLog) {
	for id := range a.idx.files {
		if a.tree.Inodes[id] == nil {
			log.removed(id)
		}
	}
	for id, f := range idx.files {
		old := a.idx.files[id]
		var codes []code
		if old != nil {
			codes = old.codes
		}
		var parts []indexFile
		differs := f.describe(id, codes, func(p indexFile) { parts = append(parts, p) })
		if old != nil && old.key == f.key && old.settled == f.settled && !differs {
			continue
		}
		for _, p := range parts {
			log.file(p)
		}
	}
}

// partial is what is known of a directory whose change was interrupted: the files that
// have been looked at, block by block.
func (a *applier) partial() *index {
	idx := newIndex()
	for _, t := range a.order {
		if t.handle == "" || t.in.Type != TypeRegular {
			continue
		}
		codes := t.had
		if t.touched {
			codes = t.codes
		}
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, t.handle, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if uint64(len(codes)) == blocksOf(int64(st.Size)) {
			idx.set(t.id, &indexed{typ: TypeRegular, key: keyOf(&st), codes: idx.take(codes)})
		}
	}
	return idx
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
		n += dataOf(in.Extents)
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
	a := &applier{fs: opts.FS, root: dir, tree: tree, workers: opts.Workers, progress: opts.Progress, verb: "restoring", forget: true}
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
