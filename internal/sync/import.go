package sync

import (
	"context"
	"errors"
)

// ImportStats counts what Import copied.
type ImportStats struct {
	Files   int
	Bytes   int64
	Skipped []string
}

// Import copies an existing data directory into an empty volume.
func (v *Volume) Import(_ context.Context, _ string, _ Progress) (ImportStats, error) {
	return ImportStats{}, errors.ErrUnsupported
}
