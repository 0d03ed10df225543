package sync

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"

	"dbsupervisor/internal/fsx"
)

// Fork is volume data that this instance has beyond the head that its successor started
// from. It is kept on this disk for some days, for people; it is never merged.
type Fork struct {
	Name   string      `json:"name"` // directory below forks/
	Reason string      `json:"reason"`
	Time   time.Time   `json:"time"`
	Head   SnapshotRef `json:"head"` // the cluster's head when the fork was set aside
	// What was known about the volume: its identity, its phase, the snapshot that it
	// descends from and the term in which it was last written.
	VolumeID string      `json:"volume_id"`
	Phase    Phase       `json:"phase"`
	Base     SnapshotRef `json:"base"`
	LiveTerm uint64      `json:"live_term"`
	// Path is the fork's data directory on this machine.
	Path string `json:"-"`
}

// SetAside moves the volume's data into a fork and begins an empty volume with a new ID.
// No process may use the volume. It works in every phase.
func (v *Volume) SetAside(_ context.Context, reason string, head SnapshotRef) (Fork, error) {
	v.op.Lock()
	defer v.op.Unlock()
	if _, err := v.fs.Stat(v.Path()); errors.Is(err, fs.ErrNotExist) && v.State().Phase != PhaseEmpty {
		return v.finishSetAside()
	}
	now := v.cfg.Clock.Wall().UTC()
	var b [4]byte
	if _, err := io.ReadFull(v.cfg.Rand, b[:]); err != nil {
		return Fork{}, fmt.Errorf("set volume aside: %w", err)
	}
	st := v.State()
	f := Fork{
		Name: now.Format("20060102T150405.000Z") + "-" + hex.EncodeToString(b[:]), Reason: reason, Time: now, Head: head,
		VolumeID: st.ID, Phase: st.Phase, Base: st.Base, LiveTerm: st.LiveTerm,
	}
	dir := filepath.Join(v.forksDir(), f.Name)
	f.Path = filepath.Join(dir, "volume")
	data, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return Fork{}, fmt.Errorf("encode fork: %w", err)
	}
	v.dropWork()
	v.stopFollowing()
	v.base, v.idx = nil, nil
	steps := []func() error{
		func() error { return v.fs.Mkdir(dir) },
		func() error { return fsx.CreateWhole(v.fs, filepath.Join(dir, "fork.json"), append(data, '\n')) },
		func() error { return v.fs.SyncDir(v.forksDir()) },
		// From here on a crash leaves no volume, which OpenVolume answers with a new one.
		func() error { return v.fs.Rename(v.Path(), f.Path) },
		func() error { return v.fs.SyncDir(dir) },
		func() error { return v.fs.SyncDir(v.cfg.Dir) },
		v.freshVolume,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return Fork{}, fmt.Errorf("set volume aside as %s: %w", f.Name, noRoom(err))
		}
	}
	return f, nil
}

// finishSetAside goes on after an attempt that had moved the data already and then failed.
func (v *Volume) finishSetAside() (Fork, error) {
	v.dropWork()
	v.stopFollowing()
	v.base, v.idx = nil, nil
	moved := v.State().ID
	if err := v.freshVolume(); err != nil {
		return Fork{}, fmt.Errorf("set volume aside: %w", noRoom(err))
	}
	forks, err := v.Forks()
	if err != nil {
		return Fork{}, err
	}
	for _, f := range forks {
		if f.VolumeID == moved {
			return f, nil
		}
	}
	return Fork{}, fmt.Errorf("set volume aside: fork of volume %s is not there", moved)
}

// Forks lists what has been set aside and is still there, newest first.
func (v *Volume) Forks() ([]Fork, error) { return listForks(v.fs, v.forksDir()) }

func listForks(fsys fsx.FS, dir string) ([]Fork, error) {
	es, err := fsys.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list forks: %w", err)
	}
	var out []Fork
	for _, e := range es {
		d := filepath.Join(dir, e.Name())
		if _, err := fsys.Stat(filepath.Join(d, "volume")); errors.Is(err, fs.ErrNotExist) {
			continue // a crash before the volume was moved, or in the middle of pruning
		} else if err != nil {
			return nil, fmt.Errorf("list forks: %w", err)
		}
		b, err := fsx.ReadFile(fsys, filepath.Join(d, "fork.json"), 1<<20)
		var f Fork
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		if err != nil {
			// Somebody has been at it by hand. It is shown, and kept: its age is not known.
			f = Fork{Reason: "fork.json can't be read: " + err.Error()}
		}
		f.Name, f.Path = e.Name(), filepath.Join(d, "volume")
		out = append(out, f)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name > out[j].Name })
	return out, nil
}

// PruneForks deletes the forks that the caller says have been kept for long enough, and what a
// crash left of others. It returns the names of the forks whose data it deleted.
func (v *Volume) PruneForks(expired func(Fork) bool) ([]string, error) {
	v.op.Lock()
	defer v.op.Unlock()
	forks, err := v.Forks()
	if err != nil {
		return nil, err
	}
	whole := map[string]Fork{}
	for _, f := range forks {
		whole[f.Name] = f
	}
	es, err := v.fs.ReadDir(v.forksDir())
	if err != nil {
		return nil, fmt.Errorf("list forks: %w", err)
	}
	var gone []string
	for _, e := range es {
		f, ok := whole[e.Name()]
		if ok && (f.Time.IsZero() || !expired(f)) {
			continue
		}
		dir := filepath.Join(v.forksDir(), e.Name())
		// fork.json goes last, so that an interrupted deletion still says what it was.
		if err := os.RemoveAll(filepath.Join(dir, "volume")); err != nil {
			return gone, fmt.Errorf("delete fork %s: %w", e.Name(), err)
		}
		if err := os.RemoveAll(dir); err != nil {
			return gone, fmt.Errorf("delete fork %s: %w", e.Name(), err)
		}
		if ok {
			gone = append(gone, e.Name())
			v.log.Info("deleted a fork after its time", "fork", f.Name, "reason", f.Reason, "set_aside", f.Time)
		}
	}
	return gone, nil
}
