package main

import (
	"encoding/json"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFigureStatistics(t *testing.T) {
	hundred := &figure{}
	for k := 100; k >= 1; k-- {
		hundred.samples = append(hundred.samples, float64(k))
	}
	for _, c := range []struct {
		name string
		got  float64
		want float64
	}{
		{"median of an even number", hundred.median(), 50.5},
		{"p99 of 100", hundred.at(0.99), 99},
		{"highest", hundred.highest(), 100},
		{"median of three", (&figure{samples: []float64{9, 1, 2}}).median(), 2},
		{"p99 of three is the highest", (&figure{samples: []float64{9, 1, 2}}).at(0.99), 9},
		{"p99 of one", (&figure{samples: []float64{7}}).at(0.99), 7},
		{"round small", round(0.0123456), 0.01235},
		{"round large", round(123456.7), 123457},
		{"round nothing", round(0), 0},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", c.name, c.got, c.want)
		}
	}
	if hundred.samples[0] != 100 {
		t.Error("the samples were sorted in place: their order is that of the runs")
	}
}

// TestMiddle: where the median has a goal of its own, both count.
func TestMiddle(t *testing.T) {
	most, middle := 15.0, 12.0
	for _, c := range []struct {
		samples []float64
		want    bool
	}{
		{[]float64{11, 12, 15}, true},
		{[]float64{11, 13, 14}, false}, // the median
		{[]float64{11, 12, 16}, false}, // the highest
	} {
		f := &figure{samples: c.samples, goal: &most, middle: &middle}
		if *f.met() != c.want {
			t.Errorf("%v: met is %v", c.samples, !c.want)
		}
	}
}

// TestSavedRows: a goal is held against the worst sample, not the median, and a figure
// without a goal says so with null.
func TestSavedRows(t *testing.T) {
	limit := 15.0
	s := &section{name: "x", machine: newMachine()}
	for _, v := range []float64{13, 16, 12} {
		s.add("takeover", "s", v).goal = &limit
	}
	for _, v := range []float64{1, 2} {
		s.addTail("freeze", "ms", v)
	}
	s.add("volume", "MiB", 1024)
	dir := t.TempDir()
	if err := s.save(dir); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "x.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatalf("not JSON: %v\n%s", err, data)
	}
	want := []struct {
		what      string
		value     float64
		goal, met any
	}{
		{"takeover", 13, 15.0, true}, {"takeover, lowest", 12, nil, nil}, {"takeover, highest", 16, 15.0, false},
		{"takeover, samples", 3, nil, nil},
		{"freeze, p50", 1.5, nil, nil}, {"freeze, p99", 2, nil, nil}, {"freeze, lowest", 1, nil, nil},
		{"freeze, highest", 2, nil, nil}, {"freeze, samples", 2, nil, nil},
		{"volume", 1024, nil, nil},
	}
	if len(got) != len(want) {
		t.Fatalf("%d rows, want %d:\n%s", len(got), len(want), data)
	}
	for k, w := range want {
		g := got[k]
		if len(g) != 5 || g["what"] != w.what || g["value"] != w.value || g["goal"] != w.goal || g["met"] != w.met {
			t.Errorf("row %d is %v, want %+v", k, g, w)
		}
	}
	var b strings.Builder
	if err := s.text(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "at most 15") || !strings.Contains(b.String(), "NO") {
		t.Errorf("the table hides a missed goal:\n%s", b.String())
	}
}

func TestGoalThatIsBetterExceeded(t *testing.T) {
	s := &section{name: "x", machine: newMachine()}
	for _, v := range []float64{11, 9} {
		s.add("ratio", "", v).atLeast(10)
	}
	f := s.find("ratio")
	if met := f.met(); met == nil || *met {
		t.Error("a sample below the goal was overlooked")
	}
	f.samples = f.samples[:1]
	if met := f.met(); met == nil || !*met {
		t.Error("a sample above the goal does not meet it")
	}
	if c := f.cells(); c[7] != "at least 10" || c[8] != "yes" {
		t.Errorf("%q", c)
	}
}

func TestInterval(t *testing.T) {
	mean, half := interval([]float64{96, 98, 100, 102, 104})
	if math.Abs(mean-100) > 1e-9 || math.Abs(half-2.776*math.Sqrt(10)/math.Sqrt(5)) > 1e-9 {
		t.Errorf("%v +- %v", mean, half)
	}
}

func TestDiffer(t *testing.T) {
	dir, older := t.TempDir(), t.TempDir()
	write := func(dir, name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	data := make([]byte, 100*page+5)
	write(older, "same", data)
	write(dir, "same", data)
	write(older, "changed", data)
	data[70*page] = 1
	data[100*page+4] = 1
	write(dir, "changed", data)
	write(older, "longer", data[:page])
	write(dir, "longer", data[:page+1])
	data[0] = 1
	write(dir, "new", data[:2*page])
	if n, err := differ(t.Context(), dir, older); err != nil || n != 3 {
		t.Errorf("%d pages, %v", n, err)
	}
}

func TestWriteMarkdownReplacesItsPartOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "page.md")
	part := func(text string) func(io.Writer) {
		return func(w io.Writer) { _, _ = io.WriteString(w, text) }
	}
	for _, c := range [][2]string{{"a", "first\n"}, {"b", "second\n"}, {"a", "third\n"}} {
		if err := writeMarkdown(path, c[0], part(c[1]), nil); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "<!-- begin a -->\nthird\n<!-- end a -->\n<!-- begin b -->\nsecond\n<!-- end b -->\n"; string(got) != want {
		t.Errorf("%s", got)
	}
}

func TestParsePgbench(t *testing.T) {
	out := `transaction type: <builtin: TPC-B (sort of)>
number of transactions actually processed: 9540
latency average = 2.210 ms
initial connection time = 9.313 ms
tps = 1817.530412 (without initial connection time)
`
	tps, latency, err := parsePgbench(out)
	if err != nil || tps != 1817.530412 || latency != 2.21 {
		t.Errorf("%v, %v, %v", tps, latency, err)
	}
	if _, _, err := parsePgbench("pgbench: error: connection refused\n"); err == nil {
		t.Error("no throughput was not an error")
	}
}

func TestParse(t *testing.T) {
	o, err := parse([]string{"-quick", "-reps", "5"})
	if err != nil || o.reps != 5 || o.volume != 192 {
		t.Errorf("-quick replaced what was given, or nothing: %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-volume", "64"}, {"-only", "freeze,nothing"}, {"-takeovers", "0"}, {"left over"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%q was accepted", args)
		}
	}
}
