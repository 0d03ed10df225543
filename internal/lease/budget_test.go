package lease_test

import (
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

// wire counts what an NFS client asks its server for. Syncing a directory asks for its
// attributes only, for every change of a name is durable when it is answered. A listing asks
// whether the directory has changed, and for its names if it has: two. Look-ups of names that the
// client knows are not counted.
type wire struct {
	asked   map[fsx.Op]int
	changes int // requests that change something on the share
}

func (w *wire) hook(op fsx.Op, _ string) error {
	switch op {
	case fsx.OpSync, fsx.OpPoint:
		return nil
	case fsx.OpReadDir:
		w.asked[op]++
	case fsx.OpCreate, fsx.OpWrite, fsx.OpLink, fsx.OpSymlink, fsx.OpRemove, fsx.OpMkdir, fsx.OpRename:
		w.changes++
	}
	w.asked[op]++
	return nil
}

func (w *wire) total() (n int) {
	for _, k := range w.asked {
		n += k
	}
	return n
}

// TestOperationBudget: a renewal or a commit asks the share 6 times and makes one name there; a
// look that finds nothing new at most 4 times and writes nothing.
func TestOperationBudget(t *testing.T) {
	f := newFaultFS(fsx.OS{})
	cfg := newShare(t, fsx.OS{})
	cfg.FS = f
	r := mustOpen(t, cfg)
	other := mustOpen(t, lease.FileConfig{FS: fsx.OS{}, Share: cfg.Share, ClusterID: cfg.ClusterID, Rand: cfg.Rand})
	rec := grow(t, r, mustLoad(t, r), 3)
	count := func(what string, most, changes int, do func()) {
		t.Helper()
		w := &wire{asked: map[fsx.Op]int{}}
		f.set(w.hook, nil)
		do()
		f.set(nil, nil)
		if w.total() > most || w.changes != changes {
			t.Errorf("%s: %d requests (%v), %d of them change something; at most %d and %d are allowed",
				what, w.total(), w.asked, w.changes, most, changes)
		}
		t.Logf("%s: %d requests %v", what, w.total(), w.asked)
	}
	for range 3 {
		count("a swap on one's own record", 6, 1, func() { rec = mustSwap(t, r, rec, rec) })
	}
	count("a look that finds nothing new", 4, 0, func() { mustLoad(t, r) })
	rec = mustSwap(t, other, rec, rec)
	count("a look that finds another's record", 6, 0, func() { rec = mustLoad(t, r) })
	count("a swap on a record that was loaded", 6, 1, func() { rec = mustSwap(t, r, rec, rec) })
	if left := names(t, registerDir(t, cfg.Share)); len(left) != int(rec.Version) {
		t.Errorf("more than records is left: %v", left)
	}
}
