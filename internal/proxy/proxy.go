// Package proxy connects clients to whichever instance is primary now, and lets them wait
// while none is. It finds the primary through the agents' health servers and needs nothing
// else: no share, no Docker, no rights. That it may be wrong about the primary harms nobody:
// the write port of every other instance is closed by its gate.
package proxy

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Config is what New needs. Durations and numbers must be set; zero means what the comment says.
type Config struct {
	Cluster string
	// Agents are the instances' health servers, host:port. A host name stands for all its
	// addresses, and is looked up again every LookUpEvery.
	Agents      []string
	LookUpEvery time.Duration
	Write       Listener
	Read        Listener // Listen "": none
	// MaxAge of a replica's data for reads; 0: any.
	MaxAge time.Duration
	// ReadPrimary lets the primary serve reads while no replica can.
	ReadPrimary bool

	HoldTime    time.Duration // how long a connection may wait for a database
	HoldMost    int           // how many may wait, for each listener
	Most        int           // connections of clients in all
	MostSource  int           // ... from one address; 0: no limit
	DialTimeout time.Duration
	// UserTimeout is how long a client may leave unread or unacknowledged what was sent to
	// it before it is cut off; 0: for as long as the kernel finds a sign of life.
	UserTimeout time.Duration
	KeepAlive   net.KeepAliveConfig
	// Drain is how long connections may go on after Run was told to end.
	Drain time.Duration
	// TrustFrom are the load balancers whose connections begin with a PROXY protocol header.
	TrustFrom []netip.Prefix

	Log hclog.Logger
	// LookUp resolves a host name; nil: the system's resolver.
	LookUp func(ctx context.Context, host string) ([]netip.Addr, error)
	// Rand is where this proxy's name comes from; nil: crypto/rand.
	Rand io.Reader
}

// Listener is one address for clients.
type Listener struct {
	Listen string // host:port
	// Port of the database on the instances; 0: what the agent says.
	Port int
	// Most is how many connections to one database are open at a time; further clients
	// wait. 0: no limit.
	Most int
	// SendHeader begins each connection to the database with a PROXY protocol header.
	SendHeader bool
}

// Proxy serves clients. Make it with New, run it once with Run.
type Proxy struct {
	cfg     Config
	log     hclog.Logger
	name    string
	board   *board
	write   *desk
	read    *desk // nil: none
	sources *sources
	metrics *metrics

	listeners []net.Listener
	stopping  chan struct{} // closed when Run was told to end
	clients   sync.WaitGroup
}

// New starts to listen, so that an address that is taken is found out at the start. Close
// must be called unless Run was.
func New(cfg Config) (*Proxy, error) {
	if cfg.LookUp == nil {
		cfg.LookUp = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	var b [8]byte
	if _, err := io.ReadFull(cfg.Rand, b[:]); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	p := &Proxy{cfg: cfg, log: cfg.Log, name: hex.EncodeToString(b[:]), stopping: make(chan struct{}), metrics: newMetrics(), sources: newSources(cfg.Most, cfg.MostSource)}
	p.write = newDesk("write", cfg, cfg.Write, p.metrics)
	desks := []*desk{p.write}
	if cfg.Read.Listen != "" {
		p.read = newDesk("read", cfg, cfg.Read, p.metrics)
		desks = append(desks, p.read)
	}
	p.board = newBoard(p)
	for _, d := range desks {
		l, err := net.Listen("tcp", d.listener.Listen)
		if err != nil {
			_ = p.Close()
			return nil, fmt.Errorf("listen for clients (%s): %w", d.name, err)
		}
		p.listeners = append(p.listeners, l)
	}
	return p, nil
}

// Addr is where clients of the write listener (0) or the read listener (1) connect.
func (p *Proxy) Addr(n int) net.Addr { return p.listeners[n].Addr() }

// Close stops listening. It is idempotent.
func (p *Proxy) Close() error {
	for _, l := range p.listeners {
		_ = l.Close() // the only error is that it was closed already
	}
	return nil
}

// Run serves until ctx ends. Then it takes no more clients, lets those that it has go on for
// Drain, and cuts off the rest.
func (p *Proxy) Run(ctx context.Context) error {
	live, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cut()
	// Where clients go is followed until the last of them has gone.
	parts.Go(func() { p.board.run(live) })
	desks := []*desk{p.write, p.read}
	var doors sync.WaitGroup
	failed := make(chan error, len(p.listeners))
	for i, l := range p.listeners {
		doors.Go(func() {
			if err := p.accept(live, l, desks[i]); err != nil {
				failed <- err
			}
		})
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	close(p.stopping)
	_ = p.Close()
	doors.Wait()
	done := make(chan struct{})
	go func() { p.clients.Wait(); close(done) }()
	timer := time.NewTimer(p.cfg.Drain)
	defer timer.Stop()
	p.log.Info("draining", "open", p.open(), "drain", p.cfg.Drain.String())
	select {
	case <-done:
	case <-timer.C:
		p.log.Warn("connections cut off at the end", "open", p.open())
		cut()
		p.write.cutAll()
		if p.read != nil {
			p.read.cutAll()
		}
		<-done
	}
	return err
}

// open is how many clients are connected or wait.
func (p *Proxy) open() int { return p.sources.count() }

// Ready says why new clients could not be served now, "" if they could.
func (p *Proxy) Ready() string {
	select {
	case <-p.stopping:
		return "the proxy is being stopped"
	default:
	}
	if !p.write.has() {
		return "no primary takes connections; clients wait"
	}
	return ""
}

// acceptPause is the wait after an accept that failed for want of something.
const acceptPause = 50 * time.Millisecond

// accept takes clients until the listener is closed.
func (p *Proxy) accept(ctx context.Context, l net.Listener, d *desk) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			var ne net.Error
			if !errors.As(err, &ne) {
				return fmt.Errorf("accept clients (%s): %w", d.name, err)
			}
			// Too many open files, most likely: what is there ends some time.
			p.log.Warn("client not accepted", "listener", d.name, "error", err)
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
				return nil
			}
			continue
		}
		tc, ok := c.(*net.TCPConn)
		if !ok {
			_ = c.Close()
			continue
		}
		p.clients.Go(func() { p.serve(ctx, tc, d) })
	}
}
