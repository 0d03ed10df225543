package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
)

// instance is a health server as agents have it, with a made-up agent behind it, and a
// made-up database.
type instance struct {
	api.Agent // what nobody asks
	t         *testing.T
	name      string
	addr      string // of the health server
	db        *backend
	proxies   *api.Proxies
	old       bool // it has no /proxy
	stop      context.CancelFunc
	ended     chan struct{}

	mu   sync.Mutex
	live api.Live
}

func (i *instance) Live() api.Live {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.live
}

// is makes the agent say something else.
func (i *instance) is(role api.Role, term uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.live = api.Live{Role: role, Term: term, ServesReads: role == api.RoleStandby}
	if role == api.RoleStandby {
		i.live.Replica = &api.LiveReplica{Term: term, FreshAt: boottime.Real{}.Now()}
	}
	if role == api.RolePrimary || role == api.RoleHandoff {
		i.live.Deadline, i.live.DatabaseAnswers = boottime.Real{}.Now().Add(time.Hour), true
	}
}

func newInstance(t *testing.T, name string) *instance {
	t.Helper()
	i := &instance{t: t, name: name, db: newBackend(t, name)}
	i.is(api.RoleStandby, 1)
	i.start("127.0.0.1:0")
	t.Cleanup(func() { i.down() })
	return i
}

// start runs the agent.
func (i *instance) start(addr string) {
	i.t.Helper()
	if i.proxies = api.NewProxies(); i.old {
		i.proxies = nil
	}
	var h *api.Health
	until(i.t, "port of the agent is free", func() bool {
		var err error
		h, err = api.NewHealth(api.HealthConfig{Listen: addr, Cluster: "shop", Instance: i.name, Agent: i, Clock: boottime.Real{},
			Log: hclog.NewNullLogger(), Database: i.db.port, Reads: i.db.port, Proxies: i.proxies})
		return err == nil
	})
	i.addr = h.Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	i.stop, i.ended = stop, ended
	go func() { defer close(ended); _ = h.Run(ctx) }()
}

// down ends the agent, not its database.
func (i *instance) down() { i.stop(); <-i.ended }

// backend answers each line with its name and the line. Closed, it refuses connections, as
// a gate does.
type backend struct {
	t    *testing.T
	name string
	port int

	mu       sync.Mutex
	listener net.Listener
	conns    map[net.Conn]bool
	early    int      // connections that are closed without a word
	first    [][]byte // what they had been told
	raw      func(net.Conn)
	seen     []string
}

func newBackend(t *testing.T, name string) *backend {
	t.Helper()
	b := &backend{t: t, name: name, conns: map[net.Conn]bool{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	b.port = l.Addr().(*net.TCPAddr).Port
	must(t, l.Close())
	t.Cleanup(func() { b.close(); b.cut() })
	return b
}

// open accepts connections.
func (b *backend) open() {
	b.t.Helper()
	var l net.Listener
	until(b.t, "port of the database is free", func() bool {
		var err error
		l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", b.port))
		return err == nil
	})
	b.take(l)
}

// take accepts connections at a listener.
func (b *backend) take(l net.Listener) {
	b.mu.Lock()
	b.listener = l
	b.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			b.conns[c] = true
			b.mu.Unlock()
			go b.serve(c)
		}
	}()
}

func (b *backend) serve(c net.Conn) {
	defer func() {
		_ = c.Close()
		b.mu.Lock()
		delete(b.conns, c)
		b.mu.Unlock()
	}()
	b.mu.Lock()
	early, raw := b.early > 0, b.raw
	if early {
		b.early--
	}
	b.mu.Unlock()
	if early {
		buf := make([]byte, 100)
		n, _ := c.Read(buf)
		b.mu.Lock()
		b.first = append(b.first, buf[:n])
		b.mu.Unlock()
		return
	}
	if raw != nil {
		raw(c)
		return
	}
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			if errors.Is(err, io.EOF) {
				_, _ = fmt.Fprintf(c, "%s:bye\n", b.name)
			}
			return
		}
		b.mu.Lock()
		b.seen = append(b.seen, strings.TrimSpace(line))
		b.mu.Unlock()
		if _, err := fmt.Fprintf(c, "%s:%s", b.name, line); err != nil {
			return
		}
	}
}

// close refuses further connections.
func (b *backend) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.listener != nil {
		_ = b.listener.Close()
	}
}

// cut resets the connections that there are.
func (b *backend) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReader(r) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// start runs a proxy for these agents.
func start(t *testing.T, edit func(*Config), agents ...*instance) (p *Proxy, stop func() error) {
	t.Helper()
	cfg := Config{
		Cluster: "shop", LookUpEvery: 50 * time.Millisecond, Write: Listener{Listen: "127.0.0.1:0"},
		HoldTime: 30 * time.Second, HoldMost: 100, Most: 10000, DialTimeout: time.Second,
		KeepAlive: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3},
		Drain:     10 * time.Second, Log: hclog.NewNullLogger(),
	}
	if testing.Verbose() {
		cfg.Log = hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: t.Output()})
	}
	for _, a := range agents {
		cfg.Agents = append(cfg.Agents, a.addr)
	}
	if edit != nil {
		edit(&cfg)
	}
	p, err := New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	var once sync.Once
	var result error
	stop = func() error {
		once.Do(func() { cancel(); result = <-ended })
		return result
	}
	t.Cleanup(func() { p.write.cutAll(); _ = stop() })
	return p, stop
}

// client is a connection to the proxy.
type client struct {
	*net.TCPConn
	t *testing.T
	r *bufio.Reader
}

func dial(t *testing.T, p *Proxy) *client {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr(0).String())
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	return &client{TCPConn: c.(*net.TCPConn), t: t, r: bufio.NewReader(c)}
}

func (c *client) say(line string) {
	c.t.Helper()
	_, err := io.WriteString(c.TCPConn, line+"\n")
	must(c.t, err)
}

// ask says something and wants the answer of one instance.
func (c *client) ask(line, from string) {
	c.t.Helper()
	c.say(line)
	c.hears(from + ":" + line)
}

func (c *client) hears(want string) {
	c.t.Helper()
	got, err := c.r.ReadString('\n')
	if err != nil || got != want+"\n" {
		c.t.Fatalf("heard %q, %v; want %q", got, err, want)
	}
}

// ends wants the connection to be over.
func (c *client) ends() {
	c.t.Helper()
	_, err := c.r.ReadString('\n')
	var ne net.Error
	if err == nil || errors.As(err, &ne) && ne.Timeout() {
		c.t.Fatalf("connection goes on: %v", err)
	}
}

func (p *Proxy) waiting() int {
	p.write.mu.Lock()
	defer p.write.mu.Unlock()
	return len(p.write.queue)
}

func (p *Proxy) serving() int {
	p.write.mu.Lock()
	defer p.write.mu.Unlock()
	return len(p.write.sessions)
}

// goes says where new clients go.
func (p *Proxy) goes() string {
	p.write.mu.Lock()
	defer p.write.mu.Unlock()
	if len(p.write.to) == 0 {
		return ""
	}
	return p.write.to[0].agent
}

func prefixes(ss ...string) (out []netip.Prefix) {
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
