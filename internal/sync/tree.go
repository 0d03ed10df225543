// Package sync keeps a database's volume and its snapshots on the shared directory
// consistent: freeze, capture, thaw, ship, commit; restore; retention; verification.
//
// Import it under the alias volsync: its name, asked for by the project's layout, shadows
// the standard library's.
package sync

import (
	"context"
	"time"
)

// BlockSize is the unit of change, of deduplication against the previous snapshot and of
// addressing in packs. Databases write aligned pages of 8 KiB (or multiples) in place;
// larger blocks multiply the bytes shipped (docs/STORE.md has the measurement).
const BlockSize = 8192

// SnapshotRef names one snapshot on the share. It is all that a register's head holds.
type SnapshotRef struct {
	ID       string    // "<term>-<seq>-<random>"
	Manifest string    // path below the shared directory
	Hash     string    // SHA-256 of the manifest file, hex
	Term     uint64    //
	Seq      uint64    //
	Frozen   time.Time // wall clock of the freeze, for people
}

// FileType is the kind of an inode in a Tree.
type FileType uint8

// The kinds that a snapshot keeps. Sockets, fifos and devices are left out; Capture counts
// and names them.
const (
	TypeRegular FileType = 1
	TypeDir     FileType = 2
	TypeSymlink FileType = 3
)

// Inode is everything about a file but its names. Hard links are several names of one inode.
type Inode struct {
	Type   FileType
	Mode   uint32 // permission bits with setuid, setgid and sticky, as in st_mode & 07777
	UID    uint32
	GID    uint32
	MTime  int64             // nanoseconds since the Unix epoch
	Size   int64             // bytes; regular files only
	Target []byte            // symbolic links only
	XAttrs map[string][]byte // includes POSIX ACLs (system.posix_acl_*)
	// Extents say where the content is, sorted by Start, without overlap, covering every
	// block of the file: ceil(Size/BlockSize) blocks. The last block is padded with zeros.
	Extents []Extent
}

// ExtentKind tells data from the two ways of being zero.
type ExtentKind uint8

// Kinds of extents.
const (
	ExtentData ExtentKind = 1 // blocks in a pack
	ExtentHole ExtentKind = 2 // not allocated: reads as zero, restored as a hole
	ExtentZero ExtentKind = 3 // allocated and zero: restored by preallocation
)

// Extent is a run of blocks of one file. For ExtentData, block Start+i of the file is block
// PackBlock+i of the pack.
type Extent struct {
	Kind      ExtentKind
	Start     uint64 // first block of the run in the file
	Count     uint64
	Pack      PackID // ExtentData only
	PackBlock uint64 // ExtentData only
}

// PackID indexes Tree.Packs. It means nothing outside of its Tree.
type PackID uint32

// FileID is an inode's number inside one snapshot lineage. It is kept across renames and
// never reused for another inode within the lineage.
type FileID uint64

// Tree is a whole snapshot, resolved: what the volume must look like.
type Tree struct {
	Ref    SnapshotRef
	Inodes map[FileID]*Inode
	// Names maps slash-separated paths relative to the volume's root (raw bytes in a Go
	// string, not necessarily UTF-8) to inodes. The root directory itself is "".
	Names map[string]FileID
	// Packs lists the packs that the extents refer to: paths below the shared directory.
	Packs  []PackRef
	NextID FileID // the next unused FileID

	meta treeMeta // the store's bookkeeping; zero is allowed and costs a full manifest
}

// PackRef names a pack and proves its identity.
type PackRef struct {
	Path string // below the shared directory
	Hash string // SHA-256 of the pack's footer, hex; the footer has a hash per frame
	Size int64  // bytes
}

// Freezer stops and continues every process of the database at one instant.
// Implemented outside of this package (the container's cgroup, watched by the guard).
type Freezer interface {
	// Freeze returns when no process of the database runs any more. On error everything
	// is thawed.
	Freeze(ctx context.Context) error
	// Thaw lets them continue. It returns ErrFreezeBroken if the database was not frozen
	// all the time since Freeze returned (another process thawed it): what was captured
	// in between is then not one point in time and must be thrown away.
	Thaw() error
}

// Progress reports long work. Implementations must be safe for concurrent use and cheap.
type Progress interface {
	// Set tells what is going on ("restoring"), how much is done and how much there is in
	// all, in bytes; total 0 means "not known".
	Set(phase string, done, total int64)
}

// Delta is what differs between a base tree and a captured moment.
type Delta struct {
	// Base is the snapshot that the delta applies to; its zero value means an empty tree.
	Base    SnapshotRef
	Inodes  map[FileID]*InodeDelta // new inodes and changed ones
	Removed []FileID               // inodes that have no name any more
	Names   map[string]FileID      // names added, or pointing to another inode now
	Unnamed []string               // names that are gone
	NextID  FileID
}

// InodeDelta is the new state of one inode. Meta.Extents is nil. Blocks of a regular file
// that no entry of Changed covers are as in the base tree (as far as Meta.Size reaches);
// for a new inode Changed covers everything. A block that a shorter size cuts must be covered
// unless it lost nothing but zeros: blocks are compared as padded.
type InodeDelta struct {
	Meta    Inode
	Changed []SpoolExtent // sorted by Start, without overlap
}

// SpoolExtent is a run of changed blocks. For ExtentData, block Start+i of the file is
// block SpoolBlock+i of the BlockSource.
type SpoolExtent struct {
	Kind       ExtentKind
	Start      uint64
	Count      uint64
	SpoolBlock uint64
}

// BlockSource holds the captured blocks, numbered from 0, until they have been shipped.
type BlockSource interface {
	// ReadBlocks fills buf (a multiple of BlockSize) with blocks from first on. It may be
	// called from several goroutines.
	ReadBlocks(first uint64, buf []byte) error
	// Blocks is how many there are.
	Blocks() uint64
}
