package sync

import (
	"path/filepath"
	"testing"

	"dbsupervisor/internal/fsx"
)

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
