package sync

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// catalogEntry is a snapshot whose manifest must stay: because it is listed, or because a
// listed one is a delta on top of it.
type catalogEntry struct {
	info   SnapshotInfo
	parent SnapshotRef
	chain  int
	listed bool
	aged   int64    // moment for the policy, see ageSnapshots
	packs  []uint32 // listed only: what its tree refers to, as sorted indexes into packs
}

// catalog says what is retained up to a head, and what is condemned.
type catalog struct {
	name      objectName
	hash      string // of the file, once read
	head      SnapshotRef
	packs     []PackRef
	entries   []catalogEntry // oldest first; the last is the head
	condemned []string       // paths, sorted
}

// catalogHeader is the only record of a catalog's first chunk.
type catalogHeader struct {
	Format uint64    `cbor:"1,keyasint"`
	Term   uint64    `cbor:"2,keyasint"`
	Seq    uint64    `cbor:"3,keyasint"`
	Rand   string    `cbor:"4,keyasint"`
	Head   refRecord `cbor:"5,keyasint"`
	Made   int64     `cbor:"6,keyasint"` // wall clock, for people
}

// snapshotRecord is a catalogEntry in a file. Its packs are given as the difference from
// the listed entry before it.
type snapshotRecord struct {
	Snapshot     refRecord  `cbor:"1,keyasint"`
	Parent       *refRecord `cbor:"2,keyasint,omitempty"`
	Writer       string     `cbor:"3,keyasint"`
	Chain        uint64     `cbor:"4,keyasint"`
	LogicalSize  int64      `cbor:"5,keyasint"`
	Files        int64      `cbor:"6,keyasint"`
	ChangedBytes int64      `cbor:"7,keyasint"`
	StoredBytes  int64      `cbor:"8,keyasint"`
	Listed       bool       `cbor:"9,keyasint"`
	Aged         int64      `cbor:"10,keyasint"`
	Added        []byte     `cbor:"11,keyasint,omitempty"`
	Dropped      []byte     `cbor:"12,keyasint,omitempty"`
}

var errIndexes = errors.New("pack numbers are malformed")

// appendIndexes encodes ascending numbers as varint steps.
func appendIndexes(b []byte, idx []uint32) []byte {
	var last uint32
	for _, i := range idx {
		b = binary.AppendUvarint(b, uint64(i-last))
		last = i
	}
	return b
}

func parseIndexes(b []byte, limit int) ([]uint32, error) {
	var out []uint32
	var last uint64
	for len(b) > 0 {
		step, n := binary.Uvarint(b)
		if n <= 0 || step > uint64(limit) || len(out) > 0 && step == 0 {
			return nil, errIndexes
		}
		if last += step; last >= uint64(limit) {
			return nil, errIndexes
		}
		out = append(out, uint32(last))
		b = b[n:]
	}
	return out, nil
}

// minus returns the elements of a that are not in b; both ascending.
func minus(a, b []uint32) []uint32 {
	var out []uint32
	for _, x := range a {
		if _, ok := slices.BinarySearch(b, x); !ok {
			out = append(out, x)
		}
	}
	return out
}

// union returns the elements of both, ascending.
func union(a, b []uint32) []uint32 {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

// writeCatalog writes a catalog, durably, under a name whose random part may change.
func (s *Store) writeCatalog(c *catalog, made int64, created *createdFiles) (CatalogRef, error) {
	f, name, err := s.create(c.name, created)
	if err != nil {
		return CatalogRef{}, err
	}
	c.name = name
	out := bufio.NewWriterSize(f, 1<<20)
	sum, err := s.encodeCatalog(newRecordWriter(s.codec, out, catalogMagic), c, made)
	if err == nil {
		err = out.Flush()
	}
	if err := s.finish(f, name.path(), err); err != nil {
		return CatalogRef{}, err
	}
	return CatalogRef{Name: name.path(), Hash: sum}, nil
}

func (s *Store) encodeCatalog(w *recordWriter, c *catalog, made int64) (string, error) {
	head, err := toRefRecord(c.head)
	if err != nil {
		return "", err
	}
	w.add(chunkHeader, &catalogHeader{Format: formatVersion, Term: c.name.term, Seq: c.name.seq, Rand: c.name.rand,
		Head: head, Made: made})
	for _, p := range c.packs {
		r, err := toPackRecord(p)
		if err != nil {
			return "", err
		}
		w.add(chunkPacks, &r)
	}
	var last []uint32
	for i := range c.entries {
		e := &c.entries[i]
		r := snapshotRecord{Writer: e.info.Writer, Chain: uint64(e.chain), LogicalSize: e.info.LogicalSize,
			Files: e.info.Files, ChangedBytes: e.info.ChangedBytes, StoredBytes: e.info.StoredBytes,
			Listed: e.listed, Aged: e.aged}
		if r.Snapshot, err = toRefRecord(e.info.SnapshotRef); err != nil {
			return "", err
		}
		if e.parent.ID != "" {
			p, err := toRefRecord(e.parent)
			if err != nil {
				return "", err
			}
			r.Parent = &p
		}
		if e.listed {
			r.Added = appendIndexes(nil, minus(e.packs, last))
			r.Dropped = appendIndexes(nil, minus(last, e.packs))
			last = e.packs
		}
		w.add(chunkSnapshots, &r)
	}
	for _, p := range c.condemned {
		w.add(chunkCondemned, p)
	}
	sum, _, err := w.end()
	return sum, err
}

// knownCatalog is readCatalog, from memory where it was the last one written or read.
func (s *Store) knownCatalog(ctx context.Context, ref CatalogRef) (*catalog, error) {
	if c := s.recent.catalog(ref); c != nil {
		return c, nil
	}
	return s.readCatalog(ctx, ref)
}

// readCatalog reads and checks a catalog. With an empty hash any will do.
func (s *Store) readCatalog(ctx context.Context, ref CatalogRef) (*catalog, error) {
	name, ok := parseName(ref.Name)
	if !ok || name.kind != kindCatalog {
		return nil, fmt.Errorf("read catalog: %q is not the path of one", ref.Name)
	}
	f, err := s.cfg.FS.Open(s.path(ref.Name))
	if err != nil {
		return nil, openError(ref.Name, err)
	}
	defer f.Close()
	d := catalogDecoder{}
	_, sum, err := s.readRecords(ctx, f, catalogMagic, d.chunk)
	if err == nil {
		if err = d.check(); err != nil {
			err = &contentError{err}
		}
	}
	switch {
	case err != nil && !isDamage(err):
		return nil, fmt.Errorf("read %s: %w", ref.Name, err)
	case err != nil:
		return nil, damaged(ref.Name, "%v", err)
	case ref.Hash != "" && ref.Hash != sum:
		return nil, damaged(ref.Name, "is whole, but not the file that was referred to")
	case d.c.name != name:
		return nil, damaged(ref.Name, "is the catalog %s", d.c.name.id())
	}
	d.c.hash = sum
	s.recent.putCatalog(&d.c)
	return &d.c, nil
}

// catalogDecoder builds a catalog from its chunks.
type catalogDecoder struct {
	c    catalog
	last []uint32
}

func (d *catalogDecoder) chunk(r *recordReader, c chunk, first bool) error {
	if !first && d.c.head.ID == "" {
		return errors.New("has an empty header")
	}
	switch c.typ {
	case chunkHeader:
		return eachRecord(r, c, d.header)
	case chunkPacks:
		return eachRecord(r, c, func(rec *packRecord) error {
			ref, err := rec.ref()
			d.c.packs = append(d.c.packs, ref)
			return err
		})
	case chunkSnapshots:
		return eachRecord(r, c, d.snapshot)
	case chunkCondemned:
		return eachRecord(r, c, func(p *string) error {
			if _, ok := parseName(*p); !ok {
				return errors.New("condemns a file that is not the store's")
			}
			d.c.condemned = append(d.c.condemned, *p)
			return nil
		})
	default:
		return fmt.Errorf("has a chunk of the unknown type %d", c.typ)
	}
}

func (d *catalogDecoder) header(h *catalogHeader) error {
	if d.c.head.ID != "" {
		return errors.New("has two headers")
	}
	if h.Format == 0 || h.Format > formatVersion {
		return fmt.Errorf("has format %d, this program reads up to %d", h.Format, formatVersion)
	}
	var err error
	if d.c.head, err = h.Head.ref(); err != nil {
		return err
	}
	d.c.name = objectName{kind: kindCatalog, term: h.Term, seq: h.Seq, rand: h.Rand}
	return nil
}

func (d *catalogDecoder) snapshot(r *snapshotRecord) error {
	e := catalogEntry{chain: int(r.Chain), listed: r.Listed, aged: r.Aged}
	ref, err := r.Snapshot.ref()
	if err != nil {
		return err
	}
	if len(r.Snapshot.Hash) != 32 || r.Chain > 1<<20 {
		return errors.New("has a malformed entry")
	}
	if r.Parent != nil {
		if e.parent, err = r.Parent.ref(); err != nil {
			return err
		}
	}
	e.info = SnapshotInfo{SnapshotRef: ref, Writer: r.Writer, LogicalSize: r.LogicalSize, ChangedBytes: r.ChangedBytes,
		StoredBytes: r.StoredBytes, Files: r.Files, Parent: e.parent.ID, Full: r.Chain == 0}
	if n := len(d.c.entries); n > 0 && d.c.entries[n-1].info.Seq >= ref.Seq {
		return errors.New("has its entries out of order")
	}
	added, err := parseIndexes(r.Added, len(d.c.packs))
	if err != nil {
		return err
	}
	dropped, err := parseIndexes(r.Dropped, len(d.c.packs))
	if err != nil {
		return err
	}
	if e.listed {
		e.packs = union(minus(d.last, dropped), added)
		d.last = e.packs
	}
	d.c.entries = append(d.c.entries, e)
	return nil
}

// check makes sure that the catalog doesn't contradict itself: whoever deletes by it must
// not delete what it retains.
func (d *catalogDecoder) check() error {
	c := &d.c
	n := len(c.entries)
	if n == 0 || c.entries[n-1].info.SnapshotRef != c.head || !c.entries[n-1].listed {
		return errors.New("does not list its head")
	}
	kept := map[string]bool{c.name.path(): true}
	for i := range c.entries {
		e := &c.entries[i]
		kept[e.info.Manifest] = true
		for _, p := range e.packs {
			kept[c.packs[p].Path] = true
		}
	}
	for _, p := range c.condemned {
		if kept[p] {
			return fmt.Errorf("condemns %s, which it retains", p)
		}
	}
	return nil
}

// walk reads manifests from head back to the snapshot until (not included), or to the first
// if that is zero, newest first. After an error it returns what it found before. Unless the
// walk is fresh, manifests that were written or read lately are not looked at again.
func (s *Store) walk(ctx context.Context, head, until SnapshotRef, fresh bool) ([]*manifest, error) {
	read := s.briefManifest
	if fresh {
		read = func(ctx context.Context, path, hash string) (*manifest, error) {
			return s.readManifest(ctx, path, hash, true)
		}
	}
	var out []*manifest
	for next := head; next.ID != ""; {
		if next.ID == until.ID {
			if next.Hash != until.Hash {
				return out, damaged(next.Manifest, "is not the one that the catalog names")
			}
			return out, nil
		}
		if err := ctx.Err(); err != nil {
			return out, err
		}
		m, err := read(ctx, next.Manifest, next.Hash)
		if err != nil {
			return out, err
		}
		if m.info.ID != next.ID {
			return out, damaged(next.Manifest, "is not the manifest of %s", next.ID)
		}
		out = append(out, m)
		next = m.parent
	}
	if until.ID != "" {
		return out, damaged(head.Manifest, "does not descend from %s, the catalog's head", until.ID)
	}
	return out, nil
}

// List returns the snapshots that can be restored, newest first: those that the catalog
// lists, and those from head back to the catalog's own head. After an error the list has
// what could be found all the same.
func (s *Store) List(ctx context.Context, head SnapshotRef, cat CatalogRef) ([]SnapshotInfo, error) {
	var c catalog
	if cat.Name != "" {
		p, err := s.readCatalog(ctx, cat)
		if err != nil {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		c = *p
	}
	ms, err := s.walk(ctx, head, c.head, true)
	var out []SnapshotInfo
	for _, m := range ms {
		out = append(out, m.info)
	}
	for _, e := range slices.Backward(c.entries) {
		if e.listed {
			out = append(out, e.info)
		}
	}
	if err != nil {
		return out, fmt.Errorf("list snapshots: %w", err)
	}
	return out, nil
}
