package fence

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/dockertest"
)

func TestParseLeads(t *testing.T) {
	const listing = `table ip x {
	map far {
		type inet_service : ipv4_addr . inet_service
		elements = { 5433 : 172.17.0.3 . 5432,
			     9000 : 10.0.0.9 . 80 }
	}
}`
	got, err := parseLeads(listing)
	if err != nil || len(got) != 2 || got[5433] != netip.MustParseAddrPort("172.17.0.3:5432") || got[9000] != netip.MustParseAddrPort("10.0.0.9:80") {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseLeads("table ip x {\n\tmap far {\n\t}\n}"); err != nil || len(got) != 0 {
		t.Errorf("an empty map: %v, %v", got, err)
	}
	if _, err := parseLeads("1 : 999.1.1.1 . 80"); err == nil {
		t.Error("an address that is none was taken")
	}
}

// named listens and answers each connection, and each line on it, with a name.
func named(t *testing.T, listen func() (net.Listener, error), name string) {
	t.Helper()
	l, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintln(c, name)
				for in := bufio.NewScanner(c); in.Scan(); {
					fmt.Fprintln(c, name)
				}
			}()
		}
	}()
}

// answerer is a connection to a named server.
type answerer struct {
	c  net.Conn
	in *bufio.Reader
}

func answerOf(dial func() (net.Conn, error)) (*answerer, string, error) {
	c, err := dial()
	if err != nil {
		return nil, "", err
	}
	a := &answerer{c: c, in: bufio.NewReader(c)}
	name, err := a.line()
	return a, name, err
}

func (a *answerer) line() (string, error) {
	if err := a.c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	s, err := a.in.ReadString('\n')
	return strings.TrimSpace(s), err
}

func (a *answerer) ask() (string, error) {
	if _, err := fmt.Fprintln(a.c, "who"); err != nil {
		return "", err
	}
	return a.line()
}

// A stable port is moved a hundred times while clients connect to it all the time: none is
// refused, and a connection that was there stays with the server that it has.
func TestSwitch(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	nsA, hostA := outside(t, 40)
	nsB, _ := outside(t, 41)
	stable := dockertest.FreePort(t)
	ports := []int{dockertest.FreePort(t), dockertest.FreePort(t)}
	names := []string{"one", "two"}
	for i, p := range ports {
		near, far := fmt.Sprintf("127.0.0.1:%d", p), fmt.Sprintf("10.213.41.2:%d", p)
		named(t, func() (net.Listener, error) { return net.Listen("tcp", near) }, names[i])
		named(t, func() (l net.Listener, err error) {
			err = errors.Join(inNamespace(nsB, func() error { l, err = net.Listen("tcp", far); return err }), err)
			return l, err
		}, names[i])
	}
	cfg := SwitchConfig{Table: fmt.Sprintf("dbst-%d-sw", os.Getpid()), Ports: []SwitchPort{{Port: uint16(stable)}}}
	w := NewSwitch(cfg)
	t.Cleanup(func() {
		if err := NewSwitch(cfg).Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	lead := func(i int) []Target {
		return []Target{{Port: uint16(stable), To: netip.MustParseAddrPort(fmt.Sprintf("10.213.41.2:%d", ports[i])), Near: uint16(ports[i])}}
	}
	if got, err := w.Leads(t.Context()); err != nil || got != nil {
		t.Errorf("before it is installed: %v, %v", got, err)
	}
	clients := map[string]func() (net.Conn, error){
		"loopback": dialer(fmt.Sprintf("127.0.0.1:%d", stable)),
		"own":      dialer(fmt.Sprintf("%s:%d", hostA, stable)),
	}
	if forwards(t) {
		clients["outside"] = dialFrom(nsA, fmt.Sprintf("%s:%d", hostA, stable))
	}
	if err := w.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, dial := range clients {
		if _, _, err := answerOf(dial); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: a port that leads nowhere: %v", name, err)
		}
	}
	if err := w.Lead(t.Context(), lead(0)...); err != nil {
		t.Fatal(err)
	}
	old := map[string]*answerer{}
	for name, dial := range clients {
		a, got, err := answerOf(dial)
		if err != nil || got != "one" {
			t.Fatalf("%s: %q, %v", name, got, err)
		}
		defer a.c.Close()
		old[name] = a
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var counts [2]atomic.Int64
	for name, dial := range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				a, got, err := answerOf(dial)
				if err != nil {
					t.Errorf("%s: a connection failed: %v", name, err)
					return
				}
				_ = a.c.Close()
				counts[slices.Index(names, got)].Add(1)
			}
		})
	}
	for i := range 100 {
		if err := w.Lead(t.Context(), lead((i+1)%2)...); err != nil {
			t.Error(err)
			break
		}
	}
	stop()
	wg.Wait()
	t.Logf("connections to one and two: %d, %d", counts[0].Load(), counts[1].Load())
	if counts[0].Load() == 0 || counts[1].Load() == 0 {
		t.Error("one of the servers has never been reached")
	}
	if err := w.Lead(t.Context(), lead(1)...); err != nil {
		t.Fatal(err)
	}
	for name, a := range old {
		if got, err := a.ask(); err != nil || got != "one" {
			t.Errorf("%s: the old connection: %q, %v", name, got, err)
		}
	}
	// An agent that is started anew.
	again := NewSwitch(cfg)
	if err := again.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := again.Leads(t.Context()); err != nil || !slices.Equal(got, lead(1)) {
		t.Errorf("leads to %v, %v", got, err)
	}
	if err := again.Lead(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, dial := range clients {
		if _, _, err := answerOf(dial); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: a closed port: %v", name, err)
		}
	}
}
