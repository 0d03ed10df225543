package container

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "env")
	for _, c := range []struct {
		name, file string
		env        map[string]string
		want       string
		bad        string // part of the error
	}{
		{name: "nothing"},
		{name: "map only", env: map[string]string{"B": "2", "A": "1=x"}, want: "A=1=x|B=2"},
		{
			name: "file", file: "# comment\n\n  A=1\r\nB= two words \nC=\n\tD=a=b#c\n",
			env: map[string]string{"A": "3"}, want: "A=3|B= two words |C=|D=a=b#c",
		},
		{name: "no value", file: "A=1\nSECRET\n", bad: "line 2"},
		{name: "blank in name", file: "hunter2 x=1\n", bad: "line 1"},
		{name: "no name in file", file: "=hunter2\n", bad: "line 1"},
		{name: "NUL in file", file: "A=\x00hunter2\n", bad: "line 1"},
		{name: "NUL in map", env: map[string]string{"A": "hunter2\x00"}, bad: "variable A"},
		{name: "name with value", env: map[string]string{"A=hunter2": ""}, bad: `"A"`},
		{name: "empty name", env: map[string]string{"": "hunter2"}, bad: `""`},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Spec{Env: c.env}
			if c.file != "" {
				s.EnvFile = file
				if err := os.WriteFile(file, []byte(c.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := environment(s)
			if c.bad != "" {
				if !errors.Is(err, ErrInvalidSpec) || !strings.Contains(err.Error(), c.bad) || strings.Contains(err.Error(), "hunter2") {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err != nil || strings.Join(got, "|") != c.want {
				t.Fatalf("got %q, %v; want %q", got, err, c.want)
			}
		})
	}
	if _, err := environment(Spec{EnvFile: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func TestRedact(t *testing.T) {
	env := []string{
		"POSTGRES_PASSWORD=hunter2", "LONGER_PASSWORD=hunter2xyz", "POSTGRES_USER=postgres", "DEBUG=on",
		"PASSWORD_MIN=1", "URL=postgres://u:p@host/db",
	}
	base := errors.New("start postgres on 1: hunter2xyz, hunter2 and postgres://u:p@host/db")
	err := redact(base, env)
	if got := err.Error(); got != "start postgres on 1: ***, *** and ***" {
		t.Errorf("got %q", got)
	}
	if !errors.Is(err, base) {
		t.Error("errors.Is does not see it")
	}
	if errors.Unwrap(err) != nil {
		t.Error("the secret can be unwrapped")
	}
	plain := errors.New("nothing secret")
	if got := redact(plain, env); !errors.Is(got, plain) || got.Error() != plain.Error() {
		t.Errorf("a harmless error became %v", got)
	}
	if redact(nil, env) != nil {
		t.Error("no error became one")
	}
}
