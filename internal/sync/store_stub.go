package sync

import (
	"context"
	"errors"
	"time"
)

var errStub = errors.New("not built yet")

// Write ships the captured blocks and writes the manifest of a new snapshot. On return both
// are durable, but nothing is committed: the register decides that.
func (s *Store) Write(ctx context.Context, r WriteRequest) (*Tree, WriteStats, error) {
	return nil, WriteStats{}, errStub
}

// WriteRollback writes the manifest of a new snapshot that has the content of an older one.
func (s *Store) WriteRollback(ctx context.Context, r RollbackRequest) (*Tree, WriteStats, error) {
	return nil, WriteStats{}, errStub
}

// LoadTree reads a snapshot's manifests and returns its tree. Errors are ErrMissing,
// ErrDamaged, or those of the file system.
func (s *Store) LoadTree(ctx context.Context, ref SnapshotRef) (*Tree, error) {
	return nil, errStub
}

// BlockHashes returns the xxh3 of every block of every pack that the tree refers to, from
// the packs' footers.
func (s *Store) BlockHashes(ctx context.Context, t *Tree) (map[PackID][]uint64, error) {
	return nil, errStub
}

// Read fetches blocks. Every frame is read and verified once; sink gets a want whole or,
// where it crosses frames, in pieces: the Want passed to it then names the piece (Block, At
// and Count; Tag is unchanged), and data is Count*BlockSize bytes, valid during the call
// only. Sink is called concurrently and in any order; its error ends the Read.
func (s *Store) Read(ctx context.Context, t *Tree, wants []Want, sink func(w Want, data []byte) error, p Progress) error {
	return errStub
}

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
