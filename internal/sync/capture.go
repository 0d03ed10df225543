package sync

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	// Prepare and Finish may be nil. Prepare is called once most of the volume has been read;
	// what it writes is read before the freeze. Finish is called last, whenever Prepare
	// succeeded.
	Prepare, Finish func(ctx context.Context) error
	// Pids are the database's processes, as this machine numbers them: their shared
	// mappings are looked at, and symbolic links as they see them. May be nil.
	Pids     func() []int
	Progress Progress // may be nil
	// NoFreeze says that the database is stopped: nothing writes the volume.
	NoFreeze bool
}

// CaptureStats counts what a capture did. Bytes are bytes of data that were read from the
// volume; holes cost nothing.
type CaptureStats struct {
	Tier                  string // how change was found
	Files, Dirs, Symlinks int
	Names                 int           // that were looked at, in all rounds
	Candidates            int64         // blocks that were said to have changed, in all rounds
	Rounds                int           // pre-copy rounds while the database ran
	ReadFiles             int           // read while it ran
	ReadBytes             int64         //
	FrozenFiles           int           // read in the freeze
	FrozenBytes           int64         //
	FrozenNames           int           // looked at in the freeze
	Predicted             time.Duration // what the freeze was expected to take; 0: no idea
	Unexplained           int           // files read as a whole because nothing reported their change
	Lost                  int           // times that the tracker lost reports
	ChangedFiles          int           // inodes in the delta
	ChangedBytes          int64         // data blocks in the delta
}

// Capture is the volume at one moment. It must be settled with Adopt or Abandon before the
// next one.
type Capture struct {
	Delta     *Delta
	Blocks    BlockSource   // readable until Shipped, Adopt or Abandon
	Frozen    time.Time     // wall clock of the freeze
	FreezeFor time.Duration // how long the database stood still
	Stats     CaptureStats
	Skipped   []string // paths of sockets, fifos and devices, which no snapshot keeps

	found   *census
	shipped bool // Blocks are gone
}

// Unchanged says that nothing differs from the base.
func (c *Capture) Unchanged() bool {
	d := c.Delta
	return len(d.Inodes)+len(d.Removed)+len(d.Names)+len(d.Unnamed) == 0
}

const (
	defaultMaxFreeze = 2 * time.Second
	maxRounds        = 5        // pre-copy rounds before a freeze
	littleToRead     = 16 << 20 // bytes that are not worth another round
	frozenWorkers    = 2
)

// Capture takes the volume as it is at one moment: it reads what has changed while the
// database runs, again what has changed meanwhile, and only the rest while the database is
// frozen. The database is thawed when it returns, whatever happened. After an error that
// is no lack of room, the next attempt starts from what this one has read.
//
// It returns ErrFreezeTooLong, ErrFreezeBroken, ErrNoRoom, ErrEscapes, ErrNoBaseline and
// ErrPhase.
func (v *Volume) Capture(ctx context.Context, req CaptureRequest) (*Capture, error) {
	v.op.Lock()
	defer v.op.Unlock()
	c, err := v.capture(ctx, req)
	if errors.Is(err, ErrNoRoom) {
		// The second copy gives way, also to the database: it may be short of room itself.
		if gone, gerr := v.giveWay(err.Error()); gerr == nil && gone {
			c, err = v.capture(ctx, req)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("capture volume: %w", err)
	}
	return c, nil
}

func (v *Volume) capture(ctx context.Context, req CaptureRequest) (*Capture, error) {
	if ph := v.State().Phase; ph != PhaseLive && ph != PhaseClean {
		return nil, fmt.Errorf("%w: it is %s", ErrPhase, ph)
	}
	switch {
	case v.base == nil:
		return nil, ErrNoBaseline
	case v.out != nil:
		return nil, errors.New("the previous capture has been neither adopted nor abandoned")
	case req.Freezer == nil && !req.NoFreeze:
		return nil, errors.New("no freezer")
	}
	if req.MaxFreeze <= 0 {
		req.MaxFreeze = defaultMaxFreeze
	}
	if err := room(v.cfg.Dir, v.cfg.MinFree, 0); errors.Is(err, ErrNoRoom) {
		if _, err := v.giveWay(err.Error()); err != nil {
			return nil, err
		}
	}
	var c *Capture
	for attempt := 1; ; attempt++ {
		if v.pend == nil {
			sp, err := v.newSpool()
			if err != nil {
				return nil, err
			}
			v.pend = newPending(v.base, v.idx, sp)
		}
		det, err := v.detector(req)
		if err != nil {
			return nil, err
		}
		p := &pass{v: v, p: v.pend, req: req, det: det}
		c, err = p.run(ctx)
		p.sumUp(c, err)
		if errors.Is(err, errUnreported) {
			v.alarm(err) // this ends tracking
			continue
		}
		if errors.Is(err, errLostFrozen) && attempt < 3 {
			v.log.Warn("the tracker lost reports in the freeze; the capture begins anew", "error", err)
			continue
		}
		if err != nil && p.spoiled {
			v.dropWork() // gives the room back
		}
		if err != nil {
			return nil, err
		}
		break
	}
	v.out = c
	return c, nil
}

// Adopt makes a capture that has been committed as tree the new baseline.
func (v *Volume) Adopt(c *Capture, tree *Tree) error {
	v.op.Lock()
	defer v.op.Unlock()
	if c == nil || v.out != c {
		return errors.New("adopt capture: it is not the one that is waiting")
	}
	if tree.Ref.ID == "" || len(tree.Names) != len(c.found.names) {
		return fmt.Errorf("adopt capture: snapshot %q has %d names, the capture %d", tree.Ref.ID, len(tree.Names), len(c.found.names))
	}
	log := v.logIndex(v.State().Copy, v.idx, v.base.Ref.Hash, tree.Ref.Hash)
	for _, id := range c.Delta.Removed {
		v.idx.remove(id)
		log.removed(id)
	}
	for id, w := range v.pend.work {
		if n := c.found.byID[id]; n != nil {
			v.idx.update(id, n.typ, w, log.file)
		}
	}
	v.base = tree
	c.found.share(tree, maps.Keys(c.Delta.Inodes))
	v.dropPending()
	log.end()
	v.idx.tidy()
	if v.follow != nil {
		v.follow.adopted()
		v.keepCarry()
	}
	if err := v.setState(func(st *VolumeState) { st.Base = tree.Ref }); err != nil {
		return fmt.Errorf("adopt capture: %w", err)
	}
	return nil
}

// Shipped says that the blocks of a capture are on the share and will not be read again. It
// gives their room on the local disk back, so that SyncFS does not write to the disk what is
// about to be deleted: that would take it from the database for nothing.
func (v *Volume) Shipped(c *Capture) {
	v.op.Lock()
	defer v.op.Unlock()
	if c != nil && v.out == c {
		v.pend.spool.close() // Adopt needs the rest
		c.shipped = true
	}
}

// Abandon settles a capture that has not been committed: what it has captured will be part of
// the next one, which reads it again if it has been Shipped. A capture that has been settled
// already is ignored.
func (v *Volume) Abandon(c *Capture) {
	v.op.Lock()
	defer v.op.Unlock()
	if c == nil || v.out != c {
		return
	}
	v.out = nil
	if c.shipped {
		v.dropWork()
	}
}
