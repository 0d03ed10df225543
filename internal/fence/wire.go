package fence

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
)

// Errors that a guard answers with. Test them with errors.Is.
var (
	// ErrExpired: the armed deadline is over, or a new one was over when it arrived. What was
	// armed is being killed; nothing can be extended any more.
	ErrExpired = errors.New("guard: deadline is over")
	// ErrNotArmed: the guard watches over nothing (it has lost its state, or never had it), or
	// over another term. Arm it again.
	ErrNotArmed = errors.New("guard: not armed for this term")
	// ErrStaleTerm: the guard has already been armed for a newer term of this cluster, or has
	// already killed in this one.
	ErrStaleTerm = errors.New("guard: term is not new enough")
	// ErrWrongGroup: the control group is not that container's.
	ErrWrongGroup = errors.New("guard: control group is not this container's")
	// ErrStillRunning: the container has processes, so the guard won't leave it alone.
	ErrStillRunning = errors.New("guard: container still runs")
	// ErrGuardRunning: another guard serves this directory.
	ErrGuardRunning = errors.New("another guard is running here")
	// ErrNoGuard: no guard answers. Start dbsupervisor's guard unit.
	ErrNoGuard = errors.New("guard does not answer; is its service running?")
)

// codes are the wire names of the errors above.
func codes() map[string]error {
	return map[string]error{
		"expired": ErrExpired, "not_armed": ErrNotArmed, "stale_term": ErrStaleTerm,
		"wrong_group": ErrWrongGroup, "still_running": ErrStillRunning,
	}
}

// maxLine bounds a request or answer in bytes.
const maxLine = 64 << 10

// SocketPath is where the guard of a run directory listens.
func SocketPath(runDir string) string { return filepath.Join(runDir, "guard.sock") }

// ArmRequest says what a guard shall kill, and when.
type ArmRequest struct {
	// Cluster is the cluster's ID: terms are compared only within it.
	Cluster string `json:"cluster,omitempty"`
	Term    uint64 `json:"term"`
	// Container is the container's full ID. It must be part of every group that is killed.
	Container string `json:"container"`
	// Group is the container's group. It may be zero while the container has not been started
	// yet: the guard then searches for it at the deadline (and does so in any case, for the
	// container may have been started again in another group).
	Group cgroup.Group `json:"group"`
	// Deadline is when to kill, on this boot's CLOCK_BOOTTIME.
	Deadline boottime.Instant `json:"deadline"`
}

// GuardStatus is what a guard says about itself.
type GuardStatus struct {
	PID    int    `json:"pid"`
	BootID string `json:"boot_id"`
	// Armed: Arm was called and Disarm has not been since. It stays true after a kill, as the
	// guard then keeps the container dead.
	Armed bool `json:"armed"`
	ArmRequest
	// Fired: the deadline passed and the guard began to kill.
	Fired bool `json:"fired,omitempty"`
	// Killed: after that, no process was left.
	Killed bool `json:"killed,omitempty"`
	// Latency is the time from the deadline to the last process's death, if Killed.
	Latency time.Duration `json:"latency_ns,omitempty"`
	// KillError says why the last kill did not succeed; it is being tried again.
	KillError string `json:"kill_error,omitempty"`
	// Freezing: an agent has a freeze going on.
	Freezing bool `json:"freezing,omitempty"`
}

// Operations on the wire.
const (
	opArm         = "arm"
	opExtend      = "extend"
	opDisarm      = "disarm"
	opKill        = "kill"
	opStatus      = "status"
	opFreezeBegin = "freeze_begin"
	opFreezeEnd   = "freeze_end"
)

// request and answer are one line of JSON each.
type request struct {
	Op       string           `json:"op"`
	Arm      *ArmRequest      `json:"arm,omitempty"`
	Term     uint64           `json:"term,omitempty"`
	Deadline boottime.Instant `json:"deadline,omitempty"`
	Group    cgroup.Group     `json:"group,omitzero"`
	Budget   time.Duration    `json:"budget_ns,omitempty"`
}

type answer struct {
	Error  string       `json:"error,omitempty"`
	Code   string       `json:"code,omitempty"`
	Broken bool         `json:"broken,omitempty"`
	Status *GuardStatus `json:"status,omitempty"`
}

// fail makes the answer for an error.
func fail(err error) answer {
	a := answer{Error: err.Error()}
	for code, e := range codes() {
		if errors.Is(err, e) {
			a.Code = code
		}
	}
	return a
}

// err is the error that the answer stands for.
func (a answer) err() error {
	switch {
	case a.Error == "":
		return nil
	case codes()[a.Code] != nil:
		return &guardError{msg: a.Error, kind: codes()[a.Code]}
	}
	return fmt.Errorf("guard: %s", a.Error)
}

// guardError keeps the guard's words and the sentinel.
type guardError struct {
	msg  string
	kind error
}

func (e *guardError) Error() string { return e.msg }
func (e *guardError) Unwrap() error { return e.kind }

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	return append(b, '\n'), nil
}
