package sync

import (
	"bufio"
	"maps"
	"slices"

	"dbsupervisor/internal/fsx"
)

// extentsPerRecord bounds a record: 64 Ki extents take at most about 1.5 MiB.
const extentsPerRecord = 64 << 10

// writeManifest writes a manifest under a name whose random part may change, durably.
// ref.ID, ref.Manifest and ref.Hash are filled in.
func (s *Store) writeManifest(m *manifest, name objectName, created *createdFiles) error {
	name.kind = kindManifest
	f, name, err := s.create(name, created)
	if err != nil {
		return err
	}
	ref := &m.info.SnapshotRef
	ref.ID, ref.Manifest = name.id(), name.path()
	ref.Hash, m.size, err = s.encodeManifest(f, m, name)
	if err = s.finish(f, name.path(), err); err == nil {
		s.recent.putManifest(m)
	}
	return err
}

// encodeManifest returns the file's hash and size.
func (s *Store) encodeManifest(f fsx.File, m *manifest, name objectName) (string, int64, error) {
	h := manifestHeader{
		Format:       formatVersion,
		Snapshot:     refRecord{Term: name.term, Seq: name.seq, Rand: name.rand, Frozen: m.info.Frozen.UnixNano()},
		Writer:       m.info.Writer,
		Chain:        uint64(m.chain),
		NextID:       uint64(m.change.nextID),
		LogicalSize:  m.info.LogicalSize,
		Files:        m.info.Files,
		Names:        m.names,
		ChangedBytes: m.info.ChangedBytes,
		StoredBytes:  m.info.StoredBytes,
	}
	if m.parent.ID != "" {
		p, err := toRefRecord(m.parent)
		if err != nil {
			return "", 0, err
		}
		h.Parent = &p
	}
	out := bufio.NewWriterSize(f, 1<<20)
	w := newRecordWriter(s.codec, out, manifestMagic)
	w.add(chunkHeader, &h)
	for _, p := range m.change.packs {
		r, err := toPackRecord(p)
		if err != nil {
			return "", 0, err
		}
		w.add(chunkPacks, &r)
	}
	for _, p := range m.dropped {
		w.add(chunkDropped, p)
	}
	for _, id := range slices.Sorted(maps.Keys(m.change.inodes)) {
		addInode(w, id, m.change.inodes[id])
	}
	for _, p := range slices.Sorted(maps.Keys(m.change.names)) {
		w.add(chunkNames, &nameRecord{Path: []byte(p), ID: uint64(m.change.names[p])})
	}
	for _, p := range m.change.unnamed {
		w.add(chunkUnnamed, []byte(p))
	}
	for _, id := range m.change.removed {
		w.add(chunkRemoved, uint64(id))
	}
	sum, size, err := w.end()
	if err != nil {
		return "", 0, err
	}
	return sum, size, out.Flush()
}

func addInode(w *recordWriter, id FileID, c *inodeChange) {
	m := &c.meta
	r := inodeRecord{ID: uint64(id), Type: uint8(m.Type), Mode: m.Mode, UID: m.UID, GID: m.GID,
		MTime: m.MTime, Size: m.Size, Target: m.Target}
	for _, k := range slices.Sorted(maps.Keys(m.XAttrs)) {
		r.XAttrs = append(r.XAttrs, [2][]byte{[]byte(k), m.XAttrs[k]})
	}
	rest := c.extents
	cut := func() []byte {
		n := min(len(rest), extentsPerRecord)
		b := appendExtents(nil, rest[:n])
		rest = rest[n:]
		return b
	}
	r.Extents = cut()
	w.add(chunkInodes, &r)
	for len(rest) > 0 {
		w.add(chunkExtents, &extentsRecord{ID: uint64(id), Extents: cut()})
	}
}
