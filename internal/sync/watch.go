package sync

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"dbsupervisor/internal/track"
)

// WriteWatch tells what is written in a directory, by the means of the tier "tracked" but
// without a volume: for who wants to know what snapshots of it would cost.
type WriteWatch struct {
	dir     string
	tracker tracker
}

// WatchWrites begins to watch. The caller closes the WriteWatch.
func WatchWrites(ctx context.Context, dir string) (*WriteWatch, error) {
	t, err := track.Open(track.Config{Root: dir, Key: "watch"})
	if err != nil {
		return nil, fmt.Errorf("watch what is written: %w", err)
	}
	w := &WriteWatch{dir: dir, tracker: t}
	if _, err := t.Drain(ctx); err != nil { // what was before does not count
		_ = w.Close()
		return nil, fmt.Errorf("watch what is written: %w", err)
	}
	return w, nil
}

// Close ends it; nothing stays in the kernel.
func (w *WriteWatch) Close() error { return w.tracker.Remove() }

// Writes are what was written in a while.
type Writes struct {
	Files  int
	Blocks uint64
	files  map[string][]blockRange
}

// Bytes is what a snapshot would read of it.
func (w *Writes) Bytes() int64 { return int64(w.Blocks) * BlockSize }

// Since returns what was written since the last call.
func (w *WriteWatch) Since(ctx context.Context) (Writes, error) {
	out := Writes{files: map[string][]blockRange{}}
	c, err := w.tracker.Drain(ctx)
	if err != nil {
		return out, fmt.Errorf("watch what is written: %w", err)
	}
	// The tracker tells about the whole file system.
	err = filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // it may have vanished
		}
		info, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // it may have vanished
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && c.Inodes[st.Ino] != nil {
			in := c.Inodes[st.Ino]
			out.files[path] = cutBlocks(blocksOfRanges(in.Written, in.Dirtied), blocksOf(info.Size()))
		}
		return ctx.Err()
	})
	for _, blocks := range out.files {
		out.Files++
		out.Blocks += countBlocks(blocks)
	}
	return out, err
}

// Round does what a snapshot does last before the freeze: it writes out what is dirty. What is
// written meanwhile is what a freeze would have to look at.
func (w *WriteWatch) Round(ctx context.Context) (left Writes, took time.Duration, err error) {
	if _, err := w.Since(ctx); err != nil {
		return left, 0, err
	}
	began := time.Now()
	if err := syncFS(ctx, w.dir); err != nil {
		return left, 0, err
	}
	took = time.Since(began)
	left, err = w.Since(ctx)
	return left, took, err
}

// readMost bounds the blocks that ReadTime reads.
const readMost = 8192

// ReadTime reads blocks that were written, as a freeze would, and says what one takes; 0 if
// there are none.
func (w *Writes) ReadTime(ctx context.Context) (time.Duration, error) {
	var n uint64
	var took time.Duration
	for path, blocks := range w.files {
		if n >= readMost {
			break
		}
		f, err := os.Open(path)
		if err != nil {
			continue // it may have vanished
		}
		began := time.Now()
		err = readScattered(ctx, f, int64(^uint64(0)>>1), 1, blocks, true, func(uint64, []code, []byte) error { return nil })
		took += time.Since(began)
		n += countBlocks(blocks)
		_ = f.Close() // only read
		if err != nil {
			return 0, err
		}
	}
	if n == 0 {
		return 0, nil
	}
	return max(took/time.Duration(n), 1), nil
}

// PredictFreeze is how long the tier "tracked" expects a freeze to take when left is what was
// written during the last round before it, and reading a block takes so long.
func PredictFreeze(left Writes, perBlock time.Duration) time.Duration {
	p := pace{frozen: speed{perBlock: max(perBlock, 1)}}
	d, _ := p.predict(2*left.Blocks, left.Files) // as much may be written again until then
	return d
}
