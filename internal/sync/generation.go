package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// What VolumeConfig.SpareCopy may be.
const (
	SpareAuto  = "auto"  // a second copy where there is room for it, the default
	SpareNever = "never" // always in place
)

// How a volume was kept usable while it became another snapshot (HydrateStats.Copy).
const (
	CopyClone   = "clone"      // a reflink clone, which is given up afterwards
	CopyTwo     = "two copies" // a second copy, which takes turns with the first
	CopyInPlace = "in place"   // not at all, from the first change to the last
)

// Generation is a snapshot that is whole and durable in a directory that nobody uses.
type Generation struct {
	Ref   SnapshotRef
	Path  string // its directory until Swap
	Stats HydrateStats
}

// spareCopy is what is in memory of the second copy.
type spareCopy struct {
	tree *Tree  // nil: not loaded
	idx  *index // nil: not loaded
}

// noSpareError says why a snapshot can't be put together beside the volume.
type noSpareError struct{ why string }

func (e *noSpareError) Error() string { return "no second copy: " + e.why }

// Prepare puts a snapshot together in a second directory beside the volume, which stays as
// it is and can be made live meanwhile by nobody: Prepare holds the volume. Files are
// cloned from the volume where its file system has reflinks; else the second directory is
// what the volume was before the last Swap and is brought forward, with blocks of the
// volume where they are right. Only the rest is fetched.
//
// After an error or a crash the volume is as it was, and the next Prepare goes on with what
// the second directory has. It returns ErrNoRoom if the disk has no room for it.
func (v *Volume) Prepare(ctx context.Context, s *Store, ref SnapshotRef, p Progress) (*Generation, error) {
	v.op.Lock()
	defer v.op.Unlock()
	g, err := func() (*Generation, error) {
		if err := v.mayHydrate(); err != nil {
			return nil, err
		}
		v.dropWork()
		tree, err := v.loadTree(ctx, s, ref)
		if err != nil {
			return nil, err
		}
		return v.prepare(ctx, s, tree, p)
	}()
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot %s: %w", ref.ID, err)
	}
	return g, nil
}

// Swap makes a prepared generation the volume, in one step: a crash leaves the one or the
// other, whole. What the volume was before is kept as the base of the next Prepare, or
// given up where that can clone. No process may use the volume.
func (v *Volume) Swap(g *Generation) error {
	v.op.Lock()
	defer v.op.Unlock()
	if err := v.mayHydrate(); err != nil {
		return fmt.Errorf("swap in snapshot %s: %w", g.Ref.ID, err)
	}
	return v.swap(g)
}

func (v *Volume) sparePath() string  { return filepath.Join(v.cfg.Dir, "spare") }
func (v *Volume) spareStage() string { return filepath.Join(v.spoolDir(), "apply-spare") }

func (v *Volume) prepare(ctx context.Context, s *Store, tree *Tree, p Progress) (*Generation, error) {
	if v.cfg.SpareCopy == SpareNever {
		return nil, v.noSpare("sync.spare_copy is never")
	}
	clone, err := v.canClone()
	if err != nil {
		return nil, err
	}
	st := v.State()
	a := v.applier(s, tree, p)
	defer runtime.KeepAlive(a) // whose indexes have the codes that it uses
	a.root, a.stage = v.sparePath(), v.spareStage()
	var here *index
	if st.Phase == PhaseClean {
		a.base, a.baseIdx, here = v.localBase(ctx, s, st.Base)
	}
	if st.Spare.Phase == "" && !clone {
		if err := room(v.cfg.Dir, v.cfg.MinFree, allocated(tree)); err != nil {
			return nil, v.noSpare(err.Error())
		}
	}
	if err := v.makeSpare(clone); err != nil {
		return nil, err
	}
	st = v.State()
	if a.idx = v.spare.idx; a.idx == nil && st.Spare.Phase == PhaseClean {
		a.idx = v.loadIndexOf(st.Spare.Copy, st.Spare.Base)
	}
	if a.base == nil && v.spare.tree != nil && v.spare.idx != nil {
		a.base, a.baseIdx = v.spare.tree, v.spare.idx
	}
	a.idxAt = st.Spare.Base.Hash
	if st.Phase == PhaseClean {
		src, err := volumeSource(ctx, v.Path(), here, clone)
		if err != nil {
			return nil, err
		}
		a.sources = append(a.sources, src)
	} else {
		donors, err := v.donors()
		if err != nil {
			return nil, err
		}
		for _, d := range donors {
			a.sources = append(a.sources, forkSource(d))
		}
	}
	if err := a.plan(ctx); err != nil {
		return nil, err
	}
	g := &Generation{Ref: tree.Ref, Path: v.sparePath()}
	g.Stats.Staged, g.Stats.Copy = true, CopyTwo
	g.Stats.LocalBytes = dataBytes(tree) - a.total
	need := a.growth()
	if clone {
		g.Stats.Copy, need = CopyClone, a.total
	}
	if st.Spare.Phase == PhaseClean && st.Spare.Base.Hash == tree.Ref.Hash && a.nothing() {
		return g, v.prepared(ctx, a) // before a restart
	}
	if err := room(v.cfg.Dir, v.cfg.MinFree, need); err != nil {
		return nil, v.noSpare(err.Error())
	}
	v.spare = spareCopy{}
	if err := v.setState(func(st *VolumeState) { st.Spare.Phase, st.Spare.Base = PhaseApplying, SnapshotRef{} }); err != nil {
		return nil, err
	}
	err = a.direct(ctx, s)
	g.Stats.ReusedBytes = a.reused.Load()
	g.Stats.FetchedBytes = a.total - g.Stats.ReusedBytes
	if errors.Is(err, ErrNoRoom) {
		return nil, v.noSpare(err.Error())
	}
	if err != nil {
		v.spare.idx = a.partial()
		return nil, err
	}
	return g, v.prepared(ctx, a)
}

// prepared makes the second copy durable and records what it is.
func (v *Volume) prepared(ctx context.Context, a *applier) error {
	idx, record, err := v.indexOf(ctx, a)
	if err != nil {
		return err
	}
	if v.State().Spare.Cloned {
		trimClones(a.root)
	}
	v.keepSpare = true
	record(v.State().Spare.Copy)
	v.keepSpare = false
	v.spare = spareCopy{tree: a.tree, idx: idx}
	return v.setState(func(st *VolumeState) { st.Spare.Phase, st.Spare.Base = PhaseClean, a.tree.Ref })
}

func (v *Volume) swap(g *Generation) error {
	if sp := v.State().Spare; sp.Phase != PhaseClean || sp.Base.Hash != g.Ref.Hash {
		return fmt.Errorf("swap in snapshot %s: %w: the second copy is %s at %q", g.Ref.ID, ErrPhase, sp.Phase, sp.Base.ID)
	}
	fail := func(err error) error { return fmt.Errorf("swap in snapshot %s: %w", g.Ref.ID, err) }
	if err := v.fs.At("swap", v.Path()); err != nil {
		return fail(err)
	}
	v.stopFollowing()
	if err := unix.Renameat2(unix.AT_FDCWD, v.sparePath(), unix.AT_FDCWD, v.Path(), unix.RENAME_EXCHANGE); err != nil {
		return fail(err)
	}
	// From here on the volume is the new one, whatever goes wrong: the directories' inode
	// numbers say so, also after a crash.
	old := spareCopy{tree: v.base, idx: v.idx}
	v.base, v.idx, v.spare = v.spare.tree, v.spare.idx, old
	v.mu.Lock()
	v.st = v.swapped(v.st)
	kept := v.st.Spare.Phase != ""
	v.mu.Unlock()
	if err := v.fs.SyncDir(v.cfg.Dir); err != nil {
		return fail(err)
	}
	if err := v.setState(func(*VolumeState) {}); err != nil {
		return fail(err)
	}
	if !kept {
		v.spare = spareCopy{}
		v.discardSpare()
	}
	return nil
}

// swapped is the state in which the two copies have taken each other's place.
func (v *Volume) swapped(st VolumeState) VolumeState {
	was := SpareState{Copy: st.Copy, Phase: st.Phase, Base: st.Base}
	st.Copy, st.Phase, st.Base, st.LiveTerm = st.Spare.Copy, st.Spare.Phase, st.Spare.Base, 0
	keep := !st.Spare.Cloned && was.Phase == PhaseClean
	st.Spare = SpareState{}
	if ino, birth, err := identify(v.sparePath()); err == nil && keep {
		was.Ino, was.Birth = ino, birth
		st.Spare = was
	}
	return st
}

// identify tells a directory from others by what no rename changes.
func identify(path string) (ino uint64, birth int64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, statMask, &st); err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	k := keyOf(&st)
	return k.Ino, k.Birth, nil
}

// makeSpare makes the second directory if there is none.
func (v *Volume) makeSpare(clone bool) error {
	if v.State().Spare.Phase != "" {
		return nil
	}
	v.discardSpare() // left by a crash
	v.trash.Wait()
	id, err := randomID(v.cfg.Rand)
	if err != nil {
		return err
	}
	if err := v.fs.Mkdir(v.sparePath()); err != nil {
		return noRoom(err)
	}
	if err := v.fs.SyncDir(v.cfg.Dir); err != nil {
		return err
	}
	ino, birth, err := identify(v.sparePath())
	if err != nil {
		return err
	}
	v.spare = spareCopy{}
	return v.setState(func(st *VolumeState) {
		st.Spare = SpareState{Copy: id, Phase: PhaseApplying, Ino: ino, Birth: birth, Cloned: clone}
	})
}

// noSpare gives the second copy up and says why.
func (v *Volume) noSpare(why string) error {
	if _, err := v.giveWay(why); err != nil {
		return err
	}
	return &noSpareError{why: why}
}

// giveWay gives the room that the second copy takes back, and says whether there was one.
func (v *Volume) giveWay(why string) (bool, error) {
	if v.keepSpare || v.State().Spare.Phase == "" {
		return false, nil
	}
	v.log.Info("giving up the second copy of the volume", "reason", why)
	v.spare = spareCopy{}
	if err := v.setState(func(st *VolumeState) { st.Spare = SpareState{} }); err != nil {
		return false, err
	}
	v.discardSpare()
	v.trash.Wait()
	return true, nil
}

// discardSpare deletes the second directory, which the state must not know any more, in
// the background. What a crash leaves of it OpenVolume deletes.
func (v *Volume) discardSpare() {
	if err := os.RemoveAll(v.spareStage()); err != nil {
		v.log.Warn("can't delete files that are not needed any more", "error", err)
	}
	if _, _, err := identify(v.sparePath()); errors.Is(err, os.ErrNotExist) {
		return
	}
	id, err := randomID(v.cfg.Rand)
	if err != nil {
		v.log.Warn("can't delete the second copy of the volume", "error", err)
		return
	}
	gone := filepath.Join(v.spoolDir(), "trash-"+id)
	if err := v.fs.Rename(v.sparePath(), gone); err != nil {
		v.log.Warn("can't delete the second copy of the volume", "error", err)
		return
	}
	v.trash.Add(1)
	go func() {
		defer v.trash.Done()
		if err := os.RemoveAll(gone); err != nil {
			v.log.Warn("can't delete the second copy of the volume", "error", err)
		}
	}()
}

// canClone tries whether the file system has reflinks.
func (v *Volume) canClone() (bool, error) {
	if v.reflink == nil {
		yes, err := CanReflink(v.spoolDir())
		if err != nil {
			return false, err
		}
		v.reflink = &yes
	}
	return *v.reflink, nil
}

// CanReflink tries whether files in dir can share blocks. It leaves nothing behind, and
// returns ErrNoRoom where there is none even for that.
func CanReflink(dir string) (bool, error) {
	var files [2]*os.File
	for i := range files {
		f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("try reflinks: %w", err)
		}
		defer f.Close()
		files[i] = f
	}
	if _, err := files[0].Write(make([]byte, BlockSize)); err != nil {
		return false, fmt.Errorf("try reflinks: %w", noRoom(err))
	}
	return unix.IoctlFileClone(int(files[1].Fd()), int(files[0].Fd())) == nil, nil
}

// allocated is how many bytes a tree takes on disk, about.
func allocated(t *Tree) int64 {
	n := int64(len(t.Inodes)) * 1024
	for _, in := range t.Inodes {
		for _, e := range in.Extents {
			if e.Kind != ExtentHole {
				n += int64(e.Count) * BlockSize
			}
		}
	}
	return n
}
