package sync

import (
	"context"
	"fmt"
)

// BaseTree is the tree that captures are differences against, for WriteRequest.Base; nil if
// there is no snapshot yet or no baseline. It must not be changed.
func (v *Volume) BaseTree() *Tree {
	v.op.Lock()
	defer v.op.Unlock()
	if v.base == nil || v.base.Ref.ID == "" {
		return nil
	}
	return v.base
}

// Baseline loads what the volume descends from, after a restart of the agent: for a live
// volume the cluster's head, if nobody else has held the term since; for a clean one its
// base. The zero reference means that there is no snapshot yet. What the index does not
// know, or knows only from before a reboot, is read again by the next capture.
func (v *Volume) Baseline(ctx context.Context, s *Store, ref SnapshotRef) error {
	v.op.Lock()
	defer v.op.Unlock()
	if err := v.baseline(ctx, s, ref); err != nil {
		return fmt.Errorf("load baseline %q: %w", ref.ID, err)
	}
	return nil
}

func (v *Volume) baseline(ctx context.Context, s *Store, ref SnapshotRef) error {
	st := v.State()
	switch {
	case st.Phase == PhaseLive:
	case st.Phase == PhaseClean && st.Base.Hash == ref.Hash:
	default:
		return fmt.Errorf("%w: it is %s at %q", ErrPhase, st.Phase, st.Base.ID)
	}
	if v.base != nil && v.idx != nil && v.base.Ref.ID == ref.ID && v.base.Ref.Hash == ref.Hash {
		return nil
	}
	tree, idx, err := v.loadBase(ctx, s, ref)
	if err != nil {
		return err
	}
	if st.Base.Hash != ref.Hash {
		if err := v.setState(func(st *VolumeState) { st.Base = ref }); err != nil {
			return err
		}
	}
	v.dropWork()
	v.base, v.idx = tree, idx
	return nil
}

func (v *Volume) loadBase(ctx context.Context, s *Store, ref SnapshotRef) (*Tree, *index, error) {
	if ref.ID == "" {
		return emptyTree(), newIndex(), nil
	}
	tree, err := s.LoadTree(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	if idx := v.loadIndex(ref); idx != nil && idx.fits(tree) {
		return tree, idx, nil
	}
	hashes, err := s.BlockHashes(ctx, tree)
	if err != nil {
		return nil, nil, err
	}
	idx, err := indexFromHashes(tree, hashes)
	return tree, idx, err
}

func emptyTree() *Tree {
	return &Tree{Inodes: map[FileID]*Inode{}, Names: map[string]FileID{}, NextID: 1}
}
