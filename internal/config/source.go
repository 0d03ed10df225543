package config

import (
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// source remembers where the keys of a file are, so that what is found wrong later can
// still be blamed on a line.
type source struct {
	file string
	root ast.Node
}

// ErrorAt makes an error that names the line of a key ("lease.ttl", "database.ports[1].host").
// A key that is not in the file is blamed on the nearest key above it.
func (c *Config) ErrorAt(key, msg, hint string) *Error {
	return c.src.errorAt(key, msg, hint)
}

func (s *source) errorAt(key, msg, hint string) *Error {
	e := &Error{File: "configuration", Key: key, Msg: msg, Advice: hint}
	if s != nil {
		e.File = s.file
		e.Line = s.line(key)
	}
	return e
}

// Has says whether the file itself sets a key, and not to null.
func (c *Config) Has(key string) bool { return c.src.has(key) }

func (s *source) has(key string) bool {
	if s == nil {
		return false
	}
	n, complete := s.find(key)
	if kv, ok := n.(*ast.MappingValueNode); ok && complete {
		_, null := plain(kv.Value).(*ast.NullNode)
		return !null
	}
	return complete
}

// File is the path that the configuration was loaded from; "" if it was made by hand.
func (c *Config) File() string {
	if c.src == nil {
		return ""
	}
	return c.src.file
}

func (s *source) line(key string) int {
	n, _ := s.find(key)
	return lineOf(n)
}

// find walks down as far as the file goes and says whether it got to the end.
func (s *source) find(key string) (last ast.Node, complete bool) {
	n := s.root
	for _, part := range splitKey(key) {
		n = plain(n)
		if i, err := strconv.Atoi(part); err == nil {
			if seq, ok := n.(*ast.SequenceNode); ok && i < len(seq.Values) {
				n = seq.Values[i]
				last = n
				continue
			}
		}
		kv := lookUp(n, part)
		if kv == nil {
			return last, false
		}
		last, n = kv, kv.Value
	}
	return last, true
}

// splitKey turns "a.b[1].c" into a, b, 1, c.
func splitKey(key string) []string {
	return strings.FieldsFunc(key, func(r rune) bool { return r == '.' || r == '[' || r == ']' })
}

// lookUp finds a key of a mapping node; nil if it is none or hasn't the key.
func lookUp(n ast.Node, key string) *ast.MappingValueNode {
	for _, kv := range pairs(n) {
		if keyText(kv) == key {
			return kv
		}
	}
	return nil
}

// pairs are the entries of a mapping node; nil for any other.
func pairs(n ast.Node) []*ast.MappingValueNode {
	switch n := n.(type) {
	case *ast.MappingNode:
		return n.Values
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}
	}
	return nil
}

func keyText(kv *ast.MappingValueNode) string { return kv.Key.GetToken().Value }

// plain takes anchors and tags off a node.
func plain(n ast.Node) ast.Node {
	for {
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.TagNode:
			n = v.Value
		default:
			return n
		}
	}
}

func lineOf(n ast.Node) int {
	if n == nil {
		return 0
	}
	if kv, ok := n.(*ast.MappingValueNode); ok {
		n = kv.Key
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}
