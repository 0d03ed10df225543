package main

import (
	stdbytes "bytes"
	"testing"

	"dbsupervisor/internal/api"
)

// Where no terminal is, each phase has one line, also when two go on at the same time.
func TestMeterSaysEachPhaseOnce(t *testing.T) {
	var out stdbytes.Buffer
	m := newMeter(&out)
	m.report(api.Progress{})
	for i := range int64(100) {
		m.Set("reading", i, 2<<20)
		m.Set("writing", i, 0)
	}
	m.done()
	if got := out.String(); got != "reading 2.0 MiB\nwriting\n" {
		t.Errorf("said %q", got)
	}
}
