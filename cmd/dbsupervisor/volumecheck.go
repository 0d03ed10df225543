package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/config"
	volsync "dbsupervisor/internal/sync"
	"dbsupervisor/internal/track"
)

func (a *app) volumeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "volume",
		Short: "Check or make the local directory that holds the database",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.volumeCheckCmd(), a.volumeCreateCmd())
	return cmd
}

func (a *app) volumeCheckCmd() *cobra.Command {
	sample := 3 * time.Second
	cmd := &cobra.Command{
		Use:   "check [DIR]",
		Short: "Say how a directory will do as the volume: how change is found, what a freeze costs",
		Long: "Say how a directory will do as the volume: how change is found there, how standbys are\n" +
			"refreshed, whether there is room, and what freeze and cost to expect. Without DIR it is the\n" +
			"volume of the configuration. It changes nothing, and measures for a few seconds. The exit code is 1\n" +
			"if something keeps the directory from being a volume.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg := config.Default()
			var dir string
			if len(args) == 1 {
				dir = args[0]
				if own, _, err := a.load(); err == nil {
					cfg = own // for min_free and the like; a configuration is not needed
				}
			} else {
				own, _, err := a.load()
				if err != nil {
					return err
				}
				cfg, dir = own, filepath.Join(own.Dir, "volume")
				if !exists(dir) {
					dir = own.Dir
				}
			}
			dir, err := filepath.Abs(dir)
			if err != nil {
				return fmt.Errorf("find directory: %w", err)
			}
			bad, err := checkVolume(cmd.Context(), a.out, cfg, dir, sample)
			if bad && err == nil {
				a.code = exitError
			}
			return err
		},
	}
	cmd.Flags().DurationVar(&sample, "sample", sample, "how long to watch what is being written; 0: not at all")
	return cmd
}

// checkVolume writes what there is to say about a directory. bad: it can't be a volume as it is.
func checkVolume(ctx context.Context, out io.Writer, cfg *config.Config, dir string, sample time.Duration) (bad bool, err error) {
	row := func(label, format string, args ...any) {
		fmt.Fprintf(out, "%-14s%s\n", label, fmt.Sprintf(format, args...))
	}
	m, err := mountOf(dir)
	if err != nil {
		return true, err
	}
	s, err := volsync.Look(ctx, dir, time.Time{})
	if err != nil {
		return true, err
	}
	again, err := volsync.Look(ctx, dir, time.Time{}) // with the names in the cache, as in a freeze
	if err != nil {
		return true, err
	}
	row("Directory", "%s: %d files in %d directories, %s", dir, s.Files, s.Dirs, bytes(s.Bytes))
	row("File system", "%s on %s, mounted at %s (%s)", m.fsType, m.source, m.point, m.options)

	tier, why := volsync.TierTracked, track.Supported(dir)
	switch {
	case cfg.Sync.Tier == volsync.TierHashed:
		tier, why = volsync.TierHashed, errors.New("sync.tier is hashed")
	case why != nil:
		tier = volsync.TierHashed
	}
	if why == nil {
		row("Tier", "tracked: the kernel says which blocks are written")
	} else {
		row("Tier", "%s: %v", tier, why)
		if cfg.Sync.Tier == volsync.TierTracked {
			bad = true
			row("  !", "sync.tier is tracked: the agent takes no snapshots here")
		}
	}
	if tier == volsync.TierTracked {
		if most, err := readNumber("/proc/sys/fs/inotify/max_user_watches"); err == nil {
			text := fmt.Sprintf("%d directories, %d watches allowed", s.Dirs, most)
			if int64(s.Dirs) > most*9/10 {
				text += ": TOO FEW; the whole volume is looked through at every snapshot. Raise fs.inotify.max_user_watches"
			}
			row("Watches", "%s", text)
		}
	}

	clone, err := volsync.CanReflink(dir)
	if err != nil {
		row("  !", "reflinks not tried: %v", err)
	}
	free := int64(m.free)
	switch second := s.Allocated; {
	case cfg.Sync.SpareCopy == "never":
		row("Standby", "refreshed in place (sync.spare_copy is never): it can't be used until that is done")
	case clone:
		row("Standby", "refreshed in a reflink clone: room for what differs is enough")
	case free-int64(cfg.Sync.MinFree) >= second:
		row("Standby", "no reflinks: refreshed in a second copy, which takes %s more", bytes(second))
	default:
		row("Standby", "no reflinks, and no room for a second copy (%s): refreshed in place", bytes(second))
	}
	row("Room", "%s free, of which %s stay free for the database (sync.min_free)", bytes(free), bytes(int64(cfg.Sync.MinFree)))
	if free <= int64(cfg.Sync.MinFree) {
		bad = true
		row("  !", "no snapshot can be taken: make room, or lower sync.min_free")
	}
	for _, o := range s.Outside {
		bad = true
		row("  !", "%s", o)
	}
	if s.Others > 0 {
		row("Left out", "%d sockets, fifos and devices, which no snapshot keeps", s.Others)
	}

	speed, err := hashSpeed(ctx, dir)
	if err != nil {
		return bad, err
	}
	if speed > 0 {
		row("Reading", "%s/s: the whole volume takes %s, as at the first snapshot", bytes(int64(speed)), since(seconds(float64(s.Bytes)/speed)))
	}
	row("Looking", "at every name takes %s", since(again.Took))
	return bad, measureWrites(ctx, row, dir, tier, sample, again, speed, cfg.Sync.MaxFreeze)
}

// measureWrites watches what is being written for a while and says what follows for a freeze.
func measureWrites(ctx context.Context, row func(string, string, ...any), dir, tier string, sample time.Duration, s volsync.Survey, speed float64, budget time.Duration) error {
	if sample <= 0 {
		return nil
	}
	if budget <= 0 {
		budget = 250 * time.Millisecond
	}
	if tier == volsync.TierTracked {
		w, err := volsync.WatchWrites(ctx, dir)
		if err == nil {
			defer func() { _ = w.Close() }() // nothing of it stays
			return measureTracked(ctx, row, w, sample, budget)
		}
		row("  !", "%v", err)
	}
	began := time.Now()
	if err := pause(ctx, sample); err != nil {
		return err
	}
	after, err := volsync.Look(ctx, dir, began)
	if err != nil {
		return err
	}
	if after.Touched == 0 {
		row("Written", nothingWritten, since(sample))
	} else {
		row("Written", "%d files of %s in %s", after.Touched, bytes(after.TouchedBytes), since(sample))
	}
	// In the freeze every name is looked at, and what was written during the round before is
	// read: a round takes as long as its files take to read.
	freeze := s.Took
	if speed > 0 {
		freeze += time.Duration(float64(after.TouchedBytes) / speed * float64(time.Second))
	}
	row("Freeze", "at least %s, with what is being written now up to about %s%s", since(s.Took), since(freeze), tooLong(s.Took, budget))
	return nil
}

const nothingWritten = "nothing in %s: is a database running here? The freeze depends on what it writes"

// measureTracked does what a snapshot would do before its freeze, and says how long that would
// be: what was written in the meantime is what is read in it.
func measureTracked(ctx context.Context, row func(string, string, ...any), w *volsync.WriteWatch, sample, budget time.Duration) error {
	if err := pause(ctx, sample); err != nil {
		return err
	}
	written, err := w.Since(ctx)
	if err != nil {
		return err
	}
	left, took, err := w.Round(ctx)
	if err != nil {
		return err
	}
	reads := &left
	if left.Blocks == 0 {
		reads = &written
	}
	perBlock, err := reads.ReadTime(ctx)
	if err != nil {
		return err
	}
	if written.Files == 0 {
		row("Written", nothingWritten, since(sample))
	} else {
		row("Written", "%s in %d files in %s (%s/s): that is what a snapshot reads", bytes(written.Bytes()), written.Files, since(sample),
			bytes(int64(float64(written.Bytes())/sample.Seconds())))
	}
	freeze := volsync.PredictFreeze(left, perBlock)
	how := "nothing was written"
	if left.Files > 0 {
		how = fmt.Sprintf("%d blocks of %d files were written, and one takes %s to read", left.Blocks, left.Files, perBlock.Round(100*time.Nanosecond))
	}
	row("Freeze", "about %s: while what was dirty went to the disk (%s) %s; the size of the volume does not matter%s",
		since(freeze), since(took), how, tooLong(freeze, budget))
	return nil
}

// tooLong says so where a freeze would be given up.
func tooLong(freeze, budget time.Duration) string {
	if freeze <= budget {
		return ""
	}
	return fmt.Sprintf(": LONGER than sync.max_freeze (%s), so snapshots of a running database are given up", since(budget))
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// mount is the file system below a directory.
type mount struct {
	point, fsType, source, options string
	free                           uint64 // bytes
}

func mountOf(dir string) (mount, error) {
	var st unix.Stat_t
	var sfs unix.Statfs_t
	if err := unix.Stat(dir, &st); err != nil {
		return mount{}, fmt.Errorf("look at %s: %w", dir, err)
	}
	if err := unix.Statfs(dir, &sfs); err != nil {
		return mount{}, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	m := mount{fsType: "unknown", source: "unknown", free: sfs.Bavail * uint64(sfs.Bsize)} //nolint:gosec // not negative
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return m, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return m, fmt.Errorf("look at %s: %w", dir, err)
	}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		// The last one that fits is the one on top.
		if p := left[4]; (real == p || strings.HasPrefix(real, strings.TrimSuffix(p, "/")+"/")) && len(p) >= len(m.point) {
			m.point, m.options, m.fsType, m.source = p, left[5]+";"+right[2], right[0], right[1]
		}
	}
	return m, sc.Err()
}

// Bounds of hashSpeed.
const (
	speedBytes = 256 << 20
	speedTime  = 3 * time.Second
)

// hashSpeed reads and hashes some of the files and returns bytes a second; 0 if there are none
// to speak of.
func hashSpeed(ctx context.Context, dir string) (float64, error) {
	var read int64
	began := time.Now()
	buf := make([]byte, 1<<20)
	enough := errors.New("enough")
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil || !d.Type().IsRegular():
			return nil // it may have vanished
		case read >= speedBytes || time.Since(began) > speedTime:
			return enough
		}
		f, err := os.Open(path)
		if err != nil {
			return nil //nolint:nilerr // it may have vanished
		}
		defer f.Close()
		for read < speedBytes && time.Since(began) <= speedTime {
			n, err := f.Read(buf)
			read += int64(n)
			_ = xxh3.Hash(buf[:n])
			if err != nil {
				return nil //nolint:nilerr // its end
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, enough) {
		return 0, fmt.Errorf("read some files of %s: %w", dir, err)
	}
	if read < 1<<20 {
		return 0, nil
	}
	return float64(read) / time.Since(began).Seconds(), nil
}

func readNumber(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}
