package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// openingSize is how much of what a client says first is kept until the database has
	// answered.
	openingSize = 1024
	// headerTime is how long a load balancer may take to send its header.
	headerTime = 3 * time.Second
	// replayTime is how long a connection on which the database says nothing may still be
	// made anew.
	replayTime = 2 * time.Second
	// closeTime is how long a client may take to close when the database has closed.
	closeTime = 10 * time.Second
	// The wait before a connection that was taken and closed without a word is made anew.
	earlyWait = 20 * time.Millisecond
	earlyMost = 500 * time.Millisecond
)

// session is one client's connection.
type session struct {
	client  *net.TCPConn
	from    netip.AddrPort // the client, as a load balancer says where there is one
	seq     uint64         // its place in the order of the clients
	opening opening

	mu       sync.Mutex
	database *net.TCPConn // nil: none yet
	isCut    bool
}

// opening is what the client says first. It is read while the client waits, so that one
// that goes away is noticed.
type opening struct {
	heard chan struct{} // closed when the rest is set
	buf   [openingSize]byte
	n     int
	err   error
}

func (o *opening) hear(c *net.TCPConn) {
	o.n, o.err = c.Read(o.buf[:])
	close(o.heard)
}

// serve is a client's whole life.
func (p *Proxy) serve(ctx context.Context, c *net.TCPConn, d *desk) {
	defer c.Close()
	from, err := p.source(c)
	if err != nil {
		p.refuse(c, d, "header")
		return
	}
	if why := p.sources.enter(from.Addr()); why != "" {
		p.refuse(c, d, why)
		return
	}
	defer p.sources.leave(from.Addr())
	p.metrics.clients.WithLabelValues(d.name).Inc()
	if err := p.tune(c, p.cfg.UserTimeout); err != nil {
		p.log.Debug("connection not tuned", "error", err)
	}
	s := &session{client: c, from: from, opening: opening{heard: make(chan struct{})}}
	go s.opening.hear(c)
	d.enter(s)
	hold, cancel := context.WithTimeout(ctx, p.cfg.HoldTime)
	defer cancel()
	early := earlyWait
	for {
		t, err := d.admit(hold, s)
		if err != nil {
			p.refuse(c, d, err.Error())
			return
		}
		if !p.connect(hold, s, d, t) {
			continue
		}
		again := s.exchange(p.metrics.relays)
		d.done(s)
		if !again {
			return
		}
		p.metrics.retries.WithLabelValues(d.name).Inc()
		select {
		case <-time.After(early):
		case <-hold.Done():
		}
		early = min(2*early, earlyMost)
	}
}

// source is the client's address.
func (p *Proxy) source(c *net.TCPConn) (netip.AddrPort, error) {
	from := addrPort(c.RemoteAddr())
	for _, trusted := range p.cfg.TrustFrom {
		if !trusted.Contains(from.Addr()) {
			continue
		}
		if err := c.SetReadDeadline(time.Now().Add(headerTime)); err != nil {
			return from, fmt.Errorf("set deadline: %w", err)
		}
		src, ok, err := readHeader(c)
		if err != nil {
			return from, err
		}
		if ok {
			from = src
		}
		return from, c.SetReadDeadline(time.Time{})
	}
	return from, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	ta, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := ta.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// refuse ends a client's connection at once.
func (p *Proxy) refuse(c *net.TCPConn, d *desk, why string) {
	p.metrics.refused.WithLabelValues(d.name, why).Inc()
	p.log.Debug("client turned away", "listener", d.name, "from", c.RemoteAddr().String(), "why", why)
	reset(c)
}

// reset closes a connection so that the other end gets an error.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // it is closed in any case
	_ = c.Close()
}

// tune has dead peers noticed.
func (p *Proxy) tune(c *net.TCPConn, user time.Duration) error {
	if err := c.SetKeepAliveConfig(p.cfg.KeepAlive); err != nil {
		return fmt.Errorf("set keepalive: %w", err)
	}
	if user <= 0 {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("use connection: %w", err)
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(user.Milliseconds())) //nolint:gosec // a file descriptor
	})
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("set user time-out: %w", err)
	}
	return nil
}

// connect makes the connection to the database to which the client was admitted. When it is
// false the client must be admitted again.
func (p *Proxy) connect(ctx context.Context, s *session, d *desk, t target) bool {
	dialer := net.Dialer{Timeout: p.cfg.DialTimeout, KeepAlive: -1}
	c, err := dialer.DialContext(ctx, "tcp", t.addr)
	tc, ok := c.(*net.TCPConn)
	if err == nil && ok {
		err = p.tune(tc, 0)
	}
	if err == nil && d.listener.SendHeader {
		_, err = tc.Write(header(s.from, addrPort(s.client.LocalAddr())))
	}
	if err != nil {
		if tc != nil {
			_ = tc.Close()
		}
		if ctx.Err() != nil {
			d.failed(s, nil) // the client's time is over, which is no fault of the database
			return false
		}
		p.log.Debug("database takes no connection", "listener", d.name, "address", t.addr, "error", err)
		p.metrics.dialErrors.WithLabelValues(d.name).Inc()
		d.failed(s, err)
		p.board.hurry()
		return false
	}
	s.mu.Lock()
	s.database = tc
	s.mu.Unlock()
	if !d.connected(s) {
		s.drop()
		return false
	}
	return true
}

// drop forgets the connection to the database.
func (s *session) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	reset(s.database)
	s.database = nil
}

// cut ends a session that has a connection to a database.
func (s *session) cut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.database == nil || s.isCut {
		return false
	}
	s.isCut = true
	reset(s.client)
	reset(s.database)
	return true
}

// active says whether the client or the database has sent something a moment ago.
func (s *session) active(moment time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.database == nil || lastHeard(s.client) < moment || lastHeard(s.database) < moment
}

// lastHeard is the time since the peer sent data, as the kernel knows it.
func lastHeard(c *net.TCPConn) time.Duration {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) //nolint:gosec // a file descriptor
	}); cerr != nil || err != nil {
		return 0
	}
	return time.Duration(info.Last_data_recv) * time.Millisecond
}

// What may still become of a connection to the database.
const (
	fateOpen   = iota // it can be made anew: nothing was said that counts
	fateSealed        // it can't
	fateLeft          // it is being made anew
)

// exchange lets client and database talk until both have ended, or one of them broke off. It
// is true if the database broke off before it said anything, while nothing was sent to it
// that it could have acted upon: then the client can have another connection.
func (s *session) exchange(r *relays) (again bool) {
	defer s.drop()
	db := s.database
	down, err := r.pump(s.client, db)
	if err != nil {
		return false
	}
	var fate atomic.Int32
	answered, left := make(chan struct{}), make(chan struct{})
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		if !s.send(r, db, &fate, answered, left) {
			reset(s.client) // so that the other direction ends too
			reset(db)
		}
	}()
	n, err := down.step()
	if n == 0 && fate.CompareAndSwap(fateOpen, fateLeft) {
		close(left)
		_ = db.SetReadDeadline(time.Unix(1, 0))
		_ = db.Close()
		<-sent
		return !s.ended()
	}
	fate.Store(fateSealed)
	close(answered)
	if err == nil && n > 0 {
		err = down.run()
	}
	if err != nil {
		reset(s.client)
		reset(db)
		<-sent
		return false
	}
	_ = s.client.CloseWrite() // fails only if the client is gone
	timer := time.AfterFunc(closeTime, func() { reset(s.client) })
	defer timer.Stop()
	<-sent
	return false
}

// ended says that the client has gone away or was cut off.
func (s *session) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isCut {
		return true
	}
	select {
	case <-s.opening.heard:
		return s.opening.n == 0
	default:
		return false
	}
}

// send moves what the client says to the database. It is false if one of them broke off.
func (s *session) send(r *relays, db *net.TCPConn, fate *atomic.Int32, answered, left <-chan struct{}) bool {
	o := &s.opening
	select {
	case <-o.heard:
	case <-left:
		return true
	}
	if o.n == 0 {
		if !errors.Is(o.err, io.EOF) {
			return fate.Load() == fateLeft
		}
		_ = db.CloseWrite() // fails only if the database is gone
		return true
	}
	safe := harmless(o.buf[:o.n])
	if !safe && !fate.CompareAndSwap(fateOpen, fateSealed) && fate.Load() == fateLeft {
		return true
	}
	if _, err := db.Write(o.buf[:o.n]); err != nil {
		// The reader of the database's answers learns it too, and decides.
		return fate.Load() != fateSealed
	}
	r.copied.Add(int64(o.n))
	if safe {
		patience := time.NewTimer(replayTime)
		defer patience.Stop()
		select {
		case <-answered:
		case <-left:
			return true
		case <-patience.C:
			if !fate.CompareAndSwap(fateOpen, fateSealed) && fate.Load() == fateLeft {
				return true
			}
		}
	}
	up, err := r.pump(db, s.client)
	if err != nil || up.run() != nil {
		return false
	}
	_ = db.CloseWrite() // fails only if the database is gone
	return true
}

// The first messages of PostgreSQL's protocol, after their length.
const (
	pgVersion3 = 3 << 16
	pgSSL      = 80877103
	pgGSS      = 80877104
)

// harmless says that a client's first words have no effect on a database, however often
// they are said: a PostgreSQL client that asks for encryption or says who it is.
func harmless(b []byte) bool {
	if len(b) < 8 || int64(binary.BigEndian.Uint32(b)) != int64(len(b)) {
		return false // also half a message, whose rest the database waits for
	}
	code := binary.BigEndian.Uint32(b[4:])
	return code == pgSSL || code == pgGSS || code&^0xffff == pgVersion3
}
