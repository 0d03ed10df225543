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
	// Values that are hidden are at least this long: of variables that sound secret, and of all.
	minSecret, minLong = 4, 12
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
	msg := clean(err.Error(), env)
	if msg == err.Error() {
		return err
	}
	return &redacted{msg: msg, err: err}
}

// clean replaces the secret values of env in a text.
func clean(text string, env []string) string {
	var values []string
	for _, e := range env {
		if name, v, _ := strings.Cut(e, "="); isSecret(name, v) {
			values = append(values, v)
		}
	}
	// The longest first: a value may be part of another.
	sort.Slice(values, func(i, j int) bool { return len(values[i]) > len(values[j]) })
	for _, v := range values {
		text = strings.ReplaceAll(text, v, "***")
	}
	return text
}

// isSecret says whether to hide a variable's value: any long one, and a shorter one if the
// name says so. Hiding every "on" or "postgres" would make messages unreadable.
func isSecret(name, value string) bool {
	if len(value) >= minLong {
		return true
	}
	name = strings.ToUpper(name)
	for _, s := range []string{"PASS", "PWD", "SECRET", "TOKEN", "KEY", "CRED", "AUTH"} {
		if strings.Contains(name, s) {
			return len(value) >= minSecret
		}
	}
	return false
}

// redacted is an error whose text hides secrets.
type redacted struct {
	msg string
	err error
}

func (r *redacted) Error() string { return r.msg }

// Is instead of Unwrap: a caller that prints each error of a chain would print the secret.
func (r *redacted) Is(target error) bool { return errors.Is(r.err, target) }
