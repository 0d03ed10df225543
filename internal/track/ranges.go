package track

import (
	"cmp"
	"math/bits"
	"slices"
)

const (
	chunkShift = 20 // bytes of a file in a slot
	blockShift = 13 // bytes of a bit
	wholeFile  = 0xffffffff

	flagTouched = 1
	flagRanged  = 2
	flagDirect  = 4
)

// bitmap has a bit for each block of a chunk.
type bitmap [2]uint64

func (b *bitmap) or(o bitmap) { b[0] |= o[0]; b[1] |= o[1] }

// chunk is what a slot says of a MiB of a file.
type chunk struct {
	n                uint32
	written, dirtied bitmap
}

// file is what the slots of one inode say together.
type file struct {
	flags  uint64
	addr   uint64  // of the inode in the kernel, with flagDirect
	chunks []chunk // in any order, the same more than once
}

// files by inode number.
type files map[uint64]*file

func (fs files) file(ino uint64) *file {
	f := fs[ino]
	if f == nil {
		f = &file{}
		fs[ino] = f
	}
	return f
}

func (fs files) ranges() map[uint64]*Inode {
	inodes := make(map[uint64]*Inode, len(fs))
	for ino, f := range fs {
		n := &Inode{Ranged: f.flags&flagRanged != 0}
		inodes[ino] = n
		slices.SortFunc(f.chunks, func(a, b chunk) int { return cmp.Compare(a.n, b.n) })
		for i := 0; i < len(f.chunks); {
			c := f.chunks[i]
			for i++; i < len(f.chunks) && f.chunks[i].n == c.n; i++ {
				c.written.or(f.chunks[i].written)
				c.dirtied.or(f.chunks[i].dirtied)
			}
			n.Written = appendBlocks(n.Written, c.n, c.written)
			n.Dirtied = appendBlocks(n.Dirtied, c.n, c.dirtied)
		}
	}
	return inodes
}

// appendBlocks appends the ranges of chunk n, which comes after all that are there.
func appendBlocks(to []Range, n uint32, b bitmap) []Range {
	for w, word := range b {
		base := int64(n)<<chunkShift + int64(w)<<(blockShift+6)
		for word != 0 {
			skip := bits.TrailingZeros64(word)
			run := bits.TrailingZeros64(^(word >> skip))
			from := base + int64(skip)<<blockShift
			r := Range{from, from + int64(run)<<blockShift}
			if last := len(to) - 1; last >= 0 && to[last].To == r.From {
				to[last].To = r.To
			} else {
				to = append(to, r)
			}
			if skip+run >= 64 {
				break
			}
			word &^= 1<<(skip+run) - 1
		}
	}
	return to
}
