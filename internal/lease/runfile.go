package lease

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

const runFormat = 1

// runState is what an agent leaves for its next start on the same boot: which incarnation
// holds which term until when.
type runState struct {
	Format      int              `json:"format"`
	BootID      string           `json:"boot_id"`
	ClusterID   string           `json:"cluster_id"`
	Instance    string           `json:"instance"`
	Incarnation string           `json:"incarnation"`
	Term        uint64           `json:"term"`
	Deadline    boottime.Instant `json:"deadline"` // nanoseconds on CLOCK_BOOTTIME
}

// readRun returns nil without an error if there is nothing to resume: no file, one of another
// boot, or one that can't be read (it is only ever an advantage).
func (l *Lease) readRun() *runState {
	if l.cfg.RunFile == "" {
		return nil
	}
	b, err := fsx.ReadFile(l.cfg.FS, l.cfg.RunFile, maxRecordSize)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			l.log.Warn("run file is not readable, starting as a challenger", "error", err)
		}
		return nil
	}
	var s runState
	if err := json.Unmarshal(b, &s); err != nil || s.Format != runFormat {
		l.log.Warn("run file is damaged, starting as a challenger", "path", l.cfg.RunFile)
		return nil
	}
	if s.BootID != l.cfg.BootID || s.Instance != l.self.Instance {
		return nil
	}
	return &s
}

// writeRun notes the tenure. A failure costs the next start its resumption, nothing else.
func (l *Lease) writeRun(clusterID string, term uint64, deadline boottime.Instant) {
	if l.cfg.RunFile == "" {
		return
	}
	b, err := json.Marshal(runState{
		Format: runFormat, BootID: l.cfg.BootID, ClusterID: clusterID, Instance: l.self.Instance,
		Incarnation: l.self.Incarnation, Term: term, Deadline: deadline,
	})
	if err == nil {
		err = fsx.ReplaceLocal(l.cfg.FS, l.cfg.RunFile, append(b, '\n'))
	}
	if err != nil {
		l.log.Warn("run file not written, a restart would wait for the ttl", "error", err)
	}
}

// forgetRun is done before a release is sent and when a tenure is relinquished: a later start
// shall not go on with it. Should it fail, a resumption is still a swap that may lose.
func (l *Lease) forgetRun() {
	if l.cfg.RunFile == "" {
		return
	}
	if err := l.cfg.FS.Remove(l.cfg.RunFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.log.Warn("run file not removed", "error", err)
	}
}

// lockInstance refuses a second agent on this machine for as long as the first one lives. The
// kernel frees the lock with the process, however it ends; the file stays.
func lockInstance(path, instance string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of the instance: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		cerr := f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("instance %q: %s is locked by a running agent: %w", instance, path, ErrInstanceInUse), cerr)
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), cerr)
	}
	return f, nil
}
