package sync

import "slices"

// blockRange is [From, To) in blocks of a file.
type blockRange struct{ From, To uint64 }

// mergeBlocks sorts ranges and joins those that overlap or touch, in place.
func mergeBlocks(rs []blockRange) []blockRange {
	slices.SortFunc(rs, func(a, b blockRange) int {
		switch {
		case a.From < b.From:
			return -1
		case a.From > b.From:
			return 1
		}
		return 0
	})
	out := rs[:0]
	for _, r := range rs {
		switch k := len(out) - 1; {
		case r.From >= r.To:
		case k >= 0 && r.From <= out[k].To:
			out[k].To = max(out[k].To, r.To)
		default:
			out = append(out, r)
		}
	}
	return out
}

// cutBlocks leaves of merged ranges what is below a block.
func cutBlocks(rs []blockRange, end uint64) []blockRange {
	for i, r := range rs {
		if r.To > end {
			out := slices.Clone(rs[:i])
			if r.From < end {
				out = append(out, blockRange{r.From, end})
			}
			return out
		}
	}
	return rs
}

func countBlocks(rs []blockRange) uint64 {
	var n uint64
	for _, r := range rs {
		n += r.To - r.From
	}
	return n
}

// hasBlock says whether merged ranges contain a block.
func hasBlock(rs []blockRange, b uint64) bool {
	i, _ := slices.BinarySearchFunc(rs, b, func(r blockRange, b uint64) int {
		if r.To <= b {
			return -1
		}
		if r.From > b {
			return 1
		}
		return 0
	})
	return i < len(rs) && rs[i].From <= b && b < rs[i].To
}

// touch is what is known of the changes of one inode: blocks that may differ, or that any
// may.
type touch struct {
	Blocks []blockRange `cbor:"1,keyasint"` // merged
	Ranged bool         `cbor:"2,keyasint"`
	// Again: it was Ranged, and what was done may not have been complete.
	Again bool `cbor:"3,keyasint"`
}

// some says whether blocks are known.
func (t *touch) some() bool { return t != nil && len(t.Blocks) > 0 }

// touches are changes by inode number.
type touches map[uint64]*touch

func (t touches) add(ino uint64, blocks []blockRange, ranged bool) *touch {
	e := t[ino]
	if e == nil {
		e = &touch{}
		t[ino] = e
	}
	e.Ranged = e.Ranged || ranged
	if len(blocks) > 0 {
		e.Blocks = mergeBlocks(append(slices.Clone(e.Blocks), blocks...))
	}
	return e
}

func (t touches) addAll(o touches) {
	for ino, e := range o {
		n := t.add(ino, e.Blocks, e.Ranged)
		n.Again = n.Again || e.Again
	}
}

func (t touches) blocks() uint64 {
	var n uint64
	for _, e := range t {
		n += countBlocks(e.Blocks)
	}
	return n
}
