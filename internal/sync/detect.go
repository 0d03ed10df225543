package sync

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// detector finds out which files may have changed, so that only those are read. There is
// one per tier.
type detector interface {
	// look opens a round of looking at the volume, and returns the inodes to be considered.
	// In a frozen round nothing can change any more, and it must be quick.
	look(ctx context.Context, kind roundKind, p *pending) ([]*node, round, error)
	// considered says that there was nothing to read of a file, or what has been read of it.
	considered(n *node, j *readJob)
	// links are the symbolic links to be checked in this round, by name.
	links() map[string]*node
	// expect is what a freeze would have to do as things stand, in blocks and names, and
	// whether something should be looked at again before; ok is false if that isn't known.
	expect() (blocks uint64, names int, again, ok bool)
	// census is what the last round found, as a whole.
	census() (*census, error)
}

// roundKind says what a round may do.
type roundKind int

const (
	roundSync   roundKind = iota // the database runs; begins with a syncfs
	roundLight                   // the database runs; no syncfs
	roundFrozen                  // nothing can change
)

// round is one pass over the volume.
type round interface {
	// suspect says which blocks of a file may differ from what was read when its stat was
	// prev (the zero key: never) and that reading was settled or not.
	suspect(now, prev statKey, settled bool) ([]blockRange, suspicion)
	// settled says whether a file that is read in this round, with this stat, can be
	// believed unchanged for as long as its stat stays the same.
	settled(now statKey) bool
}

// suspicion is what else there is to say of a file's blocks.
type suspicion int

const (
	onlyThose  suspicion = iota
	alsoHoles            // others may have become holes or ceased to be
	decideLate           // the next round will be able to say
)

// statDetector suspects every file whose stat has changed, as a whole.
//
// A stat can stay the same although the content changes: a second write within one tick of
// the clock, and stores into a shared mapping, which touch ctime only when they make a
// clean page dirty. Therefore every round begins with syncfs, which cleans all pages, and
// a file is settled only if its ctime is older than the beginning of that syncfs: whatever
// is stored into it later faults again and moves ctime. Files that a process still has
// mapped writable are read in every case, for file systems whose pages are never cleaned.
type statDetector struct {
	root string
	pids func() []int
	sync func(ctx context.Context) error

	since  int64         // clock of the file system's times when the last syncfs began
	offset time.Duration // wall clock minus boot clock then
}

// How close to the last syncfs a ctime makes a file unsettled: the clock that stamps files
// moves in steps of up to 10 ms. What was read in a freeze is looked at again later when
// it changed within a second, at no cost to the freeze: direct writes that were under way
// stamp the file when they begin.
const (
	racyWindow       = 20 * time.Millisecond
	racyWindowFrozen = time.Second
	clockSlack       = 10 * time.Millisecond
)

type statRound struct {
	before int64 // settled are ctimes below
	mapped map[uint64]bool
}

// hashed is the detector of the tier of that name: every round scans the volume.
type hashed struct {
	statDetector
	scan  func(ctx context.Context, tolerant bool, p *pending) (*scanned, error)
	found *scanned
}

func (d *hashed) look(ctx context.Context, kind roundKind, p *pending) ([]*node, round, error) {
	rd, err := d.begin(ctx, kind == roundFrozen)
	if err != nil {
		return nil, nil, err
	}
	if d.found, err = d.scan(ctx, kind != roundFrozen, p); err != nil {
		return nil, nil, err
	}
	return d.found.nodes, rd, nil
}

func (d *hashed) considered(*node, *readJob) {}

func (d *hashed) links() map[string]*node {
	out := map[string]*node{}
	for _, n := range d.found.nodes {
		if n.typ == TypeSymlink {
			for _, name := range n.names {
				out[name] = n
			}
		}
	}
	return out
}

func (d *hashed) expect() (uint64, int, bool, bool) { return 0, 0, false, false }

func (d *hashed) census() (*census, error) { return newCensus(d.found) }

func (d *statDetector) begin(ctx context.Context, frozen bool) (*statRound, error) {
	if !frozen || d.since == 0 {
		since, offset := coarseNow()
		if err := d.sync(ctx); err != nil {
			return nil, err
		}
		d.since, d.offset = since, offset
	}
	return d.rules(frozen)
}

// rules says what a stat is worth after the last syncfs.
func (d *statDetector) rules(frozen bool) (*statRound, error) {
	r := &statRound{}
	window := racyWindow
	if frozen {
		window = racyWindowFrozen
	}
	r.before = d.since - int64(window)
	// Had the clock been set, ctimes from before and after could not be compared.
	if _, offset := coarseNow(); (offset - d.offset).Abs() > clockSlack {
		r.before = 0
		d.since = 0
	}
	if d.pids != nil {
		m, err := mappedShared(d.pids())
		if err != nil {
			return nil, err
		}
		r.mapped = m
	}
	return r, nil
}

func (r *statRound) suspect(now, prev statKey, settled bool) ([]blockRange, suspicion) {
	if now == prev && settled && !r.mapped[now.Ino] {
		return nil, onlyThose
	}
	return wholeFile(now), onlyThose
}

func wholeFile(now statKey) []blockRange { return []blockRange{{0, blocksOf(now.Size)}} }

func (r *statRound) settled(now statKey) bool { return now.CTime < r.before && !r.mapped[now.Ino] }

// coarseNow reads the clock that stamps files, and how far it is ahead of one that nobody
// can set.
func coarseNow() (int64, time.Duration) {
	var wall, boot unix.Timespec
	// Both clocks exist on every kernel that this program runs on; the calls can't fail.
	_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &wall)
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return wall.Nano(), time.Duration(wall.Nano() - boot.Nano())
}

// mappedShared returns the inode numbers of files that the processes have mapped shared
// and writable. Devices are not compared: some file systems name them differently here,
// and a file too many costs only time.
func mappedShared(pids []int) (map[uint64]bool, error) {
	out := map[uint64]bool{}
	for _, pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/maps")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return nil, fmt.Errorf("read mappings of process %d: %w", pid, err)
		}
		sc := bufio.NewScanner(bytes.NewReader(b))
		sc.Buffer(nil, 1<<20)
		for sc.Scan() {
			// address perms offset dev inode path
			f := strings.Fields(sc.Text())
			if len(f) < 5 || len(f[1]) != 4 || f[1][1] != 'w' || f[1][3] != 's' {
				continue
			}
			if ino, err := strconv.ParseUint(f[4], 10, 64); err == nil && ino != 0 {
				out[ino] = true
			}
		}
	}
	return out, nil
}
