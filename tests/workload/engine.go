// Package workload is a client of any engine: it writes one number after another through a
// cluster's write port with the engine's own client program, remembers what was
// acknowledged, reads it back, and has the engine's own checker look at a copy.
package workload

import (
	"fmt"
	"slices"
	"strings"

	"dbsupervisor/tests/cluster"
)

// Engine says how one engine is used. A client program takes statements on its standard
// input and its password from the environment.
type Engine struct {
	Name  string // of the profile
	Image string
	Port  int // the database's own
	// Env has the lines of the database's env_file, with %s for the password.
	Env string
	// Database is more YAML for the database section, indented by two.
	Database string
	// Password is the variable in which the client program wants the password.
	Password string
	// Client is the program, given the port on 127.0.0.1 that it must use.
	Client func(port int) []string
	// Setup makes what the writes need.
	Setup string
	// Write stores a number; an answer for which Acked is true means that it is stored.
	Write func(n int64) string
	Acked func(line string, n int64) bool
	// Read prints the numbers that are there. Reader is the program for it where that is
	// another one than Client.
	Read   string
	Reader func(port int) []string
	// Undo has statements by which the most powerful user might try to end read-only mode.
	Undo func(port int) string
	// DataPath is where Check, a script for bash, finds a copy of the volume, which no
	// database uses. It is the engine's own opinion: another exit status than 0 says that the
	// copy is damaged.
	DataPath, Check string
	// Damage is a file of a copy, as a pattern, that Check must find wrong when DamageBytes from
	// DamageAt on have been overwritten.
	Damage                string
	DamageAt, DamageBytes int64
}

// Engines lists those that there are, sorted by name.
func Engines() []Engine {
	return []Engine{firebird(), mariadb(), openldap(), redis()}
}

// Find returns the engine of that name.
func Find(name string) (Engine, error) {
	all := Engines()
	i := slices.IndexFunc(all, func(e Engine) bool { return e.Name == name })
	if i < 0 {
		var names []string
		for _, e := range all {
			names = append(names, e.Name)
		}
		return Engine{}, fmt.Errorf("no engine %q; there are %s", name, strings.Join(names, ", "))
	}
	return all[i], nil
}

// Options are a cluster's options with this engine.
func (e Engine) Options(o cluster.Options) cluster.Options {
	o.Engine, o.Image, o.Port, o.Env = e.Name, e.Image, e.Port, e.Env
	o.Database += e.Database
	return o
}
