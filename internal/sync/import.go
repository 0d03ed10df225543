package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ImportStats counts what Import copied.
type ImportStats struct {
	Files   int
	Bytes   int64    // of data, cloned or copied
	Cloned  int      // files that share their blocks with the source (reflinks)
	Skipped []string // sockets, fifos and devices
}

// Import copies an existing data directory, which no database may be using, into an empty
// volume, with everything that a snapshot keeps. The volume is live then, without a base:
// load the zero Baseline and capture it to make the first snapshot. Where the file system
// can, the files are cloned instead of copied. After an error the volume is "applying";
// Import can be called again.
//
// It returns ErrEscapes, ErrNoRoom and ErrPhase.
func (v *Volume) Import(ctx context.Context, dir string, p Progress) (ImportStats, error) {
	v.op.Lock()
	defer v.op.Unlock()
	st, err := v.importDir(ctx, dir, p)
	if err != nil {
		return st, fmt.Errorf("import %s: %w", dir, noRoom(err))
	}
	return st, nil
}

func (v *Volume) importDir(ctx context.Context, dir string, p Progress) (ImportStats, error) {
	var stats ImportStats
	if ph := v.State().Phase; ph != PhaseEmpty && ph != PhaseApplying {
		return stats, fmt.Errorf("%w: it is %s; set it aside first", ErrPhase, ph)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return stats, err
	}
	for _, d := range []struct{ in, out string }{{dir, v.cfg.Dir}, {v.cfg.Dir, dir}} {
		if rel, err := filepath.Rel(d.out, d.in); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
			return stats, fmt.Errorf("the directory and the instance's own %s contain one another", v.cfg.Dir)
		}
	}
	if ph := v.State().Phase; ph == PhaseEmpty {
		if empty, err := dirEmpty(v.Path()); err != nil || !empty {
			return stats, errors.Join(err, fmt.Errorf("%w: %s has files that nothing is known about: set them aside first", ErrNotEmpty, v.Path()))
		}
	}
	v.dropWork()
	src, err := scan(ctx, dir, scanConfig{})
	if err != nil {
		return stats, err
	}
	views := viewsOf(dir, nil)
	for name, n := range src.names {
		if n.typ == TypeSymlink {
			if err := checkLink(dir, name, n.meta.Target, views); err != nil {
				return stats, err
			}
		}
	}
	stats.Skipped = src.skipped
	a := &applier{fs: v.fs, root: v.Path(), stage: v.stageDir(), tree: treeOf(src), workers: v.cfg.Workers, progress: p, verb: "copying", forget: true}
	if err := v.markApplying(); err != nil {
		return stats, err
	}
	// What an interrupted attempt left is not worth comparing.
	if err := v.clear(); err != nil {
		return stats, err
	}
	if err := a.plan(ctx); err != nil {
		return stats, err
	}
	if err := a.applyNames(ctx); err != nil {
		return stats, err
	}
	var cloned, files, bytes atomic.Int64
	for _, n := range src.nodes {
		if n.typ == TypeRegular {
			a.total += n.alloc
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		return stats, err
	}
	defer root.Close()
	// All files are looked at, also those without blocks: plan found nothing to fetch.
	err = a.eachFile(ctx, func(ctx context.Context, t *target) error {
		n, ok, err := v.importFile(ctx, a, root, src.names[t.names[0]], t)
		files.Add(1)
		bytes.Add(n)
		if ok {
			cloned.Add(1)
		}
		if err != nil {
			return fmt.Errorf("copy %q: %w", t.names[0], err)
		}
		return nil
	})
	stats.Files, stats.Bytes, stats.Cloned = int(files.Load()), bytes.Load(), int(cloned.Load())
	if err != nil {
		return stats, err
	}
	if err := a.link(ctx); err != nil {
		return stats, err
	}
	if err := a.applyMeta(ctx); err != nil {
		return stats, err
	}
	if err := v.SyncFS(ctx); err != nil {
		return stats, err
	}
	return stats, v.setState(func(st *VolumeState) { st.Phase, st.Base, st.LiveTerm = PhaseLive, SnapshotRef{}, 0 })
}

// importFile copies one file's content and says how much and whether it could be cloned.
func (v *Volume) importFile(ctx context.Context, a *applier, root *os.File, n *node, t *target) (int64, bool, error) {
	src, err := openBelow(int(root.Fd()), n.names[0])
	if err != nil {
		return 0, false, err
	}
	defer src.Close()
	dst, err := a.openFile(t)
	if err != nil {
		return 0, false, err
	}
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return n.alloc, true, closeWritten(dst, nil)
	}
	var done int64
	err = dst.Truncate(t.in.Size)
	if err == nil {
		left := int64(0) // of the room that was asked for
		err = readBlocks(ctx, src, t.in.Size, n.alloc, 0, blocksOf(t.in.Size), func(first uint64, codes []code, data []byte) error {
			for i := 0; i < len(codes); {
				end := i + 1
				for end < len(codes) && codes[end].kind() == codes[i].kind() {
					end++
				}
				e := Extent{Kind: codes[i].kind(), Start: first + uint64(i), Count: uint64(end - i)}
				if size := int64(e.Count) * BlockSize; e.Kind != ExtentHole {
					if left -= size; left < 0 {
						left = max(size, 64<<20)
						if err := v.room(left); err != nil {
							return err
						}
					}
				}
				if e.Kind == ExtentData {
					chunk := data[i*BlockSize : end*BlockSize]
					done += int64(len(chunk))
					if err := a.write(t, dst, e.Start, chunk, nil); err != nil {
						return err
					}
				} else if err := a.makeZero(t, dst, e); err != nil {
					return err
				}
				i = end
			}
			return nil
		})
	}
	return done, false, closeWritten(dst, err)
}

// treeOf makes a tree of a directory, in which files have no blocks yet.
func treeOf(src *scanned) *Tree {
	t := emptyTree()
	for _, n := range src.nodes {
		in := metaOf(n.meta)
		if n.typ == TypeRegular && in.Size > 0 {
			// The content is copied from the source; to the plan it is all holes.
			in.Extents = []Extent{{Kind: ExtentHole, Count: blocksOf(in.Size)}}
		}
		t.Inodes[t.NextID] = in
		for _, name := range n.names {
			t.Names[name] = t.NextID
		}
		t.NextID++
	}
	return t
}

// clear empties the volume.
func (v *Volume) clear() error {
	es, err := os.ReadDir(v.Path())
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := os.RemoveAll(filepath.Join(v.Path(), e.Name())); err != nil {
			return err
		}
	}
	return os.RemoveAll(v.stageDir())
}
