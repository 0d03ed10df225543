package sync

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestStat compares what Stat says with what is known and with the share itself.
func TestStat(t *testing.T) {
	ctx := context.Background()
	r := newPinRig(t, 81)
	r.s.cfg.packBlocks = 256
	r.policy = Policy{All: 1000 * time.Hour}
	r.bigFile("f", 100)
	r.snapshot(time.Minute)
	for _, later := range []time.Duration{30 * time.Hour, 3 * time.Hour, time.Minute} {
		for i := range 60 {
			r.model.inodes[r.model.names["f"]].blocks[i] = storeBlock{kind: ExtentData, data: noise(r.r)}
		}
		r.snapshot(later)
	}
	if _, _, err := r.write(); err != nil { // an attempt that is never committed
		t.Fatal(err)
	}
	measure := func() StoreStats {
		t.Helper()
		list, err := r.s.List(ctx, r.headRef(), r.cat)
		if err != nil {
			t.Fatal(err)
		}
		st, err := r.s.Stat(ctx, list, r.cat, nil)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	st := measure()
	const raw = (100 + 3*60) * BlockSize
	if st.Snapshots != 4 || st.Packs != 4 || st.RawBytes != raw || st.RawLiveBytes != raw || st.RawAllBytes != 400*BlockSize ||
		st.DeadBytes != 0 || st.Stray != 1 || st.Condemned != 0 {
		t.Errorf("%+v", st)
	}
	if st.Ages[0].Snapshots != 2 || st.Ages[1].Snapshots != 1 || st.Ages[2].Snapshots != 1 || st.Ages[2].Packs != 1 || st.Ages[3].Snapshots != 0 {
		t.Errorf("ages are %+v", st.Ages)
	}
	if bytes, packs := storeBytes(t, r.dir); bytes != st.Bytes || packs != st.Packs {
		t.Errorf("%d bytes in %d packs, not %d in %d", bytes, packs, st.Bytes, st.Packs)
	}
	r.policy = Policy{}
	r.condemn()
	st = measure()
	if st.Snapshots != 1 || st.Packs != 2 || st.RawLiveBytes != 100*BlockSize || st.RawBytes != 160*BlockSize || st.Condemned == 0 || st.CondemnedBytes == 0 {
		t.Errorf("after condemning: %+v", st)
	}
	var all int64
	err := filepath.WalkDir(r.dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(p) != ".catalog" {
			i, ierr := d.Info()
			if ierr != nil {
				return ierr
			}
			all += i.Size()
		}
		return err
	})
	if err != nil || all != st.Bytes+st.ManifestBytes+st.CondemnedBytes+st.StrayBytes {
		t.Errorf("the share has %d bytes, %v: %+v", all, err, st)
	}
}
