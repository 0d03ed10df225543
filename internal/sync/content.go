package sync

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// stageBlocks fetches all blocks that the plan needs into a spool, verified, before
// anything is changed.
func (a *applier) stageBlocks(ctx context.Context, s *Store, sp *spool) error {
	var wants []Want
	for _, t := range a.order {
		t.slots = make([]uint64, len(t.todo))
		for i, e := range t.todo {
			if e.Kind != ExtentData {
				continue
			}
			slot, err := sp.alloc(e.Count)
			if err != nil {
				return err
			}
			t.slots[i] = slot
			wants = append(wants, Want{Pack: e.Pack, Block: e.PackBlock, Count: e.Count, At: slot})
		}
	}
	return s.readFrames(ctx, a.tree, wants, readOptions{known: a.foots, phase: "fetching", progress: a.progress}, func(wants []Want, data []byte, first uint64) error {
		for _, w := range wants {
			if err := a.step("stage-write", "spool"); err != nil {
				return err
			}
			if err := sp.write(w.At, data[(w.Block-first)*BlockSize:][:w.Count*BlockSize]); err != nil {
				return err
			}
		}
		return nil
	})
}

// applyStaged writes the files from the spool.
func (a *applier) applyStaged(ctx context.Context, sp *spool) error {
	err := a.eachFile(ctx, func(ctx context.Context, t *target) error {
		f, err := a.prepare(t)
		if err != nil || f == nil {
			return err
		}
		err = a.writeStaged(ctx, t, f, sp)
		return closeWritten(f, err)
	})
	if err != nil {
		return err
	}
	return a.link(ctx)
}

func (a *applier) writeStaged(ctx context.Context, t *target, f *os.File, sp *spool) error {
	var buf []byte
	for i, e := range t.todo {
		if e.Kind != ExtentData {
			continue
		}
		for at := uint64(0); at < e.Count; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(e.Count-at, readChunk/BlockSize)
			if uint64(len(buf)) < n*BlockSize {
				buf = make([]byte, n*BlockSize)
			}
			chunk := buf[:n*BlockSize]
			if err := sp.read(t.slots[i]+at, chunk); err != nil {
				return err
			}
			if err := a.write(t, f, e.Start+at, chunk, nil); err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// applyDirect writes the files: what sources have, then the rest as it comes from the store.
func (a *applier) applyDirect(ctx context.Context, s *Store) error {
	err := a.eachFile(ctx, func(ctx context.Context, t *target) error {
		f, err := a.prepare(t)
		if err != nil || f == nil {
			return err
		}
		for _, src := range a.sources {
			if err == nil && t.want != nil && dataOf(t.todo) > 0 {
				err = a.fromSource(ctx, t, f, src)
			}
		}
		return closeWritten(f, err)
	})
	if err != nil {
		return err
	}
	if err := a.link(ctx); err != nil {
		return err
	}
	var wants []Want
	for _, t := range a.order {
		for _, e := range t.todo {
			if e.Kind == ExtentData {
				wants = append(wants, Want{Pack: e.Pack, Block: e.PackBlock, Count: e.Count, At: e.Start, Tag: t})
			}
		}
	}
	return s.readFrames(ctx, a.tree, wants, readOptions{known: a.foots, goOn: !a.forget}, a.writeFrame)
}

// writeFrame puts the blocks of one frame into their files.
func (a *applier) writeFrame(wants []Want, data []byte, first uint64) (err error) {
	var f *os.File
	var of *target
	defer func() {
		if f != nil {
			err = closeWritten(f, err)
		}
	}()
	for _, w := range wants {
		t := w.Tag.(*target)
		if t != of {
			if f != nil {
				if err := closeWritten(f, nil); err != nil {
					f = nil
					return err
				}
			}
			if f, err = os.OpenFile(t.handle, os.O_WRONLY|unix.O_NOFOLLOW, 0); err != nil {
				f = nil
				return err
			}
			of = t
		}
		if err := a.write(t, f, w.At, data[(w.Block-first)*BlockSize:][:w.Count*BlockSize], nil); err != nil {
			return err
		}
	}
	return nil
}

// eachFile runs f for every file whose content or size is to be changed.
func (a *applier) eachFile(ctx context.Context, f func(context.Context, *target) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(a.workers, 1))
	for _, t := range a.order {
		if t.in.Type != TypeRegular || t.handle != "" && len(t.todo) == 0 && t.size == t.in.Size {
			continue
		}
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return f(ctx, t)
		})
	}
	return g.Wait()
}

// prepare gives a file, new or old, its size, holes and preallocated ranges. The caller
// closes it.
func (a *applier) prepare(t *target) (*os.File, error) {
	f, err := a.openFile(t)
	if err != nil {
		return nil, err
	}
	if n := blocksOf(t.in.Size); !a.forget && (t.codes == nil || uint64(len(t.codes)) != n) {
		t.codes = resizeCodes(t.had, n)
	}
	t.touched = true
	if n := len(t.todo); t.codes != nil && t.in.Size < t.size && t.in.Size%BlockSize != 0 && n > 0 {
		if e := t.todo[n-1]; e.Start+e.Count == uint64(len(t.codes)) {
			t.codes[len(t.codes)-1] = codeUnknown // it is cut before it is written
		}
	}
	todo := t.todo
	if t.size != t.in.Size {
		if err := f.Truncate(t.in.Size); err != nil {
			return nil, closeWritten(f, err)
		}
		todo = append(t.regrown(), todo...)
		t.size = t.in.Size
	}
	for _, e := range todo {
		if err := a.makeZero(t, f, e); err != nil {
			return nil, closeWritten(f, fmt.Errorf("clear range: %w", err))
		}
	}
	return f, nil
}

// regrown is the block in which a file ended that has become longer, if it is to be a hole: btrfs
// allocates it for the zeros behind the old end.
func (t *target) regrown() []Extent {
	at := uint64(t.size / BlockSize)
	if t.size%BlockSize == 0 || t.size > t.in.Size {
		return nil
	}
	for _, e := range t.in.Extents {
		if e.Kind == ExtentHole && e.Start <= at && at < e.Start+e.Count {
			return []Extent{part(e, at, 1)}
		}
	}
	return nil
}

// openFile opens a file for writing. A new one is created, as a clone where there is one
// to be had.
func (a *applier) openFile(t *target) (*os.File, error) {
	if t.handle != "" {
		if err := a.step("apply-content", t.handle); err != nil {
			return nil, err
		}
		return os.OpenFile(t.handle, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	}
	p := a.abs(t.names[0])
	if err := a.step("apply-create", p); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", p, noRoom(err))
	}
	t.handle, t.fresh = p, true
	if err := a.step("apply-content", p); err != nil {
		return nil, closeWritten(f, err)
	}
	if t.clone == "" {
		t.size = 0
		return f, nil
	}
	if err := a.cloneFile(t, f); err != nil {
		return nil, closeWritten(f, fmt.Errorf("clone %s: %w", t.clone, err))
	}
	return f, nil
}

// cloneFile gives a new file the content of another, sharing its blocks.
func (a *applier) cloneFile(t *target, f *os.File) error {
	src, err := os.OpenFile(t.clone, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := unix.IoctlFileClone(int(f.Fd()), int(src.Fd())); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return err
		}
		// This one can't be (its own attributes can forbid it): it is copied.
		if t.want == nil {
			t.want = t.codes // nothing had to be changed
		}
		t.had, t.codes, t.size = nil, nil, 0
		t.todo = diffCodes(nil, t.want, t.in)
		return nil
	}
	t.fresh = false
	// A clone may have holes where its source was preallocated.
	for _, e := range t.in.Extents {
		if off := int64(e.Start) * BlockSize; e.Kind == ExtentZero && off < t.size {
			n := min(int64(e.Count)*BlockSize, t.size-off)
			err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, off, n)
			if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
				return err
			}
		}
	}
	return nil
}

// makeZero makes an extent a hole or a preallocated range.
func (a *applier) makeZero(t *target, f *os.File, e Extent) error {
	off := int64(e.Start) * BlockSize
	n := min(int64(e.Count)*BlockSize, t.in.Size-off)
	var err error
	c := codeHole
	switch e.Kind {
	case ExtentHole:
		if t.fresh {
			return nil
		}
		// Whole blocks, also behind the file's end: of a part only the bytes would be cleared.
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, int64(e.Count)*BlockSize)
	case ExtentZero:
		c = codeZero
		if t.fresh {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, off, n)
		} else {
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		}
	default:
		return nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = writeZeros(f, off, n)
	}
	if err != nil {
		return err
	}
	if t.codes != nil {
		for b := e.Start; b < e.Start+e.Count; b++ {
			t.codes[b] = c
		}
	}
	return nil
}

func writeZeros(f *os.File, off, n int64) error {
	buf := make([]byte, min(n, readChunk))
	for n > 0 {
		k, err := f.WriteAt(buf[:min(n, int64(len(buf)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// write puts blocks into a file, the last one only as far as the file goes. codes are those
// of the blocks, nil if the caller doesn't know them.
func (a *applier) write(t *target, f *os.File, block uint64, data []byte, codes []code) error {
	if err := a.step("apply-write", t.handle); err != nil {
		return err
	}
	n := uint64(len(data)) / BlockSize
	if t.codes != nil {
		for i := range n { // until all of it has been written
			t.codes[block+i] = codeUnknown
		}
	}
	off := int64(block) * BlockSize
	whole := data
	if rest := t.in.Size - off; rest < int64(len(data)) {
		data = data[:rest]
	}
	if _, err := f.WriteAt(data, off); err != nil {
		return fmt.Errorf("write %s: %w", t.handle, err)
	}
	if t.codes != nil {
		if codes == nil {
			for i := range n {
				t.codes[block+i] = blockCode(whole[i*BlockSize : (i+1)*BlockSize])
			}
		} else {
			copy(t.codes[block:], codes)
		}
	}
	done := a.done.Add(int64(len(data)))
	if a.progress != nil {
		a.progress.Set(a.verb, done, a.total)
	}
	return nil
}

func closeWritten(f *os.File, err error) error {
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return noRoom(err)
}
