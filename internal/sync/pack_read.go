package sync

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	stdsync "sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"dbsupervisor/internal/fsx"
)

// tailGuess is how much of a pack's end is read at first: footer and trailer of packs up to
// about 60 MiB of blocks come in one operation.
const tailGuess = 64 << 10

// packReader is an open pack whose footer has been verified.
type packReader struct {
	path string
	file fsx.File
	foot *footer
}

// openPack opens a pack and reads its footer. The caller closes file.
func (s *Store) openPack(ref PackRef) (*packReader, error) {
	if name, ok := parseName(ref.Path); !ok || name.kind != kindPack {
		return nil, fmt.Errorf("open pack: %q is not the path of one", ref.Path)
	}
	f, err := s.cfg.FS.Open(s.path(ref.Path))
	if err != nil {
		return nil, openError(ref.Path, err)
	}
	foot, err := readFooter(f, ref)
	if err != nil {
		_ = f.Close() // only read
		if isDamage(err) {
			return nil, damaged(ref.Path, "%v", err)
		}
		return nil, fmt.Errorf("read %s: %w", ref.Path, err)
	}
	return &packReader{path: ref.Path, file: f, foot: foot}, nil
}

// footerOf reads a pack's footer.
func (s *Store) footerOf(ref PackRef) (*footer, error) {
	p, err := s.openPack(ref)
	if err != nil {
		return nil, err
	}
	_ = p.file.Close() // only read
	return p.foot, nil
}

// eachFooter reads the footers of packs, several at once, and calls f, concurrently, with the
// number that the pack has in refs.
func (s *Store) eachFooter(ctx context.Context, refs []PackRef, f func(i int, foot *footer) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.openers())
	for i, ref := range refs {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			foot, err := s.footerOf(ref)
			if err != nil {
				return err
			}
			return f(i, foot)
		})
	}
	return g.Wait()
}

func readFooter(f io.ReaderAt, ref PackRef) (*footer, error) {
	if ref.Size < packHeader+footerHead+packTrailer {
		return nil, &contentError{errors.New("is too small for a pack")}
	}
	tail := make([]byte, min(ref.Size, tailGuess))
	if err := readAt(f, tail, ref.Size-int64(len(tail))); err != nil {
		return nil, err
	}
	n, err := parseTail(tail[len(tail)-packTrailer:])
	if err != nil {
		return nil, &contentError{err}
	}
	dataEnd := ref.Size - packTrailer - int64(n)
	if dataEnd < packHeader {
		return nil, &contentError{errFooter}
	}
	foot := tail[:len(tail)-packTrailer]
	if n <= len(foot) {
		foot = foot[len(foot)-n:]
	} else {
		foot = make([]byte, n)
		if err := readAt(f, foot, dataEnd); err != nil {
			return nil, err
		}
	}
	if sum := sha256.Sum256(foot); hex.EncodeToString(sum[:]) != ref.Hash {
		return nil, &contentError{errors.New("footer does not match its hash")}
	}
	ft, err := parseFooter(foot, dataEnd)
	if err != nil {
		return nil, &contentError{err}
	}
	return ft, nil
}

// readAt fills b; a file that ends before is damage.
func readAt(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return &contentError{fmt.Errorf("is truncated: ends at %d, should reach %d", off+int64(n), off+int64(len(b)))}
	}
	return err
}

// readFrame reads, verifies and expands frame i. raw must have a frame's capacity; stored is
// a buffer to reuse and is returned. data lies in the one or in the other: it is no buffer for
// the next call.
func (s *Store) readFrame(p *packReader, i int, raw, stored []byte) (data, buf []byte, err error) {
	fr := &p.foot.frames[i]
	if cap(stored) < int(fr.stored) {
		stored = make([]byte, fr.stored)
	}
	stored = stored[:fr.stored]
	if err := readAt(p.file, stored, fr.offset); err != nil {
		if isDamage(err) {
			return nil, stored, damaged(p.path, "%v", err)
		}
		return nil, stored, fmt.Errorf("read %s: %w", p.path, err)
	}
	data, err = s.expandFrame(p, i, raw, stored)
	return data, stored, err
}

// errSkipPack tells eachFrame to leave a pack out.
var errSkipPack = errors.New("skip this pack")

// frameJob is a frame to be read, and what to do with it.
type frameJob struct {
	pack  *packReader
	frame int
	wants []Want // pieces inside this frame
	done  *stdsync.WaitGroup
}

// BlockHashes returns the xxh3 of every block of every pack that the tree refers to, from
// the packs' footers: 8 bytes for each block.
func (s *Store) BlockHashes(ctx context.Context, t *Tree) (map[PackID][]uint64, error) {
	var mu stdsync.Mutex
	out := make(map[PackID][]uint64)
	err := s.EachBlockHashes(ctx, t, func(id PackID, hashes []uint64) error {
		mu.Lock()
		defer mu.Unlock()
		out[id] = hashes
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// EachBlockHashes calls f, concurrently, with the xxh3 of every block of each pack that the
// tree refers to, so that they need not be in memory all at once.
func (s *Store) EachBlockHashes(ctx context.Context, t *Tree, f func(id PackID, hashes []uint64) error) error {
	var refs []PackRef
	var ids []PackID
	for i, n := range countLive(t) {
		if n > 0 {
			refs, ids = append(refs, t.Packs[i]), append(ids, PackID(i))
		}
	}
	err := s.eachFooter(ctx, refs, func(i int, foot *footer) error { return f(ids[i], foot.hashes) })
	if err != nil {
		return fmt.Errorf("read block hashes: %w", err)
	}
	return nil
}

// openers is how many packs are open at once: opening waits for the share, not for a CPU.
func (s *Store) openers() int { return min(4*s.cfg.Workers, 16) }

// Read fetches blocks. Every frame is read and verified once; sink gets a want whole or,
// where it crosses frames, in pieces: the Want passed to it then names the piece (Block, At
// and Count; Tag is unchanged), and data is Count*BlockSize bytes, valid during the call
// only. Sink is called concurrently and in any order; its error ends the Read. When a file
// is missing or damaged, what was delivered before is good all the same.
func (s *Store) Read(ctx context.Context, t *Tree, wants []Want, sink func(w Want, data []byte) error, p Progress) error {
	return s.readFrames(ctx, t, wants, readOptions{phase: "reading", progress: p}, func(wants []Want, data []byte, first uint64) error {
		for _, w := range wants {
			from := (w.Block - first) * BlockSize
			if err := sink(w, data[from:from+w.Count*BlockSize]); err != nil {
				return err
			}
		}
		return nil
	})
}

// readOptions are what readFrames is asked for beside the blocks.
type readOptions struct {
	known    *footers // footers that have been read already; may be nil
	goOn     bool     // deliver what is good before an error says that something is missing or damaged
	phase    string
	progress Progress // may be nil
}

// readFrames is Read for a sink that takes all wants of a frame at once.
func (s *Store) readFrames(ctx context.Context, t *Tree, wants []Want, opts readOptions, sink func(wants []Want, data []byte, first uint64) error) error {
	wants = slices.Clone(wants)
	slices.SortFunc(wants, func(a, b Want) int {
		return cmp.Or(cmp.Compare(a.Pack, b.Pack), cmp.Compare(a.Block, b.Block))
	})
	var total int64
	for _, w := range wants {
		if int(w.Pack) >= len(t.Packs) || w.Count > packMaxBlocks {
			return fmt.Errorf("read blocks: %d blocks at %d of pack %d are not in snapshot %s", w.Count, w.Block, w.Pack, t.Ref.ID)
		}
		total += int64(w.Count) * BlockSize
	}
	var packs []packWants
	for i := 0; i < len(wants); {
		j := i + 1
		for j < len(wants) && wants[j].Pack == wants[i].Pack {
			j++
		}
		packs = append(packs, packWants{t.Packs[wants[i].Pack], wants[i:j]})
		i = j
	}
	var done atomic.Int64
	err := s.fetch(ctx, packs, opts, func(wants []Want, data []byte, first uint64) error {
		if err := sink(wants, data, first); err != nil {
			return err
		}
		n := int64(0)
		for _, w := range wants {
			n += int64(w.Count) * BlockSize
		}
		if n = done.Add(n); opts.progress != nil {
			opts.progress.Set(opts.phase, n, total)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read blocks: %w", err)
	}
	return nil
}

// eachFrame reads the frames that packs' wants need, in parallel, and hands each to f,
// concurrently. A pack with nil wants is read whole. opened is told of each pack, or why it
// couldn't be opened, and f gets the frames or their errors; both decide by what they return
// whether that ends everything (opened may return errSkipPack to go on with the others).
func (s *Store) eachFrame(ctx context.Context, packs func(yield func(PackRef, []Want) bool),
	opened func(ref PackRef, p *packReader, err error) error, f func(j *frameJob, data []byte, err error) error) error {
	type packJob struct {
		ref   PackRef
		wants []Want
	}
	g, ctx := errgroup.WithContext(ctx)
	todo := make(chan packJob)
	jobs := make(chan *frameJob)
	g.Go(func() error {
		defer close(todo)
		for ref, wants := range packs {
			select {
			case todo <- packJob{ref, wants}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	var openers stdsync.WaitGroup
	openers.Add(s.openers())
	for range s.openers() {
		g.Go(func() error {
			defer openers.Done()
			for pj := range todo {
				if err := ctx.Err(); err != nil {
					return err
				}
				p, err := s.openPack(pj.ref)
				if oerr := opened(pj.ref, p, err); oerr == nil {
					err = queueFrames(ctx, p, pj.wants, jobs)
				} else {
					err = oerr
				}
				if p != nil {
					_ = p.file.Close() // only read
				}
				if err != nil && !errors.Is(err, errSkipPack) {
					return err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		openers.Wait()
		close(jobs)
		return nil
	})
	for range s.cfg.Workers + 2 {
		g.Go(func() error {
			var raw, stored []byte
			for j := range jobs {
				if raw == nil {
					raw = make([]byte, 0, frameMaxBytes)
				}
				err := func() error {
					defer j.done.Done()
					if err := ctx.Err(); err != nil {
						return err
					}
					data, buf, err := s.readFrame(j.pack, j.frame, raw, stored)
					stored = buf
					return f(j, data, err)
				}()
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// queueFrames cuts the wants of a pack at its frames, queues a job for each frame and waits
// until all are done.
func queueFrames(ctx context.Context, p *packReader, wants []Want, jobs chan<- *frameJob) error {
	var done stdsync.WaitGroup
	defer done.Wait() // the file stays open until then
	send := func(j *frameJob) error {
		done.Add(1)
		select {
		case jobs <- j:
			return nil
		case <-ctx.Done():
			done.Done()
			return ctx.Err()
		}
	}
	if wants == nil {
		for i := range p.foot.frames {
			if err := send(&frameJob{pack: p, frame: i, done: &done}); err != nil {
				return err
			}
		}
		return nil
	}
	order, err := cutWants(p, wants)
	if err != nil {
		return err
	}
	for _, j := range order {
		j.done = &done
		if err := send(j); err != nil {
			return err
		}
	}
	return nil
}

// cutWants cuts the wants of a pack at its frames: a job for each frame that is needed.
func cutWants(p *packReader, wants []Want) ([]*frameJob, error) {
	byFrame := map[int]*frameJob{}
	var order []*frameJob
	blocks := uint64(len(p.foot.hashes))
	for _, w := range wants {
		if w.Count > blocks || w.Block > blocks-w.Count {
			return nil, damaged(p.path, "has %d blocks, not the %d at %d that a snapshot refers to", blocks, w.Count, w.Block)
		}
		for w.Count > 0 {
			i := p.foot.frameOf(w.Block)
			fr := &p.foot.frames[i]
			piece := w
			piece.Count = min(w.Count, fr.first+uint64(fr.blocks)-w.Block)
			j := byFrame[i]
			if j == nil {
				j = &frameJob{pack: p, frame: i}
				byFrame[i] = j
				order = append(order, j)
			}
			j.wants = append(j.wants, piece)
			w.Block, w.At, w.Count = w.Block+piece.Count, w.At+piece.Count, w.Count-piece.Count
		}
	}
	return order, nil
}
