package efssim_test

import (
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
	"dbsupervisor/tests/efssim"
)

// What a snapshot may cost the share, whatever the number of files.
const (
	shipBudget   = 12 // pack and manifest, and one more for each MiB begun
	commitBudget = 8  // the register's commit
)

// TestSnapshotKeepsToItsBudget counts the operations of snapshots in the steady state. They
// must not follow the number of files.
func TestSnapshotKeepsToItsBudget(t *testing.T) {
	var first [2]uint64
	for k, files := range []int{20, 2000} {
		t.Run(fmt.Sprintf("%d files", files), func(t *testing.T) {
			share, r := mount(t, t.TempDir(), patient())
			b := newBudget(t, share, files)
			b.snapshot(r) // everything
			b.snapshot(r) // the caches are warm from here on
			for n := range 5 {
				ship, commit := b.snapshot(r)
				t.Logf("snapshot %d: pack and manifest: %v", n, ship)
				t.Logf("snapshot %d: commit: %v", n, commit)
				if most := shipBudget + uint64((ship.Written+1<<20-1)>>20); ship.Total() > most { //nolint:gosec // not negative
					t.Errorf("pack and manifest took %d operations, the budget is %d: %v", ship.Total(), most, ship)
				}
				if commit.Total() > commitBudget {
					t.Errorf("the commit took %d operations, the budget is %d: %v", commit.Total(), commitBudget, commit)
				}
				if got := [2]uint64{ship.Total(), commit.Total()}; k == 0 && n == 4 {
					first = got
				} else if k == 1 && n == 4 && got != first {
					t.Errorf("%d files take %v operations, 20 files %v", files, got, first)
				}
			}
		})
	}
}

// budget is an instance that takes snapshots, without a database.
type budget struct {
	t      *testing.T
	files  int
	volume *volsync.Volume
	store  *volsync.Store
	lease  *lease.Lease
	random *mrand.ChaCha8
}

func newBudget(t *testing.T, share string, files int) *budget {
	t.Helper()
	ctx := t.Context()
	b := &budget{t: t, files: files, random: mrand.NewChaCha8([32]byte{3})}
	fc := lease.FileConfig{FS: fsx.OS{}, Share: share, Rand: rand.Reader}
	_, err := lease.InitFile(ctx, fc, lease.Record{TTL: lease.Duration(time.Minute)})
	must(t, err)
	reg, err := lease.OpenFile(ctx, fc)
	must(t, err)
	b.lease, err = lease.New(lease.Config{
		Register: reg, Clock: boottime.Real{}, Rand: rand.Reader, FS: fsx.OS{},
		Self: lease.Holder{Instance: "counted", VolumeID: "volume"},
		TTL:  time.Hour, RenewInterval: 10 * time.Minute, OpTimeout: time.Minute, Margin: time.Second,
	})
	must(t, err)
	t.Cleanup(func() { must(t, b.lease.Close()) })
	must(t, b.lease.Refresh(ctx))
	must(t, b.lease.Acquire(ctx, nil))
	b.store, err = volsync.OpenStore(volsync.StoreConfig{FS: &fsx.Kept{}, Dir: share, Workers: 1, Rand: mrand.NewChaCha8([32]byte{4})})
	must(t, err)
	must(t, b.store.Init(ctx))
	b.volume, err = volsync.OpenVolume(volsync.VolumeConfig{Dir: t.TempDir(), BootID: "boot", Rand: rand.Reader})
	must(t, err)
	t.Cleanup(func() { must(t, b.volume.Close()) })
	for k := range files {
		must(t, os.WriteFile(b.file(k), []byte(fmt.Sprint("file ", k)), 0o600))
	}
	must(t, b.volume.MarkLive(ctx, 1))
	must(t, b.volume.Baseline(ctx, b.store, volsync.SnapshotRef{}))
	return b
}

func (b *budget) file(k int) string {
	return filepath.Join(b.volume.Path(), fmt.Sprint("file-", k))
}

// snapshot changes ten files, two of 20,000 bytes among them, takes a snapshot as a
// supervisor does and returns what its two halves cost.
func (b *budget) snapshot(r *efssim.Remote) (ship, commit efssim.Wire) {
	t, ctx := b.t, b.t.Context()
	t.Helper()
	data := make([]byte, 20000)
	for k := range 10 {
		_, err := b.random.Read(data)
		must(t, err)
		must(t, os.WriteFile(b.file(k), data[:2000+18000*(k/8)], 0o600))
	}
	basis := b.lease.View().Record
	req := volsync.WriteRequest{Term: basis.Term, Seq: 1, Writer: "counted"}
	if basis.Head != nil {
		req.Base, req.Seq = b.volume.BaseTree(), basis.Head.Seq+1
	}
	c, err := b.volume.Capture(ctx, volsync.CaptureRequest{NoFreeze: true})
	must(t, err)
	req.Delta, req.Blocks, req.Frozen = c.Delta, c.Blocks, c.Frozen
	before := wire(t, r)
	tree, _, err := b.store.Write(ctx, req)
	must(t, err)
	between := wire(t, r)
	_, err = b.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.Head = &lease.Head{ID: tree.Ref.ID, Manifest: tree.Ref.Manifest, Hash: tree.Ref.Hash,
			Term: tree.Ref.Term, Seq: tree.Ref.Seq, Frozen: tree.Ref.Frozen}
	})
	must(t, err)
	after := wire(t, r)
	must(t, b.volume.Adopt(c, tree))
	return between.Since(before), after.Since(between)
}
