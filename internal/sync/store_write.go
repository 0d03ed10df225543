package sync

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Write ships the captured blocks and writes the manifest of a new snapshot. On return both
// are durable, but nothing is committed: the register decides that. The returned tree shares
// inodes with the base and must not be changed either.
//
// It costs the share the same few operations whatever changed (a pack: create, a write for
// each 4 MiB, fsync, close, fsync of the directory; a manifest likewise) and lists or looks
// up nothing. If it fails it removes what it made.
func (s *Store) Write(ctx context.Context, r WriteRequest) (*Tree, WriteStats, error) {
	var stats WriteStats
	if r.Delta == nil {
		return nil, stats, fmt.Errorf("write snapshot: %w: there is none", ErrBadDelta)
	}
	var parent SnapshotRef
	if r.Base != nil {
		parent = r.Base.Ref
	}
	if r.Delta.Base.ID != parent.ID {
		return nil, stats, fmt.Errorf("write snapshot: %w: it is for %q instead of %q", ErrBadDelta, r.Delta.Base.ID, parent.ID)
	}
	name, err := s.newName(r.Term, r.Seq, parent)
	if err != nil {
		return nil, stats, err
	}
	ship, change, err := s.plan(r.Delta, r.Blocks)
	if err != nil {
		return nil, stats, fmt.Errorf("write snapshot: %w: %w", ErrBadDelta, err)
	}
	own := len(change.packs)
	moved := false
	if r.Moves != nil && r.Base != nil {
		removed := make(map[FileID]bool, len(change.removed))
		for _, id := range change.removed {
			removed[id] = true
		}
		moved = r.Moves.apply(r.Base, change, removed)
	}
	b := buildFrom(r.Base)
	if err := b.apply(change); err != nil {
		return nil, stats, fmt.Errorf("write snapshot: %w: %w", ErrBadDelta, err)
	}
	t, err := b.finish()
	if err != nil {
		return nil, stats, fmt.Errorf("write snapshot: %w: %w", ErrBadDelta, err)
	}

	var created createdFiles
	packs, err := s.shipPacks(ctx, ship, name, &r, &created)
	if err == nil {
		copy(t.Packs[len(t.Packs)-len(change.packs):], packs)
		copy(change.packs[:own], packs)
		stats = WriteStats{Blocks: ship.total, ChangedBytes: int64(ship.total) * BlockSize, Packs: len(packs), Moved: moved}
		for _, p := range packs {
			stats.StoredBytes += p.Size
		}
		err = s.describe(ctx, t, r.Base, parent, change, name, r.Frozen, r.Writer, &stats, &created)
	}
	if err != nil {
		s.giveUp(&created, err)
		return nil, WriteStats{}, fmt.Errorf("write snapshot %s: %w", name.id(), err)
	}
	return t, stats, nil
}

// WriteRollback writes the manifest of a new snapshot that has the content of an older one
// and the current head as its parent. No data is copied: it refers to the older one's packs,
// and fails with ErrCondemned if the catalog condemns one of them.
func (s *Store) WriteRollback(ctx context.Context, r RollbackRequest) (*Tree, WriteStats, error) {
	var stats WriteStats
	if r.Target == nil || r.Head.ID == "" {
		return nil, stats, fmt.Errorf("write rollback: head and target are needed")
	}
	if err := s.CheckNotCondemned(ctx, r.Target, r.Catalog); err != nil {
		return nil, stats, fmt.Errorf("write rollback: %w", err)
	}
	name, err := s.newName(r.Term, r.Seq, r.Head)
	if err != nil {
		return nil, stats, err
	}
	head, err := s.briefManifest(ctx, r.Head.Manifest, r.Head.Hash)
	if err != nil {
		return nil, stats, fmt.Errorf("write rollback: %w", err)
	}
	t := *r.Target
	t.NextID = max(t.NextID, head.change.nextID) // a number is never used again
	if !t.meta.known {
		t.meta = treeMeta{known: true, live: countLive(&t)}
	}
	var created createdFiles
	if err := s.describe(ctx, &t, nil, r.Head, nil, name, r.Frozen, r.Writer, &stats, &created); err != nil {
		s.giveUp(&created, err)
		return nil, WriteStats{}, fmt.Errorf("write rollback %s: %w", name.id(), err)
	}
	return &t, stats, nil
}

// CheckNotCondemned returns ErrCondemned if the catalog condemns a pack that the tree refers
// to. A tree that was written while another catalog was committed must pass it before it
// can become head.
func (s *Store) CheckNotCondemned(ctx context.Context, t *Tree, cat CatalogRef) error {
	if cat.Name == "" {
		return nil
	}
	c, err := s.knownCatalog(ctx, cat)
	if err != nil {
		return err
	}
	gone := make(map[string]bool, len(c.condemned))
	for _, p := range c.condemned {
		gone[p] = true
	}
	live := liveOf(t)
	for i, p := range t.Packs {
		if live[i] > 0 && gone[p.Path] {
			return &ObjectError{Path: p.Path, Kind: ErrCondemned}
		}
	}
	return nil
}

// newName makes the name of a snapshot that follows parent.
func (s *Store) newName(term, seq uint64, parent SnapshotRef) (objectName, error) {
	if term > maxNameNumber || seq > maxNameNumber || term < parent.Term || parent.ID != "" && seq <= parent.Seq {
		return objectName{}, fmt.Errorf("name snapshot: term %d, sequence %d can't follow %q", term, seq, parent.ID)
	}
	r, err := s.random()
	return objectName{kind: kindManifest, term: term, seq: seq, rand: r}, err
}

// plan lays out the captured blocks in packs and turns the delta into a change of the tree
// whose packs are not known yet (PackRefs without content).
func (s *Store) plan(d *Delta, src BlockSource) (*shipment, *treeChange, error) {
	ship := &shipment{}
	c := &treeChange{inodes: make(map[FileID]*inodeChange, len(d.Inodes)), names: d.Names, nextID: d.NextID,
		removed: slices.Sorted(slices.Values(d.Removed)), unnamed: slices.Sorted(slices.Values(d.Unnamed))}
	var captured uint64
	if src != nil {
		captured = src.Blocks()
	}
	for _, id := range slices.Sorted(maps.Keys(d.Inodes)) {
		in := d.Inodes[id]
		ch := &inodeChange{meta: in.Meta}
		ch.meta.Extents = nil
		if err := checkSpoolExtents(in, captured); err != nil {
			return nil, nil, fmt.Errorf("inode %d: %w", id, err)
		}
		for _, e := range in.Changed {
			if e.Kind != ExtentData {
				ch.extents = appendExtent(ch.extents, Extent{Kind: e.Kind, Start: e.Start, Count: e.Count})
				continue
			}
			at := ship.add(e.SpoolBlock, e.Count)
			for start, left := e.Start, e.Count; left > 0; {
				in := at % s.cfg.packBlocks
				n := min(left, s.cfg.packBlocks-in)
				ch.extents = appendExtent(ch.extents, Extent{Kind: ExtentData, Start: start, Count: n,
					Pack: PackID(at / s.cfg.packBlocks), PackBlock: in})
				start, at, left = start+n, at+n, left-n
			}
		}
		c.inodes[id] = ch
	}
	c.packs = make([]PackRef, (ship.total+s.cfg.packBlocks-1)/s.cfg.packBlocks)
	return ship, c, nil
}

func checkSpoolExtents(in *InodeDelta, captured uint64) error {
	if in.Meta.Type != TypeRegular && len(in.Changed) > 0 {
		return fmt.Errorf("has content but is not a regular file")
	}
	if in.Meta.Size < 0 {
		return fmt.Errorf("size is negative")
	}
	var end uint64
	blocks := blocksOf(in.Meta.Size)
	for _, e := range in.Changed {
		if e.Kind < ExtentData || e.Kind > ExtentZero || e.Count == 0 || e.Start < end ||
			e.Count > blocks || e.Start > blocks-e.Count {
			return fmt.Errorf("changed blocks at %d are out of order, empty or beyond the end", e.Start)
		}
		if e.Kind == ExtentData && (e.Count > captured || e.SpoolBlock > captured-e.Count) {
			return fmt.Errorf("changed blocks at %d were not captured", e.Start)
		}
		end = e.Start + e.Count
	}
	return nil
}

// describe writes the manifest of t, full or as change to base (nil: full), and completes t.
func (s *Store) describe(ctx context.Context, t, base *Tree, parent SnapshotRef, change *treeChange, name objectName,
	frozen time.Time, writer string, stats *WriteStats, created *createdFiles) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m := manifest{parent: parent, names: int64(len(t.Names))}
	m.info = SnapshotInfo{Writer: writer, Files: int64(len(t.Inodes)), ChangedBytes: stats.ChangedBytes,
		StoredBytes: stats.StoredBytes}
	m.info.Term, m.info.Seq, m.info.Frozen = name.term, name.seq, time.Unix(0, frozen.UnixNano()).UTC()
	for _, in := range t.Inodes {
		if in.Type == TypeRegular {
			m.info.LogicalSize += in.Size
		}
	}
	meta := &t.meta
	if stats.Full = s.wantFull(base); stats.Full {
		m.change = compact(t)
		meta.chain, meta.deltaBytes = 0, 0
	} else {
		m.change = *change
		m.chain = base.meta.chain + 1
		meta.chain, meta.fullBytes, meta.deltaBytes = m.chain, base.meta.fullBytes, base.meta.deltaBytes
		for i, n := range base.meta.live {
			if n > 0 && meta.live[i] == 0 {
				m.dropped = append(m.dropped, base.Packs[i].Path)
			}
		}
	}
	if err := s.writeManifest(&m, name, created); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if stats.Full {
		meta.fullBytes = m.size
	} else {
		meta.deltaBytes += m.size
	}
	stats.ManifestBytes = m.size
	t.Ref = m.info.SnapshotRef
	return nil
}

// wantFull bounds what a reader has to go through: a chain of deltas ends when it is long or
// weighs more than 30 % of the full manifest below it.
func (s *Store) wantFull(base *Tree) bool {
	return base == nil || !base.meta.known || base.meta.chain >= s.cfg.maxChain ||
		base.meta.deltaBytes*10 > base.meta.fullBytes*3
}

// compact drops the packs that the tree doesn't refer to any more, renumbers the others and
// returns the tree as one change from nothing.
func compact(t *Tree) treeChange {
	number := make([]PackID, len(t.Packs))
	var packs []PackRef
	var live []uint64
	for i, n := range t.meta.live {
		if n > 0 {
			number[i] = PackID(len(packs))
			packs, live = append(packs, t.Packs[i]), append(live, n)
		}
	}
	c := treeChange{packs: packs, inodes: make(map[FileID]*inodeChange, len(t.Inodes)), names: t.Names, nextID: t.NextID}
	inodes := make(map[FileID]*Inode, len(t.Inodes))
	for id, in := range t.Inodes {
		n := *in
		n.Extents = slices.Clone(in.Extents)
		for i := range n.Extents {
			if e := &n.Extents[i]; e.Kind == ExtentData {
				e.Pack = number[e.Pack]
			}
		}
		inodes[id] = &n
		ch := &inodeChange{meta: n, extents: n.Extents}
		ch.meta.Extents = nil
		c.inodes[id] = ch
	}
	t.Packs, t.Inodes, t.meta.live = packs, inodes, live
	return c
}
