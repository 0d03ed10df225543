package supervisor

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"dbsupervisor/internal/api"
)

// events is the instance's history: one JSON line per transition, on the local disk. It is
// for people; nothing is decided by it, so a line lost in a crash does no harm.
type events struct {
	path string
	mu   sync.Mutex
}

// The history file is cut to its newer half when it has grown beyond maxEventBytes.
const maxEventBytes = 2 << 20

func newEvents(dir string) *events { return &events{path: filepath.Join(dir, "history.jsonl")} }

// add appends an entry.
func (e *events) add(ev api.Event) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	line, err := json.Marshal(ev)
	if err != nil {
		return fmt.Errorf("encode history entry: %w", err)
	}
	if fi, err := os.Stat(e.path); err == nil && fi.Size() > maxEventBytes {
		if err := e.cut(); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(e.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	_, err = f.Write(append(line, '\n'))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write history: %w", err)
	}
	return nil
}

// cut keeps the newer half.
func (e *events) cut() error {
	evs, err := readEvents(e.path)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, ev := range evs[len(evs)/2:] {
		if err := enc.Encode(ev); err != nil {
			return fmt.Errorf("encode history entry: %w", err)
		}
	}
	if err := os.WriteFile(e.path+".tmp", b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("write history: %w", err)
	}
	return os.Rename(e.path+".tmp", e.path)
}

// last returns the newest n entries (all for n <= 0), oldest first.
func (e *events) last(n int) ([]api.Event, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	evs, err := readEvents(e.path)
	if n > 0 && len(evs) > n {
		evs = evs[len(evs)-n:]
	}
	return evs, err
}

func readEvents(path string) ([]api.Event, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	defer f.Close()
	var evs []api.Event
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		var ev api.Event
		// A line cut short by a crash is skipped.
		if json.Unmarshal(sc.Bytes(), &ev) == nil {
			evs = append(evs, ev)
		}
	}
	if err := sc.Err(); err != nil {
		return evs, fmt.Errorf("read history: %w", err)
	}
	return evs, nil
}
