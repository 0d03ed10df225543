package faults

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/efssim"
)

// stay is the time in which one connection had its writes acknowledged.
type stay struct {
	by          string
	first, last time.Time
}

// knocker writes through every instance's own port all the time, whoever is primary.
type knocker struct {
	mu    sync.Mutex
	stays []*stay
	wg    sync.WaitGroup
}

func knock(ctx context.Context, c *cluster.Cluster) *knocker {
	k := &knocker{}
	for _, i := range c.Instances {
		k.wg.Go(func() {
			for ctx.Err() == nil {
				k.connection(ctx, i)
				_ = cluster.Until(ctx, func() bool { return i.Is(ctx, "primary") })
			}
		})
	}
	return k
}

// connection writes until a write fails. A connection belongs to one term.
func (k *knocker) connection(ctx context.Context, i *cluster.Instance) {
	cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	conn, err := i.Connect(cctx)
	cancel()
	if err != nil {
		return
	}
	defer func() {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(cctx)
	}()
	s := &stay{by: i.Name}
	for k.write(ctx, conn, s) {
		time.Sleep(5 * time.Millisecond)
	}
}

func (k *knocker) write(ctx context.Context, conn *pgx.Conn, s *stay) bool {
	wctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	sent := time.Now()
	if _, err := conn.Exec(wctx, "insert into knocks values (now())"); err != nil {
		return false
	}
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.first.IsZero() {
		s.first = now
		k.stays = append(k.stays, s)
	}
	// Acknowledged at some moment after it was sent: only that is certain.
	s.last = sent
	return true
}

// check reports connections to two instances that had writes acknowledged at the same time.
func (k *knocker) check(t *testing.T) {
	t.Helper()
	k.wg.Wait()
	slices.SortFunc(k.stays, func(a, b *stay) int { return a.first.Compare(b.first) })
	writers := map[string]bool{}
	for n, a := range k.stays {
		writers[a.by] = true
		for _, b := range k.stays[n+1:] {
			if a.by != b.by && b.first.Before(a.last) {
				t.Errorf("two writers: %s from %s to %s, %s from %s on", a.by, a.first.Format(time.StampMilli), a.last.Format(time.StampMilli), b.by, b.first.Format(time.StampMilli))
			}
		}
	}
	t.Logf("%d connections had writes acknowledged by %d instances", len(k.stays), len(writers))
}

// randomLasts is how long TestRandomHarm does harm.
func randomLasts() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("FAULTS_RANDOM")); err == nil {
		return d
	}
	return 45 * time.Second
}

// harm is one thing that happens to a cluster, and what ends it.
type harm struct {
	name string
	do   func(*cluster.Instance, *efssim.Remote) (undo func() error, err error)
}

func harms(ctx context.Context) []harm {
	nothing := func() error { return nil }
	signal := func(i *cluster.Instance, send ...func(syscall.Signal) error) (func() error, error) {
		for _, s := range send {
			if err := s(syscall.SIGSTOP); err != nil {
				return nothing, err
			}
		}
		return func() error {
			var err error
			for _, s := range send {
				err = s(syscall.SIGCONT)
			}
			return err
		}, nil
	}
	return []harm{
		{"machine lost", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) { return i.Start, i.Crash(ctx) }},
		{"agent stopped", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) { return signal(i, i.SignalAgent) }},
		{"agent and guard stopped", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) {
			return signal(i, i.SignalAgent, i.SignalGuard)
		}},
		{"agent killed", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) {
			err := i.SignalAgent(syscall.SIGKILL)
			_ = i.WaitAgent(ctx)
			return i.StartAgent, err
		}},
		{"database frozen", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) {
			id, err := i.Container(ctx)
			if err != nil || id == "" {
				return nothing, err
			}
			_ = exec.CommandContext(ctx, "docker", "pause", id).Run() // it may have ended
			return func() error { _ = exec.CommandContext(ctx, "docker", "unpause", id).Run(); return nil }, nil
		}},
		{"share hangs", func(_ *cluster.Instance, r *efssim.Remote) (func() error, error) { return r.Heal, r.Hang() }},
		{"share fails", func(_ *cluster.Instance, r *efssim.Remote) (func() error, error) { return r.Heal, r.Fail(syscall.EIO) }},
		{"share full", func(_ *cluster.Instance, r *efssim.Remote) (func() error, error) { return r.Heal, r.NoSpace(0) }},
		{"switchover", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) {
			sctx, cancel := context.WithTimeout(ctx, 15*time.Second)
			defer cancel()
			_, _ = i.CLI(sctx, "switchover") // refused where it makes no sense
			return nothing, nil
		}},
		{"failover", func(i *cluster.Instance, _ *efssim.Remote) (func() error, error) {
			sctx, cancel := context.WithTimeout(ctx, 15*time.Second)
			defer cancel()
			_, _ = i.CLI(sctx, "failover", "--yes")
			return nothing, nil
		}},
	}
}

// TestRandomHarm: things of every kind happen to three instances at random moments, one at a
// time but with less time in between than it takes to get over them. Never do two databases
// take writes; at the end the cluster works again by itself and its history is whole. The seed
// and the duration can be given: FAULTS_SEED, FAULTS_RANDOM.
func TestRandomHarm(t *testing.T) {
	lasts := randomLasts()
	seed, err := strconv.ParseUint(os.Getenv("FAULTS_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("FAULTS_SEED=%d FAULTS_RANDOM=%s", seed, lasts)
	r := rand.New(rand.NewPCG(seed, 1))
	c, shares, ctx := mounted(t, 3, func(o *cluster.Options) {
		o.Extra = "failover: {max_per_hour: 10}\n"
	})
	p, err := c.WaitPrimary(ctx)
	must(t, err)
	must(t, second(p.Exec(ctx, "psql", "-U", "postgres", "-c", "create table knocks (at timestamptz)")))
	synced(t, ctx, p)
	kctx, stop := context.WithCancel(ctx)
	defer stop()
	k := knock(kctx, c)
	list := harms(ctx)
	within := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
	for began, n := time.Now(), 0; time.Since(began) < lasts; n++ {
		if n%len(list) == 0 {
			r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		}
		h, at := list[n%len(list)], r.IntN(3)
		if p := c.Primary(ctx); p != nil && r.IntN(3) > 0 {
			at = slices.Index(c.Instances, p) // most of it happens to the primary
		}
		i := c.Instances[at]
		undo, err := h.do(i, shares[at])
		if err != nil {
			t.Fatalf("%s on %s: %v", h.name, i.Name, err)
		}
		held := within(3 * c.TTL)
		time.Sleep(held)
		must(t, undo())
		pause := within(2 * c.TTL)
		t.Logf("%s: %s, for %s, then %s", i.Name, h.name, held.Round(time.Millisecond), pause.Round(time.Millisecond))
		time.Sleep(pause)
		if i.Ended() {
			must(t, i.StartAgent()) // as systemd does
		}
	}
	// A person looks at it once.
	must(t, cluster.Until(ctx, func() bool {
		_, err := c.Instances[r.IntN(3)].CLI(ctx, "resume")
		return err == nil
	}))
	p, err = c.WaitPrimary(ctx)
	must(t, err)
	for _, i := range c.Instances {
		if i != p {
			must(t, i.WaitWarm(ctx))
		}
	}
	must(t, second(p.Exec(ctx, "psql", "-U", "postgres", "-c", "insert into knocks values (now())")))
	synced(t, ctx, p)
	must(t, second(p.CLI(ctx, "snapshots", "verify")))
	stop()
	k.check(t)
}
