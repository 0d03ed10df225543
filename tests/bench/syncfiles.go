package main

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"dbsupervisor/tests/efssim"
)

const (
	// filesChanged is in how many of the files one page is overwritten.
	filesChanged = 300
	// rehashed is how much of the volume is read to measure the rolling re-hash.
	rehashed = 512 * mib
)

// unhurried is a share that doesn't delay: what is counted there is the same, and other tools
// that ask for every file are done in this century.
func unhurried() efssim.Options {
	o := efssim.EFS()
	o.Pace = efssim.Pace{}
	return o
}

// manyFiles measures volumes of very many small files, beside the other tools.
func (r *syncRun) manyFiles(ctx context.Context, s *section) error {
	s.how = fmt.Sprintf(`%d files of 20 KiB on XFS in a file. Nothing changes; then one page of 8 KiB is overwritten with random
bytes in each of %d files, chosen at random. The shares are simulated but *do not delay*: with
the delays of EFS, tools that ask the share for every file would take many minutes. Operations
and bytes are those of an EFS all the same; times are the tools' own. The copies that rsync and
rclone start from were made beside their shares, and are not counted.`, r.files, filesChanged)
	disk, err := r.loop(ctx, "xfs", int64(r.files)*32<<10+2<<30)
	if err != nil {
		return err
	}
	own, err := r.share("files", unhurried())
	if err != nil {
		return err
	}
	w, _, err := startWorker(OpenArgs{Share: own.at, Local: filepath.Join(disk, "instance")})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, w.close)
	volume := filepath.Join(disk, "instance", "volume")
	if err := makeFiles(volume, r.files); err != nil {
		return err
	}
	c := &comparison{syncRun: r, s: s, own: own, w: w}
	if c.tools, err = r.peers(volume, unhurried()); err != nil {
		return err
	}
	r.say("first copies of %d files", r.files)
	wire, rep, err := c.snapshot(SnapshotArgs{})
	if err != nil {
		return err
	}
	c.report("first copy: dbsupervisor", wire, rep.Took)
	if err := r.resident(s, "first copy: dbsupervisor", w); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, p := range c.tools {
		g.Go(func() error { return p.seed(gctx, volume) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("first copies: %w", err)
	}
	// What the first one's syncfs has cleaned.
	if _, _, err := c.snapshot(SnapshotArgs{}); err != nil {
		return err
	}
	if err := c.unchanged(ctx); err != nil {
		return err
	}
	random := mathrand.NewChaCha8([32]byte{11})
	data := make([]byte, page)
	for _, k := range mathrand.New(random).Perm(r.files)[:filesChanged] { //nolint:gosec // a pattern
		_, _ = random.Read(data) // never fails
		if err := overwrite(writerFile(volume, k), int64(k%2)*page, data); err != nil {
			return err
		}
	}
	changed := func() (int64, error) { return filesChanged * page, nil }
	if err := c.compare(ctx, "changed", SnapshotArgs{}, changed, margins{fewer: 1}); err != nil {
		return err
	}
	return r.resident(s, "all of that: dbsupervisor", w)
}

// resident adds what the engine's own process had in memory at most so far.
func (r *syncRun) resident(s *section, what string, w *worker) error {
	u, err := w.usage()
	if err != nil {
		return err
	}
	r.peak = max(r.peak, u.Peak)
	s.add(what+": resident at most", "MiB", float64(u.Peak)/mib).atMost(128)
	return nil
}

// rehash measures the rolling re-hash.
func (r *syncRun) rehash(ctx context.Context, s *section) error {
	s.how = fmt.Sprintf(`Files of 64 MiB on XFS in a file, %d MiB in all. The tracker is proven by reading what it has not
reported, from the disk, beside everything else: sync.rehash says how many bytes a second (4 MiB
by default). Here it reads %d MiB as fast as it can; the goal is four times the default, and that
the default takes less than a hundredth of one processor.`, 2*rehashed/mib, rehashed/mib)
	disk, err := r.loop(ctx, "xfs", 2*rehashed*9/4+1<<30)
	if err != nil {
		return err
	}
	sh, err := r.share("rehash", unhurried())
	if err != nil {
		return err
	}
	w, _, err := startWorker(OpenArgs{Share: sh.at, Local: filepath.Join(disk, "instance")})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, w.close)
	random := mathrand.NewChaCha8([32]byte{12})
	block := make([]byte, mib)
	const fileSize = 64 * mib
	for k := range 2 * rehashed / fileSize {
		f, err := os.Create(filepath.Join(disk, "instance", "volume", fmt.Sprint("file-", k)))
		if err != nil {
			return err
		}
		for range fileSize / mib {
			_, _ = random.Read(block) // never fails
			if _, err = f.Write(block); err != nil {
				break
			}
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	for range 2 {
		rep, err := w.snapshot(SnapshotArgs{})
		if err != nil {
			return err
		}
		s.tier(rep.Tier)
	}
	before, err := w.usage()
	if err != nil {
		return err
	}
	var got Rehashed
	if err := w.rpc.Call("Engine.Rehash", int64(rehashed), &got); err != nil {
		return err
	}
	after, err := w.usage()
	if err != nil {
		return err
	}
	read := float64(got.Bytes) / mib
	cpu := after.CPU - before.CPU
	s.add("re-hash: read", "MiB", read)
	if got.Bytes == 0 {
		return nil // without a tracker there is nothing to prove
	}
	s.add("re-hash: alarms", "", float64(got.Alarms)).atMost(0)
	s.add("re-hash: at full speed", "bytes/s", float64(got.Bytes)/got.Took.Seconds()).atLeast(16 * mib)
	s.add("re-hash: processor time per MiB", "ms", millis(cpu)/read)
	s.add("re-hash: processor at the default of 4 MiB/s", "%", 100*cpu.Seconds()/read*4).atMost(1)
	return r.resident(s, "re-hash: dbsupervisor", w)
}
