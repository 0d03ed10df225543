package sync

import (
	"fmt"
	"sort"
	stdsync "sync"
)

// pending is what has been read of the volume since the baseline and is not committed. It
// survives failed and abandoned captures.
type pending struct {
	base  *Tree
	idx   *index
	spool *spool
	next  FileID
	// ids are the inodes that the index does not know by number.
	ids   map[uint64]identity
	taken map[FileID]bool // inodes of the baseline that were found by name
	work  map[FileID]*work
	// groups are where work notes blocks.
	groups *groupPool
}

type identity struct {
	birth int64
	typ   FileType
	id    FileID
}

// work is what was read of one inode since the baseline.
type work struct {
	key     statKey // zero while its content is not known as a whole
	settled bool
	meta    *Inode

	mu     stdsync.Mutex // guards over while workers read the file
	blocks uint64        // of the file
	base   []code        // the index's codes
	valid  uint64        // blocks of base that still count: the smallest size in between
	over   changedBlocks // what differs from base, or has none
}

// at is a block's code, and its slot in the spool plus one (0: none).
func (w *work) at(b uint64) (code, uint32) {
	if c, slot, ok := w.over.get(b); ok {
		return c, slot
	}
	if b < w.valid {
		return w.base[b], 0
	}
	return codeUnknown, 0
}

// same says whether a block is as the index has it, as far as a code can tell.
func (w *work) same(b uint64, c code) bool { return b < uint64(len(w.base)) && w.base[b] == c }

// put notes a block's code. The overlay keeps it only if the index doesn't say the same, or
// if the file's end cuts the block.
func (w *work) put(b uint64, c code, slot uint32, cut bool) {
	if b < w.valid && w.base[b] == c && slot == 0 && !cut {
		w.over.drop(b)
		return
	}
	w.over.put(b, c, slot)
}

func (w *work) resize(n uint64) {
	if n < w.blocks {
		w.over.cut(n)
	}
	w.blocks, w.valid = n, min(w.valid, n)
}

func newPending(base *Tree, idx *index, sp *spool) *pending {
	return &pending{
		base: base, idx: idx, spool: sp, next: max(base.NextID, 1),
		ids: map[uint64]identity{}, taken: map[FileID]bool{}, work: map[FileID]*work{},
		groups: &groupPool{mem: &mapped{}},
	}
}

func (p *pending) close() {
	p.spool.close()
	p.work = nil // which is not to be used any more
	p.groups.close()
}

// lookup finds an inode by number, and by what tells it from an earlier one of that number.
func (p *pending) lookup(key statKey, typ FileType) (FileID, bool) {
	if e, ok := p.ids[key.Ino]; ok && e.birth == key.Birth && e.typ == typ {
		return e.id, true
	}
	if id, ok := p.idx.byIno[key.Ino]; ok {
		if f := p.idx.files[id]; f.key.Birth == key.Birth && f.typ == typ {
			return id, true
		}
	}
	return 0, false
}

// known implements scanConfig.known.
func (p *pending) known(key statKey, typ FileType) *Inode {
	id, ok := p.lookup(key, typ)
	if !ok {
		return nil
	}
	if w := p.work[id]; w != nil {
		if w.key == key && w.settled {
			return w.meta
		}
		return nil
	}
	if f := p.idx.files[id]; f != nil && f.key == key && f.settled {
		if in := p.base.Inodes[id]; in != nil && len(in.Extents) <= shareMost {
			return in
		} else if in != nil {
			return metaOf(in)
		}
	}
	return nil
}

// identify gives an inode its number in the lineage. One that the index knows without a
// stat (after a restart) is recognised by name.
func (p *pending) identify(n *node) FileID {
	if id, ok := p.lookup(n.key, n.typ); ok {
		return id
	}
	id, found := FileID(0), false
	for _, name := range n.names {
		b, ok := p.base.Names[name]
		if !ok || p.taken[b] {
			continue
		}
		if f := p.idx.files[b]; f != nil && f.key.Ino == 0 && f.typ == n.typ {
			id, found = b, true
			p.taken[b] = true
			break
		}
	}
	if !found {
		id = p.next
		p.next++
	}
	p.ids[n.key.Ino] = identity{birth: n.key.Birth, typ: n.typ, id: id}
	return id
}

// consider notes an inode's metadata, and returns what must be read of a file.
func (p *pending) consider(n *node, rd round) *readJob {
	prev, settled := statKey{}, false
	w := p.work[n.id]
	f := p.idx.files[n.id]
	if w != nil {
		prev, settled = w.key, w.settled
	} else if f != nil {
		prev, settled = f.key, f.settled
	}
	if n.typ != TypeRegular {
		if prev != n.key || !settled {
			p.work[n.id] = &work{key: n.key, settled: rd.settled(n.key), meta: n.meta}
		}
		return nil
	}
	ranges, what := rd.suspect(n.key, prev, settled)
	if what == decideLate || what == onlyThose && ranges == nil && prev == n.key {
		return nil
	}
	if w == nil {
		w = &work{over: changedBlocks{pool: p.groups}}
		if f != nil {
			w.base, w.valid = f.codes, uint64(len(f.codes))
			w.blocks = w.valid
		}
		p.work[n.id] = w
	}
	j := &readJob{n: n, w: w, cut: p.cut(n), ranges: ranges, settled: rd.settled(n.key), prev: prev, prevSettled: settled, holes: what == alsoHoles}
	w.meta = n.meta
	w.resize(blocksOf(n.key.Size))
	// Until it has been read as a whole it must not be taken for known.
	w.key, w.settled = statKey{}, false
	return j
}

// cut is one more than the number of the block that a file ends in, if it ended later in
// the baseline; 0 otherwise. The store wants such a block anew even if it is equal.
func (p *pending) cut(n *node) uint64 {
	if in := p.base.Inodes[n.id]; in != nil && n.key.Size < in.Size && n.key.Size%BlockSize != 0 {
		return blocksOf(n.key.Size)
	}
	return 0
}

// delta says how what was found differs from the baseline. Its cost follows what the census
// saw change, unless that was everything.
func (p *pending) delta(found *census) (*Delta, *spoolSource, error) {
	d := &Delta{Base: p.base.Ref, Inodes: map[FileID]*InodeDelta{}, Names: map[string]FileID{}, NextID: p.next}
	src := &spoolSource{spool: p.spool}
	ids, names := found.changes(p)
	for _, id := range ids {
		n := found.byID[id]
		if n == nil {
			if p.base.Inodes[id] != nil {
				d.Removed = append(d.Removed, id)
			}
			continue
		}
		var changed []SpoolExtent
		if w := p.work[id]; w != nil && n.typ == TypeRegular {
			if w.key != n.key {
				return nil, nil, fmt.Errorf("%w: %q changed while it was captured", ErrFreezeBroken, n.names[0])
			}
			var err error
			if changed, err = p.changed(n, w, src); err != nil {
				return nil, nil, err
			}
		}
		in := p.base.Inodes[id]
		if in == nil || len(changed) > 0 || !sameMeta(in, n.meta) {
			m := *n.meta
			m.Extents = nil
			d.Inodes[id] = &InodeDelta{Meta: m, Changed: changed}
		}
	}
	for _, name := range names {
		old, was := p.base.Names[name]
		n := found.names[name]
		switch {
		case n == nil && was:
			d.Unnamed = append(d.Unnamed, name)
		case n != nil && (!was || old != n.id):
			d.Names[name] = n.id
		}
	}
	return d, src, nil
}

// changed lists the blocks of a file that differ from the baseline's.
func (p *pending) changed(n *node, w *work, src *spoolSource) ([]SpoolExtent, error) {
	var base []code
	if f := p.idx.files[n.id]; f != nil && p.base.Inodes[n.id] != nil {
		base = f.codes
	}
	cut := p.cut(n)
	var out []SpoolExtent
	next := uint64(0) // below, every block is as in base or in out
	gap := func(to uint64) error {
		if next < to && (to > w.valid || to > uint64(len(base))) {
			return fmt.Errorf("block %d of %q was not captured", max(next, min(w.valid, uint64(len(base)))), n.names[0])
		}
		if cut > next && cut <= to {
			return fmt.Errorf("block %d of %q, which its end cuts, was not captured", cut-1, n.names[0])
		}
		return nil
	}
	err := w.over.each(func(b uint64, c code, slot uint32) error {
		if err := gap(b); err != nil {
			return err
		}
		next = b + 1
		if b < uint64(len(base)) && base[b] == c && b+1 != cut {
			return nil
		}
		e := SpoolExtent{Kind: c.kind(), Start: b, Count: 1}
		if e.Kind == ExtentData {
			if c == codeUnknown || slot == 0 {
				return fmt.Errorf("block %d of %q was not captured", b, n.names[0])
			}
			e.SpoolBlock = src.add(uint64(slot - 1))
		}
		if k := len(out) - 1; k >= 0 && out[k].Kind == e.Kind && out[k].Start+out[k].Count == b {
			out[k].Count++ // the source numbers them in a row
		} else {
			out = append(out, e)
		}
		return nil
	})
	if err == nil {
		err = gap(w.blocks)
	}
	return out, err
}

// inOrder sorts numbers of inodes.
func inOrder(ids []FileID) []FileID {
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	return ids
}
