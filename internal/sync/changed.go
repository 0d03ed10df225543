package sync

import (
	"math/bits"
	"slices"
	stdsync "sync"
)

// changedBlocks holds, for the blocks of one file that are not as the index has them, what they
// are now. Its cost follows the number of those blocks, not the file's size.
type changedBlocks struct {
	pool *groupPool // nil: the heap
	// Most files have few blocks: the first group needs no map.
	key    uint64
	first  *changedGroup
	groups map[uint64]*changedGroup // the others
}

const groupBlocks = 64 // that a group can be about

// groupPool has groups outside of the heap: of a first capture there are blocks without end.
// It is safe for concurrent use; nil is the heap.
type groupPool struct {
	mem *mapped

	mu   stdsync.Mutex
	free [groupClasses][]*changedGroup
}

// get returns an empty group with room for the block with this number in it.
func (p *groupPool) get(i uint64) *changedGroup {
	class := 0
	for groupRoom(class) <= i {
		class++
	}
	room := groupRoom(class)
	if p == nil {
		return groupIn(make([]uint64, groupSize(room)/8), room)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free[class]); n > 0 {
		g := p.free[class][n-1]
		p.free[class] = p.free[class][:n-1]
		return g
	}
	return groupIn(p.mem.alloc(groupSize(room)), room)
}

// put takes a group back.
func (p *groupPool) put(g *changedGroup) {
	if p == nil {
		return
	}
	g.set = 0
	p.mu.Lock()
	defer p.mu.Unlock()
	class := bits.TrailingZeros64(g.room)/2 - 1
	p.free[class] = append(p.free[class], g)
}

// close ends the use of all groups.
func (p *groupPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.free[:])
	p.mem.close()
}

func (o *changedBlocks) group(k uint64) *changedGroup {
	if o.first != nil && o.key == k {
		return o.first
	}
	return o.groups[k]
}

func (o *changedBlocks) drops(k uint64, g *changedGroup) {
	if g == o.first {
		o.first = nil
	} else {
		delete(o.groups, k)
	}
	o.pool.put(g)
}

// get returns a block's code and its slot in the spool plus one (0: none).
func (o *changedBlocks) get(b uint64) (code, uint32, bool) {
	g, i := o.group(b/groupBlocks), b%groupBlocks
	if g == nil || !g.has(i) {
		return 0, 0, false
	}
	return *g.code(i), *g.slot(i), true
}

func (o *changedBlocks) put(b uint64, c code, slot uint32) {
	k, i := b/groupBlocks, b%groupBlocks
	g := o.group(k)
	if g == nil || g.room <= i {
		g = o.enlarge(k, g, i)
	}
	g.set |= 1 << i
	*g.code(i), *g.slot(i) = c, slot
}

// enlarge puts a group with room for block i in the place of old, which may be nil.
func (o *changedBlocks) enlarge(k uint64, old *changedGroup, i uint64) *changedGroup {
	g := o.pool.get(i)
	if old != nil {
		g.set = old.set
		for n := range old.room {
			*g.code(n), *g.slot(n) = *old.code(n), *old.slot(n)
		}
	}
	switch {
	case old == o.first && (old != nil || len(o.groups) == 0):
		o.key, o.first = k, g
	case o.groups == nil:
		o.groups = map[uint64]*changedGroup{k: g}
	default:
		o.groups[k] = g
	}
	if old != nil {
		o.pool.put(old)
	}
	return g
}

func (o *changedBlocks) drop(b uint64) {
	k, i := b/groupBlocks, b%groupBlocks
	g := o.group(k)
	if g == nil {
		return
	}
	if g.set &^= 1 << i; g.set == 0 {
		o.drops(k, g)
	}
}

// keys lists the groups, in order.
func (o *changedBlocks) keys() []uint64 {
	keys := make([]uint64, 0, len(o.groups)+1)
	if o.first != nil {
		keys = append(keys, o.key)
	}
	for k := range o.groups {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// cut forgets the blocks from n on.
func (o *changedBlocks) cut(n uint64) {
	for _, k := range o.keys() {
		g := o.group(k)
		switch {
		case k*groupBlocks >= n:
			o.drops(k, g)
		case (k+1)*groupBlocks > n:
			if g.set &= uint64(1)<<(n%groupBlocks) - 1; g.set == 0 {
				o.drops(k, g)
			}
		}
	}
}

// each calls f for every block, in order.
func (o *changedBlocks) each(f func(b uint64, c code, slot uint32) error) error {
	for _, k := range o.keys() {
		g := o.group(k)
		for set := g.set; set != 0; set &= set - 1 {
			i := uint64(bits.TrailingZeros64(set))
			if err := f(k*groupBlocks+i, *g.code(i), *g.slot(i)); err != nil {
				return err
			}
		}
	}
	return nil
}
