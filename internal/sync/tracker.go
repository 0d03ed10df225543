package sync

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"

	"dbsupervisor/internal/track"
)

// tracker tells what was touched in the volume; a *track.Tracker, or in tests what tells
// the same or lies.
type tracker interface {
	// Drain returns everything since the last Drain that had happened before the call.
	Drain(ctx context.Context) (*track.Changes, error)
	// Settle says that what was drained so far need not be reported again, to anybody.
	Settle() error
	Close() error  // the kernel goes on collecting
	Remove() error // ends that
}

// pinRoot is where the kernel's side of tracking is pinned, so that it outlives the agent.
const pinRoot = "/sys/fs/bpf/dbsupervisor"

// openTracker begins to track the volume, or goes on where an earlier agent left off.
func (v *Volume) openTracker() (tracker, error) {
	if v.cfg.track != nil {
		return v.cfg.track()
	}
	return v.trackKernel()
}

// trackKernel is openTracker without what a test may have put in its place.
func (v *Volume) trackKernel() (tracker, error) {
	if err := track.Supported(v.Path()); err != nil {
		return nil, err
	}
	v.sweepPins()
	t, err := track.Open(track.Config{
		Root: v.Path(), Pin: filepath.Join(pinRoot, pinName(v.cfg.Dir)), Key: v.cfg.BootID + " " + v.trackKey(), Log: v.log.Named("track"),
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Untrack ends what the kernel collects about the volume in an instance's directory, for good. No
// agent may run. It is idempotent.
func Untrack(dir string) error {
	if err := os.RemoveAll(filepath.Join(pinRoot, pinName(dir))); err != nil {
		return fmt.Errorf("end tracking: %w", err)
	}
	return nil
}

// pinName is the name under which tracking in an instance's directory is pinned: the path
// in hexadecimal, so that what belongs to a directory that is gone can be told, or a hash
// where that is too long.
func pinName(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	if len(dir) <= 120 {
		return "d" + hex.EncodeToString([]byte(dir))
	}
	h := xxh3.Hash128([]byte(dir)).Bytes()
	return "h" + hex.EncodeToString(h[:])
}

// sweepPins ends tracking that agents left behind whose directories are gone.
func (v *Volume) sweepPins() {
	es, err := os.ReadDir(pinRoot)
	if err != nil {
		return // nothing is pinned
	}
	for _, e := range es {
		if e.Name()[0] != 'd' {
			continue
		}
		dir, err := hex.DecodeString(e.Name()[1:])
		if err != nil {
			continue
		}
		if _, err := os.Lstat(string(dir)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := track.Discard(filepath.Join(pinRoot, e.Name())); err != nil {
			v.log.Warn("can't end tracking of a directory that is gone", "dir", string(dir), "error", err)
		}
	}
}
