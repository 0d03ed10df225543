package sync

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sort"

	"github.com/fxamacker/cbor/v2"
	"github.com/zeebo/xxh3"

	"dbsupervisor/internal/fsx"
)

// index remembers, for the baseline, a code per block and the stat of each inode, so that
// what has changed can be found without the store and mostly without reading.
//
// It is kept in a log (state/index): one record per adopted snapshot. The log is never
// fsynced: it is believed only in the boot in which it was written, where the page cache
// has all of it, and only if its last record names the baseline.
type index struct {
	files map[FileID]*indexed
	byIno map[uint64]FileID
	// logged is the size of the log, 0 if there is none to append to; live is about what a
	// log with a single record would take.
	logged int64
}

// indexed is what is known of one inode of the baseline.
type indexed struct {
	typ FileType
	// key is the stat with which it was read; the zero key means that it has not been read
	// on this disk, and only codes are known.
	key statKey
	// settled says that any change since would show in the key.
	settled bool
	codes   []code // regular files only
	own     bool   // nothing else refers to codes
}

func newIndex() *index {
	return &index{files: map[FileID]*indexed{}, byIno: map[uint64]FileID{}}
}

// set replaces what is known of an inode.
func (x *index) set(id FileID, f *indexed) {
	x.remove(id)
	x.files[id] = f
	if f.key.Ino != 0 {
		x.byIno[f.key.Ino] = id
	}
}

// update makes what was read of an inode what is known of it, and says how that differs.
func (x *index) update(id FileID, typ FileType, w *work) indexFile {
	var old []code
	if f := x.files[id]; f != nil {
		old = f.codes
	}
	f := &indexed{typ: typ, key: w.key, settled: w.settled}
	out := indexFile{ID: id, Type: typ, Key: f.key, Settled: f.settled, Blocks: w.blocks}
	if typ == TypeRegular {
		f.codes, f.own = old, true
		if was := x.files[id]; was == nil || !was.own || uint64(len(old)) != w.blocks {
			f.codes = resizeCodes(old, w.blocks)
		}
		var run *indexRun
		// Blocks that the overlay doesn't have are as the index had them.
		_ = w.over.each(func(b uint64, c code, _ uint32) error {
			if b < uint64(len(old)) && b < w.valid && f.codes[b] == c {
				return nil
			}
			f.codes[b] = c
			if run == nil || run.Start+uint64(len(run.Codes)/8) != b {
				out.Runs = append(out.Runs, indexRun{Start: b})
				run = &out.Runs[len(out.Runs)-1]
			}
			run.Codes = binary.LittleEndian.AppendUint64(run.Codes, uint64(c))
			return nil
		})
	}
	x.set(id, f)
	return out
}

func (x *index) remove(id FileID) {
	if old := x.files[id]; old != nil && x.byIno[old.key.Ino] == id {
		delete(x.byIno, old.key.Ino)
	}
	delete(x.files, id)
}

// codesFrom builds an index of codes alone from the packs' block hashes.
func indexFromHashes(t *Tree, hashes map[PackID][]uint64) (*index, error) {
	x := newIndex()
	for id, in := range t.Inodes {
		f := &indexed{typ: in.Type}
		if in.Type == TypeRegular {
			var err error
			if f.codes, err = codesOf(in, hashes); err != nil {
				return nil, fmt.Errorf("file %d of snapshot %s: %w", id, t.Ref.ID, err)
			}
		}
		x.files[id] = f
	}
	return x, nil
}

// codesOf lists the codes of a file's blocks.
func codesOf(in *Inode, hashes map[PackID][]uint64) ([]code, error) {
	codes := make([]code, blocksOf(in.Size))
	for _, e := range in.Extents {
		if e.Start+e.Count > uint64(len(codes)) || e.Start+e.Count < e.Start {
			return nil, fmt.Errorf("extent [%d,+%d) is outside of the file", e.Start, e.Count)
		}
		part := codes[e.Start : e.Start+e.Count]
		switch e.Kind {
		case ExtentHole:
		case ExtentZero:
			for i := range part {
				part[i] = codeZero
			}
		case ExtentData:
			h := hashes[e.Pack]
			if e.PackBlock+e.Count > uint64(len(h)) || e.PackBlock+e.Count < e.PackBlock {
				return nil, fmt.Errorf("extent refers to block %d of a pack with %d", e.PackBlock+e.Count-1, len(h))
			}
			for i := range part {
				part[i] = codeOf(h[e.PackBlock+uint64(i)])
			}
		default:
			return nil, fmt.Errorf("extent of unknown kind %d", e.Kind)
		}
	}
	return codes, nil
}

// indexRecord is one entry of the log, CBOR with a length and a hash before it.
type indexRecord struct {
	Boot    string      `cbor:"1,keyasint"`
	Volume  string      `cbor:"2,keyasint"`
	From    string      `cbor:"3,keyasint"` // hash of the snapshot that the record builds on; "" starts anew
	To      string      `cbor:"4,keyasint"` // hash of the snapshot that it describes
	Files   []indexFile `cbor:"5,keyasint"`
	Removed []FileID    `cbor:"6,keyasint"`
}

type indexFile struct {
	ID      FileID     `cbor:"1,keyasint"`
	Type    FileType   `cbor:"2,keyasint"`
	Key     statKey    `cbor:"3,keyasint"`
	Settled bool       `cbor:"4,keyasint"`
	Blocks  uint64     `cbor:"5,keyasint"`
	Runs    []indexRun `cbor:"6,keyasint"` // codes that differ from the record's base
}

type indexRun struct {
	Start uint64 `cbor:"1,keyasint"`
	Codes []byte `cbor:"2,keyasint"` // 8 bytes each, little-endian
}

const (
	indexHeader    = 16      // length and hash of a record
	indexMaxRecord = 1 << 32 // bytes; a larger index is not kept
)

func indexFileOf(id FileID, f *indexed, old []code) indexFile {
	out := indexFile{ID: id, Type: f.typ, Key: f.key, Settled: f.settled, Blocks: uint64(len(f.codes))}
	same := func(i int) bool { return i < len(old) && old[i] == f.codes[i] }
	for i := 0; i < len(f.codes); {
		if same(i) {
			i++
			continue
		}
		j := i
		for j < len(f.codes) && !same(j) {
			j++
		}
		b := make([]byte, 8*(j-i))
		for k, c := range f.codes[i:j] {
			binary.LittleEndian.PutUint64(b[8*k:], uint64(c))
		}
		out.Runs = append(out.Runs, indexRun{Start: uint64(i), Codes: b})
		i = j
	}
	return out
}

// apply brings the index forward by one record.
func (x *index) apply(r *indexRecord) error {
	for _, id := range r.Removed {
		x.remove(id)
	}
	for _, f := range r.Files {
		n := &indexed{typ: f.Type, key: f.Key, settled: f.Settled}
		if f.Blocks > indexMaxRecord/8 {
			return errors.New("file of impossible size")
		}
		if f.Type == TypeRegular {
			n.codes = make([]code, f.Blocks)
			if old := x.files[f.ID]; old != nil {
				copy(n.codes, old.codes)
			}
		}
		for _, run := range f.Runs {
			k := uint64(len(run.Codes)) / 8
			if run.Start > f.Blocks || k > f.Blocks-run.Start || f.Type != TypeRegular {
				return errors.New("codes outside of a file")
			}
			for i := range k {
				n.codes[run.Start+i] = code(binary.LittleEndian.Uint64(run.Codes[8*i:]))
			}
		}
		x.set(f.ID, n)
	}
	return nil
}

// loadIndex reads the log if it describes this snapshot, in this boot. Anything that is
// not as it should be makes it worthless, not fatal: nil is returned and the caller reads
// the volume instead.
func (v *Volume) loadIndex(ref SnapshotRef) *index { return v.loadIndexOf(v.State().Copy, ref) }

// loadIndexOf is loadIndex for one of the volume's copies.
func (v *Volume) loadIndexOf(copied string, ref SnapshotRef) *index {
	f, err := v.fs.Open(v.indexOfCopy(copied))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			v.log.Warn("can't open the index; the volume will be read instead", "error", err)
		}
		return nil
	}
	defer f.Close()
	x, at, err := readIndex(f, v.cfg.BootID, v.indexID(copied))
	switch {
	case err != nil:
		v.log.Warn("the index is of no use; the volume will be read instead", "error", err)
		return nil
	case at != ref.Hash:
		v.log.Info("the index describes another snapshot; the volume will be read instead", "snapshot", ref.ID)
		return nil
	}
	return x
}

func readIndex(f fsx.File, boot, volume string) (*index, string, error) {
	x := newIndex()
	var at string
	st, err := f.Stat()
	if err != nil {
		return nil, "", err
	}
	for x.logged < st.Size() {
		var head [indexHeader]byte
		if _, err := f.ReadAt(head[:], x.logged); err != nil {
			return nil, "", fmt.Errorf("read record: %w", err)
		}
		n := int64(binary.LittleEndian.Uint64(head[:8]))
		if n < 0 || n > st.Size()-x.logged-indexHeader {
			return nil, "", errors.New("record is cut off")
		}
		b := make([]byte, n)
		if _, err := f.ReadAt(b, x.logged+indexHeader); err != nil && !errors.Is(err, io.EOF) {
			return nil, "", fmt.Errorf("read record: %w", err)
		}
		if xxh3.Hash(b) != binary.LittleEndian.Uint64(head[8:]) {
			return nil, "", errors.New("record is damaged")
		}
		var r indexRecord
		if err := indexDecoder().Unmarshal(b, &r); err != nil {
			return nil, "", fmt.Errorf("decode record: %w", err)
		}
		if r.Boot != boot || r.Volume != volume {
			return nil, "", errors.New("record of another boot or volume")
		}
		if r.From != at {
			return nil, "", errors.New("record out of order")
		}
		if err := x.apply(&r); err != nil {
			return nil, "", fmt.Errorf("apply record: %w", err)
		}
		at = r.To
		x.logged += indexHeader + n
	}
	return x, at, nil
}

func indexDecoder() cbor.DecMode {
	m, err := cbor.DecOptions{MaxArrayElements: 1 << 30, MaxMapPairs: 1 << 20}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	return m
}

// logIndex appends what an adopted capture changed, or writes the log anew when there is
// none or it has grown much longer than what it says. Failing costs a re-read after a
// restart, so it is only logged.
func (v *Volume) logIndex(rec indexRecord) { v.logIndexOf(v.State().Copy, v.idx, rec) }

// indexID is what the index of a copy of the volume must name.
func (v *Volume) indexID(copied string) string {
	if copied == "" {
		return v.State().ID
	}
	return copied
}

// logIndexOf is logIndex for one of the volume's copies.
func (v *Volume) logIndexOf(copied string, x *index, rec indexRecord) {
	rec.Boot, rec.Volume = v.cfg.BootID, v.indexID(copied)
	live := int64(0)
	for _, f := range x.files {
		live += 96 + 8*int64(len(f.codes))
	}
	if x.logged == 0 || x.logged > 2*live+1<<20 {
		rec.From, rec.Removed, rec.Files = "", nil, rec.Files[:0]
		ids := make([]FileID, 0, len(x.files))
		for id := range x.files {
			ids = append(ids, id)
		}
		sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
		for _, id := range ids {
			rec.Files = append(rec.Files, indexFileOf(id, x.files[id], nil))
		}
		x.logged = 0
	}
	if err := v.appendIndex(v.indexOfCopy(copied), x, rec); err != nil {
		x.logged = 0
		v.log.Warn("can't keep the index; the volume will be read after a restart", "error", err)
		if err := v.dropIndexOf(copied); err != nil {
			v.log.Warn("can't remove the index", "error", err)
		}
	}
}

func (v *Volume) appendIndex(path string, x *index, rec indexRecord) error {
	b, err := cbor.Marshal(rec)
	if err != nil {
		return err
	}
	if len(b) > indexMaxRecord {
		return errors.New("the index is too large")
	}
	if err := v.room(int64(len(b))); err != nil {
		return err
	}
	if err := v.fs.At("index", path); err != nil {
		return err
	}
	flags := os.O_WRONLY | os.O_CREATE
	if x.logged == 0 {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	buf := make([]byte, indexHeader, indexHeader+len(b))
	binary.LittleEndian.PutUint64(buf, uint64(len(b)))
	binary.LittleEndian.PutUint64(buf[8:], xxh3.Hash(b))
	buf = append(buf, b...)
	_, err = f.WriteAt(buf, x.logged)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	x.logged += int64(len(buf))
	return nil
}
