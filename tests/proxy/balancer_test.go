package proxy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/tests/cluster"
)

// balancer is a real haproxy with the limits of a Network Load Balancer: a check every 5 s,
// 2 of them to take a target in or out, connections that there are left alone.
type balancer struct {
	*program
	write, read int
}

const (
	// checkEvery and checksNeeded are the fastest that a Network Load Balancer allows.
	checkEvery   = 5 * time.Second
	checksNeeded = 2
)

// startBalancer has a target for each instance; those that do not exist yet are its, too,
// as a target group has instances that are still starting.
func startBalancer(t *testing.T, c *cluster.Cluster) *balancer {
	t.Helper()
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("no haproxy")
	}
	b := &balancer{write: freePort(t), read: freePort(t)}
	var text strings.Builder
	fmt.Fprintf(&text, `global
  maxconn 2000
defaults
  mode tcp
  timeout connect 2s
  timeout client 10m
  timeout server 10m
  retries 0
`)
	listener := func(name string, port int, path string, target func(k int) int) {
		// Fail open, as NLB does: where no target is healthy all are used.
		fmt.Fprintf(&text, `listen %s
  bind 127.0.0.1:%d
  balance roundrobin
  option httpchk GET %s
  http-check expect status 200
  default-server check inter %dms fall %d rise %d
  acl none nbsrv(%[1]s) eq 0
  use_backend %[1]s-open if none
`, name, port, path, checkEvery.Milliseconds(), checksNeeded, checksNeeded)
		for k, i := range c.Instances {
			fmt.Fprintf(&text, "  server s%d 127.0.0.1:%d check port %d\n", k, target(k), i.HTTP)
		}
		fmt.Fprintf(&text, "backend %s-open\n  balance roundrobin\n", name)
		for k := range c.Instances {
			fmt.Fprintf(&text, "  server s%d 127.0.0.1:%d\n", k, target(k))
		}
	}
	listener("write", b.write, "/primary", func(k int) int { return c.Instances[k].Port })
	if c.Replica != "" {
		listener("read", b.read, "/replica?max_age=90s", func(k int) int { return c.Instances[k].ReadPort })
	}
	path := filepath.Join(c.Root, "haproxy.cfg")
	must(t, os.WriteFile(path, []byte(text.String()), 0o600))
	b.program = launch(t, "haproxy", "-db", "-f", path)
	return b
}

// reader connects, reads and closes, over and over, and counts what fails.
type reader struct {
	stop context.CancelFunc
	done sync.WaitGroup
	mu   sync.Mutex
	good int
	errs []string
}

func readThrough(t *testing.T, ctx context.Context, url string) *reader {
	t.Helper()
	rctx, cancel := context.WithCancel(ctx)
	r := &reader{stop: cancel}
	t.Cleanup(func() { r.end() })
	r.done.Go(func() {
		for rctx.Err() == nil {
			err := readOnce(ctx, url)
			r.mu.Lock()
			if err == nil {
				r.good++
			} else {
				r.errs = append(r.errs, time.Now().Format("15:04:05.000")+" "+err.Error())
			}
			r.mu.Unlock()
			select {
			case <-rctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	return r
}

func readOnce(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	var n int
	if err := conn.QueryRow(ctx, "select 1").Scan(&n); err != nil {
		return err
	}
	return conn.Close(ctx)
}

func (r *reader) end() (good int, errs []string) {
	r.stop()
	r.done.Wait()
	return r.so()
}

func (r *reader) so() (good int, errs []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.good, append(errs, r.errs...)
}

// more waits for further reads that succeed.
func (r *reader) more(t *testing.T, ctx context.Context, n int) {
	t.Helper()
	good, _ := r.so()
	within(t, ctx, time.Minute, "reads go on", func() bool { now, _ := r.so(); return now >= good+n })
}

// writeGap is the longest time without an acknowledged write since a moment.
func (k caller) writeGap(since time.Time) time.Duration {
	acks, _ := k.Seen()
	var after []cluster.Ack
	for i, a := range acks {
		if a.At.After(since) {
			if i > 0 && len(after) == 0 {
				after = append(after, acks[i-1])
			}
			after = append(after, a)
		}
	}
	gap, _ := cluster.Gap(after)
	return gap
}

// TestBalancer: behind a load balancer with the limits of a cloud's, clients of the write
// address never reach anything but the primary, also while it believes a former one, or
// nobody, to be healthy. How long they can't write, and which reads fail, is printed. It waits
// for a balancer that is as slow as the cloud's, so it runs only with TEST_LONG=1.
func TestBalancer(t *testing.T) {
	if os.Getenv("TEST_LONG") == "" {
		t.Skip("takes minutes; TEST_LONG=1 runs it")
	}
	c, ctx := start(t, 2, func(o *cluster.Options) {
		o.TTL, o.Renew, o.Margin, o.Replica = 0, 0, 0, "  enabled: true\n  interval: 5s\n"
	})
	a, b := c.Instances[0], c.Instances[1]
	d, err := c.Add("") // a target from the beginning, started later
	must(t, err)
	bal := startBalancer(t, c)
	serves := func(i *cluster.Instance) func() bool {
		return func() bool { v, err := i.AskReplica(ctx, "max_age=90s"); return err == nil && v.OK }
	}
	within(t, ctx, time.Minute, "the balancer lets writes through", func() bool { return readOnce(ctx, url(c, bal.write)) == nil })
	within(t, ctx, time.Minute, "a replica serves reads", serves(b))
	within(t, ctx, time.Minute, "the balancer lets reads through", func() bool { return readOnce(ctx, url(c, bal.read)) == nil })
	k := call(t, ctx, c, bal.write, 2)
	r := readThrough(t, ctx, url(c, bal.read))
	settle := func() {
		t.Helper()
		select {
		case <-time.After((checksNeeded + 1) * checkEvery):
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		}
	}
	stage := func(what string, do func()) {
		t.Helper()
		settle()
		k.more(t, ctx, 20)
		r.more(t, ctx, 20)
		_, werrs := k.Seen()
		good, rerrs := r.so()
		began := time.Now()
		do()
		settle()
		k.more(t, ctx, 20)
		r.more(t, ctx, 20)
		_, werrs2 := k.Seen()
		good2, rerrs2 := r.so()
		t.Logf("%s: %s without a write, %d errors of writers; %d reads, %d failed", what, k.writeGap(began).Round(10*time.Millisecond),
			len(werrs2)-len(werrs), good2-good, len(rerrs2)-len(rerrs))
	}
	stage("nothing happens", func() { within(t, ctx, time.Minute, "some writes", func() bool { return k.Count() > 100 }) })
	stage("an instance is added", func() {
		must(t, d.Start())
		must(t, d.WaitWarm(ctx))
		within(t, ctx, time.Minute, "the new replica serves reads", serves(d))
	})
	stage("switchover", func() {
		_, err := a.CLI(ctx, "switchover", "--to", b.Name)
		must(t, err)
		within(t, ctx, time.Minute, "the former primary serves reads", serves(a))
	})
	stage("an instance is removed", func() { must(t, d.Stop(ctx)) })
	stage("loss of the primary", func() {
		must(t, a.WaitWarm(ctx))
		must(t, b.Crash(ctx))
		within(t, ctx, 90*time.Second, "the other one is primary", func() bool { return a.Is(ctx, "primary") })
		// Nobody serves reads now: the first one comes back.
		must(t, d.Start())
		within(t, ctx, time.Minute, "a replica serves reads", serves(d))
	})
	acks, werrs := k.Stop()
	_, errs := r.end()
	for _, err := range werrs {
		// A replica, or a database without a term, would have said this.
		if strings.Contains(err.Error(), "read-only") || strings.Contains(err.Error(), "duplicate key") {
			t.Errorf("a writer: %v", err)
		}
	}
	t.Logf("the last failed reads: %s", strings.Join(errs[max(0, len(errs)-3):], "\n"))
	missing, err := c.Missing(ctx, a, acks)
	must(t, err)
	t.Logf("%d writes acknowledged, %d of them lost with the machine", len(acks), len(missing))
}
