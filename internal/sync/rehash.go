package sync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// rehash goes round the volume, a little at a time, to prove that what the tracker did not
// report has not changed.
type rehash struct {
	order    []FileID // files still to be read in this round
	block    uint64   // of the first
	suspects []suspect
	sweep    []FileID // files whose stats are still to be compared in this round
}

// suspect is a block that was found to differ from the index. Whether that had been
// reported the next capture will know.
type suspect struct {
	id     FileID
	key    statKey
	name   string
	block  uint64
	reread code
}

const (
	rehashStep   = 256 << 10 / BlockSize // blocks read in one call
	mostSuspects = 1000
)

// errUnreported: a block had changed and the tracker had not said so.
var errUnreported = errors.New("a change was not reported")

// Rehash reads some bytes of the volume, going on where the last call ended, and compares
// them with the index where nothing has been reported. It does nothing unless the tier is
// "tracked", and while a capture is under way or waits to be adopted. A difference that the
// next capture can't explain is an alarm: the tracker is not believed any more, and that
// capture reads everything.
func (v *Volume) Rehash(ctx context.Context, bytes int64) error {
	if !v.op.TryLock() {
		return nil
	}
	defer v.op.Unlock()
	f := v.follow
	if f == nil || f.now == nil || v.idx == nil || v.out != nil || f.lostSince != "" || len(v.rehash.suspects) >= mostSuspects {
		return nil
	}
	root, err := os.Open(v.Path())
	if err != nil {
		return fmt.Errorf("prove the tracker: %w", err)
	}
	defer root.Close()
	v.sweepStats(int(root.Fd()))
	buf := make([]byte, rehashStep*BlockSize)
	for bytes > 0 && ctx.Err() == nil {
		n, x := v.nextRehash()
		if n == nil {
			return nil // there is nothing to read
		}
		read, err := v.rehashFile(ctx, root, n, x, buf, bytes)
		if err != nil {
			return fmt.Errorf("prove the tracker: %w", err)
		}
		bytes -= max(read, BlockSize) // looking at nothing isn't free either
	}
	return ctx.Err()
}

// sweepStep is how many files' stats are compared in one call.
const sweepStep = 256

// sweepStats compares what stat says of some files, in turn, with what is known, and has the
// next capture look at the names of those that differ. There is one thing that changes a time
// and is reported by nothing: an operation that XFS refuses after it has moved mtime.
func (v *Volume) sweepStats(root int) {
	f, r := v.follow, &v.rehash
	for range sweepStep {
		if len(r.sweep) == 0 {
			for id, n := range f.now.byID {
				if n.typ == TypeRegular {
					r.sweep = append(r.sweep, id)
				}
			}
			if len(r.sweep) == 0 {
				return
			}
			inOrder(r.sweep)
		}
		n := f.now.byID[r.sweep[0]]
		if r.sweep = r.sweep[1:]; n != nil {
			for _, name := range n.names {
				var st unix.Statx_t
				err := unix.Statx(root, name, unix.AT_SYMLINK_NOFOLLOW, statMask, &st)
				if err != nil || keyOf(&st) != n.key {
					f.names[name] = true
				}
			}
		}
		if len(r.sweep) == 0 {
			return
		}
	}
}

// nextRehash is the file to go on with.
func (v *Volume) nextRehash() (*node, *indexed) {
	r := &v.rehash
	for again := false; ; again = true {
		for ; len(r.order) > 0; r.order, r.block = r.order[1:], 0 {
			n, x := v.follow.now.byID[r.order[0]], v.idx.files[r.order[0]]
			if n != nil && x != nil && n.typ == TypeRegular && x.key.Ino == n.key.Ino && x.key.Birth == n.key.Birth && r.block < uint64(len(x.codes)) {
				return n, x
			}
		}
		if again {
			return nil, nil
		}
		for id, x := range v.idx.files {
			if len(x.codes) > 0 {
				r.order = append(r.order, id)
			}
		}
		inOrder(r.order)
	}
}

// rehashFile reads on in a file and returns how many bytes that was.
func (v *Volume) rehashFile(ctx context.Context, root *os.File, n *node, x *indexed, buf []byte, most int64) (int64, error) {
	r := &v.rehash
	f, err := openBelow(int(root.Fd()), n.names[0])
	var st unix.Stat_t
	if err == nil {
		defer f.Close()
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil || st.Ino != n.key.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG {
		r.block = uint64(len(x.codes)) // it is elsewhere by now
		return 0, nil
	}
	t := v.follow.since[n.key.Ino]
	var read, checked int64
	for read < most && r.block < uint64(len(x.codes)) && ctx.Err() == nil {
		if t != nil && (t.Ranged || t.Again) {
			r.block = uint64(len(x.codes))
			break
		}
		count := min(uint64(rehashStep), uint64(len(x.codes))-r.block)
		chunk := buf[:count*BlockSize]
		got, err := readUncached(f, chunk, int64(r.block)*BlockSize)
		if err != nil {
			return read, err
		}
		clear(chunk[got:])
		read += int64(len(chunk))
		for i := range count {
			b := r.block + i
			if t != nil && hasBlock(t.Blocks, b) {
				continue // about to be read again
			}
			checked++
			c := blockCode(chunk[i*BlockSize : (i+1)*BlockSize])
			if c == x.codes[b] || c.kind() != ExtentData && x.codes[b].kind() != ExtentData || len(r.suspects) >= mostSuspects {
				continue
			}
			r.suspects = append(r.suspects, suspect{id: r.order[0], key: n.key, name: n.names[0], block: b, reread: c})
		}
		r.block += count
	}
	v.count(func(t *TrackStats) { t.RehashedBytes += read; t.RehashChecked += checked })
	return read, nil
}

// readUncached reads without leaving in the page cache what was not there, where the kernel
// can.
func readUncached(f *os.File, buf []byte, off int64) (int, error) {
	const dontCache = 0x80 // RWF_DONTCACHE, Linux 6.14
	n, err := unix.Preadv2(int(f.Fd()), [][]byte{buf}, off, dontCache)
	if err == nil && n == len(buf) {
		return n, nil
	}
	n, err = f.ReadAt(buf, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// explainSuspects returns errUnreported if a block that was found changed has not been
// reported. It is called when all reports of the time before a freeze are in.
func (v *Volume) explainSuspects() error {
	f := v.follow
	if f == nil || f.lostSince != "" {
		v.rehash.suspects = nil // everything has been looked at
		return nil
	}
	var bad []suspect
	for _, s := range v.rehash.suspects {
		t, n := f.since[s.key.Ino], f.now.byIno[s.key.Ino]
		switch {
		case n == nil || n.id != s.id:
		case t != nil && (t.Ranged || t.Again || hasBlock(t.Blocks, s.block)):
		case s.block >= blocksOf(n.key.Size):
		case v.wasRead(s):
		default:
			bad = append(bad, s)
		}
	}
	v.rehash.suspects = nil
	if len(bad) == 0 {
		return nil
	}
	s := bad[0]
	return fmt.Errorf("%w: %d blocks, the first is block %d of %q", errUnreported, len(bad), s.block, s.name)
}

// wasRead says whether the capture has read a block for another reason.
func (v *Volume) wasRead(s suspect) bool {
	w := v.pend.work[s.id]
	if w == nil {
		return false
	}
	c, _ := w.at(s.block)
	return c == s.reread
}

// alarm gives the tracker up: from here on the volume is read, all of it once.
func (v *Volume) alarm(err error) {
	text := fmt.Sprintf("%v; everything has been read again, and until the agent is restarted change is found by reading", err)
	v.log.Error("the tracker is not to be believed", "error", err)
	v.count(func(t *TrackStats) { t.Alarms++; t.Alarm = text })
	v.distrust = "the tracker was found wrong: " + err.Error()
	v.stopFollowing()
	v.dropPending()
	for _, x := range v.idx.files {
		x.settled = false
	}
	v.idx.logged = 0
	if err := v.dropIndex(); err != nil {
		v.log.Error("can't remove the index; don't restart the agent before the next snapshot", "error", err)
	}
}
