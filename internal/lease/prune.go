package lease

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
)

// Prune removes all records but the newest 64, temporary files as old as those, and those that
// this handle's own swaps have left. Only
// the holder calls it. It removes in ascending order and stops at any error but "no such
// file": that a number is free because it was pruned must imply that its predecessor is
// gone too, or a reader that slept over it could win it (see CompareAndSwap).
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
	if err := r.removeSpent(ctx); err != nil {
		return err
	}
	versions, temps, err := r.list()
	if err != nil {
		return err
	}
	newest := versions[len(versions)-1]
	if newest <= keepRecords {
		return nil
	}
	oldest := newest - keepRecords + 1 // of those that stay
	remove := func(name string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.fs.Remove(filepath.Join(r.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	// A left-over temporary name keeps its record's inode alive, and an NFS client that has
	// the record open by handle would still find it there: names first, records after.
	for _, name := range temps {
		if v, _ := tempVersion(name); v < oldest {
			if err := remove(name); err != nil {
				return err
			}
		}
	}
	for _, v := range versions {
		if v >= oldest {
			break
		}
		if err := remove(filepath.Base(r.path(v))); err != nil {
			return err
		}
	}
	return nil
}

// removeSpent removes the temporary names of swaps that counted. Their links were answered, so
// nothing that is under way can need them.
func (r *FileRegister) removeSpent(ctx context.Context) error {
	for {
		r.mu.Lock()
		if len(r.spent) == 0 {
			r.mu.Unlock()
			return nil
		}
		name := r.spent[0]
		r.mu.Unlock()
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		r.mu.Lock()
		if len(r.spent) > 0 && r.spent[0] == name {
			r.spent = r.spent[1:]
		}
		r.mu.Unlock()
	}
}

// History returns the records that are still there, ascending, up to the newest and without
// a gap.
func (r *FileRegister) History(ctx context.Context) ([]Record, error) {
	recs, err := inBackground(ctx, r.workers, func() ([]Record, error) {
		if err := r.checkCluster(); err != nil {
			return nil, err
		}
		versions, _, err := r.list()
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
