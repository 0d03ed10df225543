package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	volsync "dbsupervisor/internal/sync"
)

// forkStep is the most that a fork ages while no agent runs, however long that is by the time
// of day: a clock that was wrong for once must not make years of it. A machine that is off for
// longer keeps its forks longer.
const forkStep = 24 * time.Hour

// forkAges counts how long forks have been kept. While the agent runs it counts by a clock that
// nobody sets; between two agents by the time of day, at most forkStep.
type forkAges struct {
	fs   fsx.FS
	path string

	Wall time.Time                `json:"wall"` // of the last count
	Ages map[string]time.Duration `json:"ages"`
	last boottime.Instant         // of the last count of this agent; 0: none yet
}

func newForkAges(fsys fsx.FS, dir string) *forkAges {
	return &forkAges{fs: fsys, path: filepath.Join(dir, "fork-ages.json")}
}

// count lets the forks that are there get older, and returns their ages.
func (a *forkAges) count(forks []volsync.Fork, now boottime.Instant, wall time.Time) (map[string]time.Duration, error) {
	step := time.Duration(0)
	if a.last != 0 {
		step = now.Sub(a.last)
	} else {
		b, err := fsx.ReadFile(a.fs, a.path, 1<<20)
		if err == nil {
			// What is damaged is forgotten: forks are kept for longer then.
			if json.Unmarshal(b, a) == nil && !a.Wall.IsZero() {
				step = min(max(wall.Sub(a.Wall), 0), forkStep)
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read ages of forks: %w", err)
		}
	}
	ages := map[string]time.Duration{}
	for _, f := range forks {
		if age, ok := a.Ages[f.Name]; ok {
			ages[f.Name] = age + step
		} else {
			ages[f.Name] = 0
		}
	}
	a.Ages, a.Wall, a.last = ages, wall, now
	b, err := json.Marshal(a)
	if err == nil {
		err = fsx.ReplaceLocal(a.fs, a.path, append(b, '\n'))
	}
	if err != nil {
		return nil, fmt.Errorf("write ages of forks: %w", err)
	}
	return ages, nil
}

// expireForks deletes the forks that have been kept for long enough.
func (s *Supervisor) expireForks(ages *forkAges, keep time.Duration) ([]string, error) {
	forks, err := s.volume.Forks()
	if err != nil {
		return nil, err
	}
	old, err := ages.count(forks, s.clock.Now(), s.clock.Wall())
	if err != nil {
		return nil, err
	}
	return s.volume.PruneForks(func(f volsync.Fork) bool { return old[f.Name] > keep })
}
