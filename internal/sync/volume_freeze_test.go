package sync

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/track"
)

// TestTrackedFreezeOpensNothing: what was read before is open in the freeze, so that nothing is
// looked for by name then.
func TestTrackedFreezeOpensNothing(t *testing.T) {
	rig, v, o := volFollowed(t)
	p, away := filepath.Join(v.Path(), "f0"), filepath.Join(v.cfg.Dir, "away")
	volWrite(t, p, 3*BlockSize, []byte("before"))
	top, err := os.Stat(v.Path())
	volOK(t, err)
	fr := &volFreezer{onThaw: func() {
		volOK(t, os.Rename(away, p))
		volOK(t, os.Chtimes(v.Path(), top.ModTime(), top.ModTime()))
	}}
	o.lie = func(ch *track.Changes) {
		ch.Names = nil // as the kernel: a write names nothing
		if fr.isFrozen() {
			volOK(t, os.Rename(p, away))
		}
	}
	c, ref := rig.snapshot(v, CaptureRequest{Freezer: fr, BeforeFreeze: func(context.Context) error {
		volWrite(t, p, 5*BlockSize, []byte("in the freeze"))
		return nil
	}})
	if s := c.Stats; s.FrozenBytes != BlockSize || s.FrozenNames != 1 {
		t.Fatalf("one block was written before the freeze: %+v", s)
	}
	volSame(t, "after", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedOpenFileKeepsNoStaleName: a file that is open and has been named since is looked
// at by its names, whatever became of them.
func TestTrackedOpenFileKeepsNoStaleName(t *testing.T) {
	rig, v, o := volFollowed(t)
	at := func(name string) string { return filepath.Join(v.Path(), name) }
	removed := v.follow.now.names["f0"].key.Ino
	o.lie = func(ch *track.Changes) { // as the kernel, which reports what was written before
		ch.Inodes[removed] = &track.Inode{Written: []track.Range{{From: 0, To: BlockSize}}}
	}
	for _, name := range []string{"f0", "f1", "f2", "f3"} {
		volWrite(t, at(name), 3*BlockSize, []byte("before"))
	}
	_, ref := rig.snapshot(v, CaptureRequest{Freezer: &volFreezer{}, BeforeFreeze: func(context.Context) error {
		for _, name := range []string{"f0", "f1", "f2", "f3"} {
			volWrite(t, at(name), 5*BlockSize, []byte(name))
		}
		volOK(t, os.Remove(at("f0")))
		volOK(t, os.Rename(at("f1"), at("f2")))
		volOK(t, os.Mkdir(at("d"), 0o700))
		volOK(t, os.Rename(at("f3"), at("d/f3")))
		volOK(t, os.Chmod(at("d/f3"), 0o640))
		return nil
	}})
	volSame(t, "after", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestTrackedRoundsGetShorter: what is written while much is read is read before the freeze,
// too.
func TestTrackedRoundsGetShorter(t *testing.T) {
	hook, o := &volHook{}, &volOracle{}
	rig := newVolRig(t)
	tracked := volTracked(t, o)
	v := rig.live(func(c *VolumeConfig) { tracked(c); c.FS = hook.fs() })
	at := func(name string) string { return filepath.Join(v.Path(), name) }
	blocks := tailBytes/BlockSize + 8
	for i, name := range []string{"f0", "f1", "f2"} {
		volWrite(t, at(name), 0, volData(byte(i+1), blocks*BlockSize))
	}
	rig.snapshot(v, CaptureRequest{})
	next := map[string]string{"f0": "f1", "f1": "f2"}
	hook.set(func(op fsx.Op, path string) error {
		for from, to := range next {
			if volPoint("capture-read", op, path) && filepath.Base(path) == "capture-read "+from {
				delete(next, from)
				n := blocks
				if to == "f2" {
					n = 2 // not worth a round
				}
				volWrite(t, at(to), 0, volData(50+byte(n), n*BlockSize))
			}
		}
		return nil
	})
	volWrite(t, at("f0"), 0, volData(77, blocks*BlockSize))
	c, ref := rig.snapshot(v, CaptureRequest{Freezer: &volFreezer{}})
	if s := c.Stats; len(next) > 0 || s.FrozenBytes > 2*BlockSize || s.Rounds < 2 {
		t.Fatalf("%+v, not written: %v", s, next)
	}
	volSame(t, "after", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestReaderArena: what doesn't fit is read all the same, and the memory is given back.
func TestReaderArena(t *testing.T) {
	a := newArena(3 * BlockSize)
	if a == nil {
		t.Fatal("no memory")
	}
	if len(a.take(2*BlockSize)) != 2*BlockSize || a.take(2*BlockSize) != nil {
		t.Fatal("an arena of three blocks has two and not two more")
	}
	a.free()
	a.free()
	if a.take(BlockSize) != nil {
		t.Fatal("memory that was given back")
	}
	var none *arena
	if none.take(1) != nil {
		t.Fatal("memory of no arena")
	}
	none.free()
}
