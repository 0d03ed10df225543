package sync

import (
	"context"
	"errors"
)

// HydrateStats counts what bringing a volume to a snapshot took.
type HydrateStats struct {
	Full         bool  // the volume was empty
	Rehashed     bool  // the local files had to be read
	FetchedBytes int64 // blocks read from the store
	ReusedBytes  int64 // blocks found on this disk: in the volume itself or in a fork
	Files        int   // files whose content was written
}

// Hydrate brings an empty, clean or half-applied volume to a snapshot.
func (v *Volume) Hydrate(_ context.Context, _ *Store, _ SnapshotRef, _ Progress) (HydrateStats, error) {
	return HydrateStats{}, errors.ErrUnsupported
}

// RestoreOptions are optional.
type RestoreOptions struct {
	Workers  int
	MinFree  int64 // bytes to leave free
	Progress Progress
}

// Restore writes a snapshot into a new or empty directory.
func Restore(_ context.Context, _ *Store, _ SnapshotRef, _ string, _ RestoreOptions) error {
	return errors.ErrUnsupported
}
