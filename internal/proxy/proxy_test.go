package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dbsupervisor/internal/api"
)

// primary makes an instance the primary, its database open.
func (i *instance) primary(term uint64) {
	i.t.Helper()
	i.db.open()
	i.is(api.RolePrimary, term)
}

// TestFollowsThePrimary: clients reach the primary; when another one has the next term, they
// reach that, and what hangs on the old one is cut off.
func TestFollowsThePrimary(t *testing.T) {
	a, b := newInstance(t, "a"), newInstance(t, "b")
	a.primary(1)
	p, _ := start(t, nil, a, b)
	old := dial(t, p)
	old.ask("one", "a")
	// The machine is lost: its database stays silent, its agent too.
	a.db.close()
	a.down()
	b.primary(2)
	c := dial(t, p)
	c.ask("two", "b")
	old.ends()
	c.ask("three", "b")
}

// TestZombie: of two that call themselves primary the one with the higher term is believed,
// in whatever order they are heard.
func TestZombie(t *testing.T) {
	a, b := newInstance(t, "a"), newInstance(t, "b")
	b.primary(7)
	p, _ := start(t, nil, a, b)
	dial(t, p).ask("one", "b")
	a.primary(6)
	until(t, "both claims are known", func() bool {
		p.board.mu.Lock()
		defer p.board.mu.Unlock()
		n := 0
		for _, a := range p.board.agents {
			if a.claim != nil {
				n++
			}
		}
		return n == 2
	})
	dial(t, p).ask("two", "b")
}

// TestOtherCluster: an agent of another cluster is not believed.
func TestOtherCluster(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, func(c *Config) { c.Cluster, c.HoldTime = "other", 300*time.Millisecond }, a)
	dial(t, p).ends()
	if why := p.Ready(); why == "" {
		t.Error("ready without a primary")
	}
}

// TestHoldsInOrder: clients wait while there is no primary, and are then served in the order
// in which they came.
func TestHoldsInOrder(t *testing.T) {
	a := newInstance(t, "a")
	p, _ := start(t, func(c *Config) { c.Write.Most = 1 }, a)
	var clients []*client
	for i := range 10 {
		clients = append(clients, dial(t, p))
		until(t, "it waits", func() bool { return p.waiting() == i+1 })
		clients[i].say(fmt.Sprint(i)) // said while waiting: must not be lost
	}
	a.primary(1)
	for i, c := range clients {
		c.hears(fmt.Sprintf("a:%d", i))
		if i < len(clients)-1 && p.serving() > 1 {
			t.Errorf("%d connections to the database, want one at a time", p.serving())
		}
		must(t, c.Close())
	}
	a.db.mu.Lock()
	defer a.db.mu.Unlock()
	if !slices.IsSorted(a.db.seen) || len(a.db.seen) != 10 {
		t.Errorf("served in the order %v", a.db.seen)
	}
}

// TestGateClosed: the agent says primary, but the port refuses: clients wait, one at a time
// tries, and all are served once it opens.
func TestGateClosed(t *testing.T) {
	a := newInstance(t, "a")
	a.is(api.RolePrimary, 1)
	p, _ := start(t, nil, a)
	var clients []*client
	for i := range 20 {
		clients = append(clients, dial(t, p))
		clients[i].say("x")
	}
	until(t, "all wait or try", func() bool { return p.open() == 20 && p.waiting() >= 19 })
	a.db.open()
	for _, c := range clients {
		c.hears("a:x")
	}
}

// TestHoldIsBounded: in number and in time, and who goes away leaves room.
func TestHoldIsBounded(t *testing.T) {
	a := newInstance(t, "a")
	p, _ := start(t, func(c *Config) { c.HoldMost, c.HoldTime = 3, 2*time.Second }, a)
	var clients []*client
	for range 3 {
		clients = append(clients, dial(t, p))
	}
	until(t, "three wait", func() bool { return p.waiting() == 3 })
	turnedAway(t, p, "127.0.0.1")
	if p.waiting() != 3 {
		t.Errorf("%d wait, want 3", p.waiting())
	}
	must(t, clients[0].Close())
	until(t, "the one that went away is gone", func() bool { return p.waiting() == 2 })
	last := dial(t, p)
	began := time.Now()
	for _, c := range append(clients[1:], last) {
		c.ends()
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("turned away after %s", took)
	}
}

// TestThousandsHeld: a great many clients wait without costing much, no more than allowed,
// and all of them are served.
func TestThousandsHeld(t *testing.T) {
	const most, more = 2000, 50
	a := newInstance(t, "a")
	p, _ := start(t, func(c *Config) { c.HoldMost = most }, a)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var clients []*net.TCPConn
	connect := func() {
		if c, err := net.Dial("tcp", p.Addr(0).String()); err == nil { // else it was turned away already
			clients = append(clients, c.(*net.TCPConn))
		}
	}
	for range most {
		connect()
	}
	until(t, "all wait", func() bool { return p.waiting() == most })
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := (int64(after.HeapAlloc+after.StackInuse) - int64(before.HeapAlloc+before.StackInuse)) / most
	if each > 32<<10 {
		t.Errorf("a waiting client costs %d bytes", each)
	}
	t.Logf("a waiting client costs %d bytes, both ends of the test included", each)
	for range more {
		connect()
	}
	until(t, "the rest was turned away", func() bool { return p.open() == most })
	a.primary(1)
	var ok sync.WaitGroup
	bad := make(chan error, most)
	for _, c := range clients[:most] {
		ok.Go(func() {
			buf := make([]byte, 4)
			_, err := io.WriteString(c, "x\n")
			if err == nil {
				_, err = io.ReadFull(c, buf)
			}
			if err != nil || string(buf) != "a:x\n" {
				bad <- fmt.Errorf("%q, %w", buf, err)
			}
			_ = c.Close()
		})
	}
	ok.Wait()
	close(bad)
	for err := range bad {
		t.Error(err)
	}
	for _, c := range clients[most:] {
		_ = c.Close()
	}
	until(t, "all are gone", func() bool { return p.open() == 0 })
}

// TestSwitchover: the announcement reaches the proxy, new clients wait, the handoff waits for
// those that are there, and nobody sees an error.
func TestSwitchover(t *testing.T) {
	a, b := newInstance(t, "a"), newInstance(t, "b")
	a.primary(1)
	p, _ := start(t, nil, a, b)
	running := dial(t, p)
	running.ask("one", "a")
	until(t, "the proxy has subscribed and reported", func() bool { n, open := a.proxies.Count(); return n == 1 && open == 1 })
	a.is(api.RoleHandoff, 1)
	still := dial(t, p)
	still.ask("still", "a") // until it is announced
	must(t, still.Close())
	drained := make(chan api.Drained, 1)
	go func() { drained <- a.proxies.Hold(context.Background(), "h1", 20*time.Second) }()
	until(t, "new clients are held", func() bool { return p.goes() == "" })
	waiting := dial(t, p)
	waiting.say("two")
	until(t, "it waits", func() bool { return p.waiting() == 1 })
	for range 20 { // in use: the handoff goes on waiting
		running.ask("more", "a")
		select {
		case d := <-drained:
			t.Fatalf("drained while a connection is in use: %+v", d)
		case <-time.After(50 * time.Millisecond):
		}
	}
	must(t, running.Close())
	if d := <-drained; d != (api.Drained{Proxies: 1}) {
		t.Errorf("drained: %+v", d)
	}
	a.db.close()
	a.is(api.RoleStandby, 1)
	a.proxies.Resume()
	b.primary(2)
	waiting.hears("b:two")
}

// TestIdleConnections: a handoff does not wait for connections on which nothing happens.
func TestIdleConnections(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	c.ask("one", "a")
	until(t, "it is known", func() bool { _, open := a.proxies.Count(); return open == 1 })
	d := a.proxies.Hold(context.Background(), "h1", time.Minute)
	if d.Open != 1 || d.Busy != 0 || d.Silent != 0 {
		t.Errorf("drained: %+v", d)
	}
	a.proxies.Resume() // the move was given up: all goes on
	c.ask("two", "a")
	dial(t, p).ask("three", "a")
}

// TestNoAgent: no agent can be reached: clients wait for their time and are told.
func TestNoAgent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	addr := l.Addr().String()
	must(t, l.Close())
	p, stop := start(t, func(c *Config) { c.Agents, c.HoldTime = []string{addr}, 500*time.Millisecond }, []*instance{}...)
	dial(t, p).ends()
	must(t, stop())
}

// TestAgentHangs: an agent that accepts and says nothing keeps nobody from the others; one
// that falls silent is still believed about its database, as the gate is what counts.
func TestAgentHangs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // connections stay in its queue
	must(t, err)
	defer l.Close()
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, func(c *Config) { c.Agents = append([]string{l.Addr().String()}, c.Agents...) }, a)
	dial(t, p).ask("one", "a")
}

// TestAgentRestart: the agent ends and comes back; clients notice nothing, new ones neither.
func TestAgentRestart(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	c.ask("one", "a")
	addr := a.addr
	a.down()
	c.ask("two", "a")
	dial(t, p).ask("three", "a")
	a.is(api.RoleDown, 0) // it does not know anything yet
	a.start(addr)
	until(t, "it is followed again", func() bool { n, _ := a.proxies.Count(); return n == 1 })
	c.ask("four", "a")
	dial(t, p).ask("five", "a")
	a.is(api.RoleStandby, 1) // it is no primary any more
	until(t, "new clients are held", func() bool { return p.goes() == "" })
}

// TestOldAgent: one that tells no news by itself is asked.
func TestOldAgent(t *testing.T) {
	a := newInstance(t, "a")
	a.down()
	a.old = true
	a.start(a.addr)
	a.primary(1)
	p, _ := start(t, nil, a)
	dial(t, p).ask("one", "a")
	a.is(api.RoleStandby, 2)
	until(t, "new clients are held", func() bool { return p.goes() == "" })
}

// TestNameChanges: a host name leads to another instance.
func TestNameChanges(t *testing.T) {
	a, b := newInstance(t, "a"), newInstance(t, "b")
	a.primary(1)
	_, port, err := net.SplitHostPort(a.addr)
	must(t, err)
	// Another address of this machine, with the same port.
	b.down()
	b.start("127.0.0.2:" + port)
	var mu sync.Mutex
	names := map[string]netip.Addr{"db.example": netip.MustParseAddr("127.0.0.1")}
	p, _ := start(t, func(c *Config) {
		c.Agents = []string{"db.example:" + port}
		c.LookUp = func(_ context.Context, host string) ([]netip.Addr, error) {
			mu.Lock()
			defer mu.Unlock()
			if ip, ok := names[host]; ok {
				return []netip.Addr{ip}, nil
			}
			return nil, &net.DNSError{Err: "no such host", Name: host}
		}
	})
	c := dial(t, p)
	c.ask("one", "a")
	mu.Lock()
	delete(names, "db.example") // the name server fails: what is known is kept
	mu.Unlock()
	dial(t, p).ask("two", "a")
	mu.Lock()
	names["db.example"] = netip.MustParseAddr("127.0.0.2")
	mu.Unlock()
	until(t, "the other agent is followed", func() bool { n, _ := b.proxies.Count(); return n == 1 })
	until(t, "the first one is left", func() bool { n, _ := a.proxies.Count(); return n == 0 })
	b.is(api.RolePrimary, 2)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.2:%d", b.db.port))
	must(t, err)
	b.db.take(l)
	dial(t, p).ask("three", "b")
	c.ends()
}

// TestDatabaseClosesEarly: a connection that the database takes and closes without a word is
// made anew if what the client has said could not have had an effect, and only then.
func TestDatabaseClosesEarly(t *testing.T) {
	hello := binary.BigEndian.AppendUint32(nil, 13)
	hello = binary.BigEndian.AppendUint32(hello, pgVersion3)
	hello = append(hello, "user\n"...)
	const pgCancel = 80877102 // the database never answers it
	cancel := binary.BigEndian.AppendUint32(nil, 16)
	cancel = binary.BigEndian.AppendUint32(cancel, pgCancel)
	cancel = append(cancel, "pid key "...)
	for name, tt := range map[string]struct {
		say  []byte
		want string // "": the client is told
	}{
		"postgresql's cancel": {cancel, ""},
		"postgresql":          {hello, "a:" + string(hello)},
		"anything else":       {[]byte("INCR x\n"), ""},
		"two messages":        {append(slices.Clone(hello), "INCR x\n"...), ""},
	} {
		t.Run(name, func(t *testing.T) {
			a := newInstance(t, "a")
			a.db.early = 3
			a.primary(1)
			p, _ := start(t, nil, a)
			c := dial(t, p)
			_, err := c.Write(tt.say)
			must(t, err)
			if tt.want == "" {
				c.ends()
			} else {
				c.hears(strings.TrimSuffix(tt.want, "\n"))
			}
			a.db.mu.Lock()
			defer a.db.mu.Unlock()
			for _, f := range a.db.first {
				if !bytes.Equal(f, tt.say) {
					t.Errorf("an attempt heard %q", f)
				}
			}
			if tt.want == "" && len(a.db.first) != 1 {
				t.Errorf("said %d times", len(a.db.first))
			}
		})
	}
}

// TestDatabaseSpeaksFirst: as MariaDB does.
func TestDatabaseSpeaksFirst(t *testing.T) {
	a := newInstance(t, "a")
	a.db.raw = func(c net.Conn) {
		_, _ = io.WriteString(c, "hello\n")
		_, _ = io.Copy(c, c)
	}
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	c.hears("hello")
	c.say("x")
	c.hears("x")
}

// TestKilledInMidStream: the client of a database that is killed learns it at once.
func TestKilledInMidStream(t *testing.T) {
	a := newInstance(t, "a")
	a.db.raw = func(c net.Conn) {
		_, _ = io.WriteString(c, "row\n")
		_, _ = io.Copy(io.Discard, c)
	}
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	c.hears("row")
	a.db.close()
	a.db.cut()
	c.ends()
	until(t, "nothing is left", func() bool { return p.open() == 0 })
}

// TestHalfClose: a client that has said everything still gets the answer.
func TestHalfClose(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	c.ask("one", "a")
	must(t, c.CloseWrite())
	c.hears("a:bye")
	c.ends()
	until(t, "nothing is left", func() bool { return p.open() == 0 })
}

// TestBulk: large transfers go through the kernel, small ones do not, and nothing is changed.
func TestBulk(t *testing.T) {
	const size = 64 << 20
	a := newInstance(t, "a")
	a.db.raw = func(c net.Conn) {
		buf := make([]byte, 1)
		if _, err := io.ReadFull(c, buf); err == nil {
			_, _ = io.CopyN(c, &numbers{}, size)
		}
	}
	a.primary(1)
	p, _ := start(t, nil, a)
	c := dial(t, p)
	_, err := c.Write([]byte("x"))
	must(t, err)
	if _, err := io.Copy(&numbers{check: true}, c); err != nil {
		t.Fatal(err)
	}
	copied, spliced := p.metrics.relays.copied.Load(), p.metrics.relays.spliced.Load()
	t.Logf("%d bytes copied, %d spliced", copied, spliced)
	if copied+spliced != size+1 || spliced < size/2 {
		t.Errorf("%d bytes copied, %d spliced; want %d in all, most of them spliced", copied, spliced, size+1)
	}
}

// numbers is a stream that can be checked.
type numbers struct {
	at    int64
	check bool
}

func (n *numbers) byteAt(i int64) byte { return byte(i>>8) ^ byte(i*31) }

func (n *numbers) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = n.byteAt(n.at)
		n.at++
	}
	return len(p), nil
}

func (n *numbers) Write(p []byte) (int, error) {
	for i, b := range p {
		if b != n.byteAt(n.at) {
			return i, fmt.Errorf("byte %d is wrong", n.at)
		}
		n.at++
	}
	return len(p), nil
}

// TestClientNeverReads: it holds up nobody, costs no memory, and is cut off in the end.
func TestClientNeverReads(t *testing.T) {
	a := newInstance(t, "a")
	sent := make(chan int64, 1)
	a.db.raw = func(c net.Conn) {
		buf := make([]byte, 1)
		if _, err := io.ReadFull(c, buf); err != nil {
			return
		}
		if buf[0] == 'q' {
			_, _ = c.Write(buf)
			return
		}
		n, _ := io.Copy(c, &numbers{})
		sent <- n
	}
	a.primary(1)
	p, _ := start(t, func(c *Config) { c.UserTimeout = 3 * time.Second }, a)
	lazy := dial(t, p)
	_, err := lazy.Write([]byte("x"))
	must(t, err)
	for range 100 {
		c := dial(t, p)
		_, err := c.Write([]byte("q"))
		must(t, err)
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "q" {
			t.Fatalf("another client: %q, %v", got, err)
		}
	}
	n := <-sent // the database's side ends when the client is cut off
	if n > 64<<20 {
		t.Errorf("%d bytes were taken for a client that reads nothing", n)
	}
	t.Logf("%d bytes were taken for a client that read nothing", n)
	until(t, "nothing is left", func() bool { return p.open() == 0 })
}

// TestDrain: told to stop, the proxy takes no more clients and lets the others finish; those
// that don't are cut off.
func TestDrain(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, stop := start(t, func(c *Config) { c.Drain = time.Minute }, a)
	c := dial(t, p)
	c.ask("one", "a")
	ended := make(chan error, 1)
	go func() { ended <- stop() }()
	until(t, "no more clients are taken", func() bool {
		n, err := net.Dial("tcp", p.Addr(0).String())
		if err == nil {
			_ = n.Close()
		}
		return err != nil
	})
	if p.Ready() == "" {
		t.Error("ready while it ends")
	}
	c.ask("two", "a")
	must(t, c.Close())
	must(t, <-ended)

	p, stop = start(t, func(c *Config) { c.Drain = 100 * time.Millisecond }, a)
	c = dial(t, p)
	c.ask("three", "a")
	must(t, stop())
	c.ends()
}

// turnedAway wants a client from an address to be refused, be it before it knows that it is
// connected.
func turnedAway(t *testing.T, p *Proxy, from string) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.Dial("tcp", p.Addr(0).String())
	if err != nil {
		return
	}
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	(&client{TCPConn: c.(*net.TCPConn), t: t, r: newReader(c)}).ends()
}

// TestLimits: in all and per source.
func TestLimits(t *testing.T) {
	a := newInstance(t, "a")
	a.primary(1)
	p, _ := start(t, func(c *Config) { c.Most, c.MostSource = 3, 2 }, a)
	from := func(ip string) *client {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		nc, err := d.Dial("tcp", p.Addr(0).String())
		must(t, err)
		t.Cleanup(func() { _ = nc.Close() })
		must(t, nc.SetDeadline(time.Now().Add(30*time.Second)))
		c := &client{TCPConn: nc.(*net.TCPConn), t: t}
		c.r = newReader(nc)
		return c
	}
	one := from("127.0.0.1")
	one.ask("1", "a")
	from("127.0.0.1").ask("2", "a")
	turnedAway(t, p, "127.0.0.1")
	from("127.0.0.2").ask("3", "a")
	turnedAway(t, p, "127.0.0.3")
	must(t, one.Close())
	until(t, "there is room again", func() bool { return p.open() == 2 })
	from("127.0.0.3").ask("4", "a")
}

// TestProxyProtocol: in front and behind.
func TestProxyProtocol(t *testing.T) {
	a := newInstance(t, "a")
	heard := make(chan netip.AddrPort, 1)
	a.db.raw = func(c net.Conn) {
		src, ok, err := readHeader(c)
		if err != nil || !ok {
			t.Errorf("header at the database: %v, %v", ok, err)
		}
		heard <- src
		_, _ = io.Copy(c, c)
	}
	a.primary(1)
	p, _ := start(t, func(c *Config) { c.Write.SendHeader, c.TrustFrom, c.MostSource = true, prefixes("127.0.0.1/32"), 1 }, a)
	for _, src := range []string{"192.0.2.7:999", "[2001:db8::1]:1"} {
		c := dial(t, p)
		ap := netip.MustParseAddrPort(src)
		_, err := c.Write(append(header(ap, ap), "x\n"...))
		must(t, err)
		c.hears("x")
		if got := <-heard; got != ap {
			t.Errorf("the database was told %s, want %s", got, ap)
		}
	}
	// Without one the load balancer's connections are refused.
	c := dial(t, p)
	_, err := c.Write([]byte("no header at all, but long enough\n"))
	must(t, err)
	c.ends()
}

func FuzzHeader(f *testing.F) {
	ap := netip.MustParseAddrPort("192.0.2.7:999")
	f.Add(header(ap, ap))
	f.Add(append(signature(), headerV2|headerLocal, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		src, ok, err := readHeader(bytes.NewReader(b))
		if ok && (err != nil || !src.IsValid()) {
			t.Errorf("%v, %v", src, err)
		}
	})
}

// TestReads: replicas serve reads, the one with the fewest connections first; the primary
// where that is allowed and there is none.
func TestReads(t *testing.T) {
	a, b := newInstance(t, "a"), newInstance(t, "b")
	a.primary(1)
	b.db.open()
	b.is(api.RoleDown, 1)
	p, _ := start(t, func(c *Config) {
		c.Read, c.ReadPrimary, c.MaxAge = Listener{Listen: "127.0.0.1:0"}, true, time.Minute
	}, a, b)
	read := func() *client {
		nc, err := net.Dial("tcp", p.Addr(1).String())
		must(t, err)
		t.Cleanup(func() { _ = nc.Close() })
		must(t, nc.SetDeadline(time.Now().Add(30*time.Second)))
		return &client{TCPConn: nc.(*net.TCPConn), t: t, r: newReader(nc)}
	}
	read().ask("one", "a")
	b.is(api.RoleStandby, 1)
	until(t, "the replica is known", func() bool {
		p.read.mu.Lock()
		defer p.read.mu.Unlock()
		return len(p.read.to) == 1 && p.read.to[0].agent == "b"
	})
	read().ask("two", "b")
	dial(t, p).ask("three", "a")
}

// TestHealth: what a load balancer in front of several proxies asks.
func TestHealth(t *testing.T) {
	a := newInstance(t, "a")
	p, _ := start(t, nil, a)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Health(ctx, l) }()
	get := func(path string) (int, string) {
		res, err := http.Get("http://" + l.Addr().String() + path)
		must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(b)
	}
	if code, body := get("/health"); code != http.StatusServiceUnavailable || !strings.Contains(body, "no primary") {
		t.Errorf("%d %s", code, body)
	}
	a.primary(4)
	until(t, "healthy", func() bool { code, _ := get("/health"); return code == http.StatusOK })
	dial(t, p).ask("one", "a")
	if _, body := get("/metrics"); !strings.Contains(body, "dbsupervisor_proxy_primary_term 4") || !strings.Contains(body, `dbsupervisor_proxy_clients_total{listener="write"} 1`) {
		t.Errorf("metrics lack something:\n%s", body)
	}
	cancel()
	must(t, <-ended)
}
