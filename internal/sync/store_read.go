package sync

import (
	"context"
	"fmt"
)

// LoadTree reads a snapshot's manifests, down to the full one that its deltas are based on,
// and returns its tree. Packs are not looked at. Errors wrap ErrMissing or ErrDamaged and
// name the file, or are those of the file system.
func (s *Store) LoadTree(ctx context.Context, ref SnapshotRef) (*Tree, error) {
	var chain []*manifest
	for next := ref; ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if len(next.Hash) != 64 {
			return nil, fmt.Errorf("load snapshot %s: reference has no proper hash", next.ID)
		}
		m, err := s.readManifest(ctx, next.Manifest, next.Hash, false)
		if err != nil {
			return nil, fmt.Errorf("load snapshot %s: %w", ref.ID, err)
		}
		if n := len(chain); n > 0 && chain[n-1].chain != m.chain+1 {
			return nil, fmt.Errorf("load snapshot %s: %w", ref.ID, damaged(next.Manifest, "is not the base that %s expects", chain[n-1].info.ID))
		}
		chain = append(chain, m)
		if m.chain == 0 {
			break
		}
		next = m.parent
	}
	t, err := assemble(nil, chain)
	if err != nil {
		return nil, fmt.Errorf("load snapshot %s: %w", ref.ID, err)
	}
	return t, nil
}

// LoadTreeFrom is LoadTree for a reader that has trees already: it reads only the manifests
// that are newer than the first of them that the snapshot descends from. Trees may be nil.
func (s *Store) LoadTreeFrom(ctx context.Context, ref SnapshotRef, trees ...*Tree) (*Tree, error) {
	have := map[string]*Tree{}
	for _, t := range trees {
		if t != nil && t.meta.known && t.Ref.Hash != "" {
			have[t.Ref.Hash] = t
		}
	}
	if t := have[ref.Hash]; t != nil {
		return t, nil
	}
	var chain []*manifest
	for next := ref; len(have) > 0 && len(next.Hash) == 64; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		m, err := s.readManifest(ctx, next.Manifest, next.Hash, false)
		if err != nil || m.chain == 0 || len(chain) > 0 && chain[len(chain)-1].chain != m.chain+1 {
			break
		}
		chain = append(chain, m)
		next = m.parent
		if base := have[next.Hash]; base != nil && base.meta.chain+1 == m.chain {
			if t, err := assemble(base, chain); err == nil {
				return t, nil
			}
			break
		}
	}
	return s.LoadTree(ctx, ref)
}

// assemble applies manifests, newest first, to a tree that is the parent of the last.
func assemble(base *Tree, chain []*manifest) (*Tree, error) {
	b := buildFrom(base)
	meta := treeMeta{known: true}
	if base != nil {
		meta = base.meta
	}
	top := chain[0]
	for i := len(chain) - 1; i >= 0; i-- {
		m := chain[i]
		if m.chain == 0 {
			b = buildFrom(nil)
			meta = treeMeta{known: true, fullBytes: m.size}
		} else {
			meta.chain, meta.deltaBytes = m.chain, meta.deltaBytes+m.size
		}
		if err := b.apply(&m.change); err != nil {
			return nil, damaged(m.info.Manifest, "does not fit its parent: %v", err)
		}
	}
	t, err := b.finish()
	if err != nil {
		return nil, damaged(top.info.Manifest, "describes no proper tree: %v", err)
	}
	meta.live = t.meta.live
	t.meta = meta
	t.Ref = top.info.SnapshotRef
	if int64(len(t.Inodes)) != top.info.Files || int64(len(t.Names)) != top.names || logicalSize(t) != top.info.LogicalSize {
		return nil, damaged(top.info.Manifest, "promises another tree than it describes")
	}
	return t, nil
}

func logicalSize(t *Tree) int64 {
	var n int64
	for _, in := range t.Inodes {
		if in.Type == TypeRegular {
			n += in.Size
		}
	}
	return n
}
