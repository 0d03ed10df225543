// Package container is what dbsupervisor asks of a Docker engine, and nothing else: have an
// image, run one database container that only the agent ever starts, find it again, and end it.
//
// Every call is bounded by its context and, unless it says otherwise, by a limit of its own. A
// daemon that is down or hangs is told apart (ErrUnavailable) from one that says no. Secrets in
// environment variables never appear in errors or logs.
package container

import (
	"errors"
	"time"
)

// Labels of every container that an agent makes; by them it finds its container again.
const (
	LabelCluster  = "dbsupervisor.cluster"
	LabelInstance = "dbsupervisor.instance"
	LabelTerm     = "dbsupervisor.term"
	LabelVolume   = "dbsupervisor.volume"
	LabelRole     = "dbsupervisor.role"
	// LabelGeneration tells a replica's container from the one before and the next.
	LabelGeneration = "dbsupervisor.generation"
	// LabelImage holds the image's digest as EnsureImage returned it. Run sets it.
	LabelImage = "dbsupervisor.image"
)

// Values of LabelRole. Only one container of RolePrimary is ever a writer, and nothing but
// its label makes a container that: those of RoleReplica are never fenced, guarded or adopted
// as a primary's.
const (
	RolePrimary = "primary"
	RoleReplica = "replica"
)

// Errors of this package. Test them with errors.Is.
var (
	// ErrUnavailable: the Docker daemon is down, restarting or does not answer. What was asked
	// may happen later all the same.
	ErrUnavailable = errors.New("docker daemon does not answer; is its service running?")
	// ErrNotFound: there is no such container.
	ErrNotFound = errors.New("no such container")
	// ErrNoImage: the image is not on this machine and may not, or can't, be pulled.
	ErrNoImage = errors.New("image is not available")
	// ErrNameTaken: another container has the name.
	ErrNameTaken = errors.New("container name is taken")
	// ErrInvalidSpec: a Spec can't be turned into a container; nothing was created.
	ErrInvalidSpec = errors.New("container specification is not valid")
)

// Values of a pull policy.
const (
	PullMissing = "missing" // pull what is not here; also the meaning of ""
	PullAlways  = "always"  // ask the registry each time
	PullNever   = "never"   // use what is here
)

// Spec describes a container. Its restart policy is always "no": only an agent that holds the
// term may start a writer, not Docker, whatever happens to the daemon or the machine.
type Spec struct {
	// Name of the container, unique on this engine.
	Name string
	// Image is a reference, or what EnsureImage returned for it.
	Image string
	// Entrypoint and Command replace the image's own if set.
	Entrypoint, Command []string
	// Env has variables with their values; they win over those of EnvFile.
	Env map[string]string
	// EnvFile is a file on this machine with lines "NAME=value"; # begins a comment line. It
	// is read when the container is created.
	EnvFile string
	// Files are written into the container before it starts.
	Files []File
	// Mounts are bind mounts, the database's volume among them. Sources must exist.
	Mounts []Mount
	// Ports are published on this machine.
	Ports  []Port
	Labels map[string]string
	// ShmSize and Memory in bytes; 0 means the engine's default and no limit.
	ShmSize, Memory int64
	// CPUs is a limit in processors, 0 for none.
	CPUs float64
	// Ulimits by name without "RLIMIT_", as soft and hard limit.
	Ulimits map[string]int64
	// CapAdd and CapDrop name Linux capabilities, with or without "CAP_".
	CapAdd, CapDrop []string
	Sysctls         map[string]string
	// Network is a Docker network that exists, "host" or "none"; "" means bridge.
	Network string
	// User is a name or number, with ":group" if wanted; "" means the image's.
	User string
	// StopSignal is what Stop sends first, by name; "" means the image's.
	StopSignal string
	// StopTimeout is what `docker stop` by hand would wait for; Stop has its own parameter.
	StopTimeout time.Duration
	// WorkDir and Hostname replace the image's and the engine's choice.
	WorkDir, Hostname string
}

// File is written into a container between its creation and its start.
type File struct {
	Path     string // absolute, in the container; its directory must exist or is made
	Data     []byte // never logged
	Mode     uint32 // permission bits; 0 means 0600
	UID, GID int
}

// Mount is a bind mount.
type Mount struct {
	Source, Target string // absolute
	ReadOnly       bool
}

// PortAny lets the engine choose a port of this machine; see Info.Published.
const PortAny = -1

// Port publishes a port.
type Port struct {
	Container int
	Host      int    // 0 means the same number, PortAny one that is free
	Address   string // of this machine; "" means all
	Protocol  string // "tcp" if empty
}

// Info is what is known of a container.
type Info struct {
	ID, Name string
	// ImageDigest is what EnsureImage said of the image when the container was made.
	ImageDigest string
	Labels      map[string]string
	// Running is true while paused, too. A container that was frozen behind Docker's back
	// looks running and not paused.
	Running, Paused, OOMKilled bool
	ExitCode                   int
	// Pid of the container's first process on this machine; 0 if it does not run.
	Pid       int
	StartedAt time.Time
	// FinishedAt is zero for a container that has never ended.
	FinishedAt time.Time
	// Error is why the engine could not start it, if so.
	Error string
	// IP is the container's own address in its network, "" in host and none: for probing the
	// database past the published port.
	IP string
	// Published are the ports of this machine that lead to the container's TCP ports, while it
	// runs.
	Published map[int]int
	// Restart is the restart policy as the engine has it: "no" for every container of ours.
	Restart string
}

// ExecResult is the outcome of a command that ended. Both texts are cut to 64 KiB.
type ExecResult struct {
	ExitCode       int
	Stdout, Stderr string
}
