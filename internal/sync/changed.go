package sync

import (
	"math/bits"
	"sort"
)

// changedBlocks holds, for the blocks of one file that are not as the index has them, what they
// are now. Its cost follows the number of those blocks, not the file's size.
type changedBlocks struct {
	groups map[uint64]*changedGroup
	n      uint64 // blocks in it
}

const groupBlocks = 64 // of a group

type changedGroup struct {
	set   uint64 // one bit per block
	codes [groupBlocks]code
	slots [groupBlocks]uint32
}

// get returns a block's code and its slot in the spool plus one (0: none).
func (o *changedBlocks) get(b uint64) (code, uint32, bool) {
	g := o.groups[b/groupBlocks]
	if g == nil || g.set&(1<<(b%groupBlocks)) == 0 {
		return 0, 0, false
	}
	return g.codes[b%groupBlocks], g.slots[b%groupBlocks], true
}

func (o *changedBlocks) put(b uint64, c code, slot uint32) {
	g := o.groups[b/groupBlocks]
	if g == nil {
		if o.groups == nil {
			o.groups = map[uint64]*changedGroup{}
		}
		g = &changedGroup{}
		o.groups[b/groupBlocks] = g
	}
	if bit := uint64(1) << (b % groupBlocks); g.set&bit == 0 {
		g.set |= bit
		o.n++
	}
	g.codes[b%groupBlocks], g.slots[b%groupBlocks] = c, slot
}

func (o *changedBlocks) drop(b uint64) {
	g := o.groups[b/groupBlocks]
	if g == nil || g.set&(1<<(b%groupBlocks)) == 0 {
		return
	}
	g.set &^= 1 << (b % groupBlocks)
	o.n--
	if g.set == 0 {
		delete(o.groups, b/groupBlocks)
	}
}

// cut forgets the blocks from n on.
func (o *changedBlocks) cut(n uint64) {
	for k, g := range o.groups {
		switch {
		case k*groupBlocks >= n:
			o.n -= uint64(bits.OnesCount64(g.set))
			delete(o.groups, k)
		case (k+1)*groupBlocks > n:
			keep := uint64(1)<<(n%groupBlocks) - 1
			o.n -= uint64(bits.OnesCount64(g.set &^ keep))
			if g.set &= keep; g.set == 0 {
				delete(o.groups, k)
			}
		}
	}
}

// each calls f for every block, in order.
func (o *changedBlocks) each(f func(b uint64, c code, slot uint32) error) error {
	keys := make([]uint64, 0, len(o.groups))
	for k := range o.groups {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	for _, k := range keys {
		g := o.groups[k]
		for set := g.set; set != 0; set &= set - 1 {
			i := bits.TrailingZeros64(set)
			if err := f(k*groupBlocks+uint64(i), g.codes[i], g.slots[i]); err != nil {
				return err
			}
		}
	}
	return nil
}
