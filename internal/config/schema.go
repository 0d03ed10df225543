package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// checker compares a parsed file with the Config type before it is decoded, because the
// decoder stops at the first error and can't say where a bad duration stands. Messages
// name keys and kinds, never values that could be secrets.
type checker struct {
	file string
	errs Errors
}

func (c *checker) add(n ast.Node, key, msg, hint string) {
	c.errs = append(c.errs, &Error{File: c.file, Line: lineOf(n), Key: key, Msg: msg, Advice: hint})
}

// check walks node n, which is the value of key, against type t. at is the node to blame.
func (c *checker) check(n, at ast.Node, key string, t reflect.Type) {
	n = plain(n)
	switch n.(type) {
	case nil, *ast.NullNode, *ast.AliasNode:
		return // null keeps the default; an alias was checked where its anchor is
	}
	if isDuration(t) || t == reflect.TypeFor[Size]() {
		c.checkText(n, at, key, t)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		c.checkStruct(n, at, key, t)
	case reflect.Map:
		if !isMapping(n) {
			c.add(at, key, "must be a list of NAME: value lines, not "+kindOf(n), "write one NAME: value per line, indented below the key, without dashes")
			return
		}
		for _, kv := range pairs(n) {
			c.check(kv.Value, kv, key+"."+keyText(kv), t.Elem())
		}
	case reflect.Slice:
		seq, ok := n.(*ast.SequenceNode)
		if !ok {
			c.add(at, key, "must be a list, not "+kindOf(n), `write it as [first, second] or one "- item" per line`)
			return
		}
		for i, v := range seq.Values {
			c.check(v, v, fmt.Sprintf("%s[%d]", key, i), t.Elem())
		}
	default:
		c.checkScalar(n, at, key, t)
	}
}

func (c *checker) checkStruct(n, at ast.Node, key string, t reflect.Type) {
	if !isMapping(n) {
		c.add(at, key, "must be a section, not "+kindOf(n), "known keys here: "+strings.Join(keysOf(t), ", "))
		return
	}
	seen := map[string]bool{}
	for _, kv := range pairs(n) {
		name := keyText(kv)
		if name == "<<" {
			continue // a merged anchor was checked where it stands
		}
		full := name
		if key != "" {
			full = key + "." + name
		}
		if seen[name] {
			c.add(kv, full, "is set twice", "remove one of the two")
			continue
		}
		seen[name] = true
		f, ok := fieldOf(t, name)
		if !ok {
			c.add(kv, full, "is not a known key", didYouMean(name, keysOf(t)))
			continue
		}
		c.check(kv.Value, kv, full, f.Type)
	}
}

func (c *checker) checkText(n, at ast.Node, key string, t reflect.Type) {
	text, ok := scalarText(n)
	if isDuration(t) {
		if _, err := time.ParseDuration(text); !ok || err != nil {
			c.add(at, key, "is not a duration", `write a number with a unit: "500ms", "10s", "5m", "1h30m"`)
		}
		return
	}
	if _, err := ParseSize(text); !ok || err != nil {
		c.add(at, key, "is not a size", `write "64MiB", "1GB" or a number of bytes`)
	}
}

func (c *checker) checkScalar(n, at ast.Node, key string, t reflect.Type) {
	if _, ok := scalarText(n); !ok {
		c.add(at, key, "must be a single value, not "+kindOf(n), "check the indentation; quote text that contains : or #")
		return
	}
	switch t.Kind() {
	case reflect.Bool:
		if _, ok := n.(*ast.BoolNode); !ok {
			c.add(at, key, "must be true or false", "write true or false, without quotes")
		}
	case reflect.Int, reflect.Int64:
		if _, ok := n.(*ast.IntegerNode); !ok {
			c.add(at, key, "must be a whole number", "write a number without unit and quotes")
		}
	case reflect.Float64:
		switch n.(type) {
		case *ast.IntegerNode, *ast.FloatNode:
		default:
			c.add(at, key, "must be a number", "write a number without unit and quotes")
		}
	}
}

func isDuration(t reflect.Type) bool { return t == reflect.TypeFor[time.Duration]() }

func isMapping(n ast.Node) bool {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return true
	}
	return false
}

// scalarText is a scalar as it stands in the file, quotes removed.
func scalarText(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func kindOf(n ast.Node) string {
	switch n.(type) {
	case *ast.SequenceNode:
		return "a list"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a section"
	}
	return "a single value"
}

func yamlName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	return name
}

func fieldOf(t reflect.Type, name string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if f := t.Field(i); f.IsExported() && yamlName(f) == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func keysOf(t reflect.Type) []string {
	var out []string
	for i := range t.NumField() {
		if f := t.Field(i); f.IsExported() {
			out = append(out, yamlName(f))
		}
	}
	return out
}

// didYouMean suggests the known key that is nearest to what was written.
func didYouMean(name string, known []string) string {
	best, dist := "", 4
	for _, k := range known {
		if d := editDistance(strings.ToLower(name), k); d < dist && d < len(k) {
			best, dist = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf("did you mean %q?", best)
	}
	sorted := slices.Sorted(slices.Values(known))
	return "known keys here: " + strings.Join(sorted, ", ")
}

// editDistance is how many letters must be changed, added or removed to make a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return row[len(b)]
}
