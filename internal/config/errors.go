package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrInvalid is wrapped by every error about the content of a configuration.
var ErrInvalid = errors.New("invalid configuration")

// Error is one thing that is wrong with a configuration file. It never contains a value
// of the environment or anything else that could be a secret.
type Error struct {
	File   string
	Line   int    // 0: the file as a whole
	Key    string // "lease.ttl"; "" when no key is concerned
	Msg    string
	Advice string // what to do about it
}

// Error implements error: "file:line: key: what is wrong".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.File)
	if e.Line > 0 {
		fmt.Fprintf(&b, ":%d", e.Line)
	}
	b.WriteString(": ")
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Msg)
	return b.String()
}

// Hint says what to do about it.
func (e *Error) Hint() string { return e.Advice }

// Unwrap makes errors.Is(err, ErrInvalid) true.
func (e *Error) Unwrap() error { return ErrInvalid }

// Errors is everything that is wrong with a file, in the file's order.
type Errors []*Error

// Error implements error, one line for each.
func (l Errors) Error() string {
	lines := make([]string, len(l))
	for i, e := range l {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives access to the single errors.
func (l Errors) Unwrap() []error {
	out := make([]error, len(l))
	for i, e := range l {
		out[i] = e
	}
	return out
}

// with adds what more was found, without repeating a line, in the file's order.
func (l Errors) with(more Errors) Errors {
	said := map[int]bool{}
	for _, e := range l {
		said[e.Line] = true
	}
	all := slices.Clone(l)
	for _, e := range more {
		if e.Line == 0 || !said[e.Line] {
			all = append(all, e)
		}
	}
	slices.SortStableFunc(all, func(a, b *Error) int { return a.Line - b.Line })
	return all
}

func (l Errors) orNil() error {
	if len(l) == 0 {
		return nil
	}
	return l
}
