package sync

import (
	"context"
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
