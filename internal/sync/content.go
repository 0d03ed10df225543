package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
			// The tag turns a slot back into a block of the file.
			wants = append(wants, Want{Pack: e.Pack, Block: e.PackBlock, Count: e.Count, At: slot, Tag: staged{t, slot, e.Start}})
		}
	}
	return s.Read(ctx, a.tree, wants, func(w Want, data []byte) error {
		st := w.Tag.(staged)
		if err := a.step("stage-write", "spool"); err != nil {
			return err
		}
		setCodes(st.t.codes[st.start+(w.At-st.slot):], data)
		return sp.write(w.At, data)
	}, a.progress)
}

type staged struct {
	t     *target
	slot  uint64
	start uint64
}

func setCodes(codes []code, data []byte) {
	for i := range len(data) / BlockSize {
		codes[i] = blockCode(data[i*BlockSize : (i+1)*BlockSize])
	}
}

// applyStaged writes the files from the spool.
func (a *applier) applyStaged(ctx context.Context, sp *spool) error {
	return a.eachFile(ctx, func(ctx context.Context, t *target) error {
		f, err := a.prepare(t)
		if err != nil || f == nil {
			return err
		}
		err = a.writeStaged(ctx, t, f, sp)
		return closeWritten(f, err)
	})
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
			if err := a.write(t, f, e.Start+at, chunk); err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// applyDirect writes the files as their blocks come from the store, after what donors have
// been good for.
func (a *applier) applyDirect(ctx context.Context, s *Store) error {
	err := a.eachFile(ctx, func(ctx context.Context, t *target) error {
		f, err := a.prepare(t)
		if err != nil || f == nil {
			return err
		}
		for _, d := range a.donors {
			if err == nil && t.fresh {
				err = a.fromDonor(ctx, t, f, d)
			}
		}
		return closeWritten(f, err)
	})
	if err != nil {
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
	return s.Read(ctx, a.tree, wants, func(w Want, data []byte) error {
		t := w.Tag.(*target)
		f, err := os.OpenFile(t.handle, os.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		setCodes(t.codes[w.At:], data)
		return closeWritten(f, a.write(t, f, w.At, data))
	}, a.progress)
}

// fromDonor copies the blocks that another directory's file of that name has in common,
// and takes them off the list.
func (a *applier) fromDonor(ctx context.Context, t *target, f *os.File, donor string) error {
	root, err := os.Open(donor)
	if err != nil {
		return err
	}
	defer root.Close()
	src, err := openBelow(int(root.Fd()), t.names[0])
	if err != nil {
		return nil // it has no such file
	}
	defer src.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	have := make([]code, len(t.codes)) // what has been copied
	n := min(blocksOf(st.Size), uint64(len(have)))
	err = readBlocks(ctx, src, st.Size, st.Blocks*512, 0, n, func(first uint64, codes []code, data []byte) error {
		if data == nil {
			return nil
		}
		for i := 0; i < len(codes); {
			end := i
			for end < len(codes) && codes[end].kind() == ExtentData && codes[end] == t.codes[first+uint64(end)] {
				end++
			}
			if end == i {
				i++
				continue
			}
			chunk := data[i*BlockSize : end*BlockSize]
			if err := a.write(t, f, first+uint64(i), chunk); err != nil {
				return err
			}
			a.reused.Add(int64(len(chunk)))
			copy(have[first+uint64(i):], codes[i:end])
			i = end
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("copy from %s: %w", filepath.Join(donor, t.names[0]), err)
	}
	var rest []Extent
	for _, e := range t.todo {
		if e.Kind != ExtentData {
			rest = append(rest, e)
			continue
		}
		in := Inode{Extents: []Extent{e}}
		rest = append(rest, diffCodes(have, t.codes, &in)...)
	}
	t.todo = rest
	return nil
}

// eachFile runs f for every file whose content or size is to be changed.
func (a *applier) eachFile(ctx context.Context, f func(context.Context, *target) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(a.workers, 1))
	for _, t := range a.order {
		if t.in.Type != TypeRegular || len(t.todo) == 0 && t.size == t.in.Size {
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

// prepare gives a file its size, holes and preallocated ranges. The caller closes it.
func (a *applier) prepare(t *target) (*os.File, error) {
	if err := a.step("apply-content", t.handle); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(t.handle, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if t.size != t.in.Size {
		if err := f.Truncate(t.in.Size); err != nil {
			return nil, closeWritten(f, err)
		}
	}
	for _, e := range t.todo {
		if err := a.makeZero(t, f, e); err != nil {
			return nil, closeWritten(f, fmt.Errorf("clear range: %w", err))
		}
	}
	return f, nil
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
	for i := range t.codes[e.Start : e.Start+e.Count] {
		t.codes[e.Start+uint64(i)] = c
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

// write puts blocks into a file, the last one only as far as the file goes.
func (a *applier) write(t *target, f *os.File, block uint64, data []byte) error {
	if err := a.step("apply-write", t.handle); err != nil {
		return err
	}
	off := int64(block) * BlockSize
	if rest := t.in.Size - off; rest < int64(len(data)) {
		data = data[:rest]
	}
	if _, err := f.WriteAt(data, off); err != nil {
		return fmt.Errorf("write %s: %w", t.handle, err)
	}
	done := a.done.Add(int64(len(data)))
	if a.progress != nil {
		a.progress.Set("writing", done, a.total)
	}
	return nil
}

func closeWritten(f *os.File, err error) error {
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return noRoom(err)
}
