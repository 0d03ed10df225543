package sync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	stdsync "sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// readJob is one file to be read.
type readJob struct {
	n       *node
	w       *work
	cut     uint64
	ranges  []blockRange
	holes   bool // blocks elsewhere may have become holes, or ceased to be
	settled bool
	// What was known before, for a file that turns out to be elsewhere.
	prev        statKey
	prevSettled bool

	left   atomic.Int64 // pieces that are not done
	missed atomic.Bool  // it was gone, or another file had its name
}

// whole says whether all of the file is read, in which case its holes are asked for first.
func (j *readJob) whole() bool {
	return len(j.ranges) == 1 && j.ranges[0].From == 0 && j.ranges[0].To >= blocksOf(j.n.key.Size)
}

func (j *readJob) blocks() uint64 { return countBlocks(j.ranges) }

// How much of a file one worker reads at once: of a whole file, and of scattered ranges.
const (
	pieceBlocks  = 32 << 20 / BlockSize
	scatterPiece = 2 << 20 / BlockSize
)

// pieces cuts the job into what one worker does at once.
func (j *readJob) pieces() [][]blockRange {
	most := uint64(pieceBlocks)
	if !j.whole() {
		most = scatterPiece
	}
	var out [][]blockRange
	var piece []blockRange
	left := most
	for _, br := range j.ranges {
		for at := br.From; at < br.To; {
			n := min(left, br.To-at)
			piece = append(piece, blockRange{at, at + n})
			if at, left = at+n, left-n; left == 0 {
				out, piece, left = append(out, piece), nil, most
			}
		}
	}
	if len(piece) > 0 || len(out) == 0 { // an empty file is done at once
		out = append(out, piece)
	}
	return out
}

// reader reads files and spools the blocks that the baseline doesn't have.
type reader struct {
	fs       fsx.FS
	root     *os.File
	spool    *spool
	tolerant bool // files may vanish: the database is running
	gently   bool // it has a better claim to the processors
	progress Progress
	handles  *handles // files that stay open for later rounds; may be nil
	bytes    atomic.Int64
	// hold keeps what is read in memory, up to that many bytes, until settle: in a freeze
	// nothing is hashed, compared or written that could be after it.
	hold  int64
	arena *arena // where that is kept as long as there is room; may be nil

	mu    stdsync.Mutex // guards the rest
	held  []heldBlocks
	holds int64 // bytes of held
}

// heldBlocks are blocks that have been read and not looked at.
type heldBlocks struct {
	j     *readJob
	first uint64
	data  []byte
}

// readTask is what one worker does at once.
type readTask struct {
	j     *readJob
	piece []blockRange
	holes bool
}

// run reads. Workers take one task after another: most are so small that a goroutine for
// each would cost as much as the reading.
func (r *reader) run(ctx context.Context, jobs []*readJob, workers int) error {
	var total int64
	tasks := make([]readTask, 0, len(jobs))
	for _, j := range jobs {
		total += int64(j.blocks()) * BlockSize
		pieces := j.pieces()
		if j.holes && !j.whole() {
			pieces = append(pieces, nil) // for the holes
		}
		j.left.Store(int64(len(pieces)))
		for i, piece := range pieces {
			tasks = append(tasks, readTask{j, piece, j.holes && i == len(pieces)-1})
		}
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(max(workers, 1), len(tasks)) {
		work := func() error {
			for {
				i := next.Add(1) - 1
				if i >= int64(len(tasks)) {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := r.task(ctx, tasks[i], total); err != nil {
					return err
				}
			}
		}
		if r.gently {
			work = gently(work)
		}
		g.Go(work)
	}
	err := g.Wait()
	for _, j := range jobs {
		j.recall()
	}
	return err
}

func (r *reader) task(ctx context.Context, t readTask, total int64) error {
	if err := r.piece(ctx, t.j, t.piece, t.holes); err != nil {
		return err
	}
	if r.progress != nil {
		r.progress.Set("copying", r.bytes.Load(), total)
	}
	if t.j.left.Add(-1) == 0 && !t.j.missed.Load() {
		t.j.w.key, t.j.w.settled = t.j.n.key, t.j.settled
	}
	return nil
}

// recall takes a job back that was not finished. What is known of a file of which only
// ranges were to be read stays: they are read another time.
func (j *readJob) recall() {
	if j.w.key == (statKey{}) && !j.whole() {
		j.w.key, j.w.settled = j.prev, j.prevSettled
	}
}

// done says that everything that was to be read has been.
func (j *readJob) done() bool { return j.left.Load() == 0 && !j.missed.Load() }

func (r *reader) piece(ctx context.Context, j *readJob, piece []blockRange, holes bool) error {
	name := j.n.names[0]
	if err := r.fs.At("capture-read", name); err != nil {
		return err
	}
	if len(piece) == 0 && !holes {
		return nil
	}
	f, err := r.open(j.n)
	if err != nil {
		if r.tolerant {
			j.missed.Store(true)
			return nil
		}
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%w: %q vanished while it was captured", ErrFreezeBroken, name)
		}
		return fmt.Errorf("read %q: %w", name, err)
	}
	defer r.handles.put(j.n.key.Ino, f)
	sink := r.sink(j)
	if r.tolerant && (holes || j.whole()) {
		// An operation on ranges may be under way that was reported when it began. On XFS a
		// read waits for it, asking for holes does not; on ext4 it is the other way round.
		_, _ = f.ReadAt(make([]byte, 1), 0) // that there is nothing to read is seen below
	}
	switch {
	case holes && !j.whole():
		return r.holes(ctx, f, j, sink)
	case !j.whole():
		if r.arena != nil {
			if piece, err = r.readHeld(ctx, f, j, piece); err != nil || len(piece) == 0 {
				return err
			}
		}
		return readScattered(ctx, f, j.n.key.Size, j.n.alloc, piece, r.hold == 0, sink)
	}
	for _, br := range piece {
		if err := readBlocks(ctx, f, j.n.key.Size, j.n.alloc, br.From, br.To, sink); err != nil {
			return err
		}
	}
	return nil
}

// open opens a job's file, or takes the one that is open already.
func (r *reader) open(n *node) (rawFile, error) {
	if f, ok := r.handles.get(n.key.Ino); ok {
		return f, nil
	}
	f, err := openRaw(int(r.root.Fd()), n.names[0])
	if err != nil {
		return f, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(f.fd, &st); err == nil && (st.Ino != n.key.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG) {
		err = unix.ENOENT // another file by now
	}
	if err != nil {
		f.close()
	}
	return f, err
}

// readHeld reads blocks into the arena, without looking at more of them than whether they
// are zero. It returns what there was no room for.
func (r *reader) readHeld(ctx context.Context, f rawFile, j *readJob, ranges []blockRange) ([]blockRange, error) {
	size := j.n.key.Size
	sink := func(first uint64, codes []code, data []byte) error {
		if data == nil {
			return r.keep(j, first, codes, nil)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.holds += int64(len(data))
		r.held = append(r.held, heldBlocks{j, first, data})
		return nil
	}
	for i, br := range ranges {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		chunk := r.arena.take(int64(br.To-br.From) * BlockSize)
		if chunk == nil {
			return ranges[i:], nil
		}
		k := 0
		if off := int64(br.From) * BlockSize; off < size {
			var err error
			k, err = f.ReadAt(chunk[:min(int64(len(chunk)), size-off)], off)
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, fmt.Errorf("read %s: %w", f.Name(), err)
			}
		}
		clear(chunk[k:])
		r.bytes.Add(int64(len(chunk)))
		if err := sinkScattered(f, size, j.n.alloc, br.From, chunk, make([]code, br.To-br.From), false, sink); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// sink takes blocks that were read.
func (r *reader) sink(j *readJob) blockSink {
	return func(first uint64, codes []code, data []byte) error {
		r.bytes.Add(int64(len(data)))
		if r.hold > 0 && !j.whole() && data != nil && r.keepLater(j, first, data) {
			return nil
		}
		for i := range codes {
			if data != nil && codes[i] == codeUnknown {
				codes[i] = blockCode(data[i*BlockSize : (i+1)*BlockSize])
			}
		}
		return r.keep(j, first, codes, data)
	}
}

// holes compares where the file has data with what is known, and reads only what has data
// where none is known.
func (r *reader) holes(ctx context.Context, f blockFile, j *readJob, sink blockSink) error {
	var news []blockRange
	err := mapBlocks(ctx, f, j.n.key.Size, j.n.alloc, func(first uint64, codes []code, data bool) error {
		j.w.mu.Lock()
		defer j.w.mu.Unlock()
		for i, c := range codes {
			b := first + uint64(i)
			have, _ := j.w.at(b)
			switch {
			case data && have != codeUnknown && have.kind() == ExtentData, !data && have == c:
			case data:
				if k := len(news) - 1; k >= 0 && news[k].To == b {
					news[k].To++
				} else {
					news = append(news, blockRange{b, b + 1})
				}
			default:
				j.w.put(b, c, 0, b+1 == j.cut)
			}
		}
		return nil
	})
	if err != nil || len(news) == 0 {
		return err
	}
	return readScattered(ctx, f, j.n.key.Size, j.n.alloc, news, true, sink)
}

// keepLater takes a copy of blocks none of which is zero, if there is room.
func (r *reader) keepLater(j *readJob, first uint64, data []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hold-r.holds < int64(len(data)) {
		return false
	}
	r.holds += int64(len(data))
	r.held = append(r.held, heldBlocks{j, first, append([]byte(nil), data...)})
	return true
}

// settle hashes and spools what was held.
func (r *reader) settle(ctx context.Context) (err error) {
	defer func() {
		for _, h := range r.held {
			if err != nil {
				h.j.w.key = statKey{} // has to be read again
			}
		}
		r.held = nil
	}()
	var codes []code
	for i, h := range r.held {
		if err := ctx.Err(); err != nil {
			return err
		}
		codes = codes[:0]
		for at := 0; at < len(h.data); at += BlockSize {
			codes = append(codes, blockCode(h.data[at:at+BlockSize]))
		}
		if err := r.keep(h.j, h.first, codes, h.data); err != nil {
			return err
		}
		r.held[i].data = nil
	}
	return nil
}

// keep notes codes and spools the blocks that neither the baseline nor the spool has.
func (r *reader) keep(j *readJob, first uint64, codes []code, data []byte) error {
	w := j.w
	w.mu.Lock()
	defer w.mu.Unlock()
	wanted := func(i int) bool {
		b := first + uint64(i)
		c := codes[i]
		if c.kind() != ExtentData || w.same(b, c) && b+1 != j.cut {
			return false
		}
		have, slot := w.at(b)
		return slot == 0 || have != c
	}
	slotAt := func(i int) uint32 {
		_, slot := w.at(first + uint64(i))
		return slot
	}
	for i := 0; i < len(codes); {
		b := first + uint64(i)
		if !wanted(i) {
			if have, _, ok := w.over.get(b); !ok || have != codes[i] {
				w.put(b, codes[i], 0, b+1 == j.cut) // the slot has something else
			}
			i++
			continue
		}
		// A run of blocks that go to slots in a row, old ones or new.
		slot := slotAt(i)
		end := i + 1
		for end < len(codes) && wanted(end) {
			next := slotAt(end)
			if slot == 0 && next != 0 || slot != 0 && next != slot+uint32(end-i) {
				break
			}
			end++
		}
		n := uint64(end - i)
		if slot == 0 {
			at, err := r.spool.alloc(n)
			if err != nil {
				return err
			}
			if at+n >= math.MaxUint32 {
				return errors.New("too many changed blocks for one spool")
			}
			slot = uint32(at) + 1
		}
		for k := range n {
			w.over.put(b+k, codeUnknown, slot+uint32(k)) // until it has been written
		}
		if err := r.spool.write(uint64(slot-1), data[i*BlockSize:end*BlockSize]); err != nil {
			return err
		}
		for k := range n {
			w.over.put(b+k, codes[i+int(k)], slot+uint32(k))
		}
		i = end
	}
	return nil
}
