package sync

import (
	"context"
	"errors"
	"time"
)

// CaptureRequest says how one capture is made.
type CaptureRequest struct {
	Freezer Freezer
	// MaxFreeze bounds how long the database may stand still. 0 means two seconds.
	MaxFreeze time.Duration
	// BeforeFreeze and AfterFreeze may be nil. AfterFreeze is called after the thaw
	// whenever BeforeFreeze succeeded, whatever happened in between.
	BeforeFreeze, AfterFreeze func(ctx context.Context) error
	// Pids are the database's processes, whose shared mappings are looked at; may be nil.
	Pids     func() []int
	Progress Progress // may be nil
	// NoFreeze says that the database is stopped: nothing writes the volume.
	NoFreeze bool
}

// CaptureStats counts what a capture did.
type CaptureStats struct {
	Files, Dirs, Symlinks int
	Rounds                int   // pre-copy rounds while the database ran
	HashedFiles           int   // read while it ran
	HashedBytes           int64 //
	FrozenFiles           int   // read in the freeze
	FrozenBytes           int64 //
	ChangedFiles          int   // inodes in the delta
	ChangedBytes          int64 // data blocks in the delta
}

// Capture is the volume at one moment. It must be settled with Adopt or Abandon.
type Capture struct {
	Delta     *Delta
	Blocks    BlockSource
	Frozen    time.Time     // wall clock of the freeze
	FreezeFor time.Duration // how long the database stood still
	Stats     CaptureStats
	Skipped   []string // paths of sockets, fifos and devices, which no snapshot keeps
}

// Unchanged says that nothing differs from the base.
func (c *Capture) Unchanged() bool {
	d := c.Delta
	return len(d.Inodes)+len(d.Removed)+len(d.Names)+len(d.Unnamed) == 0
}

// Capture takes the volume as it is at one moment.
func (v *Volume) Capture(_ context.Context, _ CaptureRequest) (*Capture, error) {
	return nil, errors.ErrUnsupported
}

// Adopt makes a committed capture the new baseline.
func (v *Volume) Adopt(_ *Capture, _ *Tree) error { return errors.ErrUnsupported }

// Abandon forgets that a capture was made.
func (v *Volume) Abandon(_ *Capture) {}

// Baseline loads the tree that the volume descends from.
func (v *Volume) Baseline(_ context.Context, _ *Store, _ SnapshotRef) error {
	return errors.ErrUnsupported
}

type pending struct{}

func (p *pending) close() {}

type index struct{}

func (v *Volume) cleanSpool() error { return nil }
