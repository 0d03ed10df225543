package supervisor

import (
	"sync"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
)

// rateOver is the time over which a rate is taken: long enough to be calm, short enough to
// follow a share that becomes slow.
const rateOver = 10 * time.Second

// progress follows one job of which somebody wants to know how far it has come.
type progress struct {
	clock boottime.Clock

	mu    sync.Mutex
	now   *api.Progress
	began boottime.Instant
	marks []mark // of the last rateOver, the oldest first
}

type mark struct {
	at   boottime.Instant
	done int64
}

// set takes one piece of progress.
func (p *progress) set(n api.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.clock.Now()
	if p.now == nil || p.now.Phase != n.Phase || n.Done < p.now.Done {
		p.began, p.marks = now, nil
		n.Started = p.clock.Wall()
	} else {
		n.Started = p.now.Started
	}
	if len(p.marks) == 0 || now.Sub(p.marks[len(p.marks)-1].at) >= rateOver/20 {
		p.marks = append(p.marks, mark{now, n.Done})
	}
	for len(p.marks) > 2 && now.Sub(p.marks[1].at) >= rateOver {
		p.marks = p.marks[1:]
	}
	p.now = &n
}

// clear ends the job.
func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now, p.marks = nil, nil
}

// get returns how far the job has come now; nil when there is none.
func (p *progress) get() *api.Progress {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == nil {
		return nil
	}
	n := *p.now
	// From the oldest mark until this moment: a job that hangs gets slower and slower.
	if took := p.clock.Now().Sub(p.marks[0].at).Seconds(); took >= 1 && n.Done > p.marks[0].done {
		rate := float64(n.Done-p.marks[0].done) / took
		n.BytesPerSecond = &rate
		if n.Total > n.Done {
			left := float64(n.Total-n.Done) / rate
			n.RemainingSeconds = &left
		}
	}
	return &n
}
