package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/fsx"
)

const (
	clusterFile   = "cluster"
	registerDir   = "register"
	backendFile   = "file"
	keepRecords   = 64      // the newest records that Prune leaves
	maxRecordSize = 1 << 20 // bytes; a larger record is damage
	maxLoadTries  = 8       // a record can vanish between the listing and the opening
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
// file register/<id>/<n>, and a compare-and-swap is the exclusive creation of the next
// number with link(2). Safe for concurrent use; nothing to close.
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
	file    fsx.Content  // ... the file that it was read from or written to
	made    bool         // ... it was made by this handle
	spent   []string     // temporary names of swaps that counted, for Prune to remove
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
	var last error
	for range maxLoadTries {
		if err := ctx.Err(); err != nil {
			return Record{}, err
		}
		versions, _, err := r.list()
		if err != nil {
			return Record{}, err
		}
		newest := versions[len(versions)-1]
		if rec, file := r.knownRecord(); rec.Version == newest {
			// It was looked at when its number was new, and is still the same file.
			if id, err := r.fs.Identify(r.path(newest)); err == nil && id.Content == file {
				return rec, nil
			}
		}
		rec, file, err := r.readFile(newest)
		if err == nil && newest > 1 {
			// A listing takes time. Had it missed more records than are kept, what it shows
			// as the newest would be a stray one, whose predecessor is gone
			// (docs/MODEL.md, NO_LOAD_PRED).
			_, err = r.fs.Stat(r.path(newest - 1))
		}
		if err == nil {
			r.learn(rec, file, false)
			return rec.Clone(), nil
		}
		// We slept between listing and opening, and the record was pruned meanwhile:
		// never walk up from it, list again.
		if !errors.Is(err, fs.ErrNotExist) {
			return Record{}, err
		}
		last = err
	}
	return Record{}, last
}

// knownRecord is the newest record that is certainly a true one, and the file that holds it.
func (r *FileRegister) knownRecord() (Record, fsx.Content) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known.Clone(), r.file
}

// learn keeps a record that was loaded or (made) swapped in.
func (r *FileRegister) learn(rec Record, file fsx.Content, made bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.made = made
	if file != (fsx.Content{}) {
		r.known, r.file = rec.Clone(), file
	}
}

// Record returns one record by its version: fs.ErrNotExist if it is gone or not there yet.
// It proves nothing about which record is the newest.
func (r *FileRegister) Record(ctx context.Context, version uint64) (Record, error) {
	return inBackground(ctx, r.workers, func() (Record, error) { return r.read(version) })
}

// list returns the versions in the register's directory, ascending and never empty, and the
// names of temporary files. Opening the directory anew makes an NFS client ask the server
// whether it changed, which a look-up of a single name may not.
func (r *FileRegister) list() (versions []uint64, temps []string, err error) {
	entries, err := r.fs.ReadDir(r.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("list records: %w", err)
	}
	for _, e := range entries {
		if v, ok := parseVersion(e.Name()); ok {
			versions = append(versions, v)
		} else if _, ok := tempVersion(e.Name()); ok {
			temps = append(temps, e.Name())
		}
	}
	if len(versions) == 0 {
		return nil, nil, fmt.Errorf("list records: %s holds none: %w", r.dir, ErrCorrupt)
	}
	slices.Sort(versions)
	return versions, temps, nil
}

func (r *FileRegister) path(version uint64) string {
	return filepath.Join(r.dir, strconv.FormatUint(version, 10))
}

func (r *FileRegister) read(version uint64) (Record, error) {
	rec, _, err := r.readFile(version)
	return rec, err
}

// readFile also says which file it was.
func (r *FileRegister) readFile(version uint64) (Record, fsx.Content, error) {
	fail := func(err error) (Record, fsx.Content, error) {
		return Record{}, fsx.Content{}, fmt.Errorf("read record %d: %w", version, err)
	}
	f, err := r.fs.Open(r.path(version))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	b, err := fsx.ReadAll(f, maxRecordSize)
	if err != nil {
		return fail(err)
	}
	rec, err := decodeRecord(b)
	if err != nil {
		return fail(err)
	}
	if rec.Version != version {
		return fail(fmt.Errorf("it says version %d: %w", rec.Version, ErrCorrupt))
	}
	if rec.ClusterID != r.id.ClusterID {
		return fail(fmt.Errorf("it has cluster id %s: %w", rec.ClusterID, ErrWrongCluster))
	}
	return rec, fsx.ContentOf(st), nil
}

func encodeRecord(rec Record) ([]byte, error) {
	b, err := json.MarshalIndent(rec, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	b = append(b, '\n')
	if len(b) > maxRecordSize {
		return nil, fmt.Errorf("encode record: larger than %d bytes", maxRecordSize)
	}
	return b, nil
}

// decodeRecord is strict: a compare-and-swap writes the whole record anew, so a field that
// this program does not know would be lost.
func decodeRecord(b []byte) (Record, error) {
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return Record{}, fmt.Errorf("decode record: %w: %w", ErrCorrupt, err)
	}
	if head.Format != RecordFormat {
		return Record{}, fmt.Errorf("decode record: format %d, this program knows %d (upgrade it): %w", head.Format, RecordFormat, ErrCorrupt)
	}
	var rec Record
	if err := unmarshalStrict(b, &rec); err != nil {
		return Record{}, fmt.Errorf("decode record: %w: %w", ErrCorrupt, err)
	}
	if rec.Version == 0 || rec.Nonce == "" || rec.ClusterID == "" || rec.TTL <= 0 {
		return Record{}, fmt.Errorf("decode record: version, nonce, cluster id or ttl is missing: %w", ErrCorrupt)
	}
	return rec, nil
}

func unmarshalStrict(b []byte, v any) error {
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("data after the end")
	}
	return nil
}

// parseVersion accepts exactly what path writes: decimal, positive, without leading zeros.
func parseVersion(name string) (uint64, bool) {
	v, err := strconv.ParseUint(name, 10, 64)
	if err != nil || v == 0 || strconv.FormatUint(v, 10) != name {
		return 0, false
	}
	return v, true
}

// A temporary file's name tells the version that it was meant for, so that the holder can
// remove what crashed writers left without asking any clock.
func tempName(version uint64, nonce string) string { return fmt.Sprintf(".%d-%s.tmp", version, nonce) }

func tempVersion(name string) (uint64, bool) {
	rest, ok := strings.CutPrefix(name, ".")
	if !ok || !strings.HasSuffix(rest, ".tmp") {
		return 0, false
	}
	num, _, ok := strings.Cut(rest, "-")
	if !ok {
		return 0, false
	}
	return parseVersion(num)
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
