package sync

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A copy is what the volume is, however much was done to an older one in its place; making it
// changes nothing about the volume, and reads nothing of the share.
func TestVolumeCopy(t *testing.T) {
	for _, c := range []struct{ system, way string }{{"ext4", CopyTwo}, {"xfs", CopyClone}} {
		t.Run(c.system, func(t *testing.T) {
			d := newDeltaRig(t)
			temp := volTemps(t, volLoop(t, c.system))
			f := d.open(temp(), nil)
			dir := filepath.Join(f.cfg.Dir, "replica", "a", "data")
			if _, err := f.Copy(t.Context(), d.store, dir, nil); !errors.Is(err, ErrPhase) {
				t.Fatalf("copy of an empty volume: %v", err)
			}
			d.hydrate(f, d.ref())
			for i := range 3 {
				ref := d.ref()
				if i > 0 {
					ref = d.change(byte(20+i), 300)
					d.hydrate(f, ref)
				}
				d.reads.reset()
				if c.way == CopyClone {
					dir = filepath.Join(f.cfg.Dir, "replica", string(rune('a'+i)), "data")
				}
				g, err := f.Copy(t.Context(), d.store, dir, nil)
				volOK(t, err)
				if g.Ref.ID != ref.ID || g.Stats.Copy != c.way || g.Stats.FetchedBytes != 0 || d.reads.bytes.Load() != 0 {
					t.Fatalf("round %d: %+v, %d bytes were read of the share", i, g, d.reads.bytes.Load())
				}
				if c.way == CopyTwo && i > 0 && g.Stats.ReusedBytes > 700*BlockSize {
					t.Fatalf("round %d: %d bytes were copied again", i, g.Stats.ReusedBytes)
				}
				volSame(t, "copy", volDescribe(t, f.Path()), volDescribe(t, dir))
				// A database runs on it.
				volWrite(t, filepath.Join(dir, "data"), 5*BlockSize, volData(99, 3*BlockSize))
				volWrite(t, filepath.Join(dir, "new"), 0, volData(98, BlockSize))
				volOK(t, os.Remove(filepath.Join(dir, "f3")))
				volSame(t, "the volume after the copy was written to", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
			}
		})
	}
}

func TestVolumeCopyRefuses(t *testing.T) {
	d := newDeltaRig(t)
	f := d.open(volRAM(t), nil)
	d.hydrate(f, d.ref())
	for _, dir := range []string{f.cfg.Dir, filepath.Join(f.cfg.Dir, "..", "x"), "/tmp/elsewhere"} {
		if _, err := f.Copy(t.Context(), d.store, dir, nil); err == nil {
			t.Errorf("a copy to %s", dir)
		}
	}
	f.op.Lock() // somebody follows head, and the share hangs
	ctx, cancel := context.WithTimeout(t.Context(), 10*copyPoll)
	defer cancel()
	_, err := f.Copy(ctx, d.store, filepath.Join(f.cfg.Dir, "replica", "a"), nil)
	f.op.Unlock()
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while the volume is in use: %v", err)
	}
	f.cfg.MinFree = 1 << 60
	if _, err := f.Copy(t.Context(), d.store, filepath.Join(f.cfg.Dir, "replica", "b"), nil); !errors.Is(err, ErrNoRoom) {
		t.Errorf("without room: %v", err)
	}
}
