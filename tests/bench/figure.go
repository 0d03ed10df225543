package main

import (
	"math"
	"slices"
	"strings"
)

// figure is one measured quantity with all its samples.
type figure struct {
	what    string // the same in every run, so that runs can be compared
	unit    string
	samples []float64
	// tail says that the figure is a distribution: its p99 matters as much as its median.
	tail bool
	// goal is what the highest sample must not exceed, or what the lowest must reach if least
	// is set; nil where nothing is asked for.
	goal  *float64
	least bool
	// middle is what the median must not exceed, where that is asked for besides.
	middle *float64
}

// atMost sets a goal.
func (f *figure) atMost(v float64) { f.goal = &v }

// atLeast sets a goal that is better exceeded.
func (f *figure) atLeast(v float64) { f.goal, f.least = &v, true }

// reaches says whether a value meets the goal.
func (f *figure) reaches(v float64) bool {
	if f.least {
		return v >= *f.goal
	}
	return v <= *f.goal
}

// row is one line of build/bench/NAME.json.
type row struct {
	What  string   `json:"what"`
	Value float64  `json:"value"`
	Unit  string   `json:"unit"`
	Goal  *float64 `json:"goal"`
	Met   *bool    `json:"met"`
}

// rows are the figure's lines: the median and, where there was more than one sample, how
// far they spread and how many there were.
func (f *figure) rows() []row {
	if len(f.samples) == 0 {
		return nil
	}
	line := func(suffix string, v float64, unit string, goal *float64) row {
		r := row{What: f.what + suffix, Value: round(v), Unit: unit, Goal: goal}
		if goal != nil {
			met := f.reaches(v)
			r.Met = &met
		}
		return r
	}
	if len(f.samples) == 1 {
		return []row{line("", f.samples[0], f.unit, f.goal)}
	}
	out := []row{}
	if f.tail {
		out = append(out, line(", p50", f.median(), f.unit, f.goal), line(", p99", f.at(0.99), f.unit, f.goal))
	} else {
		goal := f.goal
		if f.middle != nil {
			goal = f.middle
		}
		out = append(out, line("", f.median(), f.unit, goal))
	}
	low, high := (*float64)(nil), f.goal
	if f.least {
		low, high = high, low
	}
	return append(out,
		line(", lowest", f.lowest(), f.unit, low),
		line(", highest", f.highest(), f.unit, high),
		line(", samples", float64(len(f.samples)), "", nil))
}

// met says whether the goal was met by every sample; nil without a goal or a sample.
func (f *figure) met() *bool {
	if f.goal == nil || len(f.samples) == 0 {
		return nil
	}
	ok := f.reaches(f.highest()) && f.reaches(f.lowest()) && (f.middle == nil || f.median() <= *f.middle)
	return &ok
}

func (f *figure) lowest() float64  { return slices.Min(f.samples) }
func (f *figure) highest() float64 { return slices.Max(f.samples) }

// median is the middle sample, or the mean of the two in the middle.
func (f *figure) median() float64 {
	s := slices.Sorted(slices.Values(f.samples))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}

// at is the smallest sample that at least the share q of all samples does not exceed. With
// fewer than 100 samples the 99th percentile is the highest.
func (f *figure) at(q float64) float64 {
	s := slices.Sorted(slices.Values(f.samples))
	k := int(math.Ceil(q*float64(len(s)))) - 1
	return s[min(max(k, 0), len(s)-1)]
}

// round keeps four digits: more would be noise.
func round(v float64) float64 {
	if v == 0 || math.Abs(v) >= 1000 {
		return math.Round(v)
	}
	p := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*p) / p
}

// section is one benchmark: one table and one JSON file.
type section struct {
	name    string // the file's
	title   string
	how     string // what was done, for the reader of the table
	figures []*figure
	machine machine // what the machine itself did before and after
}

// add appends a sample to the figure named what, which is made at its first sample.
func (s *section) add(what, unit string, v float64) *figure {
	for _, f := range s.figures {
		if f.what == what && f.unit == unit {
			f.samples = append(f.samples, v)
			return f
		}
	}
	f := &figure{what: what, unit: unit, samples: []float64{v}}
	s.figures = append(s.figures, f)
	return f
}

// find returns a figure, nil without one.
func (s *section) find(what string) *figure {
	for _, f := range s.figures {
		if f.what == what {
			return f
		}
	}
	return nil
}

// addTail is add for a figure whose p99 matters.
func (s *section) addTail(what, unit string, v float64) *figure {
	f := s.add(what, unit, v)
	f.tail = true
	return f
}

// tier says in the text how change was found.
func (s *section) tier(name string) {
	if t := " Tier: " + name + "."; !strings.Contains(s.how, t) {
		s.how += t
	}
}

// all are the section's own figures and those of the machine.
func (s *section) all() []*figure { return append(slices.Clone(s.figures), s.machine.figures()...) }
