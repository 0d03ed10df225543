package sync

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// treeBuilder applies changes to a tree, oldest first. The extents of an inode are merged
// once, at the end, however many changes touched it.
type treeBuilder struct {
	inodes  map[FileID]*Inode
	names   map[string]FileID
	packs   []PackRef
	nextID  FileID
	pending map[FileID]*pendingExtents
	// live counts blocks per pack, those of pending inodes left out; nil: not known yet.
	live []uint64
}

// pendingExtents are an inode's changes so far.
type pendingExtents struct {
	base  []Extent // of the tree that the builder started from
	limit uint64   // blocks of base that still count: the smallest size in between
	over  []Extent // newer than base
}

// buildFrom starts from a tree, which is not changed, or from nothing.
func buildFrom(t *Tree) *treeBuilder {
	b := &treeBuilder{inodes: map[FileID]*Inode{}, names: map[string]FileID{}, pending: map[FileID]*pendingExtents{}}
	if t != nil {
		b.inodes, b.names = maps.Clone(t.Inodes), maps.Clone(t.Names)
		b.packs = slices.Clone(t.Packs)
		b.nextID = t.NextID
		if t.meta.known {
			b.live = slices.Clone(t.meta.live)
		}
	} else {
		b.live = []uint64{}
	}
	return b
}

// apply makes one change. The change's packs are appended to the tree's.
func (b *treeBuilder) apply(c *treeChange) error {
	offset := PackID(len(b.packs))
	b.packs = append(b.packs, c.packs...)
	if b.live != nil {
		b.live = append(b.live, make([]uint64, len(c.packs))...)
	}
	if c.nextID < b.nextID {
		return fmt.Errorf("next file number goes back from %d to %d", b.nextID, c.nextID)
	}
	for _, id := range c.removed {
		in := b.inodes[id]
		if in == nil {
			return fmt.Errorf("removed inode %d is not there", id)
		}
		if b.pending[id] == nil {
			b.count(in.Extents, -1)
		}
		delete(b.inodes, id)
		delete(b.pending, id)
	}
	before := b.nextID
	b.nextID = c.nextID
	for id, ch := range c.inodes {
		old := b.inodes[id]
		if old == nil && id < before {
			return fmt.Errorf("inode %d is new but its number is not", id)
		}
		if id >= b.nextID {
			return fmt.Errorf("inode %d has a number from the future", id)
		}
		if old != nil && old.Type != ch.meta.Type {
			return fmt.Errorf("inode %d changed its type", id)
		}
		if err := b.change(id, old, ch, offset); err != nil {
			return fmt.Errorf("inode %d: %w", id, err)
		}
	}
	for _, p := range c.unnamed {
		if _, ok := b.names[p]; !ok {
			return fmt.Errorf("removed name %q is not there", p)
		}
		delete(b.names, p)
	}
	maps.Copy(b.names, c.names)
	return nil
}

func (b *treeBuilder) change(id FileID, old *Inode, ch *inodeChange, offset PackID) error {
	if err := checkInode(&ch.meta); err != nil {
		return err
	}
	in := ch.meta
	in.Extents = nil
	b.inodes[id] = &in
	if in.Type != TypeRegular {
		if len(ch.extents) > 0 {
			return fmt.Errorf("has content but is not a regular file")
		}
		return nil
	}
	blocks := blocksOf(in.Size)
	if err := checkExtents(ch.extents, blocks); err != nil {
		return err
	}
	over := slices.Clone(ch.extents)
	for i := range over {
		if over[i].Kind == ExtentData {
			over[i].Pack += offset
		}
	}
	p := b.pending[id]
	if p == nil {
		p = &pendingExtents{}
		if old != nil {
			p.base, p.limit = old.Extents, blocksOf(old.Size)
		}
		b.pending[id] = p
		b.count(p.base, -1) // finish counts what becomes of it
	}
	p.limit = min(p.limit, blocks)
	p.over = overlay(p.over, over, blocks)
	return nil
}

// count adds to (sign 1) or takes from the packs' live blocks.
func (b *treeBuilder) count(exts []Extent, sign int) {
	if b.live == nil {
		return
	}
	for _, e := range exts {
		if e.Kind == ExtentData && int(e.Pack) < len(b.live) {
			b.live[e.Pack] += uint64(sign) * e.Count
		}
	}
}

// finish merges what is pending and returns the tree, checked as a whole. Its Ref is not set.
func (b *treeBuilder) finish() (*Tree, error) {
	for id, p := range b.pending {
		in := b.inodes[id]
		exts := overlay(cutExtents(p.base, p.limit), p.over, blocksOf(in.Size))
		in.Extents = exts
		b.count(exts, 1)
	}
	t := &Tree{Inodes: b.inodes, Names: b.names, Packs: b.packs, NextID: b.nextID}
	if err := validateTree(t); err != nil {
		return nil, err
	}
	if b.live == nil {
		b.live = countLive(t)
	}
	t.meta = treeMeta{known: true, live: b.live}
	return t, nil
}

// liveOf is countLive, from memory where it is known.
func liveOf(t *Tree) []uint64 {
	if t.meta.known && len(t.meta.live) == len(t.Packs) {
		return t.meta.live
	}
	return countLive(t)
}

// countLive counts the blocks that the tree refers to, per pack.
func countLive(t *Tree) []uint64 {
	live := make([]uint64, len(t.Packs))
	for _, in := range t.Inodes {
		for _, e := range in.Extents {
			if e.Kind == ExtentData {
				live[e.Pack] += e.Count
			}
		}
	}
	return live
}

// checkExtents checks order, overlap and the end of extents that need not cover everything.
func checkExtents(exts []Extent, blocks uint64) error {
	var end uint64
	for _, e := range exts {
		if e.Kind < ExtentData || e.Kind > ExtentZero || e.Count == 0 || e.Start < end ||
			e.Count > blocks || e.Start > blocks-e.Count {
			return fmt.Errorf("extent at block %d is out of order, empty or beyond the end", e.Start)
		}
		end = e.Start + e.Count
	}
	return nil
}

// cutExtents returns the part of the extents below a block.
func cutExtents(exts []Extent, blocks uint64) []Extent {
	n := len(exts)
	for n > 0 && exts[n-1].Start >= blocks {
		n--
	}
	exts = exts[:n]
	if n > 0 && exts[n-1].Start+exts[n-1].Count > blocks {
		exts = slices.Clone(exts)
		exts[n-1].Count = blocks - exts[n-1].Start
	}
	return exts
}

// overlay returns base with over laid on top, cut at blocks, neighbours that continue each
// other joined, so that equal content has equal extents however it came about.
func overlay(base, over []Extent, blocks uint64) []Extent {
	out := make([]Extent, 0, len(base)+len(over))
	var at uint64 // everything below is in out
	i := 0
	fromBase := func(to uint64) {
		for at < to && i < len(base) {
			e := base[i]
			end := e.Start + e.Count
			if end <= at {
				i++
				continue
			}
			if e.Start >= to {
				break
			}
			from := max(e.Start, at)
			out = appendExtent(out, slice(e, from, min(end, to)))
			at = min(end, to)
		}
		at = max(at, to)
	}
	for _, o := range over {
		if o.Start >= blocks {
			break
		}
		fromBase(o.Start)
		end := min(o.Start+o.Count, blocks)
		out = appendExtent(out, slice(o, o.Start, end))
		at = end
	}
	fromBase(blocks)
	return out
}

// slice is the part of an extent from one block of the file to another.
func slice(e Extent, from, to uint64) Extent {
	if e.Kind == ExtentData {
		e.PackBlock += from - e.Start
	}
	e.Start, e.Count = from, to-from
	return e
}

func appendExtent(out []Extent, e Extent) []Extent {
	if n := len(out); n > 0 {
		l := &out[n-1]
		if l.Kind == e.Kind && l.Start+l.Count == e.Start &&
			(e.Kind != ExtentData || l.Pack == e.Pack && l.PackBlock+l.Count == e.PackBlock) {
			l.Count += e.Count
			return out
		}
	}
	return append(out, e)
}

// validateTree says what is wrong with a tree, if anything: a tree that passes can be restored.
func validateTree(t *Tree) error {
	linked := make(map[FileID]int, len(t.Inodes))
	for p, id := range t.Names {
		in := t.Inodes[id]
		if in == nil {
			return fmt.Errorf("%q names inode %d, which is not there", p, id)
		}
		if linked[id]++; linked[id] > 1 && in.Type == TypeDir {
			return fmt.Errorf("directory %q has two names", p)
		}
		if err := checkPath(p); err != nil {
			return err
		}
		if p == "" {
			if in.Type != TypeDir {
				return fmt.Errorf("root is not a directory")
			}
			continue
		}
		parent := p[:max(0, strings.LastIndexByte(p, '/'))]
		if pid, ok := t.Names[parent]; !ok || t.Inodes[pid] == nil || t.Inodes[pid].Type != TypeDir {
			return fmt.Errorf("%q is not in a directory", p)
		}
	}
	if _, ok := t.Names[""]; !ok {
		return fmt.Errorf("root is missing")
	}
	for id, in := range t.Inodes {
		if linked[id] == 0 {
			return fmt.Errorf("inode %d has no name", id)
		}
		if id >= t.NextID {
			return fmt.Errorf("inode %d has a number from the future", id)
		}
		if in.Type != TypeRegular {
			continue
		}
		var end uint64
		for _, e := range in.Extents {
			if e.Start != end {
				return fmt.Errorf("inode %d: blocks %d to %d are nowhere", id, end, e.Start)
			}
			if e.Kind == ExtentData && int(e.Pack) >= len(t.Packs) {
				return fmt.Errorf("inode %d: block %d is in an unknown pack", id, e.Start)
			}
			end += e.Count
		}
		if blocks := blocksOf(in.Size); end != blocks {
			return fmt.Errorf("inode %d: has %d blocks instead of %d", id, end, blocks)
		}
	}
	return nil
}
