package sync

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/track"
)

// volKernel runs a test on file systems of its own, with what the kernel reports.
func volKernel(t *testing.T, test func(t *testing.T, temp func() string)) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			top := volLoop(t, kind)
			if err := track.Supported(top); err != nil {
				t.Skip(err)
			}
			test(t, func() string {
				dir, err := os.MkdirTemp(top, "d")
				volOK(t, err)
				return dir
			})
		})
	}
}

// TestVolumeRandomKernel: TestVolumeRandom with what the kernel reports of another process.
func TestVolumeRandomKernel(t *testing.T) {
	volKernel(t, func(t *testing.T, temp func() string) {
		volRandom(t, volKit{checks: 12, temp: temp, tracked: true, hand: newVolOther(t)})
	})
}

// TestVolumeRandomHashed: the same on the same file systems without.
func TestVolumeRandomHashed(t *testing.T) {
	volKernel(t, func(t *testing.T, temp func() string) {
		volRandom(t, volKit{checks: 6, temp: temp, hand: newVolOther(t)})
	})
}

// TestTrackedRefused: XFS moves mtime before it refuses an operation, and nothing reports it. The
// sweep finds it.
func TestTrackedRefused(t *testing.T) {
	volKernel(t, func(t *testing.T, temp func() string) {
		rig, dir, hand := newVolRig(t), temp(), newVolOther(t)
		rig.temp = temp
		v := rig.open(dir, func(c *VolumeConfig) { c.Tier = TierTracked })
		t.Cleanup(func() { _ = track.Discard(filepath.Join(pinRoot, pinName(dir))) })
		volOK(t, v.MarkLive(t.Context(), 1))
		volOK(t, v.Baseline(t.Context(), rig.store, SnapshotRef{}))
		for i := range sweepStep { // more than one call's
			volOK(t, hand.do(volOp{Do: "write", Path: filepath.Join(v.Path(), fmt.Sprint("f", i)), Data: volData(byte(i), 10)}))
		}
		p := filepath.Join(v.Path(), "z")
		volOK(t, hand.do(volOp{Do: "write", Path: p, Data: volData(1, 2*BlockSize)}))
		rig.snapshot(v, CaptureRequest{})
		before := volDescribe(t, v.Path())["z"].MTime
		if err := hand.do(volOp{Do: "fallocate", Path: p, Mode: unix.FALLOC_FL_COLLAPSE_RANGE, Off: BlockSize, N: 2 * BlockSize}); err == nil {
			t.Fatal("collapsing beyond the end was not refused")
		}
		if moved := volDescribe(t, v.Path())["z"].MTime != before; !moved {
			t.Log("mtime has not moved")
		}
		volOK(t, v.Rehash(t.Context(), BlockSize))
		volOK(t, v.Rehash(t.Context(), BlockSize))
		_, ref := rig.snapshot(v, CaptureRequest{})
		volSame(t, "after a refusal", volDescribe(t, v.Path()), rig.restored(ref))
		if v.Tracking().Alarms != 0 {
			t.Error("an alarm for nothing")
		}
	})
}

// TestTrackedHoles: room allocated in a hole, and a file that loses one of its names, touch
// an inode and report no range.
func TestTrackedHoles(t *testing.T) {
	volKernel(t, func(t *testing.T, temp func() string) {
		rig, dir, hand := newVolRig(t), temp(), newVolOther(t)
		rig.temp = temp
		v := rig.open(dir, func(c *VolumeConfig) { c.Tier = TierTracked })
		t.Cleanup(func() { _ = track.Discard(filepath.Join(pinRoot, pinName(dir))) })
		volOK(t, v.MarkLive(t.Context(), 1))
		volOK(t, v.Baseline(t.Context(), rig.store, SnapshotRef{}))
		p, q := filepath.Join(v.Path(), "a"), filepath.Join(v.Path(), "b")
		do := func(o volOp) { t.Helper(); volOK(t, hand.do(o)) }
		do(volOp{Do: "write", Path: p, Data: volData(1, BlockSize)})
		do(volOp{Do: "write", Path: p, Off: 30 * BlockSize, Data: volData(2, BlockSize)})
		do(volOp{Do: "link", Path: p, To: q})
		rig.snapshot(v, CaptureRequest{})
		do(volOp{Do: "fallocate", Path: p, Mode: unix.FALLOC_FL_KEEP_SIZE, Off: 10 * BlockSize, N: 5 * BlockSize})
		c, ref := rig.snapshot(v, CaptureRequest{})
		volSame(t, "room in a hole", volDescribe(t, v.Path()), rig.restored(ref))
		if c.Stats.ReadBytes+c.Stats.FrozenBytes != 0 {
			t.Errorf("holes were read: %+v", c.Stats)
		}
		_, ref = rig.snapshot(v, CaptureRequest{BeforeFreeze: func(context.Context) error { return hand.do(volOp{Do: "remove", Path: p}) }})
		volSame(t, "one name less", volDescribe(t, v.Path()), rig.restored(ref))
	})
}
