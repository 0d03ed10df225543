package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"dbsupervisor/internal/fsx"
)

const seenFormat = 1

// seenEvery is how many renewals may pass before the memory is written again. Anything but
// a plain renewal is written at once.
const seenEvery = 16

// seenState is the instance's memory off the share: which register it belongs to and the
// highest record it has seen there. A register that is behind it was restored from a backup
// or is a replica.
type seenState struct {
	Format    int    `json:"format"`
	ClusterID string `json:"cluster_id"`
	FSID      string `json:"fs_id,omitempty"`
	Version   uint64 `json:"version"` // 0: initialised here, nothing seen yet
	Term      uint64 `json:"term"`
	Nonce     string `json:"nonce,omitempty"`
}

// readSeen returns nil without an error if there is no memory.
func readSeen(fsys fsx.FS, path string) (*seenState, error) {
	b, err := fsx.ReadFile(fsys, path, maxRecordSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read memory of the register: %w", err)
	}
	var s seenState
	if err := json.Unmarshal(b, &s); err != nil || s.Format != seenFormat || s.ClusterID == "" {
		return nil, fmt.Errorf("read memory of the register: %s is damaged (remove it only if you are sure that the share is the right one): %w", path, errors.Join(ErrCorrupt, err))
	}
	return &s, nil
}

func writeSeen(fsys fsx.FS, path string, s seenState) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode memory of the register: %w", err)
	}
	if err := fsx.ReplaceLocal(fsys, path, append(b, '\n')); err != nil {
		return fmt.Errorf("write memory of the register: %w", err)
	}
	return nil
}

// checkCluster compares identities; s may be nil and fsid "" (a backend without one).
func (s *seenState) checkCluster(clusterID, fsid string) error {
	switch {
	case s == nil:
		return nil
	case s.ClusterID != clusterID:
		return fmt.Errorf("cluster id is %s, was %s: %w", clusterID, s.ClusterID, ErrWrongCluster)
	case s.FSID != "" && fsid != "" && s.FSID != fsid:
		return fmt.Errorf("file system id is %s, was %s: %w", fsid, s.FSID, ErrWrongCluster)
	}
	return nil
}

// checkRecord refuses a record behind or different from what was seen.
func (s *seenState) checkRecord(rec Record) error {
	switch {
	case s == nil || s.Version == 0:
		return nil
	case rec.Version < s.Version:
		return fmt.Errorf("version is %d, was %d: %w", rec.Version, s.Version, ErrWentBack)
	case rec.Version == s.Version && rec.Nonce != s.Nonce:
		return fmt.Errorf("version %d is another record than before: %w", rec.Version, ErrWentBack)
	case rec.Term < s.Term:
		return fmt.Errorf("term is %d, was %d: %w", rec.Term, s.Term, ErrWentBack)
	}
	return nil
}

// memory writes seenState in the background: a slow local disk must not delay a renewal.
type memory struct {
	fs   fsx.FS
	path string
	fsid string

	mu      sync.Mutex
	state   *seenState // newest known, nil before anything was seen
	last    Record     // the record of state
	saved   uint64     // version on disk
	dirty   bool       // state shall be written
	writing bool
	idle    chan struct{} // closed when the running writer ends
	err     error         // of the last write
}

func openMemory(fsys fsx.FS, path, fsid string) (*memory, error) {
	m := &memory{fs: fsys, path: path, fsid: fsid}
	if path == "" {
		return m, nil
	}
	if err := fsys.MkdirAll(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("create directory for the memory of the register: %w", err)
	}
	s, err := readSeen(fsys, path)
	if err != nil {
		return nil, err
	}
	m.state = s
	if s != nil {
		m.saved = s.Version
	}
	return m, nil
}

func (m *memory) get() *seenState {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == nil {
		return nil
	}
	s := *m.state
	return &s
}

// note takes a newer record and starts writing it if it is more than a renewal.
func (m *memory) note(rec Record) {
	if m.path == "" {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	plain := m.last.Version != 0 && rec.Term == m.last.Term && rec.Holder.Incarnation == m.last.Holder.Incarnation &&
		rec.SameData(m.last) && rec.Released == m.last.Released
	m.state = &seenState{Format: seenFormat, ClusterID: rec.ClusterID, FSID: m.fsid, Version: rec.Version, Term: rec.Term, Nonce: rec.Nonce}
	m.last = rec
	if plain && rec.Version < m.saved+seenEvery && m.err == nil {
		return
	}
	m.dirty = true
	m.start()
}

// start runs the writer if none runs; m.mu is held.
func (m *memory) start() {
	if m.writing {
		return
	}
	m.writing, m.idle = true, make(chan struct{})
	go m.write()
}

func (m *memory) write() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.dirty {
		m.dirty = false
		s := *m.state
		m.mu.Unlock()
		err := writeSeen(m.fs, m.path, s)
		m.mu.Lock()
		m.err = err
		if err == nil {
			m.saved = s.Version
		}
	}
	m.writing = false
	close(m.idle)
}

// flush waits until everything noted is on disk and returns why it is not.
func (m *memory) flush(ctx context.Context) error {
	if m.path == "" {
		return nil
	}
	m.mu.Lock()
	if m.state != nil && (m.state.Version != m.saved || m.err != nil) {
		m.dirty = true
		m.start()
	}
	idle := m.idle
	m.mu.Unlock()
	if idle != nil {
		select {
		case <-idle:
		case <-ctx.Done():
			return fmt.Errorf("write memory of the register: %w", ctx.Err())
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}
