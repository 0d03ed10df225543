package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/track"
)

// volFollowed is a volume that follows an oracle, with some files, captured once.
func volFollowed(t *testing.T) (*volRig, *Volume, *volOracle) {
	t.Helper()
	rig, o := newVolRig(t), &volOracle{}
	v := rig.live(volTracked(t, o))
	for i := range 5 {
		volWrite(t, filepath.Join(v.Path(), fmt.Sprint("f", i)), 0, volData(byte(i+1), 40*BlockSize))
	}
	rig.snapshot(v, CaptureRequest{})
	return rig, v, o
}

// TestTrackedReadsOnlyWhatWasReported: the cost follows the change, also of names.
func TestTrackedReadsOnlyWhatWasReported(t *testing.T) {
	rig, v, _ := volFollowed(t)
	for i := range 300 {
		volOK(t, os.Mkdir(filepath.Join(v.Path(), fmt.Sprint("d", i)), 0o700))
	}
	rig.snapshot(v, CaptureRequest{})
	volWrite(t, filepath.Join(v.Path(), "f3"), 7*BlockSize+5, []byte("changed"))
	c, ref := rig.snapshot(v, CaptureRequest{})
	s := c.Stats
	if s.Tier != TierTracked || s.ReadBytes != BlockSize || s.FrozenBytes != 0 || s.Names > 5 || c.Blocks.Blocks() != 1 {
		t.Fatalf("one block cost %+v", s)
	}
	volSame(t, "one block", volDescribe(t, v.Path()), rig.restored(ref))
	c, _ = rig.snapshot(v, CaptureRequest{})
	if s := c.Stats; !c.Unchanged() || s.ReadBytes+s.FrozenBytes != 0 || s.Names != 0 {
		t.Fatalf("nothing cost %+v", s)
	}
	// A recycled file is the same file.
	volOK(t, os.Rename(filepath.Join(v.Path(), "f1"), filepath.Join(v.Path(), "f9")))
	c, ref = rig.snapshot(v, CaptureRequest{})
	if s := c.Stats; s.ReadBytes+s.FrozenBytes != 0 {
		t.Fatalf("a renamed file was read: %+v", s)
	}
	volSame(t, "renamed", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedCarries: a page that was reported dirty once is looked at in the freeze and
// after it, although nothing is reported of it again.
func TestTrackedCarries(t *testing.T) {
	rig, v, o := volFollowed(t)
	p := filepath.Join(v.Path(), "f2")
	var ino uint64
	for n, e := range v.follow.now.names {
		if n == "f2" {
			ino = e.key.Ino
		}
	}
	dirty := func(ch *track.Changes) {
		in := ch.Inodes[ino]
		delete(ch.Inodes, ino)
		if in != nil && o.drains%100 == 3 { // the one that follows the syncfs
			ch.Inodes[ino] = &track.Inode{Dirtied: []track.Range{{From: 5 * BlockSize, To: 6 * BlockSize}}}
		}
	}
	at := o.drains
	o.drains = 0
	_ = at
	o.lie = dirty
	stores := byte(0)
	store := func() { // as through a mapping: moves no time
		st, err := os.Stat(p)
		volOK(t, err)
		stores++
		volWrite(t, p, 5*BlockSize, []byte{stores, stores})
		volOK(t, os.Chtimes(p, st.ModTime(), st.ModTime()))
	}
	// The page becomes dirty between the syncfs and the drain after it.
	inner := v.follow.sync
	v.follow.sync = func(ctx context.Context) error {
		err := inner(ctx)
		store()
		return err
	}
	_, ref := rig.snapshot(v, CaptureRequest{BeforeFreeze: func(context.Context) error { store(); return nil }})
	volSame(t, "in the freeze", volDescribe(t, v.Path()), rig.restored(ref))
	v.follow.sync = inner
	// Still dirty: the next store raises nothing.
	store()
	_, ref = rig.snapshot(v, CaptureRequest{})
	volSame(t, "after the next syncfs", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedRehash: a tracker that drops a range is found out, and the snapshot is right.
func TestTrackedRehash(t *testing.T) {
	ctx := context.Background()
	rig, v, o := volFollowed(t)
	prove := func() { volOK(t, v.Rehash(ctx, 10<<20)) }
	prove()
	// What was reported, or is about to be, is no alarm.
	volWrite(t, filepath.Join(v.Path(), "f0"), 3*BlockSize, []byte("x"))
	prove()
	rig.snapshot(v, CaptureRequest{})
	if s := v.Tracking(); s.Alarms != 0 || s.RehashChecked == 0 {
		t.Fatalf("honest tracker: %+v", s)
	}
	o.lie = func(ch *track.Changes) {
		ch.Inodes = map[uint64]*track.Inode{} // so that the new stat is believed to go with the old content
	}
	p := filepath.Join(v.Path(), "f4")
	st, err := os.Stat(p)
	volOK(t, err)
	volWrite(t, p, 9*BlockSize, []byte("dropped"))
	volOK(t, os.Chtimes(p, st.ModTime(), st.ModTime()))
	rig.snapshot(v, CaptureRequest{}) // believes it
	for _, x := range v.idx.files {
		x.settled = true // as after some time
	}
	prove()
	_, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "after the alarm", volDescribe(t, v.Path()), rig.restored(ref))
	s := v.Tracking()
	tier, why := v.Tier()
	if s.Alarms != 1 || s.Alarm == "" || tier != TierHashed || why == "" {
		t.Fatalf("a dropped range was not found: %+v, tier %s (%s)", s, tier, why)
	}
	// From here on it is read.
	volWrite(t, p, 0, []byte("later"))
	_, ref = rig.snapshot(v, CaptureRequest{})
	volSame(t, "later", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedLoss: lost reports cost a look by stat, wherever they are lost.
func TestTrackedLoss(t *testing.T) {
	for name, when := range map[string]int{"before the syncfs": 1, "in the gap": 2, "after the syncfs": 3, "in the freeze": 4} {
		t.Run(name, func(t *testing.T) {
			rig, v, o := volFollowed(t)
			quiet := func(name, text string) { // moves ctime only
				p := filepath.Join(v.Path(), name)
				st, err := os.Stat(p)
				volOK(t, err)
				volWrite(t, p, 2*BlockSize, []byte(text))
				volOK(t, os.Chtimes(p, st.ModTime(), st.ModTime()))
			}
			quiet("f1", "lost")
			o.drains = 0
			inner := v.follow.sync
			v.follow.sync = func(ctx context.Context) error {
				if o.drains < 3 {
					quiet("f3", "while it syncs")
				}
				return inner(ctx)
			}
			o.lie = func(ch *track.Changes) {
				if o.drains == 1 {
					ch.Inodes = map[uint64]*track.Inode{}
				}
				if o.drains == when {
					ch.Inodes, ch.Lost = map[uint64]*track.Inode{}, "for the test"
				}
			}
			if when > 1 { // only what that drain had was lost
				o.lie = func(ch *track.Changes) {
					if o.drains == when {
						ch.Inodes, ch.Lost = map[uint64]*track.Inode{}, "for the test"
					}
				}
			}
			c, ref := rig.snapshot(v, CaptureRequest{BeforeFreeze: func(context.Context) error {
				if o.drains < 4 {
					quiet("f2", "late")
				}
				if when == 3 && o.drains == 3 {
					// Had there been no other syncfs the page would be dirty still, and a store
					// into it raise nothing.
					quiet("f3", "again")
					o.lie = func(ch *track.Changes) { ch.Inodes = map[uint64]*track.Inode{} }
				}
				return nil
			}})
			volSame(t, "after a loss", volDescribe(t, v.Path()), rig.restored(ref))
			if v.Tracking().Lost < 2 { // the first is that of the beginning
				t.Fatalf("not counted: %+v, %+v", v.Tracking(), c.Stats)
			}
		})
	}
}

// TestTrackedUnexplained: a change that shows in the stat and was not reported is read.
func TestTrackedUnexplained(t *testing.T) {
	rig, v, o := volFollowed(t)
	o.lie = func(ch *track.Changes) { ch.Inodes = map[uint64]*track.Inode{} }
	volWrite(t, filepath.Join(v.Path(), "f1"), 2*BlockSize, []byte("unreported"))
	c, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "unexplained", volDescribe(t, v.Path()), rig.restored(ref))
	if c.Stats.Unexplained != 1 || c.Stats.FrozenBytes != 0 {
		t.Fatalf("%+v", c.Stats)
	}
}

// TestTrackedRestart: after a restart of the agent nothing is read but what was reported;
// a capture that was under way when it died is not forgotten.
func TestTrackedRestart(t *testing.T) {
	ctx := context.Background()
	rig, v, o := volFollowed(t)
	p := filepath.Join(v.Path(), "f1")
	volWrite(t, p, 2*BlockSize, []byte("before"))
	c, err := v.Capture(ctx, CaptureRequest{Freezer: &volFreezer{}})
	volOK(t, err)
	_ = c // and dies
	volOK(t, v.Close())
	volWrite(t, p, 8*BlockSize, []byte("between"))
	v = rig.open(v.cfg.Dir, volTracked(t, o))
	volOK(t, v.Baseline(ctx, rig.store, rig.ref()))
	c, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "after a restart", volDescribe(t, v.Path()), rig.restored(ref))
	if c.Stats.ReadBytes+c.Stats.FrozenBytes > 4*BlockSize || c.Blocks.Blocks() != 2 {
		t.Fatalf("a restart cost %+v", c.Stats)
	}
}

// TestTrackedRefuses: sync.tier "tracked" is an error where there is no tracker, "auto" says why.
func TestTrackedRefuses(t *testing.T) {
	for tier, want := range map[string]error{TierTracked: ErrNotTracked, TierAuto: nil} {
		rig := newVolRig(t)
		v := rig.live(func(c *VolumeConfig) {
			c.Tier, c.track = tier, func() (tracker, error) { return nil, errors.New("not here") }
		})
		_, err := v.Capture(context.Background(), CaptureRequest{NoFreeze: true})
		volIs(t, err, want)
		if got, why := v.Tier(); want == nil && (got != TierHashed || why != "not here") {
			t.Fatalf("tier %s: %s", got, why)
		}
	}
}

// TestTrackedPredicts: a freeze that could not be over in time is not begun.
func TestTrackedPredicts(t *testing.T) {
	rig, v, o := volFollowed(t)
	v.pace.frozen.perBlock = time.Second
	inner := v.follow.sync
	p := filepath.Join(v.Path(), "f2")
	o.lie = func(ch *track.Changes) {
		for _, in := range ch.Inodes {
			in.Dirtied = in.Written
		}
	}
	v.follow.sync = func(ctx context.Context) error {
		volWrite(t, p, 0, volData(byte(o.drains), 20*BlockSize))
		return inner(ctx)
	}
	fr := &volFreezer{}
	_, err := v.Capture(context.Background(), CaptureRequest{Freezer: fr, MaxFreeze: 100 * time.Millisecond})
	volIs(t, err, ErrFreezeTooLong)
	if s := v.Tracking(); fr.freezes != 0 || s.TooLong != 1 || s.Predicted < time.Second {
		t.Fatalf("%d freezes, %+v", fr.freezes, s)
	}
	v.follow.sync, v.pace.frozen.perBlock = inner, 0
	_, ref := rig.snapshot(v, CaptureRequest{Freezer: fr})
	volSame(t, "later", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedHeldOutlivesFailure: what was read in a freeze is part of the next capture, also
// if the one that read it failed after the thaw.
func TestTrackedHeldOutlivesFailure(t *testing.T) {
	rig, v, _ := volFollowed(t)
	p := filepath.Join(v.Path(), "f2")
	broken := errors.New("broken")
	for _, end := range []string{"error", "cancelled"} {
		ctx, cancel := context.WithCancel(context.Background())
		_, err := v.Capture(ctx, CaptureRequest{
			Freezer: &volFreezer{},
			BeforeFreeze: func(context.Context) error {
				volWrite(t, p, 3*BlockSize, []byte(end))
				return nil
			},
			AfterFreeze: func(context.Context) error {
				if end == "cancelled" {
					cancel()
				}
				return broken
			},
		})
		cancel()
		volIs(t, err, broken)
		_, ref := rig.snapshot(v, CaptureRequest{})
		volSame(t, end, volDescribe(t, v.Path()), rig.restored(ref))
	}
}

// TestTrackedNamesOutliveFailure: what was seen to change in a round that was then given up
// is part of the next capture.
func TestTrackedNamesOutliveFailure(t *testing.T) {
	rig, v, _ := volFollowed(t)
	root := func(name string) string { return filepath.Join(v.Path(), name) }
	volOK(t, os.Mkdir(root("d"), 0o700))
	rig.snapshot(v, CaptureRequest{})
	v.pace.frozen.perBlock = time.Second
	_, err := v.Capture(context.Background(), CaptureRequest{
		Freezer: &volFreezer{}, MaxFreeze: 100 * time.Millisecond,
		BeforeFreeze: func(context.Context) error {
			volWrite(t, root("f0"), 0, volData(99, littleToRead+BlockSize)) // too much for the freeze
			volOK(t, os.WriteFile(root("empty"), nil, 0o600))
			volOK(t, os.WriteFile(root("new"), []byte("new"), 0o600))
			volOK(t, os.Chmod(root("f1"), 0o640))
			volOK(t, os.Truncate(root("f2"), 3*BlockSize+7))
			volOK(t, os.Rename(root("f3"), root("d/f3")))
			volOK(t, os.Remove(root("f4")))
			volOK(t, os.Symlink("f1", root("link")))
			volOK(t, os.Rename(root("d"), root("e")))
			return nil
		},
	})
	volIs(t, err, ErrFreezeTooLong)
	v.pace.frozen.perBlock = 0
	_, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "given up", volDescribe(t, v.Path()), rig.restored(ref))
}

// volMapped is a volume in memory, where a store through a mapping moves no time once its page
// has been stored to, with a file of ten blocks that is mapped.
func volMapped(t *testing.T) (rig *volRig, v *Volume, o *volOracle, store func(block int64, text string), ino uint64) {
	t.Helper()
	rig, o = newVolRig(t), &volOracle{}
	v = rig.open(volRAM(t), volTracked(t, o))
	volOK(t, v.MarkLive(t.Context(), 1))
	volOK(t, v.Baseline(t.Context(), rig.store, SnapshotRef{}))
	p := filepath.Join(v.Path(), "mapped")
	volWrite(t, p, 0, volData(1, 10*BlockSize))
	d := &volDoer{maps: map[string][]byte{}}
	t.Cleanup(func() { volOK(t, d.do(volOp{Do: "unmap"})) })
	store = func(block int64, text string) {
		t.Helper()
		volOK(t, d.do(volOp{Do: "store", Path: p, Off: block * BlockSize, Data: []byte(text)}))
	}
	var st unix.Stat_t
	volOK(t, unix.Stat(p, &st))
	return rig, v, o, store, st.Ino
}

// TestTrackedSameStat: a change that is reported is in the snapshot also if no time and no size
// has moved since the one before: stores into pages that were dirty, direct writes that arrive
// late.
func TestTrackedSameStat(t *testing.T) {
	rig, v, _, store, _ := volMapped(t)
	store(3, "first")
	rig.snapshot(v, CaptureRequest{})
	p := filepath.Join(v.Path(), "mapped")
	var before, after unix.Stat_t
	volOK(t, unix.Stat(p, &before))
	store(3, "again")
	volOK(t, unix.Stat(p, &after))
	if before.Ctim != after.Ctim {
		t.Fatal("the store has moved ctime: nothing is proved")
	}
	c, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "the same stat", volDescribe(t, v.Path()), rig.restored(ref))
	if c.Blocks.Blocks() != 1 {
		t.Fatalf("%d blocks", c.Blocks.Blocks())
	}
}

// TestTrackedLossStaysDirty: if the report of a page that became dirty after the syncfs was
// lost, what is stored into it later (which raises nothing) is found after the next syncfs.
func TestTrackedLossStaysDirty(t *testing.T) {
	rig, v, o, store, ino := volMapped(t)
	rig.snapshot(v, CaptureRequest{})
	o.drains = 0
	o.lie = func(ch *track.Changes) {
		delete(ch.Inodes, ino)
		if o.drains == 3 {
			ch.Lost = "for the test"
		}
	}
	inner, syncs := v.follow.sync, 0
	v.follow.sync = func(ctx context.Context) error {
		syncs++
		if syncs == 2 {
			store(5, "later")
		}
		err := inner(ctx)
		if syncs == 1 {
			store(5, "first") // the page is dirty from here on
		}
		return err
	}
	_, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "after a loss", volDescribe(t, v.Path()), rig.restored(ref))
	if syncs < 2 {
		t.Fatal("no second syncfs")
	}
}

// TestTrackedDoubtIsGone: a file that changed without a report and is gone by the next look
// makes no later capture look twice.
func TestTrackedDoubtIsGone(t *testing.T) {
	rig, v, o := volFollowed(t)
	p := filepath.Join(v.Path(), "f1")
	o.drains = 0
	o.lie = func(ch *track.Changes) {
		ch.Inodes = map[uint64]*track.Inode{}
		if o.drains == 4 { // the first after the look that doubts
			volOK(t, os.Remove(p))
		}
	}
	volWrite(t, p, 0, []byte("unreported"))
	rig.snapshot(v, CaptureRequest{})
	if _, err := os.Stat(p); err == nil {
		t.Fatal("there was no second look")
	}
	c, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "later", volDescribe(t, v.Path()), rig.restored(ref))
	if c.Stats.Rounds != 1 {
		t.Fatalf("%d rounds for nothing", c.Stats.Rounds)
	}
}

// TestTrackedCancelIsNoLoss: a capture whose caller goes away has lost no report.
func TestTrackedCancelIsNoLoss(t *testing.T) {
	rig, v, _ := volFollowed(t)
	before := v.Tracking().Lost
	volWrite(t, filepath.Join(v.Path(), "f1"), 0, []byte("changed"))
	ctx, cancel := context.WithCancel(t.Context())
	inner := v.follow.sync
	v.follow.sync = func(ctx context.Context) error {
		defer cancel()
		return inner(ctx)
	}
	_, err := v.Capture(ctx, CaptureRequest{Freezer: &volFreezer{}})
	volIs(t, err, context.Canceled)
	v.follow.sync = inner
	c, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "later", volDescribe(t, v.Path()), rig.restored(ref))
	if got := v.Tracking().Lost; got != before || c.Stats.ReadBytes != BlockSize {
		t.Fatalf("%d losses instead of %d, %+v", got, before, c.Stats)
	}
}
