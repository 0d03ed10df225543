package lease

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/fsx"
)

const (
	clusterFile   = "cluster"
	registerDir   = "register"
	backendFile   = "file"
	keepRecords   = 64      // the newest records that Prune leaves
	maxRecordSize = 1 << 20 // bytes; a larger file is damage
	maxLoadTries  = 64      // a directory can change while it is listed
)

// FileConfig describes a register in a shared directory.
type FileConfig struct {
	FS    fsx.FS
	Share string // the cluster's directory on the shared file system; must exist
	// ClusterID is the cluster that is expected there; "" accepts what the file `cluster` says.
	ClusterID string
	// SeenFile is this instance's memory off the share, the same as Config.SeenFile. With
	// it OpenFile refuses another cluster and InitFile refuses to make a second one.
	SeenFile string
	Log      hclog.Logger
	Rand     io.Reader // nonces and ids, 16 bytes each; crypto/rand.Reader
	// OpWorkers bounds how many file operations may hang at once. Default 8.
	OpWorkers int
}

// FileRegister is the Register that needs nothing but a shared directory: record n is the
// symbolic link register/<id>/<n>, whose target is the record, and a compare-and-swap is the
// exclusive creation of the next number. Safe for concurrent use; nothing to close.
type FileRegister struct {
	fs      fsx.FS
	share   string
	dir     string // of the records
	id      clusterInfo
	log     hclog.Logger
	ids     *idSource
	workers workers

	mu      sync.Mutex
	cluster fsx.Identity // of the file `cluster` when it was last read and found to be ours
	known   Record       // the newest record that is certainly a true one; Version 0: none
	file    fsx.Identity // ... the file that holds it
}

var _ Register = (*FileRegister)(nil)

// OpenFile opens the register that the file `cluster` in the share names. It returns
// ErrNotInitialised if there is none (most likely the share is not mounted) and
// ErrWrongCluster if it is not the expected one.
func OpenFile(ctx context.Context, cfg FileConfig) (*FileRegister, error) {
	r := newFileRegister(cfg)
	info, err := inBackground(ctx, r.workers, func() (clusterInfo, error) { return r.readCluster() })
	if err != nil {
		return nil, fmt.Errorf("open register in %s: %w", cfg.Share, err)
	}
	if cfg.ClusterID != "" && info.ClusterID != cfg.ClusterID {
		return nil, fmt.Errorf("open register in %s: it has cluster id %s, expected %s: %w", cfg.Share, info.ClusterID, cfg.ClusterID, ErrWrongCluster)
	}
	if cfg.SeenFile != "" {
		seen, err := readSeen(cfg.FS, cfg.SeenFile)
		if err != nil {
			return nil, fmt.Errorf("open register in %s: %w", cfg.Share, err)
		}
		if err := seen.checkCluster(info.ClusterID, info.FSID); err != nil {
			return nil, fmt.Errorf("open register in %s (this instance remembers another in %s): %w", cfg.Share, cfg.SeenFile, err)
		}
	}
	r.use(info)
	return r, nil
}

func newFileRegister(cfg FileConfig) *FileRegister {
	if cfg.OpWorkers <= 0 {
		cfg.OpWorkers = 8
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	return &FileRegister{
		fs:      cfg.FS,
		share:   cfg.Share,
		log:     cfg.Log,
		ids:     &idSource{r: cfg.Rand},
		workers: newWorkers(cfg.OpWorkers),
	}
}

func (r *FileRegister) use(info clusterInfo) {
	r.id = info
	r.dir = filepath.Join(r.share, filepath.FromSlash(info.Address))
}

// ClusterID is the cluster that the register belongs to.
func (r *FileRegister) ClusterID() string { return r.id.ClusterID }

// FSID is the random id that the share got when it was initialised. It does not depend on
// how or where the share is mounted.
func (r *FileRegister) FSID() string { return r.id.FSID }

// Describe implements Register.
func (r *FileRegister) Describe() string { return "file " + r.share }

// Load implements Register: the highest number in a fresh listing.
func (r *FileRegister) Load(ctx context.Context) (Record, error) {
	rec, err := inBackground(ctx, r.workers, func() (Record, error) { return r.load(ctx) })
	if err != nil {
		return Record{}, fmt.Errorf("load register: %w", err)
	}
	return rec, nil
}

func (r *FileRegister) load(ctx context.Context) (Record, error) {
	if err := r.checkCluster(); err != nil {
		return Record{}, err
	}
	rec, _, err := r.newest(ctx)
	return rec, err
}

// newest returns the record with the highest number in a fresh listing, and the file that has it.
//
// A listing takes time. One that lasts while more records are made than are kept could show, as
// its highest, a number that was freed and taken again: by a sleeper's stray, or by a request
// that was executed a second time. So a listing is believed only if nothing that it should have
// shown can have been removed before it ended: the record that was known before is still the same
// file (records are removed in ascending order), or, where none is known or it is gone, nothing
// at all has changed in the directory (docs/MODEL.md, NO_LOAD_ANCHOR).
func (r *FileRegister) newest(ctx context.Context) (Record, fsx.Identity, error) {
	known, file := r.knownRecord()
	last := fmt.Errorf("the directory %s changes faster than it can be listed", r.dir)
	for range maxLoadTries {
		if err := ctx.Err(); err != nil {
			return Record{}, fsx.Identity{}, err
		}
		var before fsx.Identity
		if known.Version == 0 {
			var err error
			if before, err = r.fs.Identify(r.dir); err != nil {
				return Record{}, fsx.Identity{}, err
			}
		}
		versions, err := r.list()
		if err != nil {
			return Record{}, fsx.Identity{}, err
		}
		newest := versions[len(versions)-1]
		if newest == known.Version {
			if r.is(newest, file) {
				return known, file, nil
			}
			known = Record{}
			continue
		}
		rec, id, err := r.readRecord(newest)
		if errors.Is(err, fs.ErrNotExist) {
			// We slept between listing and reading, and the record was pruned meanwhile:
			// never walk up from it, list again.
			last = err
			continue
		}
		if err != nil {
			return Record{}, fsx.Identity{}, err
		}
		if known.Version == 0 {
			after, err := r.fs.Identify(r.dir)
			if err != nil {
				return Record{}, fsx.Identity{}, err
			}
			if after != before {
				continue
			}
		} else if newest < known.Version || !r.is(known.Version, file) {
			known = Record{}
			continue
		}
		r.learn(rec, id)
		return rec, id, nil
	}
	return Record{}, fsx.Identity{}, last
}

// is says whether a record's name has this very file. The directory was opened just before, so a
// name that it knows is one that was there then, or is looked up now.
func (r *FileRegister) is(version uint64, file fsx.Identity) bool {
	id, err := r.fs.Glance(r.path(version))
	return err == nil && id == file
}

// knownRecord is the newest record that is certainly a true one, and the file that holds it.
func (r *FileRegister) knownRecord() (Record, fsx.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known.Clone(), r.file
}

// learn keeps a record that was loaded or swapped in.
func (r *FileRegister) learn(rec Record, file fsx.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known, r.file = rec.Clone(), file
}

// Record returns one record by its version: fs.ErrNotExist if it is gone or not there yet.
// It proves nothing about which record is the newest.
func (r *FileRegister) Record(ctx context.Context, version uint64) (Record, error) {
	return inBackground(ctx, r.workers, func() (Record, error) { return r.read(version) })
}

// list returns the versions in the register's directory, ascending and never empty. Opening the
// directory anew makes an NFS client ask the server whether it changed, which a look-up of a
// single name may not.
func (r *FileRegister) list() ([]uint64, error) {
	entries, err := r.fs.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var versions []uint64
	for _, e := range entries {
		if v, ok := parseVersion(e.Name()); ok {
			versions = append(versions, v)
		}
	}
	if len(versions) == 0 {
		return nil, fmt.Errorf("list records: %s holds none: %w", r.dir, ErrCorrupt)
	}
	slices.Sort(versions)
	return versions, nil
}

func (r *FileRegister) path(version uint64) string {
	return filepath.Join(r.dir, strconv.FormatUint(version, 10))
}

func (r *FileRegister) read(version uint64) (Record, error) {
	rec, _, err := r.readRecord(version)
	return rec, err
}

// readRecord also says which file it was. What that file's name had before the target was read
// is meant: if it is another one by then, the file is not found again.
func (r *FileRegister) readRecord(version uint64) (Record, fsx.Identity, error) {
	fail := func(err error) (Record, fsx.Identity, error) {
		return Record{}, fsx.Identity{}, fmt.Errorf("read record %d: %w", version, err)
	}
	id, err := r.fs.Glance(r.path(version))
	if err != nil {
		return fail(err)
	}
	target, err := r.fs.Readlink(r.path(version))
	if errors.Is(err, syscall.EINVAL) {
		return fail(fmt.Errorf("%s is no symbolic link: %w", r.path(version), ErrCorrupt))
	}
	if err != nil {
		return fail(err)
	}
	rec, err := decodeRecord(target)
	if err != nil {
		return fail(err)
	}
	if rec.Version != version {
		return fail(fmt.Errorf("it says version %d: %w", rec.Version, ErrCorrupt))
	}
	if rec.ClusterID != r.id.ClusterID {
		return fail(fmt.Errorf("it has cluster id %s: %w", rec.ClusterID, ErrWrongCluster))
	}
	return rec, id, nil
}

// parseVersion accepts exactly what path writes: decimal, positive, without leading zeros.
func parseVersion(name string) (uint64, bool) {
	v, err := strconv.ParseUint(name, 10, 64)
	if err != nil || v == 0 || strconv.FormatUint(v, 10) != name {
		return 0, false
	}
	return v, true
}

// idSource hands out random names; the reader below need not be safe for concurrent use.
type idSource struct {
	mu sync.Mutex
	r  io.Reader
}

func (s *idSource) next() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b [16]byte
	if _, err := io.ReadFull(s.r, b[:]); err != nil {
		return "", fmt.Errorf("read random id: %w", err)
	}
	return fmt.Sprintf("%x", b), nil
}
