package sync

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	stdsync "sync"
	"time"

	"dbsupervisor/internal/boottime"
)

// PinWatch is what one collector remembers of the pins that it has seen: since when, on its
// own clock, each has been silent. Clocks of two machines are never compared. The zero value
// is ready; a new collector starts over and takes every pin for alive at first.
type PinWatch struct {
	mu   stdsync.Mutex
	seen map[string]pinSight
}

type pinSight struct {
	counter uint64
	since   boottime.Instant
	pin     *pin // nil: can't be read, so it counts as covering everything
}

func (s *pinSight) ttl() time.Duration {
	if s.pin == nil || s.pin.head.TTL <= 0 {
		return pinTTLMost
	}
	return min(time.Duration(s.pin.head.TTL), pinTTLMost)
}

// pinned is what living pins cover.
type pinned struct {
	pins []*pin
	all  bool
}

func (p *pinned) covers(path string) bool {
	if p.all {
		return true
	}
	for _, x := range p.pins {
		if x.paths[path] {
			return true
		}
	}
	return false
}

// livePins looks at the pins that there are now and removes those whose readers have been
// silent for longer than they promised.
func (s *Store) livePins(ctx context.Context, w *PinWatch) (*pinned, error) {
	newest, files, err := s.listPins(ctx)
	if err != nil {
		return nil, fmt.Errorf("look for pins: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen == nil {
		w.seen = map[string]pinSight{}
	}
	for nonce := range w.seen {
		if _, ok := newest[nonce]; !ok {
			delete(w.seen, nonce)
		}
	}
	out := &pinned{}
	now := s.cfg.Clock.Now()
	for nonce, counter := range newest {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		sight, known := w.seen[nonce]
		if !known || sight.counter != counter || sight.pin == nil {
			if !known || sight.counter != counter {
				sight = pinSight{counter: counter, since: now}
			}
			// It may be half written yet, or just have been replaced.
			p, err := s.readPin(ctx, nonce, counter)
			switch {
			case err == nil:
				sight.pin = p
			case ctx.Err() != nil:
				return nil, ctx.Err()
			default:
				s.log.Debug("pin can't be read, it counts as one on everything", "pin", pinPath(nonce, counter), "error", err)
			}
			w.seen[nonce] = sight
		}
		if now.Sub(sight.since) > sight.ttl() {
			s.log.Info("pin of a silent reader removed", "pin", pinPath(nonce, counter), "silent", now.Sub(sight.since).String())
			for _, path := range files[nonce] {
				if err := s.cfg.FS.Remove(s.path(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return nil, fmt.Errorf("remove silent pin: %w", err)
				}
			}
			delete(w.seen, nonce)
			continue
		}
		if sight.pin == nil || sight.pin.head.Everything {
			out.all = true
		} else {
			out.pins = append(out.pins, sight.pin)
		}
	}
	return out, nil
}

// listPins returns the newest number of each pin, and all of its files.
func (s *Store) listPins(ctx context.Context) (map[string]uint64, map[string][]string, error) {
	if err := s.touchPins(ctx); err != nil {
		return nil, nil, err
	}
	entries, err := s.cfg.FS.ReadDir(s.path(pinDir))
	if err != nil {
		return nil, nil, err
	}
	newest, files := map[string]uint64{}, map[string][]string{}
	for _, e := range entries {
		if nonce, counter, ok := parsePinName(e.Name()); ok {
			newest[nonce] = max(newest[nonce], counter)
			files[nonce] = append(files[nonce], pinDir+"/"+e.Name())
		}
	}
	return newest, files, nil
}

// touchPins changes the directory of the pins, so that an NFS client can't answer the listing
// that follows with one that it remembers.
func (s *Store) touchPins(ctx context.Context) error {
	for made := false; ; made = true {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := s.random()
		if err != nil {
			return err
		}
		path := s.path(pinDir + "/" + r + ".look")
		f, err := s.cfg.FS.Create(path)
		switch {
		case err == nil:
			return errors.Join(f.Close(), s.cfg.FS.Remove(path))
		case errors.Is(err, fs.ErrExist):
			return nil // a repeated creation: it has changed
		case errors.Is(err, fs.ErrNotExist) && !made:
			if err := s.makePins(); err != nil {
				return err
			}
		default:
			return err
		}
	}
}
