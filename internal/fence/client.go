package fence

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
)

// callTimeout bounds one call of the guard where ctx allows longer: a guard that was stopped
// accepts connections and never answers.
const callTimeout = 5 * time.Second

// Guard speaks to the guard process of this instance. Every call makes its own connection, so
// a guard that was restarted in between is no trouble. Safe for concurrent use. A guard that
// does not answer is ErrNoGuard; the caller must then count its lease as not extended.
type Guard struct {
	socket string

	mu     sync.Mutex
	freeze *guardConn // the running freeze, if any
}

// DialGuard returns a client for the guard that serves a run directory, after asking for its
// status to see that it is there.
func DialGuard(ctx context.Context, runDir string) (*Guard, error) {
	g := &Guard{socket: SocketPath(runDir)}
	if _, err := g.Status(ctx); err != nil {
		return nil, err
	}
	return g, nil
}

// Arm makes the guard kill a container at a deadline, from now on and whatever becomes of the
// caller. A guard that watches over an earlier container kills what is left of that first.
// Errors: ErrStaleTerm, ErrExpired, ErrWrongGroup; after any, the container must not run.
func (g *Guard) Arm(ctx context.Context, r ArmRequest) error {
	_, err := g.call(ctx, request{Op: opArm, Arm: &r})
	return wrap("arm guard", err)
}

// Extend moves the deadline of the armed term to a later moment; an earlier one is ignored.
// Errors: ErrExpired, ErrNotArmed (then Arm again).
func (g *Guard) Extend(ctx context.Context, term uint64, deadline boottime.Instant) error {
	_, err := g.call(ctx, request{Op: opExtend, Term: term, Deadline: deadline})
	return wrap("extend guard's deadline", err)
}

// Disarm ends the watch, after the database was stopped. ErrStillRunning means that it was
// not, and that the guard goes on.
func (g *Guard) Disarm(ctx context.Context) error {
	_, err := g.call(ctx, request{Op: opDisarm})
	return wrap("disarm guard", err)
}

// Kill makes the guard act as if the deadline were over and returns when the container is
// dead. It is no error when nothing is armed.
func (g *Guard) Kill(ctx context.Context) error {
	_, err := g.call(ctx, request{Op: opKill})
	return wrap("kill by guard", err)
}

// Status asks the guard what it is doing.
func (g *Guard) Status(ctx context.Context) (GuardStatus, error) {
	a, err := g.call(ctx, request{Op: opStatus})
	if err == nil && a.Status == nil {
		err = errors.New("guard: answer has no status")
	}
	if err != nil {
		return GuardStatus{}, wrap("ask guard for its status", err)
	}
	return *a.Status, nil
}

// FreezeBegin announces that the caller is about to freeze a group. Should the caller die, or
// not call FreezeEnd within the budget, the guard thaws it. One freeze at a time.
func (g *Guard) FreezeBegin(ctx context.Context, group cgroup.Group, budget time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.freeze != nil {
		return errors.New("begin freeze: the last one has not ended")
	}
	c, err := g.dial(ctx)
	if err != nil {
		return wrap("begin freeze", err)
	}
	if _, err := c.roundTrip(ctx, request{Op: opFreezeBegin, Group: group, Budget: budget}); err != nil {
		c.close()
		return wrap("begin freeze", err)
	}
	g.freeze = c
	return nil
}

// FreezeEnd says that the caller has thawed the group. broken means that it may have been
// thawed before, so that what was read meanwhile is not one point in time; the same must be
// assumed after an error.
func (g *Guard) FreezeEnd(ctx context.Context) (broken bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.freeze
	if c == nil {
		return true, errors.New("end freeze: none was begun")
	}
	g.freeze = nil
	defer c.close()
	a, err := c.roundTrip(ctx, request{Op: opFreezeEnd})
	if err != nil {
		return true, wrap("end freeze", err)
	}
	return a.Broken, nil
}

func (g *Guard) call(ctx context.Context, r request) (answer, error) {
	c, err := g.dial(ctx)
	if err != nil {
		return answer{}, err
	}
	defer c.close()
	return c.roundTrip(ctx, r)
}

// guardConn is one connection to the guard.
type guardConn struct {
	conn net.Conn
	in   *bufio.Scanner
}

func (g *Guard) dial(ctx context.Context) (*guardConn, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", g.socket)
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrNoGuard, err)
	}
	in := bufio.NewScanner(conn)
	in.Buffer(nil, maxLine)
	return &guardConn{conn: conn, in: in}, nil
}

func (c *guardConn) close() { _ = c.conn.Close() }

func (c *guardConn) roundTrip(ctx context.Context, r request) (answer, error) {
	b, err := encode(r)
	if err != nil {
		return answer{}, err
	}
	if err := c.conn.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return answer{}, fmt.Errorf("%w (%w)", ErrNoGuard, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	lost := func(err error) error {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("%w (%w)", ErrNoGuard, err)
	}
	if _, err := c.conn.Write(b); err != nil {
		return answer{}, lost(err)
	}
	if !c.in.Scan() {
		err := c.in.Err()
		if err == nil {
			err = errors.New("connection closed")
		}
		return answer{}, lost(err)
	}
	var a answer
	if err := json.Unmarshal(c.in.Bytes(), &a); err != nil {
		return answer{}, fmt.Errorf("decode guard's answer: %w", err)
	}
	return a, a.err()
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
