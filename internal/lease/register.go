package lease

import (
	"context"
	"errors"
)

// Errors of a Register. Test them with errors.Is.
var (
	// ErrConflict: the compare-and-swap certainly did not take effect, because the
	// register holds a version that is not the expected one.
	ErrConflict = errors.New("register changed in between")
	// ErrUnknown: the compare-and-swap may or may not have taken effect, now or later.
	// Only a higher version settles it. Until then no file whose name was offered to it
	// may be removed and nothing may be assumed either way.
	ErrUnknown = errors.New("outcome of the register update is unknown")
	// ErrNotInitialised: there is no register here. It never means "new cluster".
	ErrNotInitialised = errors.New("no cluster is initialised here")
	// ErrCorrupt: a record can't be read or contradicts itself.
	ErrCorrupt = errors.New("register is damaged")
	// ErrWrongCluster: the register belongs to another cluster ID, backend or file system.
	ErrWrongCluster = errors.New("register belongs to another cluster")
	// ErrWentBack: the register is behind or different from what this instance has seen
	// before (a restored backup or a replica of the file system).
	ErrWentBack = errors.New("register is older than what this instance has already seen")
	// ErrInitialised: InitFile found a cluster, or the remains of one.
	ErrInitialised = errors.New("a cluster is already initialised here")
	// ErrSeenCluster: InitFile was called on an instance that already belonged to a
	// cluster; a share without one is then more likely not mounted than new.
	ErrSeenCluster = errors.New("this instance already belongs to a cluster")
)

// Register is the cluster's single source of truth: one record, changed only by
// compare-and-swap. Implementations must be safe for concurrent use and must honour ctx:
// an operation that hangs returns when ctx ends (CompareAndSwap then with ErrUnknown).
type Register interface {
	// Load returns the newest record by a fresh look, never from a cache.
	Load(ctx context.Context) (Record, error)
	// CompareAndSwap replaces prev, exactly as it was loaded, by next. The register sets
	// next.Format, next.Version (prev.Version+1) and next.Nonce (fresh) and returns the
	// record as written. The error is nil, ErrConflict, ErrUnknown (the record returned is
	// then the one that was offered, so that it can be recognised), or one that proves
	// that nothing was offered (it then wraps neither).
	CompareAndSwap(ctx context.Context, prev, next Record) (Record, error)
	// Describe says where the register is, for people ("file /mnt/efs/shop").
	Describe() string
}
