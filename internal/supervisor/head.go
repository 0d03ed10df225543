package supervisor

import (
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// RefOf is the register's head as the store names it; nil gives the reference to nothing.
func RefOf(h *lease.Head) volsync.SnapshotRef {
	if h == nil {
		return volsync.SnapshotRef{}
	}
	return volsync.SnapshotRef{ID: h.ID, Manifest: h.Manifest, Hash: h.Hash, Term: h.Term, Seq: h.Seq, Frozen: h.Frozen}
}

// HeadOf is a snapshot as the register names it.
func HeadOf(r volsync.SnapshotRef) *lease.Head {
	return &lease.Head{ID: r.ID, Manifest: r.Manifest, Hash: r.Hash, Term: r.Term, Seq: r.Seq, Frozen: r.Frozen}
}
