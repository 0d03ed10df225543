package sync

import (
	"os"
	"testing"

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
