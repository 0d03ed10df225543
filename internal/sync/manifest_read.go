package sync

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// briefManifest is readManifest for header and packs, from memory where it was written or
// read lately.
func (s *Store) briefManifest(ctx context.Context, path, hash string) (*manifest, error) {
	if m := s.recent.manifest(path, hash); m != nil {
		return m, nil
	}
	return s.readManifest(ctx, path, hash, true)
}

// readManifest reads and checks a manifest. hash is what it must hash to; "" accepts any
// (the inner hash is checked all the same). With brief, only the header and the packs are
// decoded; the rest is read and hashed.
func (s *Store) readManifest(ctx context.Context, path, hash string, brief bool) (*manifest, error) {
	name, ok := parseName(path)
	if !ok || name.kind != kindManifest {
		return nil, fmt.Errorf("read manifest: %q is not the path of one", path)
	}
	f, err := s.cfg.FS.Open(s.path(path))
	if err != nil {
		return nil, openError(path, err)
	}
	defer f.Close()
	m, sum, err := s.decodeManifest(ctx, f, brief)
	switch {
	case err != nil && !isDamage(err):
		return nil, fmt.Errorf("read %s: %w", path, err)
	case err != nil:
		return nil, damaged(path, "%v", err)
	case hash != "" && sum != hash:
		return nil, damaged(path, "is whole, but not the file that was referred to")
	case m.info.Manifest != path:
		return nil, damaged(path, "is the manifest of snapshot %s", m.info.ID)
	}
	m.info.Hash = sum
	s.recent.putManifest(m)
	return m, nil
}

// contentError is an error of a file's content, as opposed to one of reading it.
type contentError struct{ err error }

func (e *contentError) Error() string { return e.err.Error() }
func (e *contentError) Unwrap() error { return e.err }

func isDamage(err error) bool {
	var c *contentError
	return errors.As(err, &c)
}

// decodeManifest returns the manifest and the file's hash.
func (s *Store) decodeManifest(ctx context.Context, in io.Reader, brief bool) (*manifest, string, error) {
	var m manifest
	size, sum, err := s.readRecords(ctx, in, manifestMagic, func(r *recordReader, c chunk, first bool) error {
		if first {
			return m.decodeHeader(r, c)
		}
		return m.decodeChunk(r, c, brief)
	})
	if err != nil {
		return nil, "", err
	}
	m.size = size
	return &m, sum, nil
}

// readRecords feeds the chunks of a record file to f and returns the file's size and hash.
// The first chunk is a header or the file is damaged. Errors of the content, f's included,
// are contentErrors.
func (s *Store) readRecords(ctx context.Context, in io.Reader, magic string, f func(r *recordReader, c chunk, first bool) error) (int64, string, error) {
	r, err := newRecordReader(ctx, s.codec, in, magic, s.cfg.maxFile)
	if err != nil {
		if r.failed() {
			return 0, "", r.source.err
		}
		return 0, "", &contentError{err}
	}
	for first := true; ; first = false {
		c, err := r.next()
		if errors.Is(err, io.EOF) {
			if first {
				return 0, "", &contentError{errors.New("is empty")}
			}
			return r.size, r.hash, nil
		}
		if err == nil && first != (c.typ == chunkHeader) {
			err = errors.New("has its header in a wrong place")
		}
		if err == nil {
			err = f(r, c, first)
		}
		if err != nil {
			if r.failed() {
				return 0, "", r.source.err
			}
			return 0, "", &contentError{err}
		}
	}
}

func (m *manifest) decodeHeader(r *recordReader, c chunk) error {
	n := 0
	return eachRecord(r, c, func(h *manifestHeader) error {
		if n++; n > 1 {
			return errors.New("has two headers")
		}
		if h.Format == 0 || h.Format > formatVersion {
			return fmt.Errorf("has format %d, this program reads up to %d", h.Format, formatVersion)
		}
		ref, err := h.Snapshot.ref()
		if err != nil {
			return err
		}
		if h.Parent != nil {
			if m.parent, err = h.Parent.ref(); err != nil {
				return err
			}
			if len(h.Parent.Hash) != 32 || h.Parent.Seq >= h.Snapshot.Seq || h.Parent.Term > h.Snapshot.Term {
				return errors.New("names a parent that can't be one")
			}
		}
		if h.Chain > 0 && h.Parent == nil || h.Chain > 1<<20 ||
			h.LogicalSize < 0 || h.Files < 0 || h.Names < 0 || h.ChangedBytes < 0 || h.StoredBytes < 0 {
			return errors.New("has a header that contradicts itself")
		}
		m.info = SnapshotInfo{SnapshotRef: ref, Writer: h.Writer, LogicalSize: h.LogicalSize,
			ChangedBytes: h.ChangedBytes, StoredBytes: h.StoredBytes, Files: h.Files,
			Parent: m.parent.ID, Full: h.Chain == 0}
		m.chain = int(h.Chain)
		m.names = h.Names
		m.change = treeChange{nextID: FileID(h.NextID), inodes: map[FileID]*inodeChange{}, names: map[string]FileID{}}
		return nil
	})
}

func (m *manifest) decodeChunk(r *recordReader, c chunk, brief bool) error {
	ch := &m.change
	if m.info.ID == "" {
		return errors.New("has an empty header")
	}
	switch c.typ {
	case chunkPacks:
		return eachRecord(r, c, func(rec *packRecord) error {
			ref, err := rec.ref()
			ch.packs = append(ch.packs, ref)
			return err
		})
	case chunkDropped:
		return eachRecord(r, c, func(p *string) error {
			m.dropped = append(m.dropped, *p)
			return nil
		})
	}
	if brief {
		return nil
	}
	switch c.typ {
	case chunkInodes:
		return eachRecord(r, c, func(rec *inodeRecord) error { return ch.addInode(rec) })
	case chunkExtents:
		return eachRecord(r, c, func(rec *extentsRecord) error {
			in := ch.inodes[FileID(rec.ID)]
			if in == nil {
				return errors.New("has extents of an unknown file")
			}
			var err error
			in.extents, err = parseExtents(in.extents, rec.Extents, len(ch.packs))
			return err
		})
	case chunkNames:
		return eachRecord(r, c, func(rec *nameRecord) error {
			p := string(rec.Path)
			if _, ok := ch.names[p]; ok {
				return errors.New("has a name twice")
			}
			ch.names[p] = FileID(rec.ID)
			return checkPath(p)
		})
	case chunkUnnamed:
		return eachRecord(r, c, func(p *[]byte) error {
			ch.unnamed = append(ch.unnamed, string(*p))
			return nil
		})
	case chunkRemoved:
		return eachRecord(r, c, func(id *uint64) error {
			ch.removed = append(ch.removed, FileID(*id))
			return nil
		})
	default:
		return fmt.Errorf("has a chunk of the unknown type %d", c.typ)
	}
}

func (ch *treeChange) addInode(rec *inodeRecord) error {
	id := FileID(rec.ID)
	if _, ok := ch.inodes[id]; ok {
		return errors.New("has an inode twice")
	}
	in := &inodeChange{meta: Inode{Type: FileType(rec.Type), Mode: rec.Mode, UID: rec.UID, GID: rec.GID,
		MTime: rec.MTime, Size: rec.Size, Target: rec.Target}}
	for _, x := range rec.XAttrs {
		if in.meta.XAttrs == nil {
			in.meta.XAttrs = make(map[string][]byte, len(rec.XAttrs))
		}
		in.meta.XAttrs[string(x[0])] = x[1]
	}
	if err := checkInode(&in.meta); err != nil {
		return fmt.Errorf("has inode %d: %w", id, err)
	}
	ch.inodes[id] = in
	var err error
	in.extents, err = parseExtents(nil, rec.Extents, len(ch.packs))
	return err
}
