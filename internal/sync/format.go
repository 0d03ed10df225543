package sync

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
)

// The store's directories below the share.
const (
	packDir     = "packs"
	manifestDir = "manifests"
	catalogDir  = "catalogs"
)

// Limits of the format. Readers refuse what exceeds them before they allocate for it.
const (
	frameMaxBlocks = 512               // 4 MiB of blocks in a frame
	packMaxBlocks  = 64 * 512          // 256 MiB of blocks in a pack
	maxChain       = 64                // delta manifests above a full one
	maxRecordFile  = int64(1) << 30    // bytes of a manifest or catalog
	maxChunk       = 8 << 20           // bytes of a chunk, stored or not
	maxRecords     = 1 << 16           // records in a chunk
	maxTotal       = uint64(64) << 30  // bytes of all chunks of a file, decoded
	maxFileBlocks  = uint64(1) << 50   // blocks of a file (8 EiB and a bit)
	maxPathLen     = 64 << 10          // bytes of a path below the volume
	maxNameNumber  = uint64(1)<<63 - 1 // term and sequence in names
)

// Errors of a store, wrapped in an *ObjectError that names the file.
var (
	// ErrMissing: a file that a snapshot needs is not there.
	ErrMissing = errors.New("missing from the store")
	// ErrDamaged: a file is not what was written.
	ErrDamaged = errors.New("damaged in the store")
	// ErrCondemned: a file that is needed is about to be deleted.
	ErrCondemned = errors.New("condemned in the store")
	// ErrBadDelta: a delta contradicts itself or its base. Nothing has been written.
	ErrBadDelta = errors.New("delta does not fit its base")
)

// ObjectError says which file of the store is bad, and how. It wraps ErrMissing, ErrDamaged
// or ErrCondemned.
type ObjectError struct {
	Path string // below the share
	What string // what is wrong
	Kind error
}

// Error implements error.
func (e *ObjectError) Error() string {
	if e.What == "" {
		return fmt.Sprintf("%s: %v", e.Path, e.Kind)
	}
	return fmt.Sprintf("%s: %v: %s", e.Path, e.Kind, e.What)
}

// Unwrap implements errors.Unwrap.
func (e *ObjectError) Unwrap() error { return e.Kind }

func damaged(path, format string, args ...any) error {
	return &ObjectError{Path: path, What: fmt.Sprintf(format, args...), Kind: ErrDamaged}
}

// openError turns the error of an open into ErrMissing where it means that.
func openError(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &ObjectError{Path: path, Kind: ErrMissing}
	}
	return fmt.Errorf("open %s: %w", path, err)
}

// objectKind tells the store's files apart.
type objectKind uint8

const (
	kindPack objectKind = iota + 1
	kindManifest
	kindCatalog
)

// objectName is the parsed name of one of the store's files. Names are never reused: each
// has a random part, so the same term and sequence may occur in several.
type objectName struct {
	kind objectKind
	term uint64
	seq  uint64
	rand string // 16 hex digits
	n    uint64 // packs only: number of the pack inside its snapshot
}

const randLen = 16 // hex digits

func (o objectName) id() string {
	return strconv.FormatUint(o.term, 10) + "-" + strconv.FormatUint(o.seq, 10) + "-" + o.rand
}

// path is the file's path below the share.
func (o objectName) path() string {
	switch o.kind {
	case kindManifest:
		return manifestDir + "/" + o.id() + ".manifest"
	case kindCatalog:
		return catalogDir + "/" + o.id() + ".catalog"
	default:
		return fmt.Sprintf("%s/%02x/%s-%d.pack", packDir, o.shard(), o.id(), o.n)
	}
}

// shard spreads packs over directories, since NFS holds a directory's lock across creates.
func (o objectName) shard() byte {
	b, _ := hex.DecodeString(o.rand[:2]) // checked when the name was made or parsed
	return b[0] + byte(o.n)
}

// parseName is the inverse of path. It accepts nothing but what path makes, so that a path
// taken from a file can never lead out of the store.
func parseName(path string) (objectName, bool) {
	var o objectName
	var rest string
	dir, base, ok := strings.Cut(path, "/")
	if !ok {
		return o, false
	}
	switch dir {
	case packDir:
		o.kind = kindPack
		if _, base, ok = strings.Cut(base, "/"); !ok {
			return o, false
		}
		rest, ok = strings.CutSuffix(base, ".pack")
	case manifestDir:
		o.kind = kindManifest
		rest, ok = strings.CutSuffix(base, ".manifest")
	case catalogDir:
		o.kind = kindCatalog
		rest, ok = strings.CutSuffix(base, ".catalog")
	default:
		return o, false
	}
	if !ok {
		return o, false
	}
	parts := strings.Split(rest, "-")
	if o.kind == kindPack {
		if len(parts) != 4 {
			return o, false
		}
		if o.n, ok = parseNumber(parts[3]); !ok {
			return o, false
		}
		parts = parts[:3]
	}
	if len(parts) != 3 {
		return o, false
	}
	if o.term, ok = parseNumber(parts[0]); !ok {
		return o, false
	}
	if o.seq, ok = parseNumber(parts[1]); !ok {
		return o, false
	}
	o.rand = parts[2]
	if len(o.rand) != randLen {
		return o, false
	}
	for _, c := range []byte(o.rand) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return o, false
		}
	}
	return o, o.path() == path
}

func parseNumber(s string) (uint64, bool) {
	v, err := strconv.ParseUint(s, 10, 64)
	return v, err == nil && v <= maxNameNumber && strconv.FormatUint(v, 10) == s
}

// blocksOf is how many blocks a file of this size has.
func blocksOf(size int64) uint64 {
	return (uint64(size) + BlockSize - 1) / BlockSize
}
