package api

import (
	"context"
	"errors"
	"time"

	"dbsupervisor/internal/boottime"
)

// Agent is what the supervisor offers to the command line and the HTTP endpoints. All
// methods are safe for concurrent use. An error may carry a hint (see WithHint).
//
// The context of a request ends when the person at the other end goes away. A move that
// has begun (the database was asked to stop) is finished all the same: half a handoff
// would be an outage.
type Agent interface {
	// Live answers at once, without any I/O.
	Live() Live
	// Status puts everything together. It must not wait for the share or for Docker:
	// status is most wanted when those hang.
	Status(ctx context.Context) (Status, error)
	// Sync takes and commits a snapshot now and returns when it is committed. While one
	// is under way it waits for that one and takes another.
	Sync(ctx context.Context, report Report) (SyncResult, error)
	// Switchover moves the term in a planned way; nothing acknowledged is lost. On an
	// instance that is not primary it leaves an order in the register. It returns when
	// another instance holds the term.
	Switchover(ctx context.Context, req SwitchoverRequest, report Report) (MoveResult, error)
	// Failover takes the term without the old primary's help, or makes a primary fence
	// itself at once. What is beyond head is lost (kept as a fork).
	Failover(ctx context.Context, req FailoverRequest, report Report) (MoveResult, error)
	// Pause switches automatic failover off (true) or on for the whole cluster.
	Pause(ctx context.Context, paused bool) error
	// Rollback makes the content of an older snapshot the new head.
	Rollback(ctx context.Context, req RollbackRequest, report Report) (RollbackResult, error)
	// Restart ends the agent without handing off and without touching the database, right
	// after it returned; the service manager starts the (new) program, which takes the
	// container over.
	Restart(ctx context.Context) error
	// History returns the newest n entries (all for n <= 0), oldest first.
	History(ctx context.Context, n int) ([]Event, error)
	// Forks lists what was set aside, newest first.
	Forks(ctx context.Context) ([]Fork, error)
	// Token waits for the next snapshot that begins by itself and says what a replica must have
	// to show everything that had been acknowledged when it was called. ErrNotPrimary; ErrBusy
	// if too many wait already.
	Token(ctx context.Context) (Token, error)
}

// Report takes progress of a long operation; it is never nil, cheap, and safe for
// concurrent use.
type Report func(Progress)

// Set lets a Report serve where the storage engine wants its progress interface.
func (r Report) Set(phase string, done, total int64) {
	r(Progress{Phase: phase, Done: done, Total: total})
}

// Live is the part of the state that load balancers ask for many times a second. The
// server compares Deadline with the clock when it answers, so that a loop that hangs
// can't go on calling itself primary.
type Live struct {
	Role Role
	Term uint64
	// Deadline of the lease on CLOCK_BOOTTIME; zero when it is not held.
	Deadline boottime.Instant
	// DatabaseAnswers says that the last probe was answered and not too long ago.
	DatabaseAnswers bool
	// ServesReads says that a database here may be read although this is no primary.
	ServesReads bool
	// Replica is what is served to readers; nil while nothing is.
	Replica *LiveReplica
	// NoLoadBalance says that load balancers shall send no readers here all the same.
	NoLoadBalance bool
	// Failing says why this instance does not fulfil its role's duty; "" means it does.
	Failing string
	// Beat is when the supervisor's loop last went round; /health compares it with the
	// clock. Zero: not known, not checked.
	Beat boottime.Instant
}

// SyncResult describes a committed snapshot.
type SyncResult struct {
	ID           string  `json:"id"`
	Unchanged    bool    `json:"unchanged"` // nothing had changed: head is the same as before
	FreezeMS     float64 `json:"freeze_ms"`
	DurationMS   float64 `json:"duration_ms"`
	ChangedBytes int64   `json:"changed_bytes"`
	StoredBytes  int64   `json:"stored_bytes"`
	Capture      Capture `json:"capture,omitzero"`
	// Skipped names sockets, fifos and devices, which no snapshot keeps.
	Skipped []string `json:"skipped,omitempty"`
}

// SwitchoverRequest asks for a planned move.
type SwitchoverRequest struct {
	To string `json:"to,omitempty"` // instance; "" lets the primary choose
}

// FailoverRequest asks for a forced move.
type FailoverRequest struct {
	To string `json:"to,omitempty"` // instance; "" is the one that is asked
	// Terminated says that the operator knows the old instance to be gone for good; only
	// then the wait for the TTL may be cut short.
	Terminated bool `json:"terminated,omitempty"`
}

// MoveResult says where the term went.
type MoveResult struct {
	Primary    string  `json:"primary"`
	Term       uint64  `json:"term"`
	DurationMS float64 `json:"duration_ms"`
	// Lossless says that everything acknowledged is in the new primary's data.
	Lossless bool   `json:"lossless"`
	Note     string `json:"note,omitempty"`
}

// RollbackRequest names the snapshot to go back to.
type RollbackRequest struct {
	Snapshot string `json:"snapshot"` // ID
}

// RollbackResult names the new head.
type RollbackResult struct {
	Head       string    `json:"head"`
	From       string    `json:"from"`   // the head that was left; still in the list of snapshots
	Frozen     time.Time `json:"frozen"` // when the content was captured
	DurationMS float64   `json:"duration_ms"`
}

// Errors that keep their identity across the socket.
var (
	// ErrNotPrimary: only the primary can do that.
	ErrNotPrimary = errors.New("this instance is not the primary")
	// ErrBusy: another operation of the same kind is under way.
	ErrBusy = errors.New("another operation is under way")
	// ErrNoSuccessor: nobody could take the term over.
	ErrNoSuccessor = errors.New("no other instance could take over")
	// ErrNoAgent: nothing listens at the socket.
	ErrNoAgent = errors.New("no agent is running")
	// ErrNoSnapshot: there is no snapshot with that ID or at that time.
	ErrNoSnapshot = errors.New("no such snapshot")
)

// WithHint adds what a person can do to an error. Both are kept across the socket. A nil
// error stays nil.
func WithHint(err error, hint string) error {
	if err == nil || hint == "" {
		return err
	}
	return &hinted{err: err, hint: hint}
}

// HintOf returns the outermost hint in an error's chain, or "". Any error in the chain with
// a method `Hint() string` can give one.
func HintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }
func (h *hinted) Hint() string  { return h.hint }
