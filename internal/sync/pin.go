package sync

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

const (
	pinDir   = "pins"
	pinMagic = "DBSVPIN1"
	// pinTTL is how long a pin may be silent unless its reader asks for something else.
	pinTTL = 2 * time.Minute
	// pinTTLMost is the longest silence that a pin can ask for: a dead reader must not hold
	// a store's garbage for ever. A pin that can't be read counts for as long.
	pinTTLMost = time.Hour
)

// ErrPinLost means that a reader's pin could not be kept up, so that what it reads may have been
// deleted under it. What it has read in full and verified is good all the same; a copy made
// file by file may lack something.
var ErrPinLost = errors.New("the pin on the store was lost")

// ErrExpired means that a snapshot is not retained any more, or about to be deleted.
var ErrExpired = errors.New("the snapshot is not retained any more")

// PinRequest says what a reader wants to keep from being deleted while it reads.
type PinRequest struct {
	// Snapshots are what is read; none means everything that is retained.
	Snapshots []SnapshotRef
	// Look loads the register afresh: a new look at the share, never something remembered.
	Look func(ctx context.Context) (head SnapshotRef, cat CatalogRef, err error)
	// Owner is for people: who reads, and what for.
	Owner string
	// TTL is how long the pin counts after its reader went silent; it is renewed four times
	// in that time. 0 means two minutes.
	TTL time.Duration
}

// WithPin runs f while a pin keeps what r names from being deleted. head is the newest
// snapshot that the pin certainly covers if it covers everything. f's context ends with
// cause ErrPinLost when the pin can't be kept up.
//
// The order is what makes it safe: the pin is written first, and the register is looked at
// after that. What the register retains then can only be condemned later, and whoever
// deletes looks at the pins after the condemnation. A snapshot that is not retained at that
// second look is refused with ErrExpired.
func (s *Store) WithPin(ctx context.Context, r PinRequest, f func(ctx context.Context, head SnapshotRef) error) error {
	if r.TTL <= 0 {
		r.TTL = pinTTL
	}
	r.TTL = min(r.TTL, pinTTLMost)
	p := &pinner{s: s, r: r}
	if err := p.begin(ctx); err != nil {
		return fmt.Errorf("pin store: %w", err)
	}
	inner, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.keep(inner); err != nil {
			cancel(fmt.Errorf("%w: %w", ErrPinLost, err))
		}
	}()
	err := f(inner, p.head)
	lost := context.Cause(inner)
	cancel(context.Canceled)
	<-done
	p.release()
	if errors.Is(lost, ErrPinLost) {
		return errors.Join(fmt.Errorf("pin store: %w", lost), err)
	}
	return err
}

// pinner is a reader's side of one pin.
type pinner struct {
	s       *Store
	r       PinRequest
	nonce   string
	counter uint64
	paths   []string
	head    SnapshotRef
	since   boottime.Instant // before the newest file was written
}

func (p *pinner) begin(ctx context.Context) error {
	for _, ref := range p.r.Snapshots {
		paths, err := p.s.filesOf(ctx, ref)
		if err != nil {
			return err
		}
		p.paths = append(p.paths, paths...)
	}
	var err error
	if p.nonce, err = p.s.random(); err != nil {
		return err
	}
	if err := p.write(); err != nil {
		p.release()
		return err
	}
	if err := p.look(ctx); err != nil {
		p.release()
		return err
	}
	return nil
}

// look makes sure that what is pinned is retained, now that the pin is there.
func (p *pinner) look(ctx context.Context) error {
	head, cat, err := p.r.Look(ctx)
	if err != nil {
		return fmt.Errorf("load register: %w", err)
	}
	p.head = head
	if len(p.r.Snapshots) == 0 {
		return nil
	}
	list, err := p.s.List(ctx, head, cat)
	if err != nil {
		return err
	}
	retained := make(map[string]string, len(list))
	for _, i := range list {
		retained[i.ID] = i.Hash
	}
	for _, ref := range p.r.Snapshots {
		if h, ok := retained[ref.ID]; !ok || h != ref.Hash {
			return fmt.Errorf("%w: %s", ErrExpired, ref.ID)
		}
	}
	return nil
}

// filesOf names every file that a snapshot needs, and perhaps a few that only the snapshots
// below it need.
func (s *Store) filesOf(ctx context.Context, ref SnapshotRef) ([]string, error) {
	var out []string
	for next := ref; ; {
		m, err := s.briefManifest(ctx, next.Manifest, next.Hash)
		if err != nil {
			return nil, err
		}
		out = append(out, next.Manifest)
		for _, p := range m.change.packs {
			out = append(out, p.Path)
		}
		if m.chain == 0 {
			return out, nil
		}
		next = m.parent
	}
}

// keep renews the pin until ctx ends; an error says that it can't be relied on any more.
func (p *pinner) keep(ctx context.Context) error {
	clock := p.s.cfg.Clock
	next := p.since.Add(p.r.TTL / 4)
	for {
		if clock.WaitUntil(ctx, next) != nil {
			return nil //nolint:nilerr // the reader is done
		}
		was, old := p.since, p.counter
		err := p.write()
		now := clock.Now()
		if err != nil {
			p.since = was
			if now.Sub(was) >= p.r.TTL {
				return err
			}
			p.s.log.Warn("pin not renewed, trying again", "error", err)
			next = now.Add(p.r.TTL / 8)
			continue
		}
		next = p.since.Add(p.r.TTL / 4)
		// Nobody but us removes it while it counts. (A share that repeats our own removal
		// says the same; then looking once more does no harm.)
		gone := errors.Is(p.remove(old), fs.ErrNotExist)
		if gone || now.Sub(was) >= p.r.TTL {
			if err := p.look(ctx); err != nil {
				if ctx.Err() != nil {
					return nil //nolint:nilerr // the reader is done
				}
				return fmt.Errorf("it was silent for too long: %w", err)
			}
		}
	}
}

// write makes the pin's next file, durably.
func (p *pinner) write() error {
	p.since = p.s.cfg.Clock.Now()
	var f fsx.File
	var err error
	made := false
	for try := 0; ; try++ {
		p.counter++
		f, err = p.s.cfg.FS.Create(p.s.path(pinPath(p.nonce, p.counter)))
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrExist) && try < 3:
			continue // a repeated creation; the next number is as good
		case errors.Is(err, fs.ErrNotExist) && !made:
			made = true
			if merr := p.s.makePins(); merr != nil {
				return fmt.Errorf("create pin: %w", merr)
			}
			continue
		default:
			return fmt.Errorf("create pin: %w", err)
		}
		break
	}
	out := bufio.NewWriter(f)
	w := newRecordWriter(p.s.codec, out, pinMagic)
	w.add(chunkHeader, &pinHeader{Format: formatVersion, Nonce: p.nonce, Counter: p.counter, TTL: int64(p.r.TTL),
		Everything: len(p.r.Snapshots) == 0, Owner: p.r.Owner, Made: p.s.cfg.Clock.Wall().UnixNano()})
	for _, path := range p.paths {
		w.add(chunkPinned, path)
	}
	if _, _, err = w.end(); err == nil {
		err = out.Flush()
	}
	if err = p.s.finish(f, pinPath(p.nonce, p.counter), err); err != nil {
		return fmt.Errorf("write pin: %w", err)
	}
	return nil
}

// makePins makes the directory of the pins in a store from before there were any. Only the
// last level is made: a share that is not mounted stays an error.
func (s *Store) makePins() error {
	if err := s.cfg.FS.Mkdir(s.path(pinDir)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.cfg.FS.SyncDir(s.cfg.Dir)
}

func (p *pinner) remove(counter uint64) error {
	return p.s.cfg.FS.Remove(p.s.path(pinPath(p.nonce, counter)))
}

// release removes the pin's last file. What stays behind dies of silence.
func (p *pinner) release() {
	if err := p.remove(p.counter); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fsx.ErrCrash) {
		p.s.log.Warn("pin not removed, it ends by itself", "after", p.r.TTL.String(), "error", err)
	}
}

// pinHeader is the only record of a pin's first chunk.
type pinHeader struct {
	Format     uint64 `cbor:"1,keyasint"`
	Nonce      string `cbor:"2,keyasint"`
	Counter    uint64 `cbor:"3,keyasint"`
	TTL        int64  `cbor:"4,keyasint"` // nanoseconds
	Everything bool   `cbor:"5,keyasint"`
	Owner      string `cbor:"6,keyasint"`
	Made       int64  `cbor:"7,keyasint"` // wall clock, for people
}

func pinPath(nonce string, counter uint64) string {
	return pinDir + "/" + nonce + "-" + strconv.FormatUint(counter, 10) + ".pin"
}

// parsePinName is the inverse of pinPath, for a name inside the directory.
func parsePinName(name string) (nonce string, counter uint64, ok bool) {
	rest, ok := strings.CutSuffix(name, ".pin")
	if !ok {
		return "", 0, false
	}
	nonce, digits, ok := strings.Cut(rest, "-")
	if !ok || len(nonce) != randLen || strings.Trim(nonce, "0123456789abcdef") != "" {
		return "", 0, false
	}
	counter, ok = parseNumber(digits)
	return nonce, counter, ok && counter > 0
}

// pin is a pin's file as read.
type pin struct {
	head  pinHeader
	paths map[string]bool
}

// readPin reads a pin's file. Errors of its content are contentErrors.
func (s *Store) readPin(ctx context.Context, nonce string, counter uint64) (*pin, error) {
	b, err := fsx.ReadFile(s.cfg.FS, s.path(pinPath(nonce, counter)), maxPin)
	if err != nil {
		return nil, err
	}
	p, err := s.decodePin(ctx, b)
	if err != nil {
		return nil, err
	}
	if p.head.Nonce != nonce || p.head.Counter != counter {
		return nil, &contentError{errors.New("is another pin")}
	}
	return p, nil
}

// maxPin bounds a pin's file: a million paths, compressed.
const maxPin = 64 << 20

func (s *Store) decodePin(ctx context.Context, b []byte) (*pin, error) {
	p := &pin{paths: map[string]bool{}}
	_, _, err := s.readRecords(ctx, bytes.NewReader(b), pinMagic, func(r *recordReader, c chunk, first bool) error {
		switch {
		case first:
			return eachRecord(r, c, func(h *pinHeader) error {
				if h.Format == 0 || h.Format > formatVersion {
					return fmt.Errorf("has format %d, this program reads up to %d", h.Format, formatVersion)
				}
				if p.head.Format != 0 {
					return errors.New("has two headers")
				}
				p.head = *h
				return nil
			})
		case c.typ != chunkPinned:
			return fmt.Errorf("has a chunk of the unknown type %d", c.typ)
		}
		return eachRecord(r, c, func(path *string) error {
			if _, ok := parseName(*path); !ok {
				return errors.New("pins a file that is not the store's")
			}
			p.paths[*path] = true
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if p.head.Format == 0 {
		return nil, &contentError{errors.New("has an empty header")}
	}
	return p, nil
}
