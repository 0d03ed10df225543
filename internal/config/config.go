// Package config is the agent's configuration: one YAML file, checked completely before
// anything is touched. An error names file, line and what to do.
package config

import "time"

// Config is the whole file. Zero values are replaced by the defaults named here when the
// file is loaded; durations are written as in "10s", sizes as in "64MiB".
type Config struct {
	// Cluster is the name of the cluster, used in container, unit and firewall names:
	// lower-case letters, digits and dashes, at most 32. Required.
	Cluster string `yaml:"cluster"`
	// Instance names this machine inside the cluster. Default: the host's name.
	Instance string `yaml:"instance"`
	// Zone is where it runs ("eu-central-1a"), for people and for choosing a successor.
	Zone string `yaml:"zone"`
	// Advertise is the host name or IP address under which clients and the other
	// instances reach this machine; it is written to the register. Default: the address
	// that this machine's default route uses.
	Advertise string `yaml:"advertise"`
	// Share is the cluster's directory on the shared file system. Required, must exist.
	Share string `yaml:"share"`
	// ShareMount, if set, must be a mount point with Share on or below it; otherwise the
	// agent refuses to run: an unmounted share must not look like an empty one.
	ShareMount string `yaml:"share_mount"`
	// Dir is the instance's own directory on a local disk: volume, forks, spool, state.
	// Default /var/lib/dbsupervisor/<cluster>.
	Dir string `yaml:"dir"`
	// RunDir holds sockets and what must not outlive this boot.
	// Default /run/dbsupervisor/<cluster>.
	RunDir string `yaml:"run_dir"`
	// Init says whether an agent may initialise a new cluster where there is none:
	// "never" (default; use `dbsupervisor init`) or "once".
	Init string `yaml:"init"`

	// Role says what this instance may be: "any" (default), or "replica", which serves reads
	// (replica.enabled) and never becomes primary (failover.nofailover).
	Role string `yaml:"role"`

	Lease     Lease     `yaml:"lease"`
	Sync      Sync      `yaml:"sync"`
	Retention Retention `yaml:"retention"`
	Database  Database  `yaml:"database"`
	HTTP      HTTP      `yaml:"http"`
	Failover  Failover  `yaml:"failover"`
	Replica   Replica   `yaml:"replica"`
	Handoff   Handoff   `yaml:"handoff"`
	Log       Log       `yaml:"log"`

	src *source // where the keys are in the file; nil for a Config made by hand
}

// Lease has the timing of the single-writer lease. Checked when the file is loaded:
// renew_interval < ttl/2; op_timeout <= renew_interval; margin >= the larger of 1s and
// ttl/5; renew_interval + op_timeout < ttl - margin, so that one renewal may fail; and
// sync.max_freeze < ttl - margin - renew_interval.
type Lease struct {
	Backend       string        `yaml:"backend"`        // "file" (default)
	TTL           time.Duration `yaml:"ttl"`            // default 10s
	RenewInterval time.Duration `yaml:"renew_interval"` // default ttl/5
	OpTimeout     time.Duration `yaml:"op_timeout"`     // default renew_interval
	Margin        time.Duration `yaml:"margin"`         // kill time + clock error; default the larger of 1s and ttl/5
}

// Sync says when and how snapshots are taken.
type Sync struct {
	// Schedule is a cron expression or "@every 30s". Default "@every 1m".
	Schedule string `yaml:"schedule"`
	// Interval is the short form of Schedule "@every Interval", down to 1s, in whole
	// seconds. Only one of the two may be set.
	Interval time.Duration `yaml:"interval"`
	// MaxInterval is the longest time between two snapshots that the primary may choose by
	// itself while the share is slow. Default 2m, or twice Interval where that is longer.
	MaxInterval time.Duration `yaml:"max_interval"`
	// Tier says how change is found: "auto" (the best that this machine can), "tracked"
	// (eBPF; refuses to run without) or "hashed".
	Tier string `yaml:"tier"`
	// Rehash is how many bytes of the volume are read per second to prove the tracker: a
	// difference is an alarm. Default 4MiB; 0 means none.
	Rehash Size `yaml:"rehash"`
	// SpareCopy says whether a standby refreshes into a copy that nobody uses, so that its
	// old state stays usable until the new one is whole: "auto" (a reflink clone where the
	// file system has them, else a second copy where the disk has room for it) or "never".
	SpareCopy string `yaml:"spare_copy"`
	// MaxFreeze bounds how long the database may stand still for a snapshot; a capture
	// that would take longer is given up. Default 250ms, less when the lease's times leave
	// no room for it.
	MaxFreeze time.Duration `yaml:"max_freeze"`
	// Workers is how many files are read, compressed or restored at once. Default: CPUs.
	Workers int `yaml:"workers"`
	// MinFree is how much room on the local disk is always left to the database.
	// Default 256MiB.
	MinFree Size `yaml:"min_free"`
	// ForkKeep is how long data set aside as a fork is kept. Default 168h.
	ForkKeep time.Duration `yaml:"fork_keep"`
}

// Retention says how long snapshots stay: every one for All, one an hour for Hourly, one
// a day for Daily. Grace is the time between condemning and deleting. The rest is the
// upkeep of what stays.
type Retention struct {
	All    time.Duration `yaml:"all"`    // default 1h
	Hourly time.Duration `yaml:"hourly"` // default 24h
	Daily  time.Duration `yaml:"daily"`  // default 168h
	Grace  time.Duration `yaml:"grace"`  // default 1h
	// CompactBelow is the share of live blocks, in percent, below which a pack's live
	// blocks are written anew so that the pack can go. Default 30; 0 means never.
	CompactBelow int `yaml:"compact_below"`
	// Verify is the time in which every file of the store has been read and checked once,
	// the one that was checked longest ago first. Default 168h; 0 means never.
	Verify time.Duration `yaml:"verify"`
	// Rate bounds how many bytes per second compaction and verification move together.
	// Default 16MiB.
	Rate Size `yaml:"rate"`
}

// Database describes the container. What is not set comes from the engine's profile; a
// list that is set to [] is empty, whatever the profile says.
type Database struct {
	Engine      string            `yaml:"engine"` // profile: "postgres", "generic"
	Image       string            `yaml:"image"`
	Pull        string            `yaml:"pull"` // "missing" (default), "always", "never"
	Entrypoint  []string          `yaml:"entrypoint"`
	Command     []string          `yaml:"command"`
	Env         map[string]string `yaml:"env"`
	EnvFile     string            `yaml:"env_file"` // KEY=VALUE lines, for secrets; wins over env
	User        string            `yaml:"user"`
	DataPath    string            `yaml:"data_path"` // where the volume is mounted in the container
	Mounts      []Mount           `yaml:"mounts"`    // further bind mounts: configuration, certificates
	Ports       []Port            `yaml:"ports"`     // the first is the database's main port
	ShmSize     Size              `yaml:"shm_size"`
	Memory      Size              `yaml:"memory"`
	CPUs        float64           `yaml:"cpus"`
	Ulimits     map[string]int64  `yaml:"ulimits"`
	CapAdd      []string          `yaml:"cap_add"`
	CapDrop     []string          `yaml:"cap_drop"`
	Sysctls     map[string]string `yaml:"sysctls"`
	Network     string            `yaml:"network"` // Docker network; default "bridge"
	StopSignal  string            `yaml:"stop_signal"`
	StopTimeout time.Duration     `yaml:"stop_timeout"`
	// Probe is a command run in the container that exits 0 when the database answers; not
	// set means the profile's. After the profile was merged in, an empty Probe means a TCP
	// connection to the main port.
	Probe         []string      `yaml:"probe"`
	ProbeInterval time.Duration `yaml:"probe_interval"` // default 2s
	ProbeTimeout  time.Duration `yaml:"probe_timeout"`  // default 5s
	// StartTimeout is how long a start (crash recovery included) may take. Default 5m.
	StartTimeout time.Duration `yaml:"start_timeout"`
	// BeforeFreeze and AfterFreeze are commands run in the container around each capture. What
	// BeforeFreeze writes is in the snapshot; if it fails, there is none.
	BeforeFreeze []string `yaml:"before_freeze"`
	AfterFreeze  []string `yaml:"after_freeze"`
	// BeforeReady is a command run in the container when the database has answered for the
	// first time and before a client can reach it; after a restart of the agent once more, so it
	// must find nothing to do the second time.
	BeforeReady []string `yaml:"before_ready"`
	// BeforeStop is a command run in the container before a planned stop, when no client can
	// reach the database any more.
	BeforeStop []string `yaml:"before_stop"`
	// HookTimeout is how long each of these commands may take, except that BeforeReady may take
	// StartTimeout. Default 30s.
	HookTimeout time.Duration `yaml:"hook_timeout"`
	// Files are small files, path to text, written into the container before it starts, owned by
	// root and readable by all. They are no place for secrets.
	Files map[string]string `yaml:"files"`
	// After MaxRestarts deaths within RestartWindow the term is given up.
	MaxRestarts   int           `yaml:"max_restarts"`   // default 3
	RestartWindow time.Duration `yaml:"restart_window"` // default 10m
}

// Mount is a bind mount.
type Mount struct {
	Source   string `yaml:"source"`
	Target   string `yaml:"target"`
	ReadOnly bool   `yaml:"read_only"`
}

// Port publishes a port of the container. Host 0 means the same number.
type Port struct {
	Container int    `yaml:"container"`
	Host      int    `yaml:"host"`
	Address   string `yaml:"address"` // default: all addresses
}

// HTTP is the read-only endpoint for load balancers and Prometheus.
type HTTP struct {
	Listen string `yaml:"listen"` // default ":8008"
}

// Failover says whether, and before whom, this instance may become primary by itself.
type Failover struct {
	// Priority decides between standbys whose copies are equally fresh: the higher one takes
	// over first. 0 is the same as NoFailover. Default 100.
	Priority int `yaml:"priority"`
	// MaxPerHour bounds the failovers of the whole cluster within an hour that no person asked
	// for. When it is reached this instance takes over only when it is asked to. Default 4.
	MaxPerHour int `yaml:"max_per_hour"`
	// NoFailover keeps this instance from ever becoming primary.
	NoFailover bool `yaml:"nofailover"`
}

// Never says that this instance must not become primary.
func (f Failover) Never() bool { return f.NoFailover || f.Priority == 0 }

// Handoff is a planned end of the database here: a switchover, a stop, a rollback.
type Handoff struct {
	// Drain is how long it waits for the connections of clients behind proxies to end
	// before the database stops. Default 2s; 0: not at all.
	Drain time.Duration `yaml:"drain"`
}

// Log configures hclog.
type Log struct {
	Level string `yaml:"level"` // trace, debug, info (default), warn, error
	JSON  bool   `yaml:"json"`
}

// Size is a number of bytes, written as "64MiB", "1GB" or a plain number.
type Size int64
