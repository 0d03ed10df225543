package proxy

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"dbsupervisor/internal/api"
)

// claimKept is how long an agent that can't be reached may be believed to be primary against
// another one that says it is, in an older term.
const claimKept = time.Minute

// board is what is known of the agents.
type board struct {
	p *Proxy

	mu     sync.Mutex
	agents map[string]*agent // by host:port of the health server
	term   uint64            // of the route
	now    chan struct{}     // closed and replaced: ask the agents at once
	hurrys time.Time         // when it last was
}

// agent is one instance as it was last heard of.
type agent struct {
	addr, host string
	stop       context.CancelFunc
	live       bool // there is a connection to it
	event      api.ProxyEvent
	heard      time.Time
	// claim is the last event in which it was primary and nothing that came later took
	// that back. An agent that is restarted, or can't be reached, leaves its database
	// running: the gate is what tells whether clients may still go there.
	claim *api.ProxyEvent
	reads int // port of a replica that is young enough; 0: there is none
}

func newBoard(p *Proxy) *board {
	return &board{p: p, agents: map[string]*agent{}, now: make(chan struct{})}
}

// run follows all agents until ctx ends.
func (b *board) run(ctx context.Context) {
	var followers sync.WaitGroup
	defer followers.Wait()
	for {
		b.lookUp(ctx, &followers)
		select {
		case <-ctx.Done():
			return
		case <-b.hurried():
		case <-time.After(b.p.cfg.LookUpEvery):
		}
	}
}

// hurryPause is the least time between two calls of everybody.
const hurryPause = 200 * time.Millisecond

// hurry has agents that can't be reached, and names, asked again at once: a database has
// refused a connection.
func (b *board) hurry() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.hurrys) < hurryPause {
		return
	}
	b.hurrys = time.Now()
	close(b.now)
	b.now = make(chan struct{})
}

func (b *board) hurried() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

// lookUp finds the agents' addresses, begins to follow those that are new and leaves those
// that are gone. A name that can't be resolved keeps the addresses that it had.
func (b *board) lookUp(ctx context.Context, followers *sync.WaitGroup) {
	found := map[string]string{} // address -> host
	for _, a := range b.p.cfg.Agents {
		name, port, err := net.SplitHostPort(a)
		if err != nil {
			continue // checked with the configuration
		}
		if _, err := netip.ParseAddr(name); err == nil {
			found[a] = name
			continue
		}
		lctx, cancel := context.WithTimeout(ctx, lookUpTime)
		ips, err := b.p.cfg.LookUp(lctx, name)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				b.p.log.Warn("agents' name not resolved, keeping what is known", "name", name, "error", err)
			}
			b.mu.Lock()
			for _, o := range b.agents {
				if _, oport, _ := net.SplitHostPort(o.addr); oport == port {
					found[o.addr] = o.host
				}
			}
			b.mu.Unlock()
		}
		for _, ip := range ips {
			host := ip.Unmap().String()
			found[net.JoinHostPort(host, port)] = host
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for addr, a := range b.agents {
		if _, ok := found[addr]; !ok {
			a.stop()
			delete(b.agents, addr)
			b.p.log.Info("agent is gone from the names", "agent", addr)
		}
	}
	for addr, host := range found {
		if b.agents[addr] != nil {
			continue
		}
		fctx, stop := context.WithCancel(ctx)
		a := &agent{addr: addr, host: host, stop: stop}
		b.agents[addr] = a
		followers.Go(func() { b.follow(fctx, a) })
		if b.p.read != nil {
			followers.Go(func() { b.askReplica(fctx, a) })
		}
	}
	b.route()
}

const lookUpTime = 2 * time.Second

// update takes what an agent says.
func (b *board) update(a *agent, e api.ProxyEvent) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := !a.live || a.event != e
	a.live, a.event, a.heard = true, e, time.Now()
	switch {
	case e.Primary && e.Hold == "":
		a.claim = &e
	case a.claim != nil && e.Hold == "" && (e.Term == a.claim.Term || e.Term == 0) && (e.Role == api.RoleDown || e.Role == api.RoleStarting):
		// The agent or the database is being restarted in the same term.
	default:
		a.claim = nil
	}
	if changed {
		b.p.log.Debug("agent says", "agent", a.addr, "instance", e.Instance, "role", string(e.Role), "term", e.Term, "primary", e.Primary, "hold", e.Hold)
		b.route()
	}
}

// lost says that an agent can't be reached.
func (b *board) lost(a *agent, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if a.live {
		b.p.log.Info("agent lost", "agent", a.addr, "instance", a.event.Instance, "error", err)
	}
	a.live = false
	b.route()
}

// route tells the desks where clients go. b.mu is held.
func (b *board) route() {
	var newest uint64 // term
	for _, a := range b.agents {
		if a.live {
			newest = max(newest, a.event.Term)
		}
	}
	var best *agent
	for _, a := range b.agents {
		c := a.claim
		if c == nil || c.Term < newest {
			continue
		}
		if best == nil || c.Term > best.claim.Term || c.Term == best.claim.Term && a.live && !best.live {
			best = a
		}
	}
	if best != nil && !best.live {
		// A claim that nobody confirms any more gives way to one that is made now.
		for _, a := range b.agents {
			if a.live && a.claim != nil && time.Since(best.heard) > claimKept {
				best = a
			}
		}
	}
	var to []target
	if best != nil {
		to = []target{best.target(b.p.cfg.Write.Port, best.claim)}
	}
	if best != nil && best.claim.Term != b.term {
		b.p.log.Info("primary found", "instance", best.claim.Instance, "address", to[0].addr, "term", best.claim.Term)
		b.term = best.claim.Term
	}
	b.p.write.route(to)
	if newest > 0 {
		if n := b.p.write.cutBefore(newest); n > 0 {
			b.p.log.Info("connections to a term that is over cut off", "term", newest, "connections", n)
			b.p.metrics.cut.Add(float64(n))
		}
	}
	b.p.metrics.primary(best)
	if b.p.read != nil {
		b.routeReads(to)
	}
}

// routeReads is route for reads. b.mu is held.
func (b *board) routeReads(primary []target) {
	var to []target
	for _, a := range b.agents {
		if a.reads > 0 {
			to = append(to, a.target(a.reads, &a.event))
		}
	}
	if len(to) == 0 && b.p.cfg.ReadPrimary {
		to = primary
	}
	slices.SortFunc(to, func(x, y target) int {
		if x.addr < y.addr {
			return -1
		}
		return 1
	})
	b.p.read.route(to)
}

func (a *agent) target(port int, e *api.ProxyEvent) target {
	if port == 0 {
		port = e.Port
	}
	return target{addr: net.JoinHostPort(a.host, strconv.Itoa(port)), agent: e.Instance, term: e.Term}
}

// readable says whether an agent's replica serves reads, and at which port.
func (b *board) readable(a *agent, reads bool, port int) {
	if b.p.cfg.Read.Port != 0 {
		port = b.p.cfg.Read.Port
	}
	if !reads {
		port = 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if a.reads != port {
		a.reads = port
		b.route()
	}
}
