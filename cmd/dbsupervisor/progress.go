package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"

	"dbsupervisor/internal/api"
)

// meter shows how far a long operation has come: a bar on a terminal, else one line for
// each phase.
type meter struct {
	out io.Writer
	tty bool

	mu    sync.Mutex
	said  map[string]bool // phases that have their line
	phase string
	since time.Time // of the phase
	bar   *progressbar.ProgressBar
}

// minPhase is how long a bar stays: two phases that go on at the same time take turns.
const minPhase = time.Second

func newMeter(out io.Writer) *meter {
	return &meter{out: out, tty: onTerminal(out), said: map[string]bool{}}
}

// report takes one piece of progress.
func (m *meter) report(p api.Progress) { m.Set(p.Phase, p.Done, p.Total) }

// Set implements the storage engine's progress interface.
func (m *meter) Set(phase string, done, total int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if phase == "" {
		return
	}
	if !m.tty {
		m.say(phase, total)
		return
	}
	if phase != m.phase {
		if m.bar != nil && time.Since(m.since) < minPhase {
			return
		}
		m.finish()
		m.phase, m.since = phase, time.Now()
	}
	if m.bar == nil {
		if total <= 0 {
			total = -1 // a spinner
		}
		m.bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(m.out), progressbar.OptionSetDescription(m.phase),
			progressbar.OptionShowBytes(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	} else if total > 0 && m.bar.GetMax64() != total {
		m.bar.ChangeMax64(total)
	}
	_ = m.bar.Set64(done) // a terminal that went away is no reason to stop
}

// say gives each phase one line.
func (m *meter) say(phase string, total int64) {
	if m.said[phase] {
		return
	}
	m.said[phase] = true
	if total > 0 {
		phase += " " + bytes(total)
	}
	fmt.Fprintln(m.out, phase)
}

// done removes the bar.
func (m *meter) done() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.finish()
}

func (m *meter) finish() {
	if m.bar != nil {
		_ = m.bar.Clear()
		m.bar = nil
	}
}
