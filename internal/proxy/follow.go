package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"dbsupervisor/internal/api"
)

const (
	agentDial    = time.Second
	agentSilence = 3 * api.ProxyBeat // after that an agent counts as hung
	agentRetry   = 250 * time.Millisecond
	agentRetryUp = 2 * time.Second
	replicaEvery = time.Second
	// busyWithin is how long ago something must have been sent for a connection to be in use.
	busyWithin = 500 * time.Millisecond
)

// errNoStream is an agent that can be asked, but does not tell by itself.
var errNoStream = errors.New("agent tells no news by itself")

// errOther is an agent of another cluster.
var errOther = errors.New("agent belongs to another cluster")

// follow keeps a connection to one agent until ctx ends.
func (b *board) follow(ctx context.Context, a *agent) {
	wait := agentRetry
	for {
		began := time.Now()
		err := b.subscribe(ctx, a)
		if errors.Is(err, errNoStream) {
			err = b.ask(ctx, a)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			b.lost(a, err)
			b.p.log.Debug("agent not reached", "agent", a.addr, "error", err)
		}
		if time.Since(began) > agentSilence {
			wait = agentRetry
		}
		select {
		case <-ctx.Done():
			return
		case <-b.hurried():
		case <-time.After(wait):
		}
		wait = min(2*wait, agentRetryUp)
	}
}

// subscribe has the agent tell its news until the connection ends.
func (b *board) subscribe(ctx context.Context, a *agent) error {
	dialer := net.Dialer{Timeout: agentDial}
	c, err := dialer.DialContext(ctx, "tcp", a.addr)
	if err != nil {
		return fmt.Errorf("reach agent: %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := c.SetDeadline(time.Now().Add(agentSilence)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	req := "GET /proxy HTTP/1.1\r\nHost: " + a.addr + "\r\nConnection: Upgrade\r\nUpgrade: " + api.ProxyProtocol + "\r\n\r\n"
	if _, err := io.WriteString(c, req); err != nil {
		return fmt.Errorf("ask agent: %w", err)
	}
	r := bufio.NewReaderSize(c, api.MaxProxyLine)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return fmt.Errorf("ask agent: %w", err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return errNoStream
	}
	told := make(chan api.ProxyEvent, 1)
	done := make(chan struct{})
	defer func() { <-done }()
	rctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(done)
		b.report(rctx, c, told)
		_ = c.Close() // ends the reading below
	}()
	for {
		if err := c.SetReadDeadline(time.Now().Add(agentSilence)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		line, err := r.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("listen to agent: %w", err)
		}
		var e api.ProxyEvent
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("listen to agent: %w", err)
		}
		if e.Cluster != b.p.cfg.Cluster {
			return fmt.Errorf("%w: %q", errOther, e.Cluster)
		}
		b.update(a, e)
		select {
		case <-told:
		default:
		}
		told <- e // never waits: nobody else puts anything in
	}
}

// report tells an agent of the connections to its database: whenever it says something,
// which it does every beat, and often while it waits for them to end.
func (b *board) report(ctx context.Context, c net.Conn, told <-chan api.ProxyEvent) {
	out := json.NewEncoder(c)
	var e api.ProxyEvent
	for {
		every := api.ProxyBeat
		if e.Hold != "" {
			every = api.ProxyHoldBeat
		}
		select {
		case <-ctx.Done():
			return
		case e = <-told:
		case <-time.After(every):
		}
		rep := api.ProxyReport{Proxy: b.p.name, Hold: e.Hold}
		rep.Open, rep.Busy = b.p.write.count(e.Instance, busyWithin)
		if c.SetWriteDeadline(time.Now().Add(agentSilence)) != nil || out.Encode(rep) != nil {
			return
		}
	}
}

// ask is for agents that can't be followed, older ones and those with too many proxies: one
// question.
func (b *board) ask(ctx context.Context, a *agent) error {
	var v struct {
		OK       bool     `json:"ok"`
		Role     api.Role `json:"role"`
		Term     uint64   `json:"term"`
		Cluster  string   `json:"cluster"`
		Instance string   `json:"instance"`
		Port     int      `json:"port"`
	}
	if err := get(ctx, "http://"+a.addr+"/primary", &v); err != nil {
		return err
	}
	if v.Cluster != b.p.cfg.Cluster {
		return fmt.Errorf("%w: %q", errOther, v.Cluster)
	}
	b.update(a, api.ProxyEvent{Cluster: v.Cluster, Instance: v.Instance, Role: v.Role, Term: v.Term, Primary: v.OK, Port: v.Port})
	return nil
}

// askReplica keeps asking whether an agent's replica is young enough.
func (b *board) askReplica(ctx context.Context, a *agent) {
	u := "http://" + a.addr + "/replica"
	if b.p.cfg.MaxAge > 0 {
		u += "?" + url.Values{"max_age": {b.p.cfg.MaxAge.String()}}.Encode()
	}
	for ctx.Err() == nil {
		var v struct {
			OK      bool   `json:"ok"`
			Cluster string `json:"cluster"`
			Port    int    `json:"read_port"`
		}
		err := get(ctx, u, &v)
		b.readable(a, err == nil && v.OK && v.Cluster == b.p.cfg.Cluster, v.Port)
		select {
		case <-ctx.Done():
		case <-time.After(replicaEvery):
		}
	}
	b.readable(a, false, 0)
}

// get reads a small JSON answer, whatever its status.
func get(ctx context.Context, u string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, agentDial)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return fmt.Errorf("ask agent: %w", err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ask agent: %w", err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(io.LimitReader(res.Body, api.MaxProxyLine)).Decode(into); err != nil {
		return fmt.Errorf("ask agent: status %s: %w", strconv.Itoa(res.StatusCode), err)
	}
	return nil
}
