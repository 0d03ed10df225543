package sync

import "context"

// tracker tells what was touched in the volume. internal/track implements it.
type tracker interface {
	// Drain returns everything since the last Drain that had happened before the call.
	Drain(ctx context.Context) (*trackedChanges, error)
	// Settle says that what was drained so far need not be reported again, to anybody.
	Settle() error
	Close() error  // the kernel goes on collecting
	Remove() error // ends that
}

type trackedChanges struct {
	Inodes    map[uint64]*trackedInode
	Names     []string
	Lost      string
	NamesLost string
}

type trackedInode struct {
	Written []trackedRange
	Dirtied []trackedRange
	Ranged  bool
}

type trackedRange struct{ From, To int64 }
