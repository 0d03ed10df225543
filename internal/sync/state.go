package sync

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"dbsupervisor/internal/fsx"
)

// Phase says what is known about the content of a volume.
type Phase string

// The phases. Every change of phase is durable before what it allows begins.
const (
	PhaseEmpty    Phase = "empty"    // nothing in it
	PhaseApplying Phase = "applying" // half-way to a snapshot: no database may start on it
	PhaseClean    Phase = "clean"    // exactly Base
	PhaseLive     Phase = "live"     // a database has run on it since Base
)

const stateFormat = 1

// VolumeState is what volume.json keeps.
type VolumeState struct {
	Format int `json:"format"`
	// ID is new for every lineage that this disk holds; the register names the holder's.
	ID    string `json:"id"`
	Phase Phase  `json:"phase"`
	// Base is the snapshot that the volume equals (clean) or descends from (live). Zero
	// before the first snapshot, and while applying.
	Base SnapshotRef `json:"base"`
	// LiveTerm is the term in which the database last ran on it.
	LiveTerm uint64 `json:"live_term"`
	// Copy tells the directory that is the volume now from others, so that an index is
	// only believed about the one that it was made of.
	Copy string `json:"copy,omitempty"`
	// Spare is the second copy; its zero value means that there is none.
	Spare SpareState `json:"spare,omitzero"`
	// BootID is the boot in which this state was written.
	BootID string `json:"boot_id"`
}

// SpareState is what is known of the second copy of a volume. Which of two directories is
// the volume and which the spare is told by the inode number: if the volume has the spare's,
// they have taken each other's place.
type SpareState struct {
	Copy   string      `json:"copy"`
	Phase  Phase       `json:"phase"` // applying or clean
	Base   SnapshotRef `json:"base"`  // what it equals while clean
	Ino    uint64      `json:"ino"`
	Birth  int64       `json:"birth"`
	Cloned bool        `json:"cloned"` // it shares blocks with the volume
}

// State returns the volume's durable state.
func (v *Volume) State() VolumeState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.st
}

// setState makes a changed state durable.
func (v *Volume) setState(edit func(*VolumeState)) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	st := v.st
	edit(&st)
	st.Format, st.BootID = stateFormat, v.cfg.BootID
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return fmt.Errorf("encode volume state: %w", err)
	}
	if err := fsx.ReplaceLocal(v.fs, v.statePath(), append(b, '\n')); err != nil {
		return fmt.Errorf("write volume state: %w", noRoom(err))
	}
	v.st = st
	return nil
}

// loadState reads volume.json, or starts a new volume where there is none.
func (v *Volume) loadState() error {
	b, err := fsx.ReadFile(v.fs, v.statePath(), 1<<20)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		empty, err := dirEmpty(v.Path())
		if err != nil {
			return err
		}
		if !empty {
			return fmt.Errorf("%s has files but %s is missing, so nothing is known about them: move them away, or bring them in with `dbsupervisor import`", v.Path(), v.statePath())
		}
		return v.freshVolume()
	case err != nil:
		return fmt.Errorf("read volume state: %w", err)
	}
	var st VolumeState
	if err := json.Unmarshal(b, &st); err != nil {
		return fmt.Errorf("decode %s: %w", v.statePath(), err)
	}
	if st.Format != stateFormat {
		return fmt.Errorf("decode %s: format %d is not known to this version", v.statePath(), st.Format)
	}
	switch st.Phase {
	case PhaseEmpty, PhaseApplying, PhaseClean, PhaseLive:
	default:
		return fmt.Errorf("decode %s: phase %q is not known to this version", v.statePath(), st.Phase)
	}
	v.st = st
	if _, err := v.fs.Stat(v.Path()); errors.Is(err, fs.ErrNotExist) {
		// It died while setting a fork aside, or somebody moved the volume away.
		return errors.Join(v.findSpare(), v.freshVolume())
	} else if err != nil {
		return err
	}
	return v.findSpare()
}

// findSpare finds out whether a swap had taken place when the agent died, and forgets a
// second copy that is not there any more.
func (v *Volume) findSpare() error {
	sp := v.st.Spare
	if sp.Phase != "" {
		is := func(path string) bool {
			ino, birth, err := identify(path)
			return err == nil && ino == sp.Ino && birth == sp.Birth
		}
		switch {
		case is(v.Path()):
			if err := v.setState(func(st *VolumeState) { *st = v.swapped(*st) }); err != nil {
				return err
			}
		case !is(v.sparePath()), v.cfg.SpareCopy == SpareNever:
			if err := v.setState(func(st *VolumeState) { st.Spare = SpareState{} }); err != nil {
				return err
			}
		}
	}
	if v.st.Spare.Phase == "" {
		v.discardSpare()
	}
	return v.cleanIndexes()
}

// cleanIndexes removes the indexes of directories that are gone.
func (v *Volume) cleanIndexes() error {
	es, err := v.fs.ReadDir(v.stateDir())
	if err != nil {
		return err
	}
	for _, e := range es {
		p := filepath.Join(v.stateDir(), e.Name())
		if !strings.HasPrefix(e.Name(), "index") || p == v.indexOfCopy(v.st.Copy) || v.st.Spare.Phase != "" && p == v.indexOfCopy(v.st.Spare.Copy) {
			continue
		}
		if err := v.fs.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// freshVolume begins an empty volume with an identity of its own. The directory is made
// before the state says so; an empty directory with an older state is told apart by
// nobody, therefore the state goes first.
func (v *Volume) freshVolume() error {
	id, err := randomID(v.cfg.Rand)
	if err != nil {
		return err
	}
	if err := v.dropIndex(); err != nil {
		return err
	}
	if err := v.setState(func(st *VolumeState) { *st = VolumeState{ID: id, Phase: PhaseEmpty, Copy: id, Spare: st.Spare} }); err != nil {
		return err
	}
	if err := v.fs.Mkdir(v.Path()); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return v.fs.SyncDir(v.cfg.Dir)
}

func (v *Volume) dropIndex() error { return v.dropIndexOf(v.State().Copy) }

func (v *Volume) dropIndexOf(copied string) error {
	if err := v.fs.Remove(v.indexOfCopy(copied)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// MarkLive records, durably, that a database is going to run on the volume in this term.
// An empty volume may become live: the database then initialises it.
func (v *Volume) MarkLive(_ context.Context, term uint64) error {
	v.op.Lock()
	defer v.op.Unlock()
	if v.State().Phase == PhaseApplying {
		return fmt.Errorf("mark volume live: %w: a snapshot has been restored only in part; hydrate it first", ErrPhase)
	}
	return v.setState(func(st *VolumeState) { st.Phase, st.LiveTerm = PhaseLive, term })
}

// MarkClean records that the volume equals a snapshot: the database has stopped, and ref
// was captured after that, committed and adopted.
func (v *Volume) MarkClean(ctx context.Context, ref SnapshotRef) error {
	v.op.Lock()
	defer v.op.Unlock()
	st := v.State()
	if st.Phase != PhaseLive && st.Phase != PhaseClean || st.Base.ID != ref.ID || st.Base.Hash != ref.Hash || ref.ID == "" {
		return fmt.Errorf("mark volume clean at %q: %w: it is %s at %q", ref.ID, ErrPhase, st.Phase, st.Base.ID)
	}
	if err := v.SyncFS(ctx); err != nil {
		return err
	}
	v.stopFollowing() // nobody writes it any more
	return v.setState(func(st *VolumeState) { st.Phase = PhaseClean })
}

func randomID(r io.Reader) (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", fmt.Errorf("make a random id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}
