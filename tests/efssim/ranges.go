package efssim

import "slices"

// span is the bytes from..to-1.
type span struct{ from, to int64 }

// spans is a set of bytes: sorted, without overlap, neighbours merged.
type spans []span

// add returns the set with s in it.
func (r spans) add(s span) spans {
	if s.to <= s.from {
		return r
	}
	i, _ := slices.BinarySearchFunc(r, s.from, func(a span, from int64) int {
		if a.to < from {
			return -1
		}
		return 1
	})
	j := i
	for ; j < len(r) && r[j].from <= s.to; j++ {
		s.from, s.to = min(s.from, r[j].from), max(s.to, r[j].to)
	}
	return slices.Replace(r, i, j, s)
}

// missing returns what of s is not in the set.
func (r spans) missing(s span) []span {
	var out []span
	for _, have := range r {
		if have.to <= s.from {
			continue
		}
		if have.from >= s.to {
			break
		}
		if have.from > s.from {
			out = append(out, span{s.from, have.from})
		}
		s.from = have.to
	}
	if s.from < s.to {
		out = append(out, s)
	}
	return out
}

// cut returns the set without what is at or beyond size.
func (r spans) cut(size int64) spans {
	var out spans
	for _, s := range r {
		if s.from < size {
			out = append(out, span{s.from, min(s.to, size)})
		}
	}
	return out
}

func (r spans) len() (n int64) {
	for _, s := range r {
		n += s.to - s.from
	}
	return n
}

// requests is how many requests of at most size bytes each the set takes.
func (r spans) requests(size int64) (n uint64) {
	for _, s := range r {
		n += uint64((s.to - s.from + size - 1) / size) //nolint:gosec // neither is negative
	}
	return n
}
