package sync

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
)

// A pack is: header, frames, footer, trailer. The footer says where the frames are and what
// they hash to, the PackRef says what the footer hashes to.
const (
	packMagic     = "DBSVPAK1"
	packEndMagic  = "DBSVPKE1"
	packHeader    = 16 // magic, block size (u32), 4 zero bytes
	packTrailer   = 16 // footer's length (u32), 4 zero bytes, magic
	footerHead    = 16 // frames (u32), block size (u32), blocks (u64)
	footerFrame   = 48 // offset (u64), stored (u32), blocks (u16), encoding, zero, SHA-256
	footerMax     = footerHead + packMaxBlocks*(footerFrame+8)
	frameMaxBytes = frameMaxBlocks * BlockSize
)

// frame is a run of up to 512 blocks that is compressed and hashed as one.
type frame struct {
	offset   int64
	stored   uint32 // bytes in the file
	blocks   uint16
	encoding byte
	sum      [sha256.Size]byte // of the stored bytes
	first    uint64            // number of its first block; not stored
}

// footer is a pack's index.
type footer struct {
	frames []frame
	hashes []uint64 // xxh3 of every block
}

var errFooter = errors.New("footer is malformed")

func packHead() []byte {
	b := make([]byte, packHeader)
	copy(b, packMagic)
	binary.LittleEndian.PutUint32(b[8:], BlockSize)
	return b
}

func packTail(footerLen int) []byte {
	b := make([]byte, packTrailer)
	binary.LittleEndian.PutUint32(b, uint32(footerLen))
	copy(b[8:], packEndMagic)
	return b
}

// parseTail returns the footer's length.
func parseTail(b []byte) (int, error) {
	if len(b) != packTrailer || string(b[8:]) != packEndMagic || binary.LittleEndian.Uint32(b[4:]) != 0 {
		return 0, errors.New("has no trailer where it should end")
	}
	n := binary.LittleEndian.Uint32(b)
	if n < footerHead || n > footerMax {
		return 0, errFooter
	}
	return int(n), nil
}

func (f *footer) encode() []byte {
	b := make([]byte, 0, footerHead+len(f.frames)*footerFrame+len(f.hashes)*8)
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(len(f.frames)))
	b = le.AppendUint32(b, BlockSize)
	b = le.AppendUint64(b, uint64(len(f.hashes)))
	for i := range f.frames {
		fr := &f.frames[i]
		b = le.AppendUint64(b, uint64(fr.offset))
		b = le.AppendUint32(b, fr.stored)
		b = le.AppendUint16(b, fr.blocks)
		b = append(b, fr.encoding, 0)
		b = append(b, fr.sum[:]...)
	}
	for _, h := range f.hashes {
		b = le.AppendUint64(b, h)
	}
	return b
}

// parseFooter decodes and checks a footer. The frames must fill the file from the header to
// dataEnd exactly, in whatever order.
func parseFooter(b []byte, dataEnd int64) (*footer, error) {
	le := binary.LittleEndian
	if len(b) < footerHead || le.Uint32(b[4:]) != BlockSize {
		return nil, errFooter
	}
	frames, blocks := uint64(le.Uint32(b)), le.Uint64(b[8:])
	if blocks == 0 || blocks > packMaxBlocks || frames == 0 || frames > blocks ||
		uint64(len(b)) != footerHead+frames*footerFrame+blocks*8 {
		return nil, errFooter
	}
	b = b[footerHead:]
	f := &footer{frames: make([]frame, frames), hashes: make([]uint64, blocks)}
	var sum uint64
	for i := range f.frames {
		fr := &f.frames[i]
		fr.offset = int64(le.Uint64(b))
		fr.stored = le.Uint32(b[8:])
		fr.blocks = le.Uint16(b[12:])
		fr.encoding = b[14]
		copy(fr.sum[:], b[16:footerFrame])
		fr.first = sum
		raw := uint32(fr.blocks) * BlockSize
		switch {
		case b[15] != 0, fr.blocks == 0, fr.blocks > frameMaxBlocks, fr.stored == 0,
			fr.offset < packHeader, fr.offset > dataEnd:
			return nil, errFooter
		case fr.encoding == encodingRaw && fr.stored != raw,
			fr.encoding == encodingZstd && fr.stored >= raw,
			fr.encoding > encodingZstd:
			return nil, errFooter
		}
		sum += uint64(fr.blocks)
		b = b[footerFrame:]
	}
	if sum != blocks {
		return nil, errFooter
	}
	for i := range f.hashes {
		f.hashes[i] = le.Uint64(b[i*8:])
	}
	order := make([]int, frames)
	for i := range order {
		order[i] = i
	}
	sort.Slice(order, func(i, j int) bool { return f.frames[order[i]].offset < f.frames[order[j]].offset })
	at := int64(packHeader)
	for _, i := range order {
		if f.frames[i].offset != at {
			return nil, fmt.Errorf("%w: frames leave a gap or overlap", errFooter)
		}
		at += int64(f.frames[i].stored)
	}
	if at != dataEnd {
		return nil, fmt.Errorf("%w: frames don't reach it", errFooter)
	}
	return f, nil
}

// frameOf returns the index of the frame that holds the block.
func (f *footer) frameOf(block uint64) int {
	return sort.Search(len(f.frames), func(i int) bool { return f.frames[i].first > block }) - 1
}
