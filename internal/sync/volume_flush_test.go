package sync

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/track"
)

// volWritten is how many bytes have been written to the device of a file system.
func volWritten(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	volOK(t, unix.Stat(path, &st))
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev)))
	volOK(t, err)
	sectors, err := strconv.ParseInt(strings.Fields(string(b))[6], 10, 64)
	volOK(t, err)
	return sectors * 512
}

// TestVolumeShipped: captured blocks that are on the share are not written to the local disk,
// and if the snapshot is not committed after all they are read again.
func TestVolumeShipped(t *testing.T) {
	const much = 32 << 20
	for _, system := range []string{"ext4", "xfs"} {
		for _, tier := range []string{TierHashed, TierTracked} {
			t.Run(system+" "+tier, func(t *testing.T) {
				ctx, rig, mnt := t.Context(), newVolRig(t), volLoop(t, system)
				v := rig.open(mnt, func(c *VolumeConfig) {
					if tier == TierTracked {
						volTracked(t, &volOracle{})(c)
					}
				})
				volOK(t, v.MarkLive(ctx, 1))
				volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
				rig.snapshot(v, CaptureRequest{})
				p := filepath.Join(v.Path(), "f")
				volWrite(t, p, 0, volData(1, much))
				c, err := v.Capture(ctx, CaptureRequest{Freezer: &volFreezer{}})
				volOK(t, err)
				rig.write(c)
				v.Shipped(c)
				before := volWritten(t, mnt)
				volOK(t, v.SyncFS(ctx))
				if n := volWritten(t, mnt) - before; n > much/4 {
					t.Errorf("%d bytes were written to the disk after %d had been captured", n, much)
				}
				if err := c.Blocks.ReadBlocks(0, make([]byte, BlockSize)); err == nil {
					t.Error("blocks were read that had been given back")
				}
				v.Abandon(c)
				_, ref := rig.snapshot(v, CaptureRequest{})
				volSame(t, "after a snapshot that was not committed", volDescribe(t, v.Path()), rig.restored(ref))
			})
		}
	}
}

// TestVolumeShippedAdopted: what a capture found is in the index also when its blocks were given
// back before: a block that becomes what it was is captured again, and nothing else is.
func TestVolumeShippedAdopted(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	volWrite(t, p, 0, volData(1, 3*BlockSize))
	for _, seed := range []byte{2, 1, 2, 1} {
		_, ref := rig.snapshot(v, CaptureRequest{}) // says Shipped
		volSame(t, "shipped and adopted", volDescribe(t, v.Path()), rig.restored(ref))
		c, err := v.Capture(t.Context(), CaptureRequest{Freezer: &volFreezer{}})
		volOK(t, err)
		if !c.Unchanged() {
			t.Errorf("%d inodes have changed since", len(c.Delta.Inodes))
		}
		v.Abandon(c)
		volWrite(t, p, BlockSize, volData(seed, BlockSize))
	}
}

// TestTrackedWritesOutGently: what was written goes to the disk before the syncfs, unless the
// database is stopped, and somebody may wait.
func TestTrackedWritesOutGently(t *testing.T) {
	const much = 32 << 20
	volKernel(t, func(t *testing.T, temp func() string) {
		rig, dir, hand := newVolRig(t), temp(), newVolOther(t)
		v := rig.open(dir, func(c *VolumeConfig) { c.Tier = TierTracked })
		t.Cleanup(func() { _ = track.Discard(filepath.Join(pinRoot, pinName(dir))) })
		volOK(t, v.MarkLive(t.Context(), 1))
		volOK(t, v.Baseline(t.Context(), rig.store, SnapshotRef{}))
		p := filepath.Join(v.Path(), "f")
		dirty := func(seed byte) {
			t.Helper()
			for at := int64(0); at < much; at += 1 << 20 {
				volOK(t, hand.do(volOp{Do: "write", Path: p, Off: at, Data: volData(seed, 1<<20)}))
			}
		}
		dirty(1)
		rig.snapshot(v, CaptureRequest{})
		var at int64
		inner := v.follow.sync
		v.follow.sync = func(ctx context.Context) error {
			at = volWritten(t, dir)
			return inner(ctx)
		}
		for i, stopped := range []bool{false, true} {
			dirty(byte(i + 2))
			before := volWritten(t, dir)
			_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: stopped})
			if wrote := at - before; stopped != (wrote < much/2) {
				t.Errorf("stopped %v: %d of %d bytes were on the disk before the syncfs", stopped, wrote, much)
			}
			volSame(t, "captured", volDescribe(t, v.Path()), rig.restored(ref))
		}
	})
}

func TestPortions(t *testing.T) {
	rs := []blockRange{{0, 3}, {5, 6}, {100, 125}, {130, 131}}
	want := []blockRange{{0, 106}, {106, 116}, {116, 131}}
	if got := portions(rs, 10); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := portions(nil, 10); got != nil {
		t.Errorf("nothing gave %v", got)
	}
}
