package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/zeebo/xxh3"

	"dbsupervisor/internal/fsx"
)

// The tiers: how change is found.
const (
	TierAuto    = "auto"    // the best that there is here
	TierTracked = "tracked" // the kernel tells which blocks were written; refuses to do without
	TierHashed  = "hashed"  // files whose stat changed are read
)

// ErrNotTracked says that the tier "tracked" was asked for and can't be had here.
var ErrNotTracked = errors.New("change can't be tracked here")

// Tier says how changes are found ("tracked" or "hashed"), and where it is not the best
// tier, why. Before the first capture it says what is known by then.
func (v *Volume) Tier() (tier, reason string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.tier, v.tierWhy
}

// TrackStats sums up how change has been found since the volume was opened.
type TrackStats struct {
	ReadBytes     int64 // read for captures while the database ran
	FrozenBytes   int64 // and in freezes
	Lost          int64 // times that the tracker lost reports
	TooLong       int64 // captures given up with ErrFreezeTooLong
	RehashedBytes int64 // read to prove the tracker
	RehashChecked int64 // blocks that were found to be as the tracker says
	Alarms        int64 // blocks that had changed without a report
	Alarm         string
	Predicted     time.Duration // what the last freeze was expected to take; 0: no telling
}

// Tracking returns the sums. It waits for nothing.
func (v *Volume) Tracking() TrackStats {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.tracked
}

// count adds to the sums.
func (v *Volume) count(add func(t *TrackStats)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	add(&v.tracked)
}

func (v *Volume) setTier(tier, why string) {
	v.mu.Lock()
	changed := v.tier != tier || v.tierWhy != why
	v.tier, v.tierWhy = tier, why
	v.mu.Unlock()
	if changed {
		v.log.Info("tier of change detection", "tier", tier, "reason", why)
	}
}

// detector is what finds out what changed, for one capture.
func (v *Volume) detector(req CaptureRequest) (detector, error) {
	if err := v.startFollowing(); err != nil {
		return nil, err
	}
	if v.follow != nil {
		v.follow.looked, v.follow.unexplained, v.follow.gently = 0, 0, !req.NoFreeze
		return v.follow, nil
	}
	return &hashed{
		statDetector: statDetector{root: v.Path(), pids: req.Pids, sync: v.SyncFS},
		scan:         v.scanAll,
	}, nil
}

// startFollowing opens the tracker if there is one to open.
func (v *Volume) startFollowing() error {
	switch {
	case v.follow != nil:
		return nil
	case v.distrust != "":
		v.setTier(TierHashed, v.distrust)
		return nil
	case v.cfg.Tier == TierHashed:
		v.setTier(TierHashed, "sync.tier is hashed")
		return nil
	}
	t, err := v.openTracker()
	if err != nil {
		if v.cfg.Tier == TierTracked {
			return fmt.Errorf("%w: %w; set sync.tier to auto to read instead", ErrNotTracked, err)
		}
		v.setTier(TierHashed, err.Error())
		return nil
	}
	f := newFollower(t)
	f.log, f.clock, f.root, f.sync, f.scan = v.log, v.cfg.Clock, v.Path(), v.SyncFS, v.scanAll
	f.forget = v.dropCarry
	f.stat = statDetector{root: v.Path(), sync: v.SyncFS}
	if carry, ok := v.loadCarry(); ok {
		f.carry = carry
		f.since.addAll(carry)
	} else {
		f.lost, f.lostSince = noPast, noPast
	}
	v.follow = f
	v.setTier(TierTracked, "")
	return nil
}

const noPast = "nothing is known of the time before"

// scanAll lists the whole volume.
func (v *Volume) scanAll(ctx context.Context, tolerant bool, p *pending) (*scanned, error) {
	if err := v.fs.At("capture-scan", v.Path()); err != nil {
		return nil, err
	}
	return scan(ctx, v.Path(), scanConfig{known: p.known, tolerant: tolerant})
}

// stopFollowing forgets what was tracked: the volume has become another one, or was written
// by this process.
func (v *Volume) stopFollowing() {
	if err := v.dropCarry(); err != nil {
		v.log.Warn("can't remove what was tracked", "error", err)
	}
	if v.follow == nil {
		return
	}
	if err := v.follow.tracker.Remove(); err != nil {
		v.log.Warn("can't end tracking", "error", err)
	}
	v.follow = nil
}

// carried is what must be read again although it has been read and settled, kept for the
// time after a restart of the agent.
type carried struct {
	Boot   string  `cbor:"1,keyasint"`
	Volume string  `cbor:"2,keyasint"`
	Carry  touches `cbor:"3,keyasint"`
}

// keepCarry settles an adopted capture with the tracker. Whatever is interrupted here, an
// agent that starts then is told too much rather than too little: the file is replaced
// before the tracker forgets anything.
func (v *Volume) keepCarry() {
	f := v.follow
	b, err := cbor.Marshal(carried{Boot: v.cfg.BootID, Volume: v.trackKey(), Carry: f.carry})
	if err == nil {
		err = v.writeCarry(append(fmt.Appendf(nil, "%016x\n", xxh3.Hash(b)), b...))
	}
	if err == nil {
		err = f.tracker.Settle()
	}
	if err != nil {
		v.log.Warn("can't keep what was tracked; more will be read after a restart", "error", err)
	}
}

// trackKey tells what is tracked from other volumes, and from what this one was before.
func (v *Volume) trackKey() string {
	st := v.State()
	return st.ID + "/" + st.Copy
}

// writeCarry replaces the file in one step. It needs no fsync: it is believed only in the
// boot in which it was written.
func (v *Volume) writeCarry(b []byte) error {
	tmp := v.carryPath() + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return noRoom(err)
	}
	return v.fs.Rename(tmp, v.carryPath())
}

func (v *Volume) dropCarry() error {
	if err := v.fs.Remove(v.carryPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (v *Volume) loadCarry() (touches, bool) {
	b, err := fsx.ReadFile(v.fs, v.carryPath(), 1<<30)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			v.log.Warn("can't read what was tracked", "error", err)
		}
		return nil, false
	}
	var r carried
	if len(b) < 17 || string(b[:17]) != fmt.Sprintf("%016x\n", xxh3.Hash(b[17:])) || cbor.Unmarshal(b[17:], &r) != nil ||
		r.Boot != v.cfg.BootID || r.Volume != v.trackKey() {
		v.log.Info("what was tracked is of another boot or volume, or damaged")
		return nil, false
	}
	if r.Carry == nil {
		r.Carry = touches{}
	}
	return r.Carry, true
}
