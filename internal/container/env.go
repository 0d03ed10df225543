package container

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
)

const (
	maxEnvFile = 1 << 20
	// minSecret is the shortest value that is hidden: hiding "1" or "on" would make every
	// message unreadable and protect nothing.
	minSecret = 4
)

// environment merges a spec's file and map into "NAME=value" lines, sorted.
func environment(s Spec) ([]string, error) {
	env := map[string]string{}
	if s.EnvFile != "" {
		if err := readEnvFile(s.EnvFile, env); err != nil {
			return nil, err
		}
	}
	for k, v := range s.Env {
		if err := checkEnvName(k); err != nil {
			return nil, err
		}
		if strings.ContainsRune(v, 0) {
			return nil, fmt.Errorf("environment variable %s: value has a NUL byte: %w", k, ErrInvalidSpec)
		}
		env[k] = v
	}
	out := make([]string, 0, len(env))
	for k, v := range env {
		out = append(out, k+"="+v)
	}
	sort.Strings(out)
	return out, nil
}

// readEnvFile reads "NAME=value" lines into env. Errors name the line, never what is in it.
func readEnvFile(path string, env map[string]string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("read env file: %w", err)
	}
	if st.Size() > maxEnvFile {
		return fmt.Errorf("env file %s is larger than %d bytes: %w", path, maxEnvFile, ErrInvalidSpec)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read env file: %w", err)
	}
	in := bufio.NewScanner(bytes.NewReader(b))
	in.Buffer(nil, maxEnvFile+1)
	for n := 1; in.Scan(); n++ {
		line := strings.TrimLeft(strings.TrimSuffix(in.Text(), "\r"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok || checkEnvName(name) != nil || strings.ContainsRune(value, 0) {
			return fmt.Errorf("env file %s, line %d: want NAME=value: %w", path, n, ErrInvalidSpec)
		}
		env[name] = value
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("read env file: %w", err)
	}
	return nil
}

func checkEnvName(name string) error {
	if name == "" || strings.ContainsAny(name, "= \t\x00") {
		name, _, _ = strings.Cut(name, "=") // what follows may be the value
		return fmt.Errorf("environment variable's name %q: %w", name, ErrInvalidSpec)
	}
	return nil
}

// redact hides the values of env wherever they appear in an error's text. errors.Is
// still sees what it is.
func redact(err error, env []string) error {
	if err == nil {
		return nil
	}
	values := make([]string, 0, len(env))
	for _, e := range env {
		if _, v, _ := strings.Cut(e, "="); len(v) >= minSecret {
			values = append(values, v)
		}
	}
	// The longest first: a value may be part of another.
	sort.Slice(values, func(i, j int) bool { return len(values[i]) > len(values[j]) })
	msg := err.Error()
	clean := msg
	for _, v := range values {
		clean = strings.ReplaceAll(clean, v, "***")
	}
	if clean == msg {
		return err
	}
	return &redacted{msg: clean, err: err}
}

// redacted is an error whose text hides secrets.
type redacted struct {
	msg string
	err error
}

func (r *redacted) Error() string { return r.msg }

// Is instead of Unwrap: a caller that prints each error of a chain would print the secret.
func (r *redacted) Is(target error) bool { return errors.Is(r.err, target) }
