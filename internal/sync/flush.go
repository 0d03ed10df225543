package sync

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A syncfs of a busy volume keeps the disk to itself until hundreds of MiB are written, and
// whatever the database wants to have on disk meanwhile, its log above all, waits behind
// them. So what is known to have been written goes to the disk in small portions first, with
// room between them, and the syncfs finds little left to do.
const (
	// flushLeast is how much there must be for the trouble to be worth it.
	flushLeast = 16 << 20 / BlockSize
	// flushPortion is how much is waited for at once: some milliseconds of a slow disk.
	flushPortion = 2 << 20 / BlockSize
	// flushPause is how long the pauses may take together. The rest is written without.
	flushPause = time.Second
)

// writeOut writes blocks of files to the disk, in portions, each followed by a pause of its
// own length, and says whether there was enough to do that. It is a courtesy: a file that
// can't be opened is left to the syncfs that follows, which also finds what failed.
func (f *follower) writeOut(ctx context.Context) (bool, error) {
	dirty := touches{}
	dirty.addAll(f.todo)
	dirty.addAll(f.carry)
	if dirty.blocks() < flushLeast {
		return false, nil
	}
	root, err := os.Open(f.root)
	if err != nil {
		return false, err
	}
	defer root.Close()
	left := flushPause
	for ino, t := range dirty {
		n := f.now.byIno[ino]
		if n == nil || n.typ != TypeRegular || len(t.Blocks) == 0 {
			continue
		}
		file, err := openBelow(int(root.Fd()), n.names[0])
		if err != nil {
			continue // renamed or gone
		}
		for _, p := range portions(t.Blocks, flushPortion) {
			began := f.clock.Now()
			_ = unix.SyncFileRange(int(file.Fd()), int64(p.From)*BlockSize, int64(p.To-p.From)*BlockSize,
				unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
			pause := min(left, f.clock.Now().Sub(began))
			left -= pause
			if err = f.clock.WaitUntil(ctx, f.clock.Now().Add(pause)); err != nil {
				break
			}
		}
		_ = file.Close() // only read
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// portions covers merged ranges with ranges that hold at most so many of their blocks. What
// lies between two blocks of a portion is covered too: it is clean.
func portions(rs []blockRange, most uint64) []blockRange {
	var out []blockRange
	room := uint64(0)
	for _, r := range rs {
		for r.From < r.To {
			if room == 0 {
				out, room = append(out, r), most
			}
			n := min(r.To-r.From, room)
			r.From, room = r.From+n, room-n
			out[len(out)-1].To = r.From
		}
	}
	return out
}
