package api

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
)

// follower is a proxy as the agent sees it.
type follower struct {
	t *testing.T
	c net.Conn
	r *bufio.Reader
}

func startProxies(t *testing.T) (*Proxies, string) {
	t.Helper()
	p := NewProxies()
	h, err := NewHealth(HealthConfig{Listen: "127.0.0.1:0", Cluster: "shop", Instance: "a", Clock: boottime.Real{}, Log: hclog.NewNullLogger(),
		Agent: &fakeAgent{live: Live{Role: RolePrimary, Term: 3, Deadline: boottime.Real{}.Now().Add(time.Hour), DatabaseAnswers: true}}, Database: 5432, Proxies: p})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = h.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return p, h.Addr().String()
}

func follow(t *testing.T, addr string) *follower {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "GET /proxy HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: "+ProxyProtocol+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	f := &follower{t: t, c: c, r: bufio.NewReader(c)}
	res, err := http.ReadResponse(f.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res.Status)
	}
	return f
}

// hears waits for an event that fits.
func (f *follower) hears(fits func(ProxyEvent) bool) {
	f.t.Helper()
	for {
		line, err := f.r.ReadBytes('\n')
		if err != nil {
			f.t.Fatal(err)
		}
		var e ProxyEvent
		if err := json.Unmarshal(line, &e); err != nil {
			f.t.Fatal(err)
		}
		if fits(e) {
			return
		}
	}
}

func (f *follower) says(r ProxyReport) {
	f.t.Helper()
	if err := json.NewEncoder(f.c).Encode(r); err != nil {
		f.t.Fatal(err)
	}
}

// A handoff waits for every proxy's word that it holds, and for its connections; no longer
// than it allows, whatever a stranger claims.
func TestHoldWaitsForProxies(t *testing.T) {
	p, addr := startProxies(t)
	if d := p.Hold(t.Context(), "nobody", time.Minute); d != (Drained{}) {
		t.Errorf("without a proxy: %+v", d)
	}
	p.Resume()
	f, twice := follow(t, addr), follow(t, addr)
	f.hears(func(e ProxyEvent) bool { return e.Primary && e.Term == 3 && e.Port == 5432 && e.Hold == "" })
	done := make(chan Drained, 1)
	go func() { done <- p.Hold(t.Context(), "h", time.Minute) }()
	f.hears(func(e ProxyEvent) bool { return e.Hold == "h" })
	still := func(why string) {
		t.Helper()
		select {
		case d := <-done:
			t.Fatalf("%s: %+v", why, d)
		case <-time.After(100 * time.Millisecond):
		}
	}
	still("nobody has answered")
	f.says(ProxyReport{Proxy: "p"}) // of before the announcement
	still("it does not hold yet")
	f.says(ProxyReport{Proxy: "p", Hold: "h", Open: 2, Busy: 2})
	twice.says(ProxyReport{Proxy: "p", Hold: "h", Open: 2, Busy: 2})
	still("two connections are in use")
	if n, open := p.Count(); n != 1 || open != 2 {
		t.Errorf("%d proxies with %d connections, want one with 2: it follows in two ways", n, open)
	}
	f.says(ProxyReport{Proxy: "p", Hold: "h"})
	twice.says(ProxyReport{Proxy: "p", Hold: "h"})
	if d := <-done; d != (Drained{Proxies: 1}) {
		t.Errorf("%+v", d)
	}
	p.Resume()
	f.hears(func(e ProxyEvent) bool { return e.Hold == "" })

	// A stranger who claims connections for ever, and one who says nothing.
	f.says(ProxyReport{Proxy: "p", Hold: "again", Open: 1000, Busy: 1000})
	began := time.Now()
	d := p.Hold(t.Context(), "again", 300*time.Millisecond)
	if took := time.Since(began); took < 300*time.Millisecond || took > 20*time.Second {
		t.Errorf("took %s", took)
	}
	if d.Silent == 0 {
		t.Errorf("%+v", d)
	}
}

// What a proxy may send is bounded, and so is their number.
func TestProxiesAreBounded(t *testing.T) {
	p, addr := startProxies(t)
	f := follow(t, addr)
	if _, err := f.c.Write(make([]byte, 2*MaxProxyLine)); err != nil {
		t.Fatal(err)
	}
	for _, err := f.r.ReadBytes('\n'); err == nil; _, err = f.r.ReadBytes('\n') {
	}
	f = follow(t, addr)
	f.says(ProxyReport{Proxy: "p", Open: -5})
	for _, err := f.r.ReadBytes('\n'); err == nil; _, err = f.r.ReadBytes('\n') {
	}
	for range maxProxiesFrom {
		follow(t, addr)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/proxy", nil)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(want int) {
		t.Helper()
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s, want %d", res.Status, want)
		}
	}
	ask(http.StatusUpgradeRequired)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", ProxyProtocol)
	ask(http.StatusServiceUnavailable)
	_ = p
}
