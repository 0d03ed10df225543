package sync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"unsafe"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// code stands for the content of one block: the two ways of being zero, or a hash.
type code uint64

const (
	codeHole    code = 0
	codeZero    code = 1
	codeUnknown code = ^code(0) // not read yet, or only in part
)

// codeOf makes a code of a block's xxh3.
func codeOf(h uint64) code {
	switch c := code(h); c {
	case codeHole, codeZero:
		return c + 2
	case codeUnknown:
		return c - 1
	default:
		return c
	}
}

func (c code) kind() ExtentKind {
	switch c {
	case codeHole:
		return ExtentHole
	case codeZero:
		return ExtentZero
	default:
		return ExtentData
	}
}

// blockCode looks at a whole block.
func blockCode(b []byte) code {
	if allZero(b) {
		return codeZero
	}
	return codeOf(xxh3.Hash(b))
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if *(*uint64)(unsafe.Pointer(unsafe.SliceData(b))) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// readChunk is how much is read in one call: large enough to be cheap, small enough to
// notice the end of a freeze's budget.
const readChunk = 1 << 20

// blockSink is told the codes of consecutive blocks. data is nil for holes and zeros that
// didn't have to be read; otherwise it has the blocks, padded with zeros, and is valid
// during the call only.
type blockSink func(first uint64, codes []code, data []byte) error

// readBlocks looks at blocks [from, to) of a file of size bytes. Where the file is shorter
// by now, the rest counts as zeros: its stat will differ too.
func readBlocks(ctx context.Context, f blockFile, size, alloc int64, from, to uint64, sink blockSink) error {
	end := min(int64(to)*BlockSize, size)
	buf := make([]byte, min(int64(readChunk), int64(to-from)*BlockSize))
	codes := make([]code, len(buf)/BlockSize)
	zeros := unwritten{f: f, skip: alloc == 0}
	for b := from; b < to; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, stop, err := nextData(f, int64(b)*BlockSize, end)
		if err != nil {
			return err
		}
		// Blocks before the data are holes, or allocated and unwritten.
		hole := min(uint64(data)/BlockSize, to)
		if data >= end {
			hole = to
		}
		for b < hole {
			n := min(hole-b, uint64(len(codes)))
			for i := range codes[:n] {
				c, err := zeros.code(int64(b+uint64(i))*BlockSize, min(int64(b+uint64(i)+1)*BlockSize, end))
				if err != nil {
					return err
				}
				codes[i] = c
			}
			if err := sink(b, codes[:n], nil); err != nil {
				return err
			}
			b += n
		}
		last := min((uint64(stop)+BlockSize-1)/BlockSize, to)
		for b < last {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(last-b, uint64(len(codes)))
			chunk := buf[:n*BlockSize]
			k, err := f.ReadAt(chunk[:min(int64(len(chunk)), end-int64(b)*BlockSize)], int64(b)*BlockSize)
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("read %s: %w", f.Name(), err)
			}
			clear(chunk[k:])
			for i := range codes[:n] {
				codes[i] = blockCode(chunk[i*BlockSize : (i+1)*BlockSize])
			}
			if err := sink(b, codes[:n], chunk); err != nil {
				return err
			}
			b += n
		}
	}
	return nil
}

// nextData finds the first data at or after off: [start, stop). start is end or more if
// there is none.
func nextData(f blockFile, off, end int64) (start, stop int64, err error) {
	fd := int(f.Fd())
	start, err = unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return end, end, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return off, end, nil // the file system doesn't tell holes apart
	case err != nil:
		return 0, 0, fmt.Errorf("seek data in %s: %w", f.Name(), err)
	}
	if start >= end {
		return end, end, nil
	}
	stop, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) { // truncated just now
		return start, end, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("seek hole in %s: %w", f.Name(), err)
	}
	return start, min(max(stop, start+1), end), nil
}

// unwritten tells allocated but unwritten ranges (fallocate) from holes. It asks the file
// system for the extent map as far as needed.
type unwritten struct {
	f      blockFile
	skip   bool // nothing can be unwritten
	upTo   int64
	ranges [][2]int64 // known unwritten ranges that end behind the last question
}

// Fiemap, linux/fiemap.h.
const (
	fsIocFiemap        = 0xC020660B
	fiemapLast         = 0x1
	fiemapUnwritten    = 0x800
	fiemapExtentsAtOne = 128
)

type fiemapExtent struct {
	Logical, Physical, Length uint64
	_                         [2]uint64
	Flags                     uint32
	_                         [3]uint32
}

type fiemapRequest struct {
	Start, Length                 uint64
	Flags, Mapped, Count, Padding uint32
	Extents                       [fiemapExtentsAtOne]fiemapExtent
}

// code says what a block without data is. Questions must come in ascending order.
func (u *unwritten) code(from, to int64) (code, error) {
	for !u.skip && u.upTo < to {
		if err := u.more(max(from, u.upTo)); err != nil {
			return 0, err
		}
	}
	for len(u.ranges) > 0 && u.ranges[0][1] <= from {
		u.ranges = u.ranges[1:]
	}
	if len(u.ranges) > 0 && u.ranges[0][0] < to {
		return codeZero, nil
	}
	return codeHole, nil
}

func (u *unwritten) more(from int64) error {
	req := fiemapRequest{Start: uint64(from), Length: ^uint64(0) - uint64(from), Count: fiemapExtentsAtOne}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, u.f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&req)))
	switch {
	case errors.Is(errno, unix.EOPNOTSUPP), errors.Is(errno, unix.ENOTTY), errors.Is(errno, unix.EINVAL):
		u.skip = true
		return nil
	case errno != 0:
		return fmt.Errorf("map extents of %s: %w", u.f.Name(), errno)
	}
	u.upTo = int64(^uint64(0) >> 1)
	n := min(req.Mapped, fiemapExtentsAtOne)
	for _, e := range req.Extents[:n] {
		if e.Flags&fiemapUnwritten != 0 {
			u.ranges = append(u.ranges, [2]int64{int64(e.Logical), int64(e.Logical + e.Length)})
		}
		if e.Flags&fiemapLast == 0 && n == fiemapExtentsAtOne {
			u.upTo = int64(e.Logical + e.Length)
		} else {
			u.upTo = int64(^uint64(0) >> 1)
		}
	}
	return nil
}

// readScattered looks at some blocks of a file of size bytes that most likely have data:
// they are read without asking for holes first, and only what is zero is asked about. If
// hashed is false the codes of other blocks are left unknown.
func readScattered(ctx context.Context, f blockFile, size, alloc int64, ranges []blockRange, hashed bool, sink blockSink) error {
	var most uint64
	for _, br := range ranges {
		most = max(most, br.To-br.From)
	}
	most = min(most, readChunk/BlockSize)
	buf, codes := make([]byte, most*BlockSize), make([]code, most)
	for _, br := range ranges {
		for b := br.From; b < br.To; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(br.To-b, most)
			chunk := buf[:n*BlockSize]
			k := 0
			if off := int64(b) * BlockSize; off < size {
				var err error
				k, err = f.ReadAt(chunk[:min(int64(len(chunk)), size-off)], off)
				if err != nil && !errors.Is(err, io.EOF) {
					return fmt.Errorf("read %s: %w", f.Name(), err)
				}
			}
			clear(chunk[k:])
			if err := sinkScattered(f, size, alloc, b, chunk, codes[:n], hashed, sink); err != nil {
				return err
			}
			b += n
		}
	}
	return nil
}

// sinkScattered passes runs of blocks that are all zero, or all not, on.
func sinkScattered(f blockFile, size, alloc int64, first uint64, chunk []byte, codes []code, hashed bool, sink blockSink) error {
	block := func(i int) []byte { return chunk[i*BlockSize : (i+1)*BlockSize] }
	for i := 0; i < len(codes); {
		zero := allZero(block(i))
		end := i
		for end < len(codes) && allZero(block(end)) == zero {
			var err error
			switch {
			case zero:
				codes[end], err = zeroCode(f, size, alloc, first+uint64(end))
			case hashed:
				codes[end] = blockCode(block(end))
			default:
				codes[end] = codeUnknown
			}
			if err != nil {
				return err
			}
			end++
		}
		var data []byte
		if !zero {
			data = chunk[i*BlockSize : end*BlockSize]
		}
		if err := sink(first+uint64(i), codes[i:end], data); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// zeroCode says in which way a block that reads as zero is zero.
func zeroCode(f blockFile, size, alloc int64, b uint64) (code, error) {
	from := int64(b) * BlockSize
	end := min(from+BlockSize, size)
	if from >= size {
		return codeHole, nil
	}
	data, _, err := nextData(f, from, end)
	if err != nil {
		return 0, err
	}
	if data < end {
		return codeZero, nil
	}
	zeros := unwritten{f: f, skip: alloc == 0}
	return zeros.code(from, end)
}

// Of linux/fs/xfs/libxfs/xfs_fs.h: give back what was allocated ahead.
const (
	xfsFreeEOFBlocks = 0x8080583A // _IOR('X', 58, struct xfs_fs_eofblocks)
	xfsEOFVersion    = 1
	xfsEOFSync       = 1
)

type xfsEOFBlocks struct {
	Version, Flags, UID, GID, Project, _ uint32
	MinSize                              uint64
	_                                    [12]uint64
}

// trimClones makes XFS give back what it allocated ahead for writes to shared blocks: until
// it does so by itself, minutes later, a hole there looks like data once it has been read.
// Other file systems don't know the call.
func trimClones(dir string) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	req := xfsEOFBlocks{Version: xfsEOFVersion, Flags: xfsEOFSync}
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), xfsFreeEOFBlocks, uintptr(unsafe.Pointer(&req)))
	_ = unix.Close(fd)
}

// mapBlocks tells for all blocks of a file whether they have data, and of the others in
// which way they have none.
func mapBlocks(ctx context.Context, f blockFile, size, alloc int64, tell func(first uint64, codes []code, data bool) error) error {
	zeros := unwritten{f: f, skip: alloc == 0}
	codes := make([]code, readChunk/BlockSize)
	run := func(from, to uint64, data bool) error {
		for b := from; b < to; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(to-b, uint64(len(codes)))
			for i := range codes[:n] {
				codes[i] = codeUnknown
				if !data {
					c, err := zeros.code(int64(b+uint64(i))*BlockSize, min(int64(b+uint64(i)+1)*BlockSize, size))
					if err != nil {
						return err
					}
					codes[i] = c
				}
			}
			if err := tell(b, codes[:n], data); err != nil {
				return err
			}
			b += n
		}
		return nil
	}
	blocks := blocksOf(size)
	for b := uint64(0); b < blocks; {
		data, stop, err := nextData(f, int64(b)*BlockSize, size)
		if err != nil {
			return err
		}
		hole := min(uint64(data)/BlockSize, blocks)
		if data >= size {
			hole = blocks
		}
		last := max(hole, min((uint64(stop)+BlockSize-1)/BlockSize, blocks))
		if err := run(b, hole, false); err != nil {
			return err
		}
		if err := run(hole, last, true); err != nil {
			return err
		}
		b = max(last, b+1)
	}
	return nil
}

// codesIn are n codes in memory that is aligned for them.
func codesIn(mem []byte, n uint64) []code {
	return unsafe.Slice((*code)(unsafe.Pointer(unsafe.SliceData(mem))), n)
}

// changedGroup is what is noted of the first blocks of a group of 64: of as many as there is
// room for, for most files are small. The codes follow it in memory, then the slots.
type changedGroup struct {
	set  uint64 // one bit per block
	room uint64 // blocks: groupRoom of a class
}

const groupClasses = 3

// groupRoom is 4, 16 or groupBlocks.
func groupRoom(class int) uint64 { return 4 << (2 * class) }

const groupHead = 16 // bytes of changedGroup

func groupSize(room uint64) int { return groupHead + int(room)*12 }

func (g *changedGroup) code(i uint64) *code {
	return (*code)(unsafe.Add(unsafe.Pointer(g), groupHead+8*i))
}

func (g *changedGroup) slot(i uint64) *uint32 {
	return (*uint32)(unsafe.Add(unsafe.Pointer(g), groupHead+8*g.room+4*i))
}

func (g *changedGroup) has(i uint64) bool { return g.set&(1<<i) != 0 }

// groupIn is an empty group in memory of groupSize(room) bytes, aligned for any word.
func groupIn[T byte | uint64](mem []T, room uint64) *changedGroup {
	g := (*changedGroup)(unsafe.Pointer(unsafe.SliceData(mem)))
	g.room = room
	return g
}
