package sync

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dbsupervisor/internal/fsx"
)

// storeSeeds writes a small history and returns the bytes of its files, by kind.
func storeSeeds(t testing.TB) map[objectKind][][]byte {
	dir := t.TempDir()
	h := newStoreHistory(t, newTestStore(t, nil, dir), 21)
	h.s.cfg.frameBlocks, h.s.cfg.packBlocks = 2, 4
	for i := range 3 {
		// Little content, mostly compressible, so that a fuzzer gets on.
		id := h.model.add(fmt.Sprint("f", i), Inode{Type: TypeRegular, Mode: 0o600, Size: 3*BlockSize - 5,
			XAttrs: map[string][]byte{"user.a": {1}}})
		row := strings.Repeat(fmt.Sprint("row ", i), BlockSize)[:BlockSize]
		h.model.inodes[id].blocks = []storeBlock{{ExtentData, row}, {kind: ExtentHole}, {ExtentData, row[:BlockSize-5] + "\x00\x00\x00\x00\x00"}}
		link := h.model.add(fmt.Sprint("l", i), Inode{Type: TypeSymlink, Target: []byte("f")})
		if i > 0 {
			delete(h.model.inodes, link)
			delete(h.model.names, fmt.Sprint("l", i))
			delete(h.model.names, fmt.Sprint("l", i-1))
			h.model.prune()
		}
		tree, _, err := h.write()
		if err != nil {
			t.Fatal(err)
		}
		h.commit(tree)
	}
	if _, _, err := h.s.Condemn(context.Background(), h.head.Ref, CatalogRef{}, Policy{}, h.now, 1); err != nil {
		t.Fatal(err)
	}
	files, _, err := h.s.listFiles(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	out := map[objectKind][][]byte{}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.path()))
		if err != nil {
			t.Fatal(err)
		}
		out[f.kind] = append(out[f.kind], b)
	}
	return out
}

// storePackOf returns the reference that a pack with these bytes would have.
func storePackOf(b []byte) PackRef {
	ref := PackRef{Path: "packs/00/1-1-0000000000000000-0.pack", Size: int64(len(b))}
	if len(b) < packTrailer {
		return ref
	}
	if n := int64(binary.LittleEndian.Uint32(b[len(b)-packTrailer:])); n <= int64(len(b)-packTrailer) {
		sum := sha256.Sum256(b[int64(len(b)-packTrailer)-n : len(b)-packTrailer])
		ref.Hash = hex.EncodeToString(sum[:])
	}
	return ref
}

// storeMemFile is a file that is only read.
type storeMemFile struct {
	fsx.File
	*bytes.Reader
}

func (f storeMemFile) Read(b []byte) (int, error)              { return f.Reader.Read(b) }
func (f storeMemFile) ReadAt(b []byte, off int64) (int, error) { return f.Reader.ReadAt(b, off) }

// FuzzPack reads packs whose footer has the right hash, whatever it says.
func FuzzPack(f *testing.F) {
	for _, b := range storeSeeds(f)[kindPack] {
		f.Add(b)
	}
	s := newTestStore(f, nil, "/nowhere")
	raw := make([]byte, 0, frameMaxBytes)
	f.Fuzz(func(t *testing.T, b []byte) {
		ref := storePackOf(b)
		foot, err := readFooter(bytes.NewReader(b), ref)
		if err != nil {
			return
		}
		if n := uint64(len(foot.hashes)); n == 0 || n > packMaxBlocks {
			t.Fatalf("footer of %d blocks", n)
		}
		n := len(foot.encode())
		if !bytes.Equal(foot.encode(), b[len(b)-packTrailer-n:len(b)-packTrailer]) {
			t.Fatal("footer has more than one encoding")
		}
		p := &packReader{path: ref.Path, file: storeMemFile{Reader: bytes.NewReader(b)}, foot: foot}
		var stored []byte
		for i := range foot.frames {
			var data []byte
			data, stored, err = s.readFrame(p, i, raw, stored)
			if err == nil && len(data) != int(foot.frames[i].blocks)*BlockSize {
				t.Fatalf("frame of %d bytes", len(data))
			}
		}
	})
}

// FuzzFrame expands any bytes as a frame.
func FuzzFrame(f *testing.F) {
	c, err := newCodec(1)
	if err != nil {
		f.Fatal(err)
	}
	for _, raw := range [][]byte{bytes.Repeat([]byte("row"), BlockSize), make([]byte, frameMaxBytes)} {
		out, enc := c.compress(nil, raw)
		f.Add(out, enc, len(raw))
	}
	f.Add([]byte("raw"), byte(encodingRaw), 3)
	buf := make([]byte, 0, frameMaxBytes)
	f.Fuzz(func(t *testing.T, stored []byte, enc byte, size int) {
		if size < 0 || size > frameMaxBytes {
			return
		}
		out, err := c.expand(buf, stored, enc, size)
		if err == nil && (len(out) != size || size > 0 && &out[0] != &buf[:1][0]) {
			t.Fatalf("expanded to %d bytes elsewhere", len(out))
		}
	})
}

// FuzzManifest reads any bytes as a manifest and as a catalog.
func FuzzManifest(f *testing.F) {
	seeds := storeSeeds(f)
	for _, b := range append(seeds[kindManifest], seeds[kindCatalog]...) {
		f.Add(b)
	}
	s := newTestStore(f, nil, "/nowhere")
	f.Fuzz(func(t *testing.T, b []byte) { storeReadAny(t, s, b) })
}

func storeReadAny(t *testing.T, s *Store, b []byte) {
	ctx := context.Background()
	if _, _, err := s.decodeManifest(ctx, bytes.NewReader(b), true); err == nil {
		if m, _, err := s.decodeManifest(ctx, bytes.NewReader(b), false); err == nil {
			if tree, err := assemble(nil, []*manifest{m}); err == nil {
				if err := validateTree(tree); err != nil {
					t.Fatal(err)
				}
				_ = countLive(tree)
			}
		}
	}
	d := catalogDecoder{}
	if _, _, err := s.readRecords(ctx, bytes.NewReader(b), catalogMagic, d.chunk); err == nil && d.check() == nil {
		next := &catalog{}
		if err := next.follow(&d.c, nil); err == nil {
			next.expire(Policy{})
			_ = next.trim()
		}
	}
}

// FuzzRecords puts any bytes into a well-formed file, as the content of its chunks.
func FuzzRecords(f *testing.F) {
	s := newTestStore(f, nil, "/nowhere")
	seeds := storeSeeds(f)
	for kind, magic := range map[objectKind]string{kindManifest: manifestMagic, kindCatalog: catalogMagic} {
		for _, b := range seeds[kind] {
			var chunks [][]byte
			var types []byte
			_, _, err := s.readRecords(context.Background(), bytes.NewReader(b), magic, func(r *recordReader, c chunk, _ bool) error {
				raw, err := r.expand(c)
				types, chunks = append(types, c.typ), append(chunks, bytes.Clone(raw))
				return err
			})
			if err != nil {
				f.Fatal(err)
			}
			for i := range chunks {
				f.Add(kind == kindCatalog, chunks[0], types[i], chunks[i])
			}
		}
	}
	f.Fuzz(func(t *testing.T, isCatalog bool, header []byte, typ byte, records []byte) {
		magic := manifestMagic
		if isCatalog {
			magic = catalogMagic
		}
		if len(header) == 0 || len(records) == 0 || len(header)+len(records) > maxChunk {
			return
		}
		var out bytes.Buffer
		w := newRecordWriter(s.codec, &out, magic)
		w.chunk(chunkHeader, encodingRaw, header, len(header))
		// A pack table, so that extents and numbers can refer to something.
		r := packRecord{Path: "packs/00/1-1-0000000000000000-0.pack", Hash: make([]byte, 32), Size: 1 << 20}
		w.add(chunkPacks, &r)
		w.flush()
		w.chunk(typ, encodingRaw, records, len(records))
		if _, _, err := w.end(); err != nil {
			t.Fatal(err)
		}
		storeReadAny(t, s, out.Bytes())
	})
}

// FuzzPin reads any bytes as a pin, and any records in a well-formed one.
func FuzzPin(f *testing.F) {
	s := newTestStore(f, nil, "/nowhere")
	file := func(h *pinHeader, records ...any) []byte {
		var out bytes.Buffer
		w := newRecordWriter(s.codec, &out, pinMagic)
		w.add(chunkHeader, h)
		for _, r := range records {
			w.add(chunkPinned, r)
		}
		if _, _, err := w.end(); err != nil {
			f.Fatal(err)
		}
		return out.Bytes()
	}
	h := &pinHeader{Format: 1, Nonce: "0123456789abcdef", Counter: 3, TTL: 1e11, Owner: "restore on alpha", Made: 7}
	f.Add(file(h, "packs/00/1-1-0000000000000000-0.pack", "manifests/1-1-0000000000000000.manifest"), []byte(nil))
	h.Everything = true
	f.Add(file(h), []byte{0x60})
	f.Add([]byte(pinMagic), []byte{0x41, 0x00})
	f.Fuzz(func(t *testing.T, b, records []byte) {
		read := func(b []byte) {
			p, err := s.decodePin(context.Background(), b)
			if err != nil {
				if !isDamage(err) {
					t.Fatal(err)
				}
				return
			}
			if ttl := (&pinSight{pin: p}).ttl(); ttl <= 0 || ttl > pinTTLMost {
				t.Fatalf("a pin may be silent for %v", ttl)
			}
			for path := range p.paths {
				if name, ok := parseName(path); !ok || name.path() != path {
					t.Fatalf("pins %q", path)
				}
			}
		}
		read(b)
		if len(records) == 0 || len(records) > maxChunk {
			return
		}
		var out bytes.Buffer
		w := newRecordWriter(s.codec, &out, pinMagic)
		w.add(chunkHeader, h)
		w.flush()
		w.chunk(chunkPinned, encodingRaw, records, len(records))
		if _, _, err := w.end(); err != nil {
			t.Fatal(err)
		}
		read(out.Bytes())
	})
}

// FuzzPinName parses any name of a file among the pins.
func FuzzPinName(f *testing.F) {
	for _, name := range []string{"0123456789abcdef-1.pin", "0123456789abcdef-01.pin", "0123456789abcdef.pin", "../../x-1.pin", "x.look"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		nonce, counter, ok := parsePinName(name)
		if ok && pinPath(nonce, counter) != pinDir+"/"+name {
			t.Fatalf("%q is %q, %d", name, nonce, counter)
		}
	})
}
