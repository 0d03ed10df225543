package main

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// growthReps is how often the change is made on each volume.
const growthReps = 5

func (r *syncRun) growthSizes() (small, large int64) {
	if r.full {
		return 3 << 10, 30 << 10
	}
	return int64(r.scale) * 16 / 10, int64(r.scale) * 16
}

// growth makes the same change on a volume and on one ten times as large.
func (r *syncRun) growth(ctx context.Context, s *section) error {
	small, large := r.growthSizes()
	s.how = fmt.Sprintf(`Files of 64 MiB on XFS in a file, %d MiB and %d MiB in all, of pages that compress about tenfold.
Three thousand pages of 8 KiB, chosen at random, are overwritten with random bytes; %d times on
each volume. The share is a simulated EFS. Ratios are of medians.`, small, large, growthReps)
	type figures struct{ took, bytes float64 }
	var got [2]figures
	for k, size := range []int64{small, large} {
		kept := len(r.cleanups)
		took, bytes, err := r.grown(ctx, s, size)
		if err := errors.Join(err, r.cleanup(kept)); err != nil {
			return err
		}
		got[k] = figures{took, bytes}
	}
	s.add("time, ten times as large / as it is", "", got[1].took/got[0].took).atMost(1.2)
	s.add("bytes written, ten times as large / as it is", "", got[1].bytes/got[0].bytes).atMost(1.1)
	return nil
}

func (r *syncRun) grown(ctx context.Context, s *section, size int64) (took, bytes float64, err error) {
	// The first snapshot keeps a copy of everything until it is shipped.
	disk, err := r.loop(ctx, "xfs", size*mib*9/4+1<<30)
	if err != nil {
		return 0, 0, err
	}
	sh, err := r.share(fmt.Sprint("growth-", size), r.efs())
	if err != nil {
		return 0, 0, err
	}
	w, _, err := startWorker(OpenArgs{Share: sh.at, Local: filepath.Join(disk, "instance")})
	if err != nil {
		return 0, 0, err
	}
	r.cleanups = append(r.cleanups, w.close)
	random := mathrand.NewChaCha8([32]byte{9})
	const fileSize = 64 * mib
	files := int(max(1, size*mib/fileSize))
	path := func(k int) string { return filepath.Join(disk, "instance", "volume", fmt.Sprint("file-", k)) }
	block := make([]byte, mib)
	for k := range files {
		f, err := os.Create(path(k))
		if err != nil {
			return 0, 0, err
		}
		for range fileSize / mib {
			for at := 0; at < len(block); at += page {
				_, _ = random.Read(block[at : at+page/10]) // never fails
			}
			if _, err := f.Write(block); err != nil {
				return 0, 0, errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return 0, 0, err
		}
	}
	for range 2 { // the first takes everything, the second what its syncfs has cleaned
		if _, err := w.snapshot(SnapshotArgs{}); err != nil {
			return 0, 0, err
		}
	}
	what := fmt.Sprintf("%d MiB: ", size)
	var t, b *figure
	for range growthReps {
		for range 3000 {
			_, _ = random.Read(block[:page])                                                                                                       // never fails
			if err := overwrite(path(int(random.Uint64()%uint64(files))), int64(random.Uint64()%(fileSize/page))*page, block[:page]); err != nil { //nolint:gosec // small
				return 0, 0, err
			}
		}
		var rep SnapshotReply
		wire, _, err := sh.count(func() (err error) { rep, err = w.snapshot(SnapshotArgs{}); return err })
		if err != nil {
			return 0, 0, err
		}
		t = s.add(what+"time", "ms", millis(rep.Took))
		b = s.add(what+"written to the share", "MiB", float64(wire.Written)/mib)
		s.add(what+"operations", "", float64(wire.Total()))
		s.add(what+"source read", "MiB", float64(rep.Capture.ReadBytes+rep.Capture.FrozenBytes)/mib)
	}
	return t.median(), b.median(), r.resident(s, what+"dbsupervisor", w)
}

func overwrite(path string, at int64, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, at)
	return errors.Join(err, f.Close())
}

// noise measures, until stop is closed, by how much a sleep of a millisecond is late.
func noise(stop <-chan struct{}, each func(late time.Duration)) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		began := time.Now()
		time.Sleep(time.Millisecond)
		each(time.Since(began) - time.Millisecond)
	}
}
