package lease

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
)

// Prune removes all records but the newest 64. Only the holder calls it. It removes in ascending
// order and stops at any error but "no such file": that a number is free because it was pruned
// must imply that its predecessor is gone too, or a reader that slept over it could win it (see
// CompareAndSwap).
func (r *FileRegister) Prune(ctx context.Context) error {
	_, err := inBackground(ctx, r.workers, func() (struct{}, error) { return struct{}{}, r.prune(ctx) })
	if err != nil {
		return fmt.Errorf("prune register: %w", err)
	}
	return nil
}

func (r *FileRegister) prune(ctx context.Context) error {
	if err := r.checkCluster(); err != nil {
		return err
	}
	versions, err := r.list()
	if err != nil {
		return err
	}
	newest := versions[len(versions)-1]
	if newest <= keepRecords {
		return nil
	}
	oldest := newest - keepRecords + 1 // of those that stay
	for _, v := range versions {
		if v >= oldest {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.fs.Remove(r.path(v)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// History returns the records that are still there, ascending, up to the newest and without
// a gap.
func (r *FileRegister) History(ctx context.Context) ([]Record, error) {
	recs, err := inBackground(ctx, r.workers, func() ([]Record, error) {
		if err := r.checkCluster(); err != nil {
			return nil, err
		}
		versions, err := r.list()
		if err != nil {
			return nil, err
		}
		// From the newest down to the first gap: below it may lie strays, records of
		// attempts that never counted.
		var recs []Record
		for v := versions[len(versions)-1]; v > 0; v-- {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			rec, err := r.read(v)
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return nil, err
			}
			recs = append(recs, rec)
		}
		slices.Reverse(recs)
		return recs, nil
	})
	if err != nil {
		return nil, fmt.Errorf("read register history: %w", err)
	}
	return recs, nil
}
