// Package engine knows what one kind of database needs: its image, port, data path and
// environment, how to ask whether it answers, how to stop it, and what to run around a
// freeze. That is data, one small file for each engine; everything in it can be set
// otherwise in the configuration.
package engine

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"dbsupervisor/internal/config"
)

// profiles is read-only data of the program; embedding needs a package variable.
//
//go:embed profiles/*.yaml
var profiles embed.FS

// ErrUnknown is wrapped when there is no profile of that name.
var ErrUnknown = errors.New("unknown engine")

// Profile is what one engine needs. Zero values mean that the profile has no opinion.
type Profile struct {
	Image        string            `yaml:"image"`
	DataPath     string            `yaml:"data_path"`
	Ports        []int             `yaml:"ports"` // in the container; the first is the main one
	Env          map[string]string `yaml:"env"`
	Entrypoint   []string          `yaml:"entrypoint"`
	Command      []string          `yaml:"command"`
	User         string            `yaml:"user"`
	ShmSize      config.Size       `yaml:"shm_size"`
	Probe        []string          `yaml:"probe"` // empty: TCP connection to the main port
	StopSignal   string            `yaml:"stop_signal"`
	StopTimeout  time.Duration     `yaml:"stop_timeout"`
	BeforeReady  []string          `yaml:"before_ready"`
	BeforeFreeze []string          `yaml:"before_freeze"`
	AfterFreeze  []string          `yaml:"after_freeze"`
	BeforeStop   []string          `yaml:"before_stop"`
	HookTimeout  time.Duration     `yaml:"hook_timeout"`
	// Files are written into the container before it starts: path -> text.
	Files map[string]string `yaml:"files"`
	// FirstStartNeeds lists variables of which at least one must be set before the image
	// can make a new database.
	FirstStartNeeds []string `yaml:"first_start_needs"`
	// Replica says how to run it read-only; nothing in it means that there is no known way.
	Replica config.ReadOnly `yaml:"replica"`
}

// Names lists the profiles that are built in, sorted.
func Names() []string {
	files, err := fs.Glob(profiles, "profiles/*.yaml")
	if err != nil {
		return nil // only a malformed pattern can fail
	}
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = strings.TrimSuffix(strings.TrimPrefix(f, "profiles/"), ".yaml")
	}
	slices.Sort(names)
	return names
}

// Load returns a built-in profile.
func Load(name string) (Profile, error) {
	var p Profile
	data, err := profiles.ReadFile("profiles/" + name + ".yaml")
	if err != nil || name == "" {
		return p, fmt.Errorf("load engine profile %q: %w", name, ErrUnknown)
	}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&p); err != nil {
		return p, fmt.Errorf("load engine profile %q: %w", name, err)
	}
	return p, nil
}

// Merge fills what the configuration does not set. A list that is empty but not nil was
// set to [] and stays empty. Environments and files are merged, the configuration's
// win.
func (p Profile) Merge(d config.Database) config.Database {
	d.Image = or(d.Image, p.Image)
	d.DataPath = or(d.DataPath, p.DataPath)
	d.User = or(d.User, p.User)
	d.ShmSize = or(d.ShmSize, p.ShmSize)
	d.StopSignal = or(d.StopSignal, p.StopSignal)
	d.StopTimeout = or(d.StopTimeout, p.StopTimeout)
	d.Entrypoint = orList(d.Entrypoint, p.Entrypoint)
	d.Command = orList(d.Command, p.Command)
	d.Probe = orList(d.Probe, p.Probe)
	d.BeforeReady = orList(d.BeforeReady, p.BeforeReady)
	d.BeforeFreeze = orList(d.BeforeFreeze, p.BeforeFreeze)
	d.AfterFreeze = orList(d.AfterFreeze, p.AfterFreeze)
	d.BeforeStop = orList(d.BeforeStop, p.BeforeStop)
	d.HookTimeout = or(d.HookTimeout, p.HookTimeout)
	if d.Ports == nil {
		for _, port := range p.Ports {
			d.Ports = append(d.Ports, config.Port{Container: port, Host: port})
		}
	}
	d.Env = merged(p.Env, d.Env)
	d.Files = merged(p.Files, d.Files)
	return d
}

// merged is a new map of both; what is set wins.
func merged(profile, set map[string]string) map[string]string {
	out := map[string]string{}
	maps.Copy(out, profile)
	maps.Copy(out, set)
	return out
}

func or[T comparable](set, profile T) T {
	var zero T
	if set != zero {
		return set
	}
	return profile
}

func orList(set, profile []string) []string {
	if set != nil {
		return set
	}
	return profile
}

// Resolve replaces cfg.Database by what the container will really be given: the profile
// merged in and checked. It is idempotent. Warnings are remarks for a person.
func Resolve(cfg *config.Config) (warnings []string, err error) {
	p, err := Load(cfg.Database.Engine)
	if errors.Is(err, ErrUnknown) {
		return nil, cfg.ErrorAt("database.engine", "is not a known engine", "known: "+strings.Join(Names(), ", ")+`; use "generic" for any other database`)
	}
	if err != nil {
		return nil, err
	}
	cfg.Database = p.Merge(cfg.Database)
	cfg.MergeReadOnly(p.Replica)
	if cfg.Replica.ReadOnly.Probe == nil {
		cfg.Replica.ReadOnly.Probe = cfg.Database.Probe
	}
	d := &cfg.Database
	switch {
	case d.Image == "":
		return nil, cfg.ErrorAt("database.image", "is required for this engine", "name the image with its version, such as registry.example.com/db:1.2")
	case d.DataPath == "":
		return nil, cfg.ErrorAt("database.data_path", "is required for this engine", "name the directory in the container that holds the data")
	case len(d.Ports) == 0:
		return nil, cfg.ErrorAt("database.ports", "must name at least one port", "the first port is the one that clients write to: ports: [{container: 5432}]")
	}
	if d.Network == "host" && len(d.Probe) == 0 {
		return nil, cfg.ErrorAt("database.probe", "is required with network: host", "the main port is closed until the probe is answered, so connecting to it can't be the probe; name a command that asks the database")
	}
	if cfg.Replica.Enabled && cfg.Replica.ReadOnly.Enforced == "" {
		return nil, cfg.ErrorAt("replica.enabled", "is not possible: no way is known to run this engine read-only",
			"leave replicas out, or say in replica.read_only how it is run (enforced, args, files, probe)")
	}
	// The profile's defaults can collide with what the file says (http.listen, mounts).
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	env, err := d.Environment()
	if err != nil {
		return nil, cfg.ErrorAt("database.env_file", err.Error(), "write one KEY=VALUE per line")
	}
	if len(p.FirstStartNeeds) > 0 && !slices.ContainsFunc(p.FirstStartNeeds, func(k string) bool { return env[k] != "" }) {
		warnings = append(warnings, "none of "+strings.Join(p.FirstStartNeeds, ", ")+" is set: the image can't make a new database without (an imported or restored one starts)")
	}
	return warnings, nil
}
