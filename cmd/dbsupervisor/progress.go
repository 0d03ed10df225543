package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"

	"dbsupervisor/internal/api"
)

// meter shows how far a long operation has come: a bar on a terminal, else one line for
// each phase.
type meter struct {
	out io.Writer
	tty bool

	mu    sync.Mutex
	phase string
	bar   *progressbar.ProgressBar
}

func newMeter(out io.Writer) *meter { return &meter{out: out, tty: onTerminal(out)} }

// report takes one piece of progress.
func (m *meter) report(p api.Progress) { m.Set(p.Phase, p.Done, p.Total) }

// Set implements the storage engine's progress interface.
func (m *meter) Set(phase string, done, total int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if phase != m.phase {
		m.finish()
		m.phase = phase
		if !m.tty {
			if total > 0 {
				phase += " " + humanize.IBytes(uint64(total)) //nolint:gosec // positive
			}
			fmt.Fprintln(m.out, phase)
		}
	}
	if !m.tty || phase == "" {
		return
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
