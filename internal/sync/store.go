package sync

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"runtime"
	stdsync "sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// StoreConfig says where a store is and what it may use.
type StoreConfig struct {
	FS  fsx.FS // default: the real file system
	Dir string // the cluster's directory on the share; must exist
	Log hclog.Logger
	// Rand makes names unique. Default crypto/rand.
	Rand io.Reader
	// Workers is how many frames are compressed or checked at once. Default: CPUs.
	Workers int
	// Clock paces a throttled Write. Default: the machine's clock.
	Clock boottime.Clock

	packBlocks  uint64 // blocks per pack; tests make it small
	frameBlocks uint64 // blocks per frame; tests make it small
	maxChain    int    // delta manifests in a row
	maxFile     int64  // bytes of a manifest or catalog that are read at most
}

// Store keeps snapshots in a directory of the share as immutable files: packs of blocks,
// manifests that say how to build a tree from them, and catalogs that say what is retained
// and what is condemned. docs/STORE.md specifies the format.
//
// A Store never decides what is committed; the register does. It holds no state of its own
// but a few immutable records that it wrote or read lately, and is safe for concurrent use. Its methods check their context between operations on the
// share, so one that hangs in the kernel (a hard NFS mount) hangs the method.
type Store struct {
	cfg    StoreConfig
	log    hclog.Logger
	codec  *codec
	randMu stdsync.Mutex // guards cfg.Rand
	recent recentFiles
}

// OpenStore returns a store in a directory that Init has prepared at some time. It touches
// nothing and doesn't even look.
func OpenStore(cfg StoreConfig) (*Store, error) {
	if cfg.Dir == "" || !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("open store: directory %q is not an absolute path", cfg.Dir)
	}
	if cfg.FS == nil {
		cfg.FS = fsx.OS{}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if cfg.Workers <= 0 {
		cfg.Workers = runtime.NumCPU()
	}
	if cfg.Clock == nil {
		cfg.Clock = boottime.Real{}
	}
	if cfg.packBlocks == 0 {
		cfg.packBlocks = packMaxBlocks
	}
	if cfg.frameBlocks == 0 {
		cfg.frameBlocks = frameMaxBlocks
	}
	if cfg.maxChain == 0 {
		cfg.maxChain = maxChain
	}
	if cfg.maxFile == 0 {
		cfg.maxFile = maxRecordFile
	}
	// The extra two keep CPUs busy while others wait for the share.
	c, err := newCodec(cfg.Workers + 2)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return &Store{cfg: cfg, log: cfg.Log, codec: c}, nil
}

// Init makes the store's directories, durably. The share's directory itself must exist: an
// unmounted share must not look like an empty store. It is idempotent.
func (s *Store) Init(ctx context.Context) error {
	mkdir := func(rel string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		// A retried mkdir over NFS may say "exists" after it succeeded; both are fine.
		if err := s.cfg.FS.Mkdir(s.path(rel)); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("initialise store: %w", err)
		}
		return nil
	}
	for _, d := range []string{packDir, manifestDir, catalogDir, pinDir} {
		if err := mkdir(d); err != nil {
			return err
		}
	}
	for i := range 256 {
		if err := mkdir(fmt.Sprintf("%s/%02x", packDir, i)); err != nil {
			return err
		}
	}
	for _, d := range []string{s.path(packDir), s.cfg.Dir} {
		if err := s.cfg.FS.SyncDir(d); err != nil {
			return fmt.Errorf("initialise store: %w", err)
		}
	}
	return nil
}

// path turns a path below the share into an absolute one.
func (s *Store) path(rel string) string { return filepath.Join(s.cfg.Dir, rel) }

// WriteRequest describes a snapshot to be written.
type WriteRequest struct {
	// Base is the tree of the current head, which becomes the parent; nil means that there
	// is none, and the snapshot stands alone. It is not changed.
	Base   *Tree
	Delta  *Delta
	Blocks BlockSource // may be nil if Delta has no data
	Term   uint64
	Seq    uint64    // the head's plus one
	Frozen time.Time // wall clock, for people
	Writer string    // the instance, for people
	// Moves are blocks that compaction has brought together; nil: none. They cost the
	// snapshot only room in the manifest. Before the commit the tree must pass
	// CheckNotCondemned.
	Moves *Moves
	// Limit is the most bytes per second that are written to packs; 0 means no limit.
	Limit int64
	// Gently leaves the processors to others as far as they want them: the database runs.
	Gently   bool
	Progress Progress // may be nil
}

// WriteStats is what a Write cost.
type WriteStats struct {
	Blocks        uint64 // blocks of data shipped
	ChangedBytes  int64  // Blocks in bytes
	StoredBytes   int64  // bytes of the packs
	ManifestBytes int64
	Packs         int
	Full          bool // a full manifest, not a delta
	Moved         bool // the tree refers to what WriteRequest.Moves brought
}

// RollbackRequest describes a new snapshot with the content of an older one.
type RollbackRequest struct {
	Head    SnapshotRef // the current head: the parent
	Catalog CatalogRef  // the committed catalog; its condemned packs can't be used again
	Target  *Tree       // what the volume shall look like
	Term    uint64
	Seq     uint64 // the head's plus one
	Frozen  time.Time
	Writer  string
}

// Want asks for blocks of a pack.
type Want struct {
	Pack  PackID
	Block uint64 // first block in the pack
	Count uint64
	// At is the caller's own number for Block, for instance the block of the file that it
	// belongs to. It advances with Block when a want is delivered in pieces.
	At  uint64
	Tag any // the caller's; the same for every piece
}

// CatalogRef names a catalog. Its zero value means that there is none yet.
type CatalogRef struct {
	Name string // path below the share
	Hash string // SHA-256 of the file, hex
}

// SnapshotInfo is what a list shows of a snapshot.
type SnapshotInfo struct {
	SnapshotRef
	Writer       string
	LogicalSize  int64  // bytes of all regular files
	ChangedBytes int64  // bytes of the blocks that it added
	StoredBytes  int64  // bytes of the packs that it added
	Files        int64  // inodes
	Parent       string // ID; "" for the first
	Full         bool   // has a full manifest
}

// Policy says how long snapshots are retained, counted back from the newest one: every
// snapshot for All, the first of each hour for Hourly, the first of each day for Daily.
type Policy struct{ All, Hourly, Daily time.Duration }

// Summary is what a Condemn decided.
type Summary struct {
	Retained  int // snapshots
	Manifests int // condemned names, by kind
	Packs     int
	Catalogs  int
	// New counts those of them that the previous catalog did not condemn; old catalogs are
	// left out, there is always one.
	New int
	// Unknown counts files in the store's directories with names that no store makes. They
	// are left alone.
	Unknown int
	// Unchanged says that no catalog was written because there was nothing to decide: the
	// returned reference is the one passed in.
	Unchanged bool
}

// SweepStats is what a Sweep did.
type SweepStats struct {
	Removed int
	Gone    int // had been removed before
	Pinned  int // left because a reader's pin covers them
	Early   int // left because they have not been condemned for long enough
}
