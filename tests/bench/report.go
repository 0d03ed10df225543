package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
		c[7] = map[bool]string{false: "at most ", true: "at least "}[f.least] + number(*f.goal)
		if f.middle != nil {
			c[7] += ", median " + number(*f.middle)
		}
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
func (s *section) save(dir string) error { return saveAll(dir, s.name, []*section{s}) }

// saveAll writes the rows of several sections to one file.
func saveAll(dir, name string, ss []*section) error {
	var b strings.Builder
	b.WriteString("[")
	sep := "\n  "
	for _, s := range ss {
		for _, f := range s.all() {
			for _, r := range f.rows() {
				if len(ss) > 1 {
					r.What = s.name + ": " + r.What
				}
				line, err := json.Marshal(r)
				if err != nil {
					return fmt.Errorf("encode %s: %w", r.What, err)
				}
				b.WriteString(sep + string(line))
				sep = ",\n  "
			}
		}
	}
	b.WriteString("\n]\n")
	return os.WriteFile(filepath.Join(dir, name+".json"), []byte(b.String()), 0o644)
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

// syncMarkdown is the header of the sync engine's tables.
func (h header) syncMarkdown(w io.Writer) {
	fmt.Fprintf(w, `# The sync engine beside other tools

Printed by

    %s

on %s in %s; version %s; %s.

All shares are simulated (docs/EFSSIM.md): counts of operations and bytes are those of an NFSv4.1
client of EFS and do not depend on this machine; times do. Columns as below. "make bench-sync"
writes the same as build/bench/sync.json.
`, h.command, h.at.UTC().Format("2006-01-02 15:04 MST"), h.took.Round(time.Second), h.version, h.machine)
	if h.options.scale != 200 {
		fmt.Fprintf(w, "\n**A run at scale %d instead of 200.**\n", h.options.scale)
	}
}

// writeMarkdown replaces one part of a page: what is between the comments with its name. A
// part that the page does not have yet comes last.
func writeMarkdown(path, part string, head func(io.Writer), ss []*section) error {
	var b strings.Builder
	head(&b)
	for _, s := range ss {
		s.markdown(&b)
	}
	begin, end := "<!-- begin "+part+" -->\n", "<!-- end "+part+" -->\n"
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	before, rest, found := strings.Cut(string(old), begin)
	_, after, whole := strings.Cut(rest, end)
	if found != whole {
		return fmt.Errorf("write %s: the part %s does not end", path, part)
	}
	return os.WriteFile(path, []byte(before+begin+b.String()+end+after), 0o644)
}
