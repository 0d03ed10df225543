package sync

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sort"
	stdsync "sync"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"
)

// footers keeps the footers of packs that have been read, so that comparing and fetching
// ask for each once. It is safe for concurrent use.
type footers struct {
	mu stdsync.Mutex
	of map[PackRef]*footer
}

func newFooters() *footers { return &footers{of: map[PackRef]*footer{}} }

func (f *footers) get(ref PackRef) *footer {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.of[ref]
}

// load reads the footers of packs that are not known yet, several at once.
func (f *footers) load(ctx context.Context, s *Store, packs []PackRef) error {
	packs = slices.DeleteFunc(slices.Clone(packs), func(ref PackRef) bool { return f.get(ref) != nil })
	err := s.eachFooter(ctx, packs, func(i int, foot *footer) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.of[packs[i]] = foot
		return nil
	})
	if err != nil {
		return fmt.Errorf("read block hashes: %w", err)
	}
	return nil
}

const (
	// fetchRun is how many stored bytes are read in one call: neighbouring frames that are
	// wanted are read together.
	fetchRun = frameMaxBytes
	// fetchReaders is how many such reads are under way: enough to hide the latency of a
	// share, few enough for their buffers to be little.
	fetchReaders = 5
)

// packRun is a part of a pack that is read in one call.
type packRun struct {
	pack   *packReader
	frames []*frameJob // in the order of the file
	off    int64
	size   int
	done   *stdsync.WaitGroup
}

// readRun is a packRun in memory.
type readRun struct {
	*packRun
	buf  []byte
	left int // frames that have not been checked; guarded by fetcher.mu
}

// fetcher reads wanted blocks: some goroutines open packs and plan large reads, some read,
// and as many as there are CPUs check, expand and hand on.
type fetcher struct {
	s     *Store
	opts  readOptions
	sink  func(wants []Want, data []byte, first uint64) error
	runs  chan *packRun
	bufs  chan []byte // a fixed number of buffers, which bounds the memory
	ready chan frameOf

	mu  stdsync.Mutex
	bad error // the first file that is missing or damaged, if the rest is wanted all the same
}

// survive keeps the error of a bad file for the end where the rest is wanted.
func (f *fetcher) survive(err error) error {
	if !f.opts.goOn || !errors.Is(err, ErrMissing) && !errors.Is(err, ErrDamaged) {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bad == nil {
		f.bad = err
	}
	return nil
}

type frameOf struct {
	run *readRun
	job *frameJob
}

// packWants are the wants of one pack.
type packWants struct {
	ref   PackRef
	wants []Want
}

// fetch reads the frames that the wants need, each once, and hands each to sink with the
// wants that it holds, cut at its borders; data are its blocks, of which the first has the
// number first in its pack. Sink is called concurrently.
func (s *Store) fetch(ctx context.Context, packs []packWants, opts readOptions, sink func(wants []Want, data []byte, first uint64) error) error {
	g, ctx := errgroup.WithContext(ctx)
	f := &fetcher{s: s, opts: opts, sink: sink, runs: make(chan *packRun), ready: make(chan frameOf, 2*s.cfg.Workers)}
	f.bufs = make(chan []byte, fetchReaders+s.cfg.Workers)
	for range cap(f.bufs) {
		f.bufs <- nil // made when first used
	}
	todo := make(chan packWants)
	g.Go(func() error {
		defer close(todo)
		for _, p := range packs {
			select {
			case todo <- p:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	stage := func(n int, after func(), work func() error) {
		var all stdsync.WaitGroup
		all.Add(n)
		for range n {
			g.Go(func() error { defer all.Done(); return work() })
		}
		g.Go(func() error { all.Wait(); after(); return nil })
	}
	stage(min(s.openers(), max(len(packs), 1)), func() { close(f.runs) }, func() error {
		for p := range todo {
			if err := f.survive(f.plan(ctx, p)); err != nil {
				return err
			}
		}
		return nil
	})
	stage(fetchReaders, func() { close(f.ready) }, func() error { return f.read(ctx) })
	stage(max(s.cfg.Workers, 1), func() {}, func() error { return f.check(ctx) })
	if err := g.Wait(); err != nil {
		return err
	}
	return f.bad
}

// plan opens a pack, queues its reads and waits until they are done.
func (f *fetcher) plan(ctx context.Context, pw packWants) error {
	p, err := f.open(pw.ref)
	if err != nil {
		return err
	}
	var done stdsync.WaitGroup
	// The file stays open until nobody reads it. When everything ends early, those who read
	// it end too, but what nobody took up is never done.
	defer func() {
		finished := make(chan struct{})
		go func() { done.Wait(); close(finished) }()
		select {
		case <-finished:
		case <-ctx.Done():
		}
		_ = p.file.Close() // only read
	}()
	jobs, err := cutWants(p, pw.wants)
	if err != nil {
		return err
	}
	for _, r := range gather(p, jobs) {
		r.done = &done
		done.Add(1)
		select {
		case f.runs <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (f *fetcher) open(ref PackRef) (*packReader, error) {
	if f.opts.known != nil {
		if foot := f.opts.known.get(ref); foot != nil {
			file, err := f.s.cfg.FS.Open(f.s.path(ref.Path))
			if err != nil {
				return nil, openError(ref.Path, err)
			}
			return &packReader{path: ref.Path, file: file, foot: foot}, nil
		}
	}
	return f.s.openPack(ref)
}

// gather joins frames that lie behind each other in the file.
func gather(p *packReader, jobs []*frameJob) []*packRun {
	frames := p.foot.frames
	sort.Slice(jobs, func(i, j int) bool { return frames[jobs[i].frame].offset < frames[jobs[j].frame].offset })
	var out []*packRun
	for _, j := range jobs {
		fr := &frames[j.frame]
		if n := len(out); n > 0 {
			if r := out[n-1]; r.off+int64(r.size) == fr.offset && r.size+int(fr.stored) <= fetchRun {
				r.frames, r.size = append(r.frames, j), r.size+int(fr.stored)
				continue
			}
		}
		out = append(out, &packRun{pack: p, frames: []*frameJob{j}, off: fr.offset, size: int(fr.stored)})
	}
	return out
}

func (f *fetcher) read(ctx context.Context) error {
	for r := range f.runs {
		var buf []byte
		select {
		case buf = <-f.bufs:
		case <-ctx.Done():
			r.done.Done()
			return ctx.Err()
		}
		if cap(buf) < r.size {
			buf = make([]byte, r.size)
		}
		run := &readRun{packRun: r, buf: buf[:r.size], left: len(r.frames)}
		err := readAt(r.pack.file, run.buf, r.off)
		r.done.Done()
		if isDamage(err) {
			f.bufs <- run.buf
			if err := f.survive(damaged(r.pack.path, "%v", err)); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", r.pack.path, err)
		}
		for _, j := range r.frames {
			select {
			case f.ready <- frameOf{run, j}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

func (f *fetcher) check(ctx context.Context) error {
	var raw []byte
	for fo := range f.ready {
		if err := ctx.Err(); err != nil {
			return err
		}
		fr := &fo.run.pack.foot.frames[fo.job.frame]
		at := fr.offset - fo.run.off
		stored := fo.run.buf[at : at+int64(fr.stored)]
		if fr.encoding != encodingRaw && raw == nil {
			raw = make([]byte, 0, frameMaxBytes)
		}
		data, err := f.s.expandFrame(fo.run.pack, fo.job.frame, raw, stored)
		if err == nil {
			err = f.sink(fo.job.wants, data, fr.first)
		}
		if err := f.survive(err); err != nil {
			return err
		}
		f.mu.Lock()
		fo.run.left--
		last := fo.run.left == 0
		f.mu.Unlock()
		if last {
			f.bufs <- fo.run.buf // there is room: it came from there
		}
	}
	return nil
}

// expandFrame verifies and expands a frame that has been read. The result may lie in stored
// or in raw.
func (s *Store) expandFrame(p *packReader, i int, raw, stored []byte) ([]byte, error) {
	fr := &p.foot.frames[i]
	if sha256.Sum256(stored) != fr.sum {
		return nil, damaged(p.path, "frame %d (blocks %d to %d) does not match its hash", i, fr.first, fr.first+uint64(fr.blocks)-1)
	}
	data := stored
	if fr.encoding != encodingRaw || len(stored) != int(fr.blocks)*BlockSize {
		var err error
		if data, err = s.codec.expand(raw, stored, fr.encoding, int(fr.blocks)*BlockSize); err != nil {
			return nil, damaged(p.path, "frame %d %v", i, err)
		}
	}
	for b := range uint64(fr.blocks) {
		if xxh3.Hash(data[b*BlockSize:(b+1)*BlockSize]) != p.foot.hashes[fr.first+b] {
			return nil, damaged(p.path, "block %d does not match its hash", fr.first+b)
		}
	}
	return data, nil
}
