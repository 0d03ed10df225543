package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// columns are a table's; cells are the figure's texts in that order.
func columns() []string {
	return []string{"what", "median", "p99", "lowest", "highest", "n", "unit", "goal", "met"}
}

func (f *figure) cells() []string {
	c := []string{f.what, number(f.median()), "", "", "", strconv.Itoa(len(f.samples)), f.unit, "", ""}
	if f.tail {
		c[2] = number(f.at(0.99))
	}
	if len(f.samples) > 1 {
		c[3], c[4] = number(f.lowest()), number(f.highest())
	}
	if met := f.met(); met != nil {
		c[7] = "at most " + number(*f.goal)
		c[8] = map[bool]string{true: "yes", false: "NO"}[*met]
	}
	return c
}

func number(v float64) string { return strconv.FormatFloat(round(v), 'f', -1, 64) }

// text prints the section for a terminal.
func (s *section) text(w io.Writer) error {
	fmt.Fprintf(w, "\n%s\n", s.title)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  "+strings.Join(columns(), "\t"))
	for _, f := range s.all() {
		if len(f.samples) > 0 {
			fmt.Fprintln(t, "  "+strings.Join(f.cells(), "\t"))
		}
	}
	return t.Flush()
}

// markdown prints the section for docs/.
func (s *section) markdown(w io.Writer) {
	fmt.Fprintf(w, "\n## %s\n\n%s\n\n", s.title, s.how)
	fmt.Fprintln(w, "| "+strings.Join(columns(), " | ")+" |")
	fmt.Fprintln(w, "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |")
	for _, f := range s.all() {
		if len(f.samples) > 0 {
			fmt.Fprintln(w, "| "+strings.Join(f.cells(), " | ")+" |")
		}
	}
}

// save writes DIR/NAME.json: one row per line, so that two runs can be compared with diff.
func (s *section) save(dir string) error {
	var b strings.Builder
	b.WriteString("[")
	sep := "\n  "
	for _, f := range s.all() {
		for _, r := range f.rows() {
			line, err := json.Marshal(r)
			if err != nil {
				return fmt.Errorf("encode %s: %w", r.What, err)
			}
			b.WriteString(sep + string(line))
			sep = ",\n  "
		}
	}
	b.WriteString("\n]\n")
	return os.WriteFile(filepath.Join(dir, s.name+".json"), []byte(b.String()), 0o644)
}

// header is what a reader must know to judge the numbers.
type header struct {
	command, version, machine string
	options                   options
	at                        time.Time
	took                      time.Duration
}

func (h header) markdown(w io.Writer) {
	fmt.Fprintf(w, `# Figures

Measured with real agents, guards and a real PostgreSQL on one machine. Printed by

    %s

on %s in %s; version %s; %s.

The shared directory is a directory of %s. A network file system adds its round trips; the
section on operations counts them.

Medians over n repetitions; the range beside them is of the same repetitions. The lines that
begin with "machine" are this machine without our programs, measured right before and after
the benchmark of that table: what differs by less than these do is noise. Goals are those
that the project was given; where there is none the column is empty. %q writes the same
figures as %s/NAME.json, rows of what, value, unit, goal and met.
`, h.command, h.at.UTC().Format("2006-01-02 15:04 MST"), h.took.Round(time.Second), h.version, h.machine,
		where(h.options), "make bench", "build/bench")
	if h.options.quick {
		fmt.Fprintf(w, "\n**A quick run on a small volume: these figures say nothing.**\n")
	}
}

func where(o options) string {
	if o.share != "" {
		return "`" + o.share + "`"
	}
	return "the same local disk"
}

// writeMarkdown writes the whole page.
func writeMarkdown(path string, h header, ss []*section) error {
	var b strings.Builder
	h.markdown(&b)
	for _, s := range ss {
		s.markdown(&b)
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
