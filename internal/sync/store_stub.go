package sync

import (
	"context"
	"errors"
	"time"
)

var errStub = errors.New("not built yet")

// List returns the snapshots, newest first.
func (s *Store) List(ctx context.Context, head SnapshotRef, cat CatalogRef) ([]SnapshotInfo, error) {
	return nil, errStub
}

// Condemn decides by the policy.
func (s *Store) Condemn(ctx context.Context, head SnapshotRef, cat CatalogRef, p Policy, now time.Time, term uint64) (CatalogRef, Summary, error) {
	return CatalogRef{}, Summary{}, errStub
}

// Sweep unlinks what the committed catalog condemns.
func (s *Store) Sweep(ctx context.Context, cat CatalogRef) (SweepStats, error) {
	return SweepStats{}, errStub
}

// VerifyReport is what a Verify found.
type VerifyReport struct {
	Snapshots int
	Packs     int
	Bytes     int64 // read
	Problems  []Problem
	// NewestWhole is the newest snapshot without any problem; nil if there is none.
	NewestWhole *SnapshotInfo
}

// Problem is one thing that is wrong with a store.
type Problem struct {
	Path      string   // the file, below the share
	What      string   // what is wrong with it
	Snapshots []string // IDs of those that can't be restored because of it, newest first
}

// Verify checks everything that these snapshots need.
func (s *Store) Verify(ctx context.Context, snaps []SnapshotInfo, p Progress) (VerifyReport, error) {
	return VerifyReport{}, errStub
}

// RescueReport is what the share alone says about the history.
type RescueReport struct {
	// Committed are the snapshots that were certainly committed, newest first.
	Committed []SnapshotInfo
	// Unproven are whole manifests that nothing proves to have been committed, newest first.
	Unproven []SnapshotInfo
	// Catalog is the newest catalog that fits the history; zero if there is none.
	Catalog CatalogRef
	// Problems are files that can't be read or are damaged.
	Problems []Problem
}

// Scan looks for committed snapshots without a register.
func (s *Store) Scan(ctx context.Context) (RescueReport, error) { return RescueReport{}, errStub }
