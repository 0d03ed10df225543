package sync

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
)

// TestChecker: every file is read once in the time that is set, the one that was checked
// longest ago first, also over interruptions and restarts; damage is found.
func TestChecker(t *testing.T) {
	ctx := context.Background()
	r := newPinRig(t, 71)
	for range 4 {
		r.step(t, 30, time.Minute)
	}
	r.condemn()
	var reads []string
	r.s.cfg.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		if op == fsx.OpOpen && !strings.HasSuffix(path, ".catalog") {
			reads = append(reads, filepath.Base(path))
		}
		return nil
	}}
	state := filepath.Join(t.TempDir(), "checked.json")
	req := CheckRequest{Catalog: r.cat, Every: 10 * time.Hour}
	c := r.s.NewChecker(fsx.OS{}, state)
	check := func() {
		t.Helper()
		if err := c.Check(ctx, req); err != nil {
			t.Fatal(err)
		}
	}
	check()
	if len(reads) > 0 {
		t.Errorf("new files are read at once: %v", reads)
	}
	n := c.Report().Files
	if n < 6 {
		t.Fatalf("%d files", n)
	}
	r.clock.Advance(6 * time.Hour)
	// A budget, and an interruption after the first frame, again and again.
	slow := req
	slow.Rate = 1
	for i := 0; c.Report().Checked < n; i++ {
		if i > 1000 {
			t.Fatal("it never comes to an end")
		}
		inner, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- c.Check(inner, slow) }()
		for len(done) == 0 && r.clock.Waiters() == 0 {
			<-time.After(100 * time.Microsecond)
		}
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if i%5 == 0 { // the agent is restarted
			c = r.s.NewChecker(fsx.OS{}, state)
			check2 := CheckRequest{Catalog: r.cat, Every: 1000 * time.Hour}
			if err := c.Check(ctx, check2); err != nil {
				t.Fatal(err)
			}
		}
	}
	if rep := c.Report(); len(rep.Problems) > 0 || rep.Files != n {
		t.Errorf("report is %+v", rep)
	}
	reads = nil
	check()
	if len(reads) > 0 {
		t.Errorf("files are read again at once: %v", reads)
	}
	// A flipped bit, and a file that is missing.
	packs, err := filepath.Glob(filepath.Join(r.dir, packDir, "*", "*.pack"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(packs[0])
	if err != nil {
		t.Fatal(err)
	}
	b[packHeader+3] ^= 1
	if err := os.WriteFile(packs[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(packs[1]); err != nil {
		t.Fatal(err)
	}
	r.clock.Advance(6 * time.Hour)
	check() // ends at what is missing
	check()
	check()
	rep := c.Report()
	var bad []string
	for _, p := range rep.Problems {
		bad = append(bad, filepath.Base(p.Path)+" "+p.What)
	}
	slices.Sort(bad)
	if len(bad) != 2 || !slices.ContainsFunc(bad, func(s string) bool { return strings.Contains(s, filepath.Base(packs[1])+" missing") }) {
		t.Errorf("found %v", bad)
	}
}
