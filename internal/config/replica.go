package config

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// The values of Config.Role.
const (
	RoleAny     = "any"     // primary or standby, as it comes
	RoleReplica = "replica" // serves reads and never becomes primary
)

// The values of ReadOnly.Enforced.
const (
	// EnforcedByEngine: the engine refuses every write, and no client can undo that.
	EnforcedByEngine = "engine"
	// EnforcedByRights: it refuses the writes of users without rights. Readers must be
	// given such a user; whoever may administer the database could write to the copy.
	EnforcedByRights = "rights"
)

// Replica makes a standby serve reads: a second container runs read-only on a copy of the
// newest snapshot and is replaced by the next one while it serves.
type Replica struct {
	// Enabled runs it whenever this instance is a standby.
	Enabled bool `yaml:"enabled"`
	// Ports are the stable read ports of this machine, IPv4 only. Default: the database's
	// main port, on the number above its write port.
	Ports []Port `yaml:"ports"`
	// Interval is the least time between the beginnings of two refreshes. Default 10s.
	Interval time.Duration `yaml:"interval"`
	// Schedule, if set, lets a refresh begin only at these times: a cron expression or
	// "@every 10m".
	Schedule string `yaml:"schedule"`
	// Warm are commands run in the new container before it gets readers. One that fails is
	// logged and changes nothing.
	Warm [][]string `yaml:"warm"`
	// WarmTimeout bounds all of them together. Default 1m.
	WarmTimeout time.Duration `yaml:"warm_timeout"`
	// Drain is how long sessions of the copy before may go on after a refresh; the next
	// refresh waits for them. Default 1m.
	Drain time.Duration `yaml:"drain"`
	// OnFailure says what becomes of the copy that serves when a refresh fails: "keep" it,
	// however old it gets (default), or "stop" it, which closes the read port until a refresh
	// succeeds.
	OnFailure string `yaml:"on_failure"`
	// NoLoadBalance makes /replica say 503 here, whatever else is true: load balancers send
	// no readers, while those who know the address are still served.
	NoLoadBalance bool `yaml:"noloadbalance"`
	// MaxAge is the age from which on /replica says no without being asked for one; 0, the
	// default, means never.
	MaxAge time.Duration `yaml:"max_age"`
	// Memory and CPUs limit each of at most two containers. Default: the database's.
	Memory Size    `yaml:"memory"`
	CPUs   float64 `yaml:"cpus"`
	// ReadOnly replaces what the engine's profile says, field by field.
	ReadOnly ReadOnly `yaml:"read_only"`
}

// ReadOnly says how an engine is run so that it can only be read. It is part of an engine's
// profile. The copy it runs on is thrown away afterwards, so it may be changed by recovery.
//
// In Args, Env and Files, $NAME and ${NAME} stand for the container's environment, which has
// DBSUPERVISOR_SNAPSHOT (the ID of the snapshot served), DBSUPERVISOR_TERM, DBSUPERVISOR_SEQ
// and DBSUPERVISOR_FROZEN (RFC 3339) besides; $$ is a dollar. The commands are given as they
// are: those that are for a shell find all of it in their environment.
type ReadOnly struct {
	// Enforced is EnforcedByEngine or EnforcedByRights; "" means that the engine has no known
	// way, and replica mode is refused.
	Enforced string `yaml:"enforced"`
	// Why says in one or two sentences what keeps writes out, and what does not.
	Why string `yaml:"why"`
	// Entrypoint and Command replace the database's if set. DefaultCommand is used if neither
	// they nor the database's own command are.
	Entrypoint     []string `yaml:"entrypoint"`
	Command        []string `yaml:"command"`
	DefaultCommand []string `yaml:"default_command"`
	// Args are appended to the command.
	Args []string `yaml:"args"`
	// Env is added to the database's environment and wins over it.
	Env map[string]string `yaml:"env"`
	// User replaces the database's user if set.
	User string `yaml:"user"`
	// Files are mounted read-only over the container's file system, so that nobody in the
	// container can change, rename or remove them.
	Files []ReadOnlyFile `yaml:"files"`
	// VolumeReadOnly mounts the copy itself read-only (after Prepare).
	VolumeReadOnly bool `yaml:"volume_read_only"`
	// Prepare is a command that is run to its end on the copy before the database is started
	// on it, in a container of the same image and user, without network: recovery of an engine
	// that can't do it read-only, a switch in the files. It replaces entrypoint and command.
	Prepare []string `yaml:"prepare"`
	// Ready is a command run in the started container once the probe has been answered, before
	// it gets readers: loading what is in no file, making a user. A failure fails the refresh.
	Ready []string `yaml:"ready"`
	// Probe is a command in the container that exits 0 only if the database answers and is
	// read-only. Default: the database's probe.
	Probe []string `yaml:"probe"`
	// StopSignal replaces the database's: a copy is thrown away, so it may end at once.
	StopSignal string `yaml:"stop_signal"`
}

// ReadOnlyFile is a file that is mounted read-only into the container.
type ReadOnlyFile struct {
	// Path is absolute, in the container. In the data path, the file belongs to the owner of
	// the data path, elsewhere to root.
	Path    string `yaml:"path"`
	Content string `yaml:"content"`
	// Mode has the permission bits; default 0644.
	Mode int `yaml:"mode"`
}

// Merge fills what r does not set from a profile's; environments are merged.
func (r ReadOnly) Merge(p ReadOnly) ReadOnly {
	text := func(set *string, profile string) {
		if *set == "" {
			*set = profile
		}
	}
	list := func(set *[]string, profile []string) {
		if *set == nil {
			*set = profile
		}
	}
	text(&r.Enforced, p.Enforced)
	text(&r.Why, p.Why)
	text(&r.User, p.User)
	text(&r.StopSignal, p.StopSignal)
	list(&r.Entrypoint, p.Entrypoint)
	list(&r.Command, p.Command)
	list(&r.DefaultCommand, p.DefaultCommand)
	list(&r.Args, p.Args)
	list(&r.Prepare, p.Prepare)
	list(&r.Ready, p.Ready)
	list(&r.Probe, p.Probe)
	if r.Files == nil {
		r.Files = p.Files
	}
	r.VolumeReadOnly = r.VolumeReadOnly || p.VolumeReadOnly
	env := map[string]string{}
	for _, m := range []map[string]string{p.Env, r.Env} {
		for k, v := range m {
			env[k] = v
		}
	}
	if len(env) > 0 {
		r.Env = env
	}
	return r
}

// replicaDefaults fills in what follows from other keys. It is idempotent: the ports are
// known only when the engine's profile has been merged in.
func (c *Config) replicaDefaults() {
	if c.Role == RoleReplica {
		c.Replica.Enabled, c.Failover.NoFailover = true, true
	}
	r := &c.Replica
	if r.Enabled && r.Ports == nil && len(c.Database.Ports) > 0 {
		p := c.Database.Ports[0]
		r.Ports = []Port{{Container: p.Container, Host: p.Host + 1, Address: p.Address}}
	}
	for i := range r.Ports {
		p := &r.Ports[i]
		if p.Container == 0 && len(c.Database.Ports) > 0 {
			p.Container = c.Database.Ports[0].Container
		}
	}
}

// MergeReadOnly fills in what the engine's profile says of replicas, and the read ports that
// follow from the database's.
func (c *Config) MergeReadOnly(p ReadOnly) {
	c.Replica.ReadOnly = c.Replica.ReadOnly.Merge(p)
	c.replicaDefaults()
}

func (v *validator) replica(used map[int]string) {
	c, r := v.c, v.c.Replica
	v.need(c.Role == RoleAny || c.Role == RoleReplica, "role", "is not a known value", `use "any" or "replica"`)
	if c.Role == RoleReplica && c.Has("replica.enabled") {
		v.need(r.Enabled, "replica.enabled", "contradicts role: replica", "remove one of the two")
	}
	v.need(r.Interval >= time.Second, "replica.interval", "must be at least 1s", "use for example 10s")
	v.need(r.Drain >= 0, "replica.drain", "must not be negative", "use for example 1m; 0 ends the old sessions at once")
	v.need(r.WarmTimeout > 0, "replica.warm_timeout", "must be more than 0", "use for example 1m")
	v.need(r.MaxAge >= 0, "replica.max_age", "must not be negative", "use for example 5m; 0 means that no age is too old")
	v.need(r.OnFailure == "keep" || r.OnFailure == "stop", "replica.on_failure", "is not a known value", `use "keep" or "stop"`)
	v.need(r.CPUs >= 0, "replica.cpus", "must not be negative", "use for example 1.5; 0 means the database's limit")
	v.need(r.Memory == 0 || r.Memory >= 6<<20, "replica.memory", "is less than Docker's minimum of 6MiB", "give the size with a unit, such as 4GiB")
	if r.Schedule != "" {
		_, err := ParseSchedule(r.Schedule)
		v.need(err == nil, "replica.schedule", "is not a schedule", `use "@every 10m" or five cron fields, such as "*/10 * * * *"`)
	}
	v.readOnly("replica.read_only", r.ReadOnly)
	if !r.Enabled {
		return
	}
	v.need(c.Database.Network != "host" && c.Database.Network != "none", "replica.enabled",
		"needs a Docker network of its own: two copies run side by side", "set database.network to bridge, or to the name of a network")
	for i, p := range r.Ports {
		key := fmt.Sprintf("replica.ports[%d]", i)
		if !v.c.Has("replica.ports") {
			key = "replica.enabled"
		}
		ok := v.need(p.Container >= 1 && p.Container <= 65535, key+".container", "is not a port", "use a number from 1 to 65535")
		ok = v.need(p.Host >= 1 && p.Host <= 65535, key+".host", "is not a port", "use a number from 1 to 65535") && ok
		ip := net.ParseIP(p.Address)
		v.need(p.Address == "" || ip != nil && ip.To4() != nil, key+".address", "is not an IPv4 address", "leave it out to listen on all addresses of this machine")
		if !ok {
			continue
		}
		other, taken := used[p.Host]
		v.need(!taken, key, fmt.Sprintf("uses host port %d, which is taken by %s", p.Host, other), "give each a port of its own: replica.ports: [{host: 5433}]")
		used[p.Host] = key
	}
}

func (v *validator) readOnly(key string, r ReadOnly) {
	switch r.Enforced {
	case "", EnforcedByEngine, EnforcedByRights:
	default:
		v.need(false, key+".enforced", "is not a known value", `use "engine" or "rights"`)
	}
	v.need(r.StopSignal == "" || knownSignal(r.StopSignal), key+".stop_signal", "is not a signal", "use for example SIGQUIT")
	for i, f := range r.Files {
		fkey := fmt.Sprintf("%s.files[%d]", key, i)
		v.need(strings.HasPrefix(f.Path, "/") || strings.HasPrefix(f.Path, "$"), fkey+".path", "is not an absolute path", "write it from the root of the container, or from a variable: $PGDATA/standby.signal")
		v.need(f.Mode >= 0 && f.Mode <= 0o777, fkey+".mode", "is not a file mode", "use for example 0644")
	}
}
