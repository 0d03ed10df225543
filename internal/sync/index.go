package sync

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"

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
//
// Codes are outside of the heap (mapped): there is one for each block of the volume.
type index struct {
	files map[FileID]*indexed
	byIno map[uint64]FileID
	mem   *mapped // where the codes are, which nobody else may change or keep
	waste int64   // bytes of it that are of no use any more
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
	codes   []code // regular files only; of the index's own memory
}

// newIndex makes an empty index.
func newIndex() *index {
	x := &index{files: map[FileID]*indexed{}, byIno: map[uint64]FileID{}}
	x.use(&mapped{})
	return x
}

// use takes memory over. It is given back when nobody has the index any more: whoever has
// codes of an index must have the index.
func (x *index) use(mem *mapped) {
	x.mem = mem
	runtime.AddCleanup(x, (*mapped).close, mem)
}

// set replaces what is known of an inode.
func (x *index) set(id FileID, f *indexed) {
	x.forget(id)
	x.files[id] = f
	if f.key.Ino != 0 {
		x.byIno[f.key.Ino] = id
	}
}

// take copies codes into the index's own memory.
func (x *index) take(codes []code) []code {
	out := x.mem.codes(uint64(len(codes)))
	copy(out, codes)
	return out
}

// resize makes codes, which the index no longer has otherwise, n of them; new ones are holes.
func (x *index) resize(codes []code, n uint64) []code {
	if n <= uint64(cap(codes)) {
		had := uint64(len(codes))
		codes = codes[:n]
		if n > had {
			clear(codes[had:])
		}
		return codes
	}
	// A file that has grown will grow again.
	room := n
	if len(codes) > 0 {
		room += n / 8
	}
	out := x.mem.codes(room)[:n]
	copy(out, codes)
	x.waste += int64(cap(codes)) * 8
	return out
}

// tidy gives back what is of no use any more where that is more than half. Nobody may have
// codes of the index.
func (x *index) tidy() {
	if x.waste < 4<<20 || x.waste*2 < x.mem.taken() {
		return
	}
	old := x.mem
	x.use(&mapped{})
	for _, f := range x.files {
		f.codes = x.take(f.codes)
	}
	x.waste = 0
	old.close()
}

// indexPart is how many codes a record has about, so that none is large.
const indexPart = 128 << 10

// update makes what was read of an inode what is known of it, and tells emit how that
// differs, in one part or several.
func (x *index) update(id FileID, typ FileType, w *work, emit func(indexFile)) {
	var old []code
	if f := x.files[id]; f != nil {
		old = f.codes
	}
	f := &indexed{typ: typ, key: w.key, settled: w.settled}
	out := indexFile{ID: id, Type: typ, Key: f.key, Settled: f.settled, Blocks: w.blocks}
	if typ == TypeRegular {
		f.codes = x.resize(old, w.blocks)
		var run *indexRun
		n := 0
		// Blocks that the overlay doesn't have are as the index had them.
		_ = w.over.each(func(b uint64, c code, _ uint32) error {
			if b < uint64(len(old)) && b < w.valid && f.codes[b] == c {
				return nil
			}
			f.codes[b] = c
			if n++; n > indexPart {
				emit(out)
				out.Runs, run, n = nil, nil, 1
			}
			if run == nil || run.Start+uint64(len(run.Codes)/8) != b {
				out.Runs = append(out.Runs, indexRun{Start: b})
				run = &out.Runs[len(out.Runs)-1]
			}
			run.Codes = binary.LittleEndian.AppendUint64(run.Codes, uint64(c))
			return nil
		})
	}
	x.set(id, f)
	emit(out)
}

// remove forgets an inode.
func (x *index) remove(id FileID) {
	if old := x.files[id]; old != nil {
		x.waste += int64(cap(old.codes)) * 8
	}
	x.forget(id)
}

func (x *index) forget(id FileID) {
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
			f.codes = x.mem.codes(blocksOf(in.Size))
			if err = codesOf(in, hashes, f.codes); err != nil {
				return nil, fmt.Errorf("file %d of snapshot %s: %w", id, t.Ref.ID, err)
			}
		}
		x.files[id] = f
	}
	return x, nil
}

// codesOf fills in the codes of a file's blocks, all of them holes so far.
func codesOf(in *Inode, hashes map[PackID][]uint64, codes []code) error {
	for _, e := range in.Extents {
		if e.Start+e.Count > uint64(len(codes)) || e.Start+e.Count < e.Start {
			return fmt.Errorf("extent [%d,+%d) is outside of the file", e.Start, e.Count)
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
				return fmt.Errorf("extent refers to block %d of a pack with %d", e.PackBlock+e.Count-1, len(h))
			}
			for i := range part {
				part[i] = codeOf(h[e.PackBlock+uint64(i)])
			}
		default:
			return fmt.Errorf("extent of unknown kind %d", e.Kind)
		}
	}
	return nil
}

// indexRecord is one entry of the log, CBOR with a length and a hash before it.
type indexRecord struct {
	Boot    string      `cbor:"1,keyasint"`
	Volume  string      `cbor:"2,keyasint"`
	From    string      `cbor:"3,keyasint"` // hash of the snapshot that the record builds on; "" starts anew
	To      string      `cbor:"4,keyasint"` // hash of the snapshot that it describes
	Files   []indexFile `cbor:"5,keyasint"`
	Removed []FileID    `cbor:"6,keyasint"`
	// More: records with the same From and To follow, and only all of them together count.
	More bool `cbor:"7,keyasint,omitempty"`
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

// describe tells emit how what is known of a file differs from old, in one part or several,
// and says whether it does.
func (f *indexed) describe(id FileID, old []code, emit func(indexFile)) bool {
	out := indexFile{ID: id, Type: f.typ, Key: f.key, Settled: f.settled, Blocks: uint64(len(f.codes))}
	same := func(i int) bool { return i < len(old) && old[i] == f.codes[i] }
	n, differs := 0, false
	for i := 0; i < len(f.codes); {
		if same(i) {
			i++
			continue
		}
		differs = true
		j := i
		for j < len(f.codes) && j-i < indexPart && !same(j) {
			j++
		}
		if n += j - i; n > indexPart {
			emit(out)
			out.Runs, n = nil, j-i
		}
		b := make([]byte, 8*(j-i))
		for k, c := range f.codes[i:j] {
			binary.LittleEndian.PutUint64(b[8*k:], uint64(c))
		}
		out.Runs = append(out.Runs, indexRun{Start: uint64(i), Codes: b})
		i = j
	}
	emit(out)
	return differs
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
			var old []code
			if was := x.files[f.ID]; was != nil {
				old = was.codes
			}
			n.codes = x.resize(old, f.Blocks)
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
	var more *indexRecord // the record before, if it is to be continued
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
		if r.From != at || more != nil && r.To != more.To {
			return nil, "", errors.New("record out of order")
		}
		if err := x.apply(&r); err != nil {
			return nil, "", fmt.Errorf("apply record: %w", err)
		}
		if more = nil; r.More {
			more = &indexRecord{To: r.To}
		} else {
			at = r.To
		}
		x.logged += indexHeader + n
	}
	if more != nil {
		return nil, "", errors.New("the last record is cut off")
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

// indexID is what the index of a copy of the volume must name.
func (v *Volume) indexID(copied string) string {
	if copied == "" {
		return v.State().ID
	}
	return copied
}

// indexLog appends what a snapshot changed, in records of a bounded size, or writes the log
// anew when there is none or it has grown much longer than what it says. Failing costs a
// re-read after a restart, so it is only logged.
type indexLog struct {
	v      *Volume
	copied string
	x      *index
	anew   bool
	rec    indexRecord
	size   int // about, of rec
	err    error
}

// indexLogBytes is how large a record becomes, about.
const indexLogBytes = 1 << 20

// logIndex begins to log what leads from one snapshot to another (hashes; from is "" where
// there was none), of one of the volume's copies. end must be called.
func (v *Volume) logIndex(copied string, x *index, from, to string) *indexLog {
	l := &indexLog{v: v, copied: copied, x: x}
	l.rec = indexRecord{Boot: v.cfg.BootID, Volume: v.indexID(copied), From: from, To: to}
	live := int64(0)
	for _, f := range x.files {
		live += 96 + 8*int64(len(f.codes))
	}
	if x.logged == 0 || x.logged > 2*live+1<<20 {
		l.anew, l.rec.From, x.logged = true, "", 0
	}
	return l
}

// removed notes an inode that is gone.
func (l *indexLog) removed(id FileID) {
	if l.anew || l.err != nil {
		return
	}
	l.rec.Removed = append(l.rec.Removed, id)
	if l.size += 9; l.size >= indexLogBytes {
		l.flush(true)
	}
}

// file notes what is known of a file, or a part of it.
func (l *indexLog) file(f indexFile) {
	if !l.anew {
		l.add(f)
	}
}

func (l *indexLog) add(f indexFile) {
	if l.err != nil {
		return
	}
	l.rec.Files = append(l.rec.Files, f)
	l.size += 96
	for _, r := range f.Runs {
		l.size += 16 + len(r.Codes)
	}
	if l.size >= indexLogBytes {
		l.flush(true)
	}
}

func (l *indexLog) flush(more bool) {
	l.rec.More = more
	l.err = l.v.appendIndex(l.v.indexOfCopy(l.copied), l.x, l.rec)
	l.rec.Files, l.rec.Removed, l.size = nil, nil, 0
}

// end completes what was begun: from here on the log counts.
func (l *indexLog) end() {
	if l.anew {
		ids := make([]FileID, 0, len(l.x.files))
		for id := range l.x.files {
			ids = append(ids, id)
		}
		for _, id := range inOrder(ids) {
			l.x.files[id].describe(id, nil, l.add)
		}
	}
	if l.err == nil {
		l.flush(false)
	}
	if l.err == nil {
		return
	}
	l.x.logged = 0
	l.v.log.Warn("can't keep the index; the volume will be read after a restart", "error", l.err)
	if err := l.v.dropIndexOf(l.copied); err != nil {
		l.v.log.Warn("can't remove the index", "error", err)
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
