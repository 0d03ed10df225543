package sync

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// formatVersion is what this program writes, and the newest that it reads.
const formatVersion = 1

// refRecord names a snapshot inside a file. The manifest's path follows from the ID.
type refRecord struct {
	_      struct{} `cbor:",toarray"`
	Term   uint64
	Seq    uint64
	Rand   string
	Frozen int64
	Hash   []byte
}

// manifestHeader is the only record of a manifest's first chunk.
type manifestHeader struct {
	Format       uint64     `cbor:"1,keyasint"`
	Snapshot     refRecord  `cbor:"2,keyasint"` // without hash
	Parent       *refRecord `cbor:"3,keyasint,omitempty"`
	Writer       string     `cbor:"4,keyasint"`
	Chain        uint64     `cbor:"5,keyasint"` // 0: full; else this many deltas on top of a full one
	NextID       uint64     `cbor:"6,keyasint"`
	LogicalSize  int64      `cbor:"7,keyasint"`
	Files        int64      `cbor:"8,keyasint"`
	Names        int64      `cbor:"9,keyasint"`
	ChangedBytes int64      `cbor:"10,keyasint"`
	StoredBytes  int64      `cbor:"11,keyasint"`
}

type packRecord struct {
	_    struct{} `cbor:",toarray"`
	Path string
	Hash []byte
	Size int64
}

type inodeRecord struct {
	ID      uint64      `cbor:"1,keyasint"`
	Type    uint8       `cbor:"2,keyasint"`
	Mode    uint32      `cbor:"3,keyasint"`
	UID     uint32      `cbor:"4,keyasint"`
	GID     uint32      `cbor:"5,keyasint"`
	MTime   int64       `cbor:"6,keyasint"`
	Size    int64       `cbor:"7,keyasint,omitempty"`
	Target  []byte      `cbor:"8,keyasint,omitempty"`
	XAttrs  [][2][]byte `cbor:"9,keyasint,omitempty"`
	Extents []byte      `cbor:"10,keyasint,omitempty"`
}

// extentsRecord continues the extents of an inode that came before.
type extentsRecord struct {
	_       struct{} `cbor:",toarray"`
	ID      uint64
	Extents []byte
}

type nameRecord struct {
	_    struct{} `cbor:",toarray"`
	Path []byte
	ID   uint64
}

// inodeChange is the new state of an inode: what a manifest says about it. In a full
// manifest the extents are all there are, in a delta those that changed.
type inodeChange struct {
	meta    Inode // Extents nil
	extents []Extent
}

// treeChange is a manifest's content: how to get from the parent's tree (or from nothing)
// to the snapshot's. Extents refer to packs by their index in packs.
type treeChange struct {
	packs   []PackRef
	inodes  map[FileID]*inodeChange
	removed []FileID
	names   map[string]FileID
	unnamed []string
	nextID  FileID
}

// manifest is a manifest file as read.
type manifest struct {
	info    SnapshotInfo
	parent  SnapshotRef // zero: none
	chain   int
	names   int64
	size    int64    // of the file
	dropped []string // packs that the parent's tree refers to and this one doesn't
	change  treeChange
}

// treeMeta is what the store knows of a tree besides its content.
type treeMeta struct {
	known      bool
	chain      int
	fullBytes  int64    // size of the full manifest at the chain's bottom
	deltaBytes int64    // sizes of the deltas above it
	live       []uint64 // blocks that the tree refers to, per pack
}

func toRefRecord(r SnapshotRef) (refRecord, error) {
	name, ok := parseName(r.Manifest)
	if !ok || name.kind != kindManifest || name.id() != r.ID || name.term != r.Term || name.seq != r.Seq {
		return refRecord{}, fmt.Errorf("name snapshot: %q is not the manifest of snapshot %q", r.Manifest, r.ID)
	}
	h, err := hex.DecodeString(r.Hash)
	if err != nil || len(h) != 32 {
		return refRecord{}, fmt.Errorf("name snapshot: %q has no proper hash", r.ID)
	}
	return refRecord{Term: r.Term, Seq: r.Seq, Rand: name.rand, Frozen: r.Frozen.UnixNano(), Hash: h}, nil
}

func (r *refRecord) ref() (SnapshotRef, error) {
	o := objectName{kind: kindManifest, term: r.Term, seq: r.Seq, rand: r.Rand}
	if len(r.Rand) != randLen {
		return SnapshotRef{}, errors.New("names a snapshot wrongly")
	}
	path := o.path()
	if _, ok := parseName(path); !ok {
		return SnapshotRef{}, errors.New("names a snapshot wrongly")
	}
	return SnapshotRef{ID: o.id(), Manifest: path, Hash: hex.EncodeToString(r.Hash),
		Term: r.Term, Seq: r.Seq, Frozen: time.Unix(0, r.Frozen).UTC()}, nil
}

func toPackRecord(p PackRef) (packRecord, error) {
	h, err := hex.DecodeString(p.Hash)
	if err != nil {
		return packRecord{}, fmt.Errorf("name pack %s: %w", p.Path, err)
	}
	return packRecord{Path: p.Path, Hash: h, Size: p.Size}, nil
}

func (r *packRecord) ref() (PackRef, error) {
	if name, ok := parseName(r.Path); !ok || name.kind != kindPack || len(r.Hash) != 32 ||
		r.Size < packHeader+packTrailer {
		return PackRef{}, errors.New("names a pack wrongly")
	}
	return PackRef{Path: r.Path, Hash: hex.EncodeToString(r.Hash), Size: r.Size}, nil
}

// checkPath says what is wrong with the name of a file below the volume.
func checkPath(p string) error {
	if len(p) > maxPathLen {
		return errors.New("path is too long")
	}
	if p == "" {
		return nil // the root
	}
	start := 0
	for i := 0; i <= len(p); i++ {
		if i < len(p) && p[i] == 0 {
			return errors.New("path has a zero byte")
		}
		if i < len(p) && p[i] != '/' {
			continue
		}
		switch p[start:i] {
		case "", ".", "..":
			return fmt.Errorf("path %q is not plain", p)
		}
		start = i + 1
	}
	return nil
}

// checkInode says what is wrong with an inode's metadata.
func checkInode(m *Inode) error {
	switch {
	case m.Type != TypeRegular && m.Type != TypeDir && m.Type != TypeSymlink:
		return fmt.Errorf("unknown file type %d", m.Type)
	case m.Mode > 0o7777:
		return fmt.Errorf("mode %o is more than permission bits", m.Mode)
	case m.Size < 0:
		return errors.New("size is negative")
	case (len(m.Target) > 0) != (m.Type == TypeSymlink) || len(m.Target) > maxPathLen:
		return errors.New("target does not fit the file type")
	}
	for k := range m.XAttrs {
		if k == "" {
			return errors.New("extended attribute without a name")
		}
	}
	return nil
}
