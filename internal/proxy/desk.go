package proxy

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Why a client is turned away; the text is the metric's label.
var (
	errHoldTime = errors.New("hold_time") // no database could be had in time
	errHoldMost = errors.New("hold_most") // too many wait already
	errGone     = errors.New("client_gone")
	errStopped  = errors.New("stopped")
)

// target is a database that takes connections.
type target struct {
	addr  string // host:port
	agent string // instance
	term  uint64
}

// The wait after a target has refused a connection; it doubles each time.
const (
	sickWait = 20 * time.Millisecond
	sickMost = 250 * time.Millisecond
)

// sickness is what is remembered of a target that refused a connection: until it has taken
// one again, it is tried by one client at a time, with a pause between.
type sickness struct {
	wait   time.Duration
	until  time.Time
	trying bool
}

// desk decides where the clients of one listener go, and lets them wait in the order of
// their arrival while there is nowhere to go.
type desk struct {
	name     string
	listener Listener
	hold     int
	metrics  *metrics

	mu       sync.Mutex
	to       []target
	sick     map[string]*sickness // by address
	queue    []*waiter            // by seq
	seq      uint64
	sessions map[*session]target // with a connection to a database, or making one
	timer    *time.Timer         // when a sick target is tried next
}

type waiter struct {
	s     *session
	ready chan target // has room for one
}

func newDesk(name string, cfg Config, l Listener, m *metrics) *desk {
	return &desk{name: name, listener: l, hold: cfg.HoldMost, metrics: m, sick: map[string]*sickness{}, sessions: map[*session]target{}}
}

// enter gives a client its place in the order.
func (d *desk) enter(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seq++
	s.seq = d.seq
}

// admit returns the target that the client is to be connected to, as soon as there is one.
// connected or failed must follow.
func (d *desk) admit(ctx context.Context, s *session) (target, error) {
	d.mu.Lock()
	if ctx.Err() != nil {
		defer d.mu.Unlock()
		return target{}, tooLate(ctx)
	}
	if len(d.queue) == 0 {
		if t, ok := d.pick(); ok {
			d.sessions[s] = t
			d.mu.Unlock()
			return t, nil
		}
	}
	if len(d.queue) >= d.hold {
		d.mu.Unlock()
		return target{}, errHoldMost
	}
	w := &waiter{s: s, ready: make(chan target, 1)}
	// Who had been admitted before has an older place than those who wait.
	at, _ := slices.BinarySearchFunc(d.queue, s.seq, func(w *waiter, seq uint64) int {
		return cmp.Compare(w.s.seq, seq)
	})
	d.queue = slices.Insert(d.queue, at, w)
	d.next() // who comes back may have been the only one to be told of a target's recovery
	d.mu.Unlock()
	d.metrics.held.WithLabelValues(d.name).Inc()
	defer d.metrics.held.WithLabelValues(d.name).Dec()
	began := time.Now()
	defer func() { d.metrics.holdTime.WithLabelValues(d.name).Observe(time.Since(began).Seconds()) }()
	heard := s.opening.heard
	for {
		select {
		case t := <-w.ready:
			return t, nil
		case <-ctx.Done():
			return d.giveUp(ctx, w)
		case <-heard:
			if s.opening.n > 0 {
				heard = nil // it has begun to speak, and waits for an answer
				continue
			}
			if _, err := d.giveUp(ctx, w); err == nil {
				d.failed(s, nil) // a place that somebody else can use
			}
			return target{}, errGone
		}
	}
}

// giveUp takes a client out of the queue, unless its turn has come meanwhile.
func (d *desk) giveUp(ctx context.Context, w *waiter) (target, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case t := <-w.ready:
		return t, nil
	default:
	}
	if i := slices.Index(d.queue, w); i >= 0 {
		d.queue = slices.Delete(d.queue, i, i+1)
	}
	return target{}, tooLate(ctx)
}

func tooLate(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return errStopped
	}
	return errHoldTime
}

// pick finds the target for the next client: the one with the fewest connections. d.mu is
// held.
func (d *desk) pick() (target, bool) {
	now := time.Now()
	best, least := -1, 0
	for i, t := range d.to {
		if s := d.sick[t.addr]; s != nil && (s.trying || now.Before(s.until)) {
			continue
		}
		n := 0
		if len(d.to) > 1 || d.listener.Most > 0 {
			n = d.load(t)
		}
		if d.listener.Most > 0 && n >= d.listener.Most {
			continue
		}
		if best < 0 || n < least {
			best, least = i, n
		}
	}
	if best < 0 {
		return target{}, false
	}
	t := d.to[best]
	if s := d.sick[t.addr]; s != nil {
		s.trying = true
	}
	return t, true
}

// load counts a target's connections. d.mu is held.
func (d *desk) load(t target) int {
	n := 0
	for _, o := range d.sessions {
		if o.addr == t.addr {
			n++
		}
	}
	return n
}

// next lets those who wait go where they can. d.mu is held.
func (d *desk) next() {
	for len(d.queue) > 0 {
		t, ok := d.pick()
		if !ok {
			d.arm()
			return
		}
		w := d.queue[0]
		d.queue = d.queue[1:]
		d.sessions[w.s] = t
		w.ready <- t
	}
}

// arm sees to it that a sick target is tried again. d.mu is held.
func (d *desk) arm() {
	var first time.Time
	for _, t := range d.to {
		if s := d.sick[t.addr]; s != nil && !s.trying && (first.IsZero() || s.until.Before(first)) {
			first = s.until
		}
	}
	if first.IsZero() {
		return
	}
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer = time.AfterFunc(time.Until(first), func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.next()
	})
}

// connected says that the target has taken the client's connection. It is false when
// clients are no longer to go there: then the connection must be given up, and the client
// has to be admitted again.
func (d *desk) connected(s *session) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.sessions[s]
	delete(d.sick, t.addr)
	ok := slices.Contains(d.to, t)
	if !ok {
		delete(d.sessions, s)
	}
	d.next()
	return ok
}

// failed says that the target has not taken the connection; a nil error, that nobody asked it.
func (d *desk) failed(s *session, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.sessions[s]
	delete(d.sessions, s)
	old := d.sick[t.addr]
	switch {
	case err != nil:
		wait := sickWait
		if old != nil {
			wait = min(2*old.wait, sickMost)
		}
		d.sick[t.addr] = &sickness{wait: wait, until: time.Now().Add(wait)}
	case old != nil:
		old.trying = false
	}
	d.next()
}

// done is the end of a connection that was made.
func (d *desk) done(s *session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.sessions, s)
	d.next()
}

// route says where clients go from now on; nowhere means that they wait.
func (d *desk) route(to []target) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if slices.Equal(to, d.to) {
		return
	}
	d.to = to
	clear(d.sick)
	d.next()
}

func (d *desk) has() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.to) > 0
}

// count says how many connections go to an instance's database, and on how many of them
// something was sent a moment ago.
func (d *desk) count(agent string, moment time.Duration) (open, busy int) {
	d.mu.Lock()
	var list []*session
	for s, t := range d.sessions {
		if t.agent == agent {
			list = append(list, s)
		}
	}
	d.mu.Unlock()
	for _, s := range list {
		if s.active(moment) {
			busy++
		}
	}
	return len(list), busy
}

// cutBefore ends connections to databases whose term is over, as another one has begun:
// whoever waits for an answer there would wait for the network's patience to end.
func (d *desk) cutBefore(term uint64) int {
	return d.cut(func(t target) bool { return t.term < term })
}

func (d *desk) cutAll() { d.cut(func(target) bool { return true }) }

func (d *desk) cut(which func(target) bool) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for s, t := range d.sessions {
		if which(t) && s.cut() {
			n++
		}
	}
	return n
}
