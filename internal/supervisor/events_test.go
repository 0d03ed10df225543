package supervisor

import (
	"os"
	"strings"
	"testing"

	"dbsupervisor/internal/api"
)

func TestEvents(t *testing.T) {
	e := newEvents(t.TempDir())
	if evs, err := e.last(5); err != nil || len(evs) != 0 {
		t.Fatalf("before the first entry: %v, %v", evs, err)
	}
	text := strings.Repeat("x", 1000)
	for n := range 3 * maxEventBytes / len(text) {
		if err := e.add(api.Event{Term: uint64(n), Kind: "state", Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	fi, err := os.Stat(e.path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > 2*maxEventBytes {
		t.Errorf("history grows without bound: %d bytes", fi.Size())
	}
	evs, err := e.last(2)
	if err != nil || len(evs) != 2 || evs[1].Term != evs[0].Term+1 {
		t.Errorf("want the newest two, oldest first: %v, %v", evs, err)
	}
	// A line that a crash cut short costs that line only.
	f, err := os.OpenFile(e.path, os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"term": 9, "te` + "\n"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.add(api.Event{Kind: "after"}); err != nil {
		t.Fatal(err)
	}
	if evs, err = e.last(1); err != nil || evs[0].Kind != "after" {
		t.Errorf("after a broken line: %v, %v", evs, err)
	}
}
