package sync

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sort"
	stdsync "sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// shipRun is a run of captured blocks that goes to the packs as a whole.
type shipRun struct {
	first uint64 // in the BlockSource
	count uint64
	at    uint64 // blocks before it in this snapshot's packs
}

// shipment is what a snapshot puts into packs: runs of captured blocks, laid out one after
// the other and cut into frames and packs.
type shipment struct {
	runs  []shipRun
	total uint64 // blocks
}

// add appends a run and returns the place of its first block.
func (p *shipment) add(first, count uint64) uint64 {
	at := p.total
	if n := len(p.runs); n > 0 && p.runs[n-1].first+p.runs[n-1].count == first {
		p.runs[n-1].count += count
	} else {
		p.runs = append(p.runs, shipRun{first: first, count: count, at: at})
	}
	p.total += count
	return at
}

// read fills buf with the shipment's blocks from at on.
func (p *shipment) read(src BlockSource, at uint64, buf []byte) error {
	i := sort.Search(len(p.runs), func(i int) bool { return p.runs[i].at > at }) - 1
	for len(buf) > 0 {
		r := p.runs[i]
		skip := at - r.at
		n := min(r.count-skip, uint64(len(buf)/BlockSize))
		if err := src.ReadBlocks(r.first+skip, buf[:n*BlockSize]); err != nil {
			return fmt.Errorf("read captured blocks: %w", err)
		}
		buf, at, i = buf[n*BlockSize:], at+n, i+1
	}
	return nil
}

// packWriter is one pack in the making. Frames arrive in any order from several goroutines.
type packWriter struct {
	mu     stdsync.Mutex
	name   objectName
	file   fsx.File
	blocks uint64
	next   int64 // where the next frame goes
	noted  int   // frames whose place is known
	left   int   // frames still to be written
	footer footer
	ref    PackRef
}

// shipper writes a shipment.
type shipper struct {
	s        *Store
	ship     *shipment
	src      BlockSource
	packs    []*packWriter
	frames   uint64
	perPack  uint64 // frames in a pack
	pace     *pacer
	progress Progress
	done     atomic.Int64
	created  *createdFiles
}

// createdFiles remembers what a Write has made, to remove it if the Write fails: nothing of
// it has been offered to the register then.
type createdFiles struct {
	mu    stdsync.Mutex
	paths []string // below the share
}

func (c *createdFiles) add(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paths = append(c.paths, path)
}

// shipPacks writes the shipment's packs, durably. The memory it takes is two buffers of a
// frame for each of Workers+2 goroutines.
func (s *Store) shipPacks(ctx context.Context, ship *shipment, id objectName, r *WriteRequest, created *createdFiles) ([]PackRef, error) {
	if ship.total == 0 {
		return nil, nil
	}
	w := &shipper{s: s, ship: ship, src: r.Blocks, created: created, progress: r.Progress,
		perPack: s.cfg.packBlocks / s.cfg.frameBlocks,
		frames:  (ship.total + s.cfg.frameBlocks - 1) / s.cfg.frameBlocks,
	}
	if r.Limit > 0 {
		w.pace = &pacer{clock: s.cfg.Clock, rate: r.Limit}
	}
	w.packs = make([]*packWriter, (w.frames+w.perPack-1)/w.perPack)
	for i := range w.packs {
		name := id
		name.kind, name.n = kindPack, uint64(i)
		frames := min(w.perPack, w.frames-uint64(i)*w.perPack)
		blocks := min(s.cfg.packBlocks, ship.total-uint64(i)*s.cfg.packBlocks)
		w.packs[i] = &packWriter{name: name, blocks: blocks, next: packHeader, left: int(frames)}
	}
	// Two goroutines more than workers, so that a write to the share doesn't idle a CPU.
	var nextFrame atomic.Uint64
	g, ctx := errgroup.WithContext(ctx)
	for range min(uint64(s.cfg.Workers)+2, w.frames) {
		work := func() error {
			size := min(s.cfg.frameBlocks, ship.total) * BlockSize
			// Outside of the heap, which would keep as much again until it is collected.
			mem := newBuffers(int(packHeader + 2*size + size/64 + 1024))
			defer mem.free()
			raw, out := mem.take(int64(size)), mem.rest()[:packHeader]
			for {
				i := nextFrame.Add(1) - 1
				if i >= w.frames {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				var err error
				if out, err = w.frame(ctx, i, raw, out); err != nil {
					return err
				}
			}
		}
		if r.Gently {
			work = gently(work)
		}
		g.Go(work)
	}
	err := g.Wait()
	refs := make([]PackRef, len(w.packs))
	for i, p := range w.packs {
		refs[i] = p.ref
		if p.file != nil { // unfinished
			_ = p.file.Close() // the file is given up
		}
	}
	if err != nil {
		return nil, err
	}
	return refs, nil
}

// frame makes and writes frame i of the shipment. out has packHeader spare bytes in front;
// the returned slice is out, possibly grown.
func (w *shipper) frame(ctx context.Context, i uint64, raw, out []byte) ([]byte, error) {
	at := i * w.s.cfg.frameBlocks
	blocks := min(w.s.cfg.frameBlocks, w.ship.total-at)
	raw = raw[:blocks*BlockSize]
	if err := w.ship.read(w.src, at, raw); err != nil {
		return out, err
	}
	p := w.packs[i/w.perPack]
	inPack := i % w.perPack
	hashes := p.hashes()[inPack*w.s.cfg.frameBlocks:]
	for b := range blocks {
		hashes[b] = xxh3.Hash(raw[b*BlockSize : (b+1)*BlockSize])
	}
	full, encoding := w.s.codec.compress(out[:packHeader], raw)
	stored := full[packHeader:]
	fr := frame{stored: uint32(len(stored)), blocks: uint16(blocks), encoding: encoding, sum: sha256.Sum256(stored)}
	if err := w.pace.wait(ctx, len(stored)); err != nil {
		return out, err
	}
	file, err := p.reserve(w, &fr)
	if err != nil {
		return out, err
	}
	// The frame at the front takes the header along, and the last one the end: every
	// operation counts on a share.
	last, tail := p.put(int(inPack), fr)
	off, all := fr.offset, stored
	if fr.offset == packHeader {
		copy(full, packHead())
		off, all = 0, full
	}
	if last && fr.offset+int64(fr.stored) == p.next {
		all = append(all, tail...)
		tail = nil
	}
	if cap(all) > cap(full) {
		full = all[:packHeader] // grown: worth keeping
	}
	_, err = file.WriteAt(all, off)
	if err = p.wrote(w, err, tail); err != nil {
		return full, err
	}
	if w.progress != nil {
		w.progress.Set("shipping", w.done.Add(int64(len(raw))), int64(w.ship.total)*BlockSize)
	}
	return full, nil
}

// hashes is where the blocks' hashes go. It is made for the first frame: of a large snapshot
// all packs together have one for each block.
func (p *packWriter) hashes() []uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.footer.hashes == nil {
		p.footer = footer{frames: make([]frame, p.left), hashes: make([]uint64, p.blocks)}
	}
	return p.footer.hashes
}

// reserve finds room for a frame, and makes the file for the first.
func (p *packWriter) reserve(w *shipper, fr *frame) (fsx.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file == nil {
		f, name, err := w.s.create(p.name, w.created)
		if err != nil {
			return nil, fmt.Errorf("create pack: %w", err)
		}
		p.file, p.name = f, name
	}
	fr.offset = p.next
	p.next += int64(fr.stored)
	return p.file, nil
}

// put notes a frame that is about to be written. For the last one to be noted it returns
// the pack's end, to be written at p.next.
func (p *packWriter) put(i int, fr frame) (last bool, tail []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.footer.frames[i] = fr
	if p.noted++; p.noted < len(p.footer.frames) {
		return false, nil
	}
	foot := p.footer.encode()
	sum := sha256.Sum256(foot)
	tail = append(foot, packTail(len(foot))...)
	p.ref = PackRef{Path: p.name.path(), Hash: hex.EncodeToString(sum[:]), Size: p.next + int64(len(tail))}
	return true, tail
}

// wrote counts a frame that has been written, with err, and makes the pack durable when
// there is none left. tail is what remains to be written at the pack's end, if anything.
func (p *packWriter) wrote(w *shipper, err error, tail []byte) error {
	if err == nil && len(tail) > 0 {
		_, err = p.file.WriteAt(tail, p.next)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left--
	if err == nil && p.left > 0 {
		return nil
	}
	f := p.file
	if err == nil {
		p.file = nil
		p.footer = footer{}
		err = w.s.finish(f, p.name.path(), nil)
	}
	if err != nil {
		return fmt.Errorf("write pack: %w", err)
	}
	return nil
}

// create makes a new file of the store. Over NFS, exclusive creation may say "exists" after
// it succeeded: then another name is as good, and the empty file becomes an orphan.
func (s *Store) create(name objectName, created *createdFiles) (fsx.File, objectName, error) {
	for try := 0; ; try++ {
		path := name.path()
		f, err := s.cfg.FS.Create(s.path(path))
		switch {
		case err == nil:
			created.add(path)
			return f, name, nil
		case errors.Is(err, fs.ErrExist) && try < 3:
			if name.rand, err = s.random(); err != nil {
				return nil, name, err
			}
		case errors.Is(err, fs.ErrNotExist) && name.kind == kindPack && try < 3:
			// A copy of the store may have lost its empty directories. Only the last level is
			// made: an unmounted share stays an error.
			dir := filepath.Dir(s.path(path))
			if merr := s.cfg.FS.Mkdir(dir); merr != nil && !errors.Is(merr, fs.ErrExist) {
				return nil, name, err
			}
			if err := s.cfg.FS.SyncDir(filepath.Dir(dir)); err != nil {
				return nil, name, err
			}
		default:
			return nil, name, err
		}
	}
}

// finish makes a written file durable: its content, the errors that only closing shows, and
// its name. err is that of the writing.
func (s *Store) finish(f fsx.File, path string, err error) error {
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = s.cfg.FS.SyncDir(filepath.Dir(s.path(path)))
	}
	return err
}

// giveUp removes what a failed Write has made.
func (s *Store) giveUp(created *createdFiles, cause error) {
	if errors.Is(cause, fsx.ErrCrash) {
		return // a dead process removes nothing
	}
	for _, p := range created.paths {
		if err := s.cfg.FS.Remove(s.path(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("file of a failed snapshot left on the share", "path", p, "error", err)
		}
	}
}

// random returns the part of a name that makes it unique.
func (s *Store) random() (string, error) {
	b := make([]byte, randLen/2)
	s.randMu.Lock()
	defer s.randMu.Unlock()
	if _, err := io.ReadFull(s.cfg.Rand, b); err != nil {
		return "", fmt.Errorf("read random bytes: %w", err)
	}
	return hex.EncodeToString(b), nil
}

// pacer spreads writes over time. A nil pacer doesn't.
type pacer struct {
	clock boottime.Clock
	rate  int64 // bytes per second
	mu    stdsync.Mutex
	free  boottime.Instant // when the bytes let through so far are paid for
}

// wait blocks until n bytes may be written.
func (p *pacer) wait(ctx context.Context, n int) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	now := p.clock.Now()
	at := max(p.free, now)
	p.free = at.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	if at <= now {
		return ctx.Err()
	}
	return p.clock.WaitUntil(ctx, at)
}
