package api

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// ProxyProtocol is what a proxy asks GET /proxy to be upgraded to. From then on the agent
// sends lines of ProxyEvent and the proxy lines of ProxyReport, each at least every
// ProxyBeat.
const ProxyProtocol = "dbsupervisor-proxy/1"

const (
	// ProxyBeat is the longest time between two lines in either direction.
	ProxyBeat = time.Second
	// ProxyHoldBeat is the time between two reports while a handoff waits for them.
	ProxyHoldBeat = 50 * time.Millisecond
	// MaxProxyLine bounds a line in either direction.
	MaxProxyLine = 4096
)

// ProxyEvent is what an agent tells a proxy; each one is the whole state.
type ProxyEvent struct {
	Cluster  string `json:"cluster"`
	Instance string `json:"instance"`
	Role     Role   `json:"role"`
	Term     uint64 `json:"term"`
	// Primary: the database here takes connections for writing now.
	Primary bool `json:"primary"`
	// Port of the database on the agent's machine.
	Port int `json:"port"`
	// Hold is the name of a planned handoff that has been announced: no new connections.
	Hold string `json:"hold,omitempty"`
}

// ProxyReport is what a proxy tells an agent of its connections to the database there.
type ProxyReport struct {
	Proxy string `json:"proxy"` // one start of a proxy
	Hold  string `json:"hold,omitempty"`
	Open  int    `json:"open"`
	Busy  int    `json:"busy"` // of them, those on which something was sent a moment ago
}

// Drained is how far the proxies have got when a handoff stops waiting for them.
type Drained struct {
	Proxies int // that were told
	Silent  int // ... and have not said that they hold new connections
	Open    int // connections that are left
	Busy    int // ... on which something was sent a moment ago
}

const (
	maxProxies     = 256                    // subscriptions
	maxProxiesFrom = 32                     // ... from one address
	proxyPatience  = 5 * ProxyBeat          // a proxy that is silent for longer is gone
	proxyLook      = ProxyHoldBeat          // how often the agent's state is looked at
	idleEnough     = 500 * time.Millisecond // connections that are idle for so long end by nobody's doing
)

// Proxies are the proxies that have subscribed to this agent. The health server accepts
// them from anybody who reaches it: all that a stranger can do is to be told what
// /primary tells, and to claim connections, which delays a planned handoff by the time
// that handoff allows.
type Proxies struct {
	mu    sync.Mutex
	subs  map[*proxySub]bool
	event ProxyEvent    // newest, without Hold
	hold  string        // the announced handoff
	moved chan struct{} // closed and replaced when something was reported
}

type proxySub struct {
	host   string
	wake   chan struct{} // there is something to send
	report ProxyReport
	conn   net.Conn
}

// NewProxies is the empty set.
func NewProxies() *Proxies {
	return &Proxies{subs: map[*proxySub]bool{}, moved: make(chan struct{})}
}

// Hold tells all proxies to let new connections wait, and returns when the connections that
// they have to this database have ended, when the rest of them stands idle, after most, or
// when ctx ends.
func (p *Proxies) Hold(ctx context.Context, name string, most time.Duration) Drained {
	p.setHold(name)
	began := time.Now()
	timer := time.NewTimer(most)
	defer timer.Stop()
	for {
		d, moved := p.drained(name)
		idle := d.Busy == 0 && time.Since(began) >= idleEnough
		if d.Silent == 0 && (d.Open == 0 || idle) {
			return d
		}
		select {
		case <-moved:
		case <-timer.C:
			return d
		case <-ctx.Done():
			return d
		}
	}
}

// Resume ends a Hold; it is idempotent.
func (p *Proxies) Resume() { p.setHold("") }

func (p *Proxies) setHold(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold != name {
		p.hold = name
		p.wakeAll()
	}
}

// wakeAll has the state sent to everybody. p.mu is held.
func (p *Proxies) wakeAll() {
	for s := range p.subs {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// drained adds up what was reported. A proxy that reaches this agent in two ways counts once.
func (p *Proxies) drained(name string) (Drained, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var d Drained
	seen := map[string]bool{}
	for s := range p.subs {
		if r := s.report; r.Hold != name {
			d.Proxies++
			d.Silent++
		} else if !seen[r.Proxy] {
			seen[r.Proxy] = true
			d.Proxies++
			d.Open += r.Open
			d.Busy += r.Busy
		}
	}
	return d, p.moved
}

// watch keeps the state that proxies are told, until ctx ends; then they are all left.
func (p *Proxies) watch(ctx context.Context, state func() ProxyEvent) {
	t := time.NewTicker(proxyLook)
	defer t.Stop()
	for {
		e := state()
		p.mu.Lock()
		if e != p.event {
			p.event = e
			p.wakeAll()
		}
		p.mu.Unlock()
		select {
		case <-t.C:
		case <-ctx.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			for s := range p.subs {
				if s.conn != nil {
					_ = s.conn.Close() // its own goroutine says the rest
				}
			}
			return
		}
	}
}

// ServeHTTP takes a subscription.
func (p *Proxies) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), ProxyProtocol) {
		w.Header().Set("Upgrade", ProxyProtocol)
		http.Error(w, "this path is for dbsupervisor proxy", http.StatusUpgradeRequired)
		return
	}
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	s := p.join(host)
	if s == nil {
		http.Error(w, "too many proxies", http.StatusServiceUnavailable)
		return
	}
	defer p.leave(s)
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "can't be upgraded", http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	p.mu.Lock()
	s.conn = conn
	p.mu.Unlock()
	if conn.SetDeadline(time.Time{}) != nil {
		return
	}
	const accepted = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + ProxyProtocol + "\r\n\r\n"
	if _, err := conn.Write([]byte(accepted)); err != nil {
		return
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		p.listen(s, conn, rw.Reader)
	}()
	p.speak(s, conn, gone)
	_ = conn.Close()
	<-gone
}

// speak sends the state when it changes, and every beat.
func (p *Proxies) speak(s *proxySub, conn net.Conn, gone <-chan struct{}) {
	beat := time.NewTicker(ProxyBeat)
	defer beat.Stop()
	out := json.NewEncoder(conn)
	for {
		p.mu.Lock()
		e := p.event
		e.Hold = p.hold
		p.mu.Unlock()
		if conn.SetWriteDeadline(time.Now().Add(proxyPatience)) != nil || out.Encode(e) != nil {
			return
		}
		select {
		case <-s.wake:
		case <-beat.C:
		case <-gone:
			return
		}
	}
}

// listen takes reports until the proxy is gone.
func (p *Proxies) listen(s *proxySub, conn net.Conn, r *bufio.Reader) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, MaxProxyLine)
	for conn.SetReadDeadline(time.Now().Add(proxyPatience)) == nil && sc.Scan() {
		var rep ProxyReport
		if json.Unmarshal(sc.Bytes(), &rep) != nil || rep.Open < 0 || rep.Busy < 0 {
			return
		}
		p.mu.Lock()
		s.report = rep
		p.stir()
		p.mu.Unlock()
	}
}

// stir wakes whoever waits for reports. p.mu is held.
func (p *Proxies) stir() {
	close(p.moved)
	p.moved = make(chan struct{})
}

// join adds a subscription, nil if there are too many.
func (p *Proxies) join(host string) *proxySub {
	p.mu.Lock()
	defer p.mu.Unlock()
	same := 0
	for s := range p.subs {
		if s.host == host {
			same++
		}
	}
	if len(p.subs) >= maxProxies || same >= maxProxiesFrom {
		return nil
	}
	s := &proxySub{host: host, wake: make(chan struct{}, 1)}
	p.subs[s] = true
	return s
}

func (p *Proxies) leave(s *proxySub) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.subs, s)
	p.stir()
}

// Count is how many proxies are subscribed, and how many connections to this database they
// have.
func (p *Proxies) Count() (proxies, open int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[string]bool{}
	for s := range p.subs {
		if !seen[s.report.Proxy] {
			seen[s.report.Proxy] = true
			open += s.report.Open
		}
	}
	return len(seen), open
}
