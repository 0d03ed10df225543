package sync

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// source is a directory on this disk that may have blocks of a tree. It is only read, and
// what is read is believed only where its hash is right.
type source struct {
	root string
	// clone says that its files are known by idx and can be cloned (reflinks).
	clone bool
	idx   *index // may be nil
	names map[string]*node
	ids   map[FileID]*node // the files that are as the index says
}

// forkSource is a directory of which nothing is known.
func forkSource(root string) *source { return &source{root: root} }

// volumeSource looks at the directory that idx describes; idx may be nil.
func volumeSource(ctx context.Context, root string, idx *index, clone bool) (*source, error) {
	// Stats only.
	found, err := scan(ctx, root, scanConfig{known: func(statKey, FileType) *Inode { return &Inode{} }})
	if err != nil {
		return nil, err
	}
	s := &source{root: root, clone: clone, idx: idx, names: found.names, ids: map[FileID]*node{}}
	if idx == nil {
		return s, nil
	}
	for _, n := range found.nodes {
		if id, ok := idx.byIno[n.key.Ino]; ok && n.typ == TypeRegular {
			if f := idx.files[id]; f.key == n.key && f.typ == n.typ {
				s.ids[id] = n
			}
		}
	}
	return s, nil
}

// find returns the file that most likely has a target's blocks, or nil.
func (s *source) find(t *target) *node {
	if n := s.ids[t.id]; n != nil {
		return n
	}
	for _, name := range t.names {
		if n := s.names[name]; n != nil && n.typ == TypeRegular {
			return n
		}
	}
	return nil
}

func (s *source) path(n *node) string { return filepath.Join(s.root, n.names[0]) }

// codes are those of a file, or nil if they are not known.
func (s *source) codes(id FileID, n *node) []code {
	if s.idx == nil || s.ids[id] != n {
		return nil
	}
	return s.idx.files[id].codes
}

// cloneSource finds a file to clone a new one from.
func (a *applier) cloneSource(t *target) (*source, *node) {
	if t.handle != "" {
		return nil, nil
	}
	for _, s := range a.sources {
		if s.clone {
			if n := s.find(t); n != nil {
				return s, n
			}
		}
	}
	return nil, nil
}

// fromSource copies the blocks that a source's file has in common with what a target still
// needs, and takes them off the list.
func (a *applier) fromSource(ctx context.Context, t *target, f *os.File, s *source) error {
	rel, codes := t.names[0], []code(nil)
	if s.names != nil {
		n := s.find(t)
		if n == nil {
			return nil
		}
		rel, codes = n.names[0], s.codes(t.id, n)
	}
	root, err := os.Open(s.root)
	if err != nil {
		return err
	}
	defer root.Close()
	src, err := openBelow(int(root.Fd()), rel)
	if err != nil {
		return nil // it has no such file
	}
	defer src.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	for _, e := range t.todo {
		if e.Kind != ExtentData {
			continue
		}
		end := min(e.Start+e.Count, blocksOf(st.Size))
		for at := e.Start; at < end; {
			to := end
			if codes != nil {
				// Only what is known to be right is read.
				has := func(b uint64) bool { return b < uint64(len(codes)) && codes[b] == t.want[b] }
				if !has(at) {
					at++
					continue
				}
				for to = at + 1; to < end && has(to); {
					to++
				}
			}
			if err := a.copyRange(ctx, t, f, src, &st, blockRange{at, to}); err != nil {
				return fmt.Errorf("copy from %s: %w", filepath.Join(s.root, rel), err)
			}
			at = to
		}
	}
	var rest []Extent
	for _, e := range t.todo {
		if e.Kind != ExtentData {
			rest = append(rest, e)
			continue
		}
		rest = append(rest, diffCodes(t.codes, t.want, &Inode{Extents: []Extent{e}})...)
	}
	t.todo = rest
	return nil
}

func (a *applier) copyRange(ctx context.Context, t *target, f, src *os.File, st *unix.Stat_t, r blockRange) error {
	return readBlocks(ctx, src, st.Size, st.Blocks*512, r.From, r.To, func(first uint64, codes []code, data []byte) error {
		if data == nil {
			return nil
		}
		for i := 0; i < len(codes); {
			end := i
			for end < len(codes) && codes[end].kind() == ExtentData && codes[end] == t.want[first+uint64(end)] {
				end++
			}
			if end == i {
				i++
				continue
			}
			chunk := data[i*BlockSize : end*BlockSize]
			if err := a.write(t, f, first+uint64(i), chunk, codes[i:end]); err != nil {
				return err
			}
			a.reused.Add(int64(len(chunk)))
			i = end
		}
		return nil
	})
}
