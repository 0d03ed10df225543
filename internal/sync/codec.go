package sync

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"
)

// codec bundles the compressors and the CBOR rules of the format. It is safe for
// concurrent use.
type codec struct {
	zenc *zstd.Encoder
	zdec *zstd.Decoder
	cenc cbor.UserBufferEncMode
	cdec cbor.DecMode
}

// How the bytes of a frame or chunk are stored.
const (
	encodingRaw  = 0
	encodingZstd = 1
)

func newCodec(concurrency int) (*codec, error) {
	var c codec
	var err error
	// The fastest level: compression is what bounds bulk shipping. No checksum, since
	// everything is hashed anyway.
	c.zenc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false),
		zstd.WithEncoderConcurrency(concurrency), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(1<<20))
	if err != nil {
		return nil, fmt.Errorf("make compressor: %w", err)
	}
	// DecodeAll fills the caller's buffer and never grows it.
	c.zdec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(concurrency), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(maxChunk), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("make decompressor: %w", err)
	}
	c.cenc, err = cbor.CoreDetEncOptions().UserBufferEncMode()
	if err != nil {
		return nil, fmt.Errorf("make cbor encoder: %w", err)
	}
	c.cdec, err = cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		MaxArrayElements: maxRecords,
		MaxMapPairs:      maxRecords,
		MaxNestedLevels:  8,
	}.DecMode()
	if err != nil {
		return nil, fmt.Errorf("make cbor decoder: %w", err)
	}
	return &c, nil
}

// compress appends raw to dst in the smaller of the two encodings. Saving less than a
// sixteenth is not worth the reader's time.
func (c *codec) compress(dst, raw []byte) ([]byte, byte) {
	out := c.zenc.EncodeAll(raw, dst)
	if len(out)-len(dst) < len(raw)-len(raw)/16 {
		return out, encodingZstd
	}
	return append(out[:len(dst)], raw...), encodingRaw
}

// expand decodes stored bytes into dst[:size]; dst must have that capacity.
func (c *codec) expand(dst, stored []byte, encoding byte, size int) ([]byte, error) {
	switch encoding {
	case encodingRaw:
		if len(stored) != size {
			return nil, fmt.Errorf("has %d bytes instead of %d", len(stored), size)
		}
		return append(dst[:0], stored...), nil
	case encodingZstd:
		out, err := c.zdec.DecodeAll(stored, dst[:0:size])
		if err != nil {
			return nil, fmt.Errorf("can't be decompressed: %w", err)
		}
		if len(out) != size {
			return nil, fmt.Errorf("decompresses to %d bytes instead of %d", len(out), size)
		}
		return out, nil
	default:
		return nil, fmt.Errorf("has the unknown encoding %d", encoding)
	}
}

var errExtents = errors.New("extents are malformed")

// appendExtents encodes extents as unsigned varints: count*4+kind, the gap to the end of
// the extent before (the first: to block 0) and, for data, the pack and the (signed)
// distance of the pack block from the end of the data extent before.
func appendExtents(b []byte, exts []Extent) []byte {
	var end, packEnd uint64
	for _, e := range exts {
		b = binary.AppendUvarint(b, e.Count<<2|uint64(e.Kind))
		b = binary.AppendUvarint(b, e.Start-end)
		if e.Kind == ExtentData {
			b = binary.AppendUvarint(b, uint64(e.Pack))
			b = binary.AppendVarint(b, int64(e.PackBlock-packEnd))
			packEnd = e.PackBlock + e.Count
		}
		end = e.Start + e.Count
	}
	return b
}

// parseExtents appends the extents in b to exts. Packs must be below packs, and the first
// extent must not overlap the last of exts.
func parseExtents(exts []Extent, b []byte, packs int) ([]Extent, error) {
	var end, packEnd, floor uint64
	if n := len(exts); n > 0 {
		floor = exts[n-1].Start + exts[n-1].Count
	}
	next := func() (uint64, bool) {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, false
		}
		b = b[n:]
		return v, true
	}
	for len(b) > 0 {
		head, ok1 := next()
		gap, ok2 := next()
		e := Extent{Kind: ExtentKind(head & 3), Count: head >> 2}
		if !ok1 || !ok2 || e.Count == 0 || e.Count > maxFileBlocks || gap > maxFileBlocks {
			return nil, errExtents
		}
		e.Start = end + gap
		if end = e.Start + e.Count; end > maxFileBlocks || e.Start < floor {
			return nil, errExtents
		}
		switch e.Kind {
		case ExtentHole, ExtentZero:
		case ExtentData:
			pack, ok := next()
			step, n := binary.Varint(b)
			if !ok || n <= 0 || pack >= uint64(packs) {
				return nil, errExtents
			}
			b = b[n:]
			e.Pack = PackID(pack)
			e.PackBlock = packEnd + uint64(step)
			if e.PackBlock > packMaxBlocks || e.Count > packMaxBlocks || e.PackBlock+e.Count > packMaxBlocks {
				return nil, errExtents
			}
			packEnd = e.PackBlock + e.Count
		default:
			return nil, errExtents
		}
		exts = append(exts, e)
	}
	return exts, nil
}
