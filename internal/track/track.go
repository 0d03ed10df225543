// Package track tells which bytes of which files of a volume have changed, and which names,
// without reading them: programs in the kernel (eBPF, on tracepoints of ext4, XFS and the
// page cache) record the ranges that are written, inotify the names. docs/TRACKING.md says
// what is seen, what is not, and how the reader of a Tracker must go about it.
package track

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/go-hclog"
)

// ErrUnsupported is wrapped by what Supported and Open return where the kernel or the file
// system does not offer what tracking needs.
var ErrUnsupported = errors.New("change tracking is not available")

// ErrClosed is returned by the methods of a closed Tracker.
var ErrClosed = errors.New("the tracker is closed")

// Config says what to track.
type Config struct {
	// Root is the volume's directory, on ext4 or XFS.
	Root string
	// Pin is a directory on a BPF file system (usually /sys/fs/bpf, which Open mounts if it
	// is not) that keeps programs and maps over a restart of the agent. It is created. If it
	// is empty nothing survives Close.
	Pin string
	// Key identifies what is tracked: boot ID and volume ID. Programs that were pinned with
	// another key are discarded.
	Key string
	// Slots bounds the number of distinct MiB of files that can change before what changed
	// has been settled; 0 is DefaultSlots. Rounded up to a power of two. One takes 64 bytes
	// of kernel memory, and its index about as much again.
	Slots int
	Log   hclog.Logger
}

// DefaultSlots costs 8 MiB of kernel memory for slots and about as much for their index.
const DefaultSlots = 1 << 17

// Changes are what has happened since the Drain before.
type Changes struct {
	// Inodes by inode number: files of the root's file system, also some that are not below
	// the root.
	Inodes map[uint64]*Inode
	// Names are slash-separated paths relative to the root ("." is the root) that were
	// created, removed, renamed, linked, or whose mode, owner, times or extended attributes
	// were set. A write to a file does not name it; it is in Inodes. A directory that
	// appeared or was moved is named itself and must be looked at as a whole.
	Names []string
	// Lost, if not empty, says why Inodes is not complete.
	Lost string
	// NamesLost, if not empty, says why Names is not complete.
	NamesLost string
}

// Inode is what happened to the content of a file. One without any range was touched: its
// size, attributes or extents may have changed, so its size and holes must be compared.
type Inode struct {
	// Written are the ranges of write calls, by whatever interface, widened to BlockSize.
	Written []Range
	// Dirtied are the pages that became dirty in the page cache, by write calls and by
	// stores through a mapping, widened to BlockSize. Such a store may follow at any time
	// until the page has been written back; the rule for it is at Drain.
	Dirtied []Range
	// Ranged means that ranges don't tell the change: truncation, holes, ranges that moved,
	// reflinks, swapped extents. Compare the holes, or read the file.
	Ranged bool
}

// Range is a part of a file, in bytes, To exclusive.
type Range struct{ From, To int64 }

// BlockSize is the unit, in bytes, to which ranges are widened.
const BlockSize = 8 << 10

// Tracker collects changes. Its methods may be called from any goroutine.
type Tracker struct {
	cfg   Config
	log   hclog.Logger
	mount mountID
	names *names

	mu     sync.Mutex
	kernel *kernel // nil: closed
	lost   string  // what the next Drain has to say, beside what it finds
	direct []directWrites
}

// Open begins to track, or goes on where a process that ended left off: then the first Drain
// has all inodes since that process's last Settle, and only the names are lost. Otherwise
// (another Key, a file system that was unmounted since, other programs) the first Drain says
// Lost. It needs root, or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN. Close the Tracker.
func Open(cfg Config) (*Tracker, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.Slots == 0 {
		cfg.Slots = DefaultSlots
	}
	mount, err := identify(cfg.Root)
	if err != nil {
		return nil, err
	}
	t := &Tracker{cfg: cfg, log: cfg.Log, mount: mount}
	var fresh string
	t.kernel, fresh, err = openKernel(cfg, mount)
	if err != nil {
		return nil, err
	}
	t.lost = fresh
	t.names, err = watchNames(cfg.Root, cfg.Log)
	if err != nil {
		_ = t.kernel.close()
		return nil, err
	}
	if fresh != "" {
		// Pages that are dirty already raise no event when they are stored to again. From
		// here on each page has been clean once.
		if err := syncfs(cfg.Root); err != nil {
			_ = t.Close()
			return nil, err
		}
	}
	t.log.Info("change tracking runs", "root", cfg.Root, "file_system", mount.fsType,
		"taken_up", fresh == "", "reason", fresh, "programs", t.kernel.loaded())
	return t, nil
}

// Drain returns everything that happened since the last Drain and before this call. If no
// program can write the volume meanwhile (it is frozen) that is everything. Otherwise a
// change that is under way during the call is reported by this Drain or the next one, and
// once it is complete by the next one at the latest, so that copying what a Drain names,
// while the database runs, loses nothing that the frozen Drain will not name again, with two
// exceptions that the caller has to deal with:
//
//   - Dirtied. A store through a mapping may come long after its page was reported. After a
//     syncfs(2) each page has been clean since the syncfs began, and the next store to it is
//     reported anew. So: Drain, syncfs, then copy what that Drain reported as Dirtied
//     (together with what was Dirtied since the syncfs before began); what Drains after the
//     beginning of the syncfs report as Dirtied must be copied in the freeze, and again
//     after the next syncfs.
//   - Ranged. The operation may still be running. Read a byte of the file and look for a
//     hole (SEEK_HOLE) before comparing: both wait for it.
//
// After Lost all files must be read, beginning after the next syncfs.
func (t *Tracker) Drain(ctx context.Context) (*Changes, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kernel == nil {
		return nil, fmt.Errorf("drain changes: %w", ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("drain changes: %w", err)
	}
	inodes, lost, err := t.kernel.drain()
	if err != nil {
		return nil, err
	}
	t.directs(inodes)
	c := &Changes{Inodes: inodes.ranges(), Lost: first(t.lost, lost)}
	t.lost = ""
	if now, err := identify(t.cfg.Root); err != nil || now != t.mount {
		c.Lost = "the volume's file system was unmounted or mounted again"
		if err != nil {
			c.Lost += ": " + err.Error()
		}
	}
	c.Names, c.NamesLost = t.names.drain()
	return c, nil
}

// Settle says that everything drained so far has been dealt with for good (a snapshot that
// has it is committed). What is drained but not settled is reported again after a restart.
func (t *Tracker) Settle() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kernel == nil {
		return fmt.Errorf("settle changes: %w", ErrClosed)
	}
	t.kernel.settle(len(t.direct) > 0)
	return nil
}

// Close ends the reading. The kernel goes on collecting if there is a Config.Pin. It is
// idempotent.
func (t *Tracker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kernel == nil {
		return nil
	}
	err := t.kernel.close()
	t.kernel = nil
	return errors.Join(err, t.names.close())
}

// Remove ends the collecting: it closes the Tracker and takes away what is pinned.
func (t *Tracker) Remove() error {
	return errors.Join(t.Close(), Discard(t.cfg.Pin))
}

func first(reasons ...string) string {
	for _, r := range reasons {
		if r != "" {
			return r
		}
	}
	return ""
}
