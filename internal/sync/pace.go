package sync

import (
	"context"
	"fmt"
	"time"
)

// pace is how fast this machine reads the volume, as measured in earlier rounds, to tell
// beforehand how long a freeze would take.
type pace struct {
	running, frozen speed
}

type speed struct {
	perBlock time.Duration // smoothed; 0: not known
}

// paceBlocks is how many blocks a round must read to be worth learning from.
const paceBlocks = 64

func (p *pace) note(frozen bool, bytes int64, took time.Duration) {
	s := &p.running
	if frozen {
		s = &p.frozen
	}
	n := bytes / BlockSize
	if n < paceBlocks {
		return
	}
	each := took / time.Duration(n)
	if s.perBlock == 0 {
		s.perBlock = each
		return
	}
	s.perBlock = (3*s.perBlock + each) / 4
}

// What a freeze takes beside reading blocks: the freezer, asking the tracker, and a look at
// each touched name.
const (
	freezeFixed   = 2 * time.Millisecond
	freezePerName = 20 * time.Microsecond
)

// predict is how long a freeze would take; ok is false where nothing has been measured.
func (p *pace) predict(blocks uint64, names int) (time.Duration, bool) {
	each := p.frozen.perBlock
	if each == 0 {
		each = p.running.perBlock
	}
	if each == 0 && blocks > 0 {
		return 0, false
	}
	return freezeFixed + time.Duration(blocks)*each + time.Duration(names)*freezePerName, true
}

// precopy reads what has changed while the database runs, until what a freeze would have
// to read is little, or gets no less. It refuses to freeze where that would take longer
// than it may.
func (p *pass) precopy(ctx context.Context) error {
	kind := roundSync
	before := maxRead
	for {
		start, read := p.v.cfg.Clock.Now(), p.stats.ReadBytes
		if err := p.round(ctx, kind, p.v.cfg.Workers); err != nil {
			return err
		}
		p.stats.Rounds++
		took := p.v.cfg.Clock.Now().Sub(start)
		read = p.stats.ReadBytes - read
		done, next, err := p.enough(took, read, before)
		if err != nil {
			return err
		}
		if done {
			p.makeArena(read)
			return nil
		}
		before, kind = read, next
	}
}

// tailBytes are not worth another round to have them read before the freeze.
const tailBytes = 256 << 10

// makeArena finds memory for what the freeze will have to read: about as much as the last
// round, and what must be read again in any case.
func (p *pass) makeArena(read int64) {
	blocks, _, _, _ := p.det.expect()
	size := min(read, holdMost) + min(int64(blocks), holdMost/BlockSize)*BlockSize
	p.arena = newArena(min(size*3/2+1<<20, holdMost) &^ (BlockSize - 1))
}

const maxRead = int64(^uint64(0) >> 1)

// enough says after a round whether it was the last one before the freeze, and if not, what
// the next one shall be.
func (p *pass) enough(took time.Duration, read, before int64) (bool, roundKind, error) {
	blocks, names, again, known := p.det.expect()
	if known {
		// The tier knows what it will read at least; as much may be written again until then.
		expected, ok := p.v.pace.predict(2*blocks, names)
		if p.stats.Predicted = expected; !ok {
			expected, ok = 0, blocks*BlockSize <= littleToRead
		}
		switch {
		case ok && expected <= p.req.MaxFreeze/2 && !again:
			if p.stats.Rounds < maxRounds && read > tailBytes && read <= before/4*3 {
				// What was written during this round is left to the freeze. The next one is
				// shorter, for all that it reads is open, and nothing is synced.
				return false, roundLight, nil
			}
			return true, 0, nil
		case p.stats.Rounds < maxRounds && again && expected <= p.req.MaxFreeze/2 && p.stats.Rounds%2 == 1:
			return false, roundLight, nil
		case p.stats.Rounds < maxRounds:
			return false, roundSync, nil
		case expected > p.req.MaxFreeze:
			return false, 0, fmt.Errorf("%w: it would be %s", ErrFreezeTooLong, expected.Round(time.Millisecond))
		default:
			return true, 0, nil
		}
	}
	// A freeze has to do at most what this round did, if as much changes during a round
	// as did before it; it reads with fewer workers, but does not sync. Files that were
	// written in the very moment of a round are read again in the next, for nothing.
	p.stats.Predicted = took
	quick, little := took <= p.req.MaxFreeze/4, read <= littleToRead || read > before/2
	switch {
	case quick && little:
		return true, 0, nil
	case p.stats.Rounds < maxRounds:
		return false, roundSync, nil
	case took > 4*p.req.MaxFreeze:
		return false, 0, fmt.Errorf("%w: what changes while the database runs takes %s to read", ErrFreezeTooLong, took.Round(time.Millisecond))
	default:
		return true, 0, nil
	}
}

// precopyStopped does for a stopped database what must come before the last round.
func (p *pass) precopyStopped(ctx context.Context) error {
	if _, _, _, known := p.det.expect(); !known {
		return nil // the last round does it all
	}
	err := p.round(ctx, roundSync, p.v.cfg.Workers)
	p.stats.Rounds++
	return err
}

// affordable gives a freeze up that can't be over in time.
func (p *pass) affordable(frozen bool, blocks uint64) error {
	if !frozen || p.req.NoFreeze {
		return nil
	}
	expected, ok := p.v.pace.predict(blocks, 0)
	if ok && p.v.pace.frozen.perBlock > 0 && expected > p.req.MaxFreeze && blocks > littleToRead/BlockSize {
		return fmt.Errorf("%w: reading %d blocks would take %s (sync.max_freeze)", ErrFreezeTooLong, blocks, expected.Round(time.Millisecond))
	}
	return nil
}
