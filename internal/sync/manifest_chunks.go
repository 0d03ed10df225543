package sync

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
)

// Manifests and catalogs are record files: a magic, chunks of CBOR records, and a hash of
// all that. The file's own hash, which includes that one, is what other files and the
// register name it by; the inner hash tells a whole file from a damaged one when nobody
// knows its name any more (see Scan).
const (
	manifestMagic = "DBSVMAN1"
	catalogMagic  = "DBSVCAT1"
	magicLen      = 8
	chunkHead     = 12 // type, encoding, two zero bytes, stored (u32), decoded (u32)
	chunkEnd      = 0xff
	flushAt       = 512 << 10 // bytes of records after which a writer ends a chunk
)

// Types of chunks. A file begins with its header; then any number of the others, in
// ascending order of type, but for chunkExtents among chunkInodes.
const (
	chunkHeader    = 1
	chunkPacks     = 2
	chunkDropped   = 3
	chunkInodes    = 4
	chunkExtents   = 5
	chunkNames     = 6
	chunkUnnamed   = 7
	chunkRemoved   = 8
	chunkSnapshots = 16
	chunkCondemned = 17
	chunkPinned    = 18
)

// recordWriter writes a record file to w. The first error sticks.
type recordWriter struct {
	codec *codec
	w     io.Writer
	sum   hash.Hash
	size  int64
	typ   byte // of the chunk being filled
	count int
	buf   bytes.Buffer
	out   []byte
	err   error
}

func newRecordWriter(c *codec, w io.Writer, magic string) *recordWriter {
	rw := &recordWriter{codec: c, w: w, sum: sha256.New()}
	rw.write([]byte(magic))
	return rw
}

func (w *recordWriter) write(b []byte) {
	if w.err != nil {
		return
	}
	w.sum.Write(b)
	w.size += int64(len(b))
	_, w.err = w.w.Write(b)
}

// add appends a record to the chunk of this type.
func (w *recordWriter) add(typ byte, record any) {
	if w.err != nil {
		return
	}
	if w.typ != typ || w.buf.Len() >= flushAt || w.count == maxRecords {
		w.flush()
		w.typ = typ
	}
	if w.err = w.codec.cenc.MarshalToBuffer(record, &w.buf); w.err != nil {
		w.err = fmt.Errorf("encode record: %w", w.err)
	}
	w.count++
}

func (w *recordWriter) flush() {
	if w.err == nil && w.buf.Len() > maxChunk {
		w.err = fmt.Errorf("encode record: %d bytes are more than the format allows", w.buf.Len())
	}
	if w.err != nil || w.count == 0 {
		return
	}
	var encoding byte
	w.out, encoding = w.codec.compress(w.out[:0], w.buf.Bytes())
	w.chunk(w.typ, encoding, w.out, w.buf.Len())
	w.buf.Reset()
	w.count = 0
}

func (w *recordWriter) chunk(typ, encoding byte, stored []byte, size int) {
	h := make([]byte, 4, chunkHead)
	h[0], h[1] = typ, encoding
	h = binary.LittleEndian.AppendUint32(h, uint32(len(stored)))
	h = binary.LittleEndian.AppendUint32(h, uint32(size))
	w.write(h)
	w.write(stored)
}

// end completes the file and returns its hash.
func (w *recordWriter) end() (sum string, size int64, err error) {
	w.flush()
	w.typ = 0
	if w.err != nil {
		return "", 0, w.err
	}
	h := make([]byte, chunkHead)
	h[0] = chunkEnd
	binary.LittleEndian.PutUint32(h[4:], sha256.Size)
	binary.LittleEndian.PutUint32(h[8:], sha256.Size)
	w.write(h)
	w.write(w.sum.Sum(nil))
	return hex.EncodeToString(w.sum.Sum(nil)), w.size, w.err
}

// chunk is a chunk as it is in the file.
type chunk struct {
	typ      byte
	encoding byte
	size     int // decoded
	stored   []byte
}

// recordReader reads a record file and hashes it on the way. Nothing that it returns may be
// used before next has returned io.EOF: only then the file has proved to be whole.
type recordReader struct {
	codec  *codec
	in     *bufio.Reader
	source *failReader
	sum    hash.Hash
	size   int64
	total  uint64
	buf    []byte // stored bytes of the current chunk
	raw    []byte // decoded bytes of the current chunk
	hash   string // of the whole file, after io.EOF
}

// failReader keeps the file system's own errors apart from what they cause.
type failReader struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (f *failReader) Read(b []byte) (int, error) {
	if f.err = f.ctx.Err(); f.err != nil {
		return 0, f.err
	}
	n, err := f.r.Read(b)
	if err != nil && err != io.EOF { //nolint:errorlint // io.Reader's contract
		f.err = err
	}
	return n, err
}

// newRecordReader begins to read; the reader is there even after an error.
func newRecordReader(ctx context.Context, c *codec, r io.Reader, magic string, limit int64) (*recordReader, error) {
	src := &failReader{ctx: ctx, r: r}
	rr := &recordReader{codec: c, source: src, sum: sha256.New(),
		in: bufio.NewReaderSize(io.LimitReader(src, limit), 256<<10)}
	b := make([]byte, magicLen)
	if err := rr.fill(b); err != nil {
		return rr, err
	}
	if string(b) != magic {
		return rr, errors.New("does not begin as it should")
	}
	return rr, nil
}

// fill reads len(b) bytes into the hash.
func (r *recordReader) fill(b []byte) error {
	if _, err := io.ReadFull(r.in, b); err != nil {
		if r.source.err != nil {
			return r.source.err
		}
		return errors.New("is truncated")
	}
	r.sum.Write(b)
	r.size += int64(len(b))
	return nil
}

// failed says whether an error came from the file system rather than from the content.
func (r *recordReader) failed() bool { return r.source.err != nil }

// next returns the next chunk, valid until the following call, or io.EOF after the last
// when everything fits together.
func (r *recordReader) next() (chunk, error) {
	var c chunk
	h := make([]byte, chunkHead)
	if err := r.fill(h); err != nil {
		return c, err
	}
	c.typ, c.encoding = h[0], h[1]
	stored, size := binary.LittleEndian.Uint32(h[4:]), binary.LittleEndian.Uint32(h[8:])
	if h[2] != 0 || h[3] != 0 || stored == 0 || stored > maxChunk || size > maxChunk {
		return c, errors.New("has a malformed chunk")
	}
	if c.typ == chunkEnd {
		return c, r.finish(c, stored, size)
	}
	if r.total += uint64(size); r.total > maxTotal {
		return c, errors.New("is larger than the format allows")
	}
	if cap(r.buf) < int(stored) {
		r.buf = make([]byte, stored)
	}
	c.stored, c.size = r.buf[:stored], int(size)
	return c, r.fill(c.stored)
}

func (r *recordReader) finish(c chunk, stored, size uint32) error {
	if c.encoding != 0 || stored != sha256.Size || size != sha256.Size {
		return errors.New("has a malformed end")
	}
	want := r.sum.Sum(nil)
	got := make([]byte, sha256.Size)
	if err := r.fill(got); err != nil {
		return err
	}
	if !bytes.Equal(want, got) {
		return errors.New("does not match its own hash")
	}
	if _, err := r.in.ReadByte(); err == nil {
		return errors.New("goes on after its end")
	} else if r.source.err != nil {
		return r.source.err
	}
	r.hash = hex.EncodeToString(r.sum.Sum(nil))
	return io.EOF
}

// expand returns a chunk's decoded bytes, valid until the next call.
func (r *recordReader) expand(c chunk) ([]byte, error) {
	if cap(r.raw) < c.size {
		r.raw = make([]byte, c.size)
	}
	b, err := r.codec.expand(r.raw, c.stored, c.encoding, c.size)
	if err != nil {
		return nil, fmt.Errorf("has a chunk that %w", err)
	}
	return b, nil
}

// eachRecord decodes a chunk's records one by one.
func eachRecord[T any](r *recordReader, c chunk, f func(*T) error) error {
	b, err := r.expand(c)
	if err != nil {
		return err
	}
	for n := 0; len(b) > 0; n++ {
		if n == maxRecords {
			return errors.New("has a chunk of too many records")
		}
		var rec T
		if b, err = r.codec.cdec.UnmarshalFirst(b, &rec); err != nil {
			return fmt.Errorf("has a malformed record: %w", err)
		}
		if err := f(&rec); err != nil {
			return err
		}
	}
	return nil
}
