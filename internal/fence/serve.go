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

// maxFreezeBudget bounds what an agent may ask for: more is a mistake in units.
const maxFreezeBudget = 10 * time.Minute

// serve answers connections until ctx ends.
func (g *guard) serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer l.Close()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// Out of file descriptors, most likely. The loop that kills is not concerned.
			g.log.Error("can't accept a connection", "error", err)
			g.waitUntil(ctx, g.cfg.Clock.Now().Add(100*time.Millisecond))
			continue
		}
		g.connGroup.Add(1)
		go func() {
			defer g.connGroup.Done()
			g.handle(ctx, c)
		}()
	}
}

// handle answers one connection's requests.
func (g *guard) handle(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	in := bufio.NewScanner(c)
	in.Buffer(nil, maxLine)
	for in.Scan() {
		var r request
		var a answer
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			a = fail(fmt.Errorf("decode request: %w", err))
		} else if r.Op == opFreezeBegin {
			g.handleFreeze(ctx, c, in, r)
			return // a freeze is the last thing on its connection
		} else {
			a = g.answer(ctx, r)
		}
		if !reply(c, a) {
			return
		}
	}
}

func reply(c net.Conn, a answer) bool {
	b, err := encode(a)
	if err != nil {
		return false
	}
	// A client that does not read its answer must not hold a goroutine for ever.
	_ = c.SetWriteDeadline(time.Now().Add(callTimeout))
	_, err = c.Write(b)
	return err == nil
}

func (g *guard) answer(ctx context.Context, r request) answer {
	var err error
	switch r.Op {
	case opStatus:
		return answer{Status: g.status()}
	case opArm:
		if r.Arm == nil {
			return fail(errors.New("arm without arguments"))
		}
		err = g.arm(ctx, *r.Arm)
	case opExtend:
		err = g.extend(r.Term, r.Deadline)
	case opDisarm:
		err = g.disarm()
	case opKill:
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		err = g.killNow(ctx)
	default:
		err = fmt.Errorf("operation %q is not known", r.Op)
	}
	if err != nil {
		return fail(err)
	}
	return answer{}
}

// freezeWatch is one agent's freeze.
type freezeWatch struct {
	superseded chan struct{} // closed when a newer freeze begins
	quiet      chan struct{} // closed when it has taken note of that, or has ended
}

// handleFreeze answers freeze_begin and stays until freeze_end, the end of the connection, or
// the guard's end, and thaws then. When the budget is over, it thaws and goes on thawing.
func (g *guard) handleFreeze(ctx context.Context, c net.Conn, in *bufio.Scanner, r request) {
	if r.Budget <= 0 || r.Budget > maxFreezeBudget {
		reply(c, fail(fmt.Errorf("freeze budget %s is out of range", r.Budget)))
		return
	}
	groups := []cgroup.Group{r.Group}
	if r.Group.IsZero() { // frozen by the container runtime
		if groups = g.groups(g.snapshot().ArmRequest); len(groups) == 0 {
			reply(c, fail(errors.New("freeze without a control group")))
			return
		}
	}
	thaw := func() {
		for _, grp := range groups {
			if err := grp.Thaw(); err != nil {
				g.log.Error("can't thaw the database", "path", grp.FreezerPath, "error", err)
			}
		}
	}
	w := &freezeWatch{superseded: make(chan struct{}), quiet: make(chan struct{})}
	quiet := sync.OnceFunc(func() { close(w.quiet) })
	g.mu.Lock()
	old := g.freeze
	g.freeze = w
	kills := g.kills
	g.mu.Unlock()
	if old != nil { // its thaw must not hit what is frozen from now on
		close(old.superseded)
		<-old.quiet
	}
	// end comes before the answer: with that the agent may begin the next freeze.
	end := func() {
		thaw()
		quiet()
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.freeze == w {
			g.freeze = nil
		}
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	until := g.cfg.Clock.Now().Add(r.Budget)
	if !reply(c, answer{}) {
		end()
		return
	}
	ended := make(chan bool, 1) // true: properly
	go func() {
		var e request
		ended <- in.Scan() && json.Unmarshal(in.Bytes(), &e) == nil && e.Op == opFreezeEnd
	}()
	timer := g.timer(ctx, until)
	superseded := w.superseded
	broken := false
	for {
		select {
		case properly := <-ended:
			g.mu.Lock()
			broken = broken || g.kills != kills
			g.mu.Unlock()
			end()
			if properly {
				reply(c, answer{Broken: broken})
			} else {
				g.log.Warn("agent went away in the middle of a freeze, thawed the database")
			}
			return
		case <-timer:
			if !broken {
				g.log.Warn("freeze is over its budget, thawed the database", "budget", r.Budget)
			}
			thaw()
			broken = true
			timer = g.timer(ctx, g.cfg.Clock.Now().Add(rethawEvery))
		case <-superseded:
			thaw()
			quiet()
			broken, timer, superseded = true, nil, nil
		case <-ctx.Done():
			end()
			return
		}
	}
}

// timer closes its channel at a moment. It never does if ctx ends first.
func (g *guard) timer(ctx context.Context, at boottime.Instant) <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		if g.cfg.Clock.WaitUntil(ctx, at) == nil || ctx.Err() == nil {
			close(ch)
		}
	}()
	return ch
}
