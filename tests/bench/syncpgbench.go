package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// pgbench measures what the agent's snapshots cost the database.
func (r *syncRun) pgbench(ctx context.Context, s *section, kind string) (err error) {
	s.how = fmt.Sprintf(`A real agent, guard and PostgreSQL ("pgbench -i -s %d") on %s in a file; the share is in
memory, without delay: it is no disk of this machine's in life either. %d pairs of runs of %s as fast as it goes (4
clients), one without and one with a snapshot every 5 s, the first a second after the run's
begin; the order turns round from pair to pair, and a checkpoint precedes each run. The
interval is the mean's at 95 %% (Student). Then %d pairs at 70 %% of the rate without snapshots:
p99 of the latency from each transaction's scheduled start. Processor time is the agent's in
the runs with snapshots, less that in those without.`, r.benchScale(), kind, r.pairs, r.bench, r.latencyPairs())
	disk, err := r.loop(ctx, kind, int64(r.benchScale())*16*mib*4+6<<30)
	if err != nil {
		return err
	}
	c, err := cluster.New(cluster.Options{Root: disk, Binary: r.binary, Image: r.image, Schedule: never, TTL: r.ttl})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, c.Close)
	if c.Share, err = os.MkdirTemp("/dev/shm", "dbsupervisor-bench-share-"); err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, func() error { return os.RemoveAll(c.Share) })
	i, err := c.Add("")
	if err != nil {
		return err
	}
	if err := i.Start(); err != nil {
		return err
	}
	if _, err := c.WaitPrimary(ctx); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(i.LogPath("run")))
	}
	if err := i.Pgbench(ctx, "-i", "-q", "-s", fmt.Sprint(r.benchScale())); err != nil {
		return err
	}
	b := &agentBench{syncRun: r, i: i, s: s}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		noise(stop, func(time.Duration) { // ten times a second is enough
			if n, err := resident(i.AgentPID()); err == nil {
				r.peak = max(r.peak, n)
			}
			time.Sleep(9 * time.Millisecond)
		})
	}()
	err = b.measure(ctx)
	close(stop)
	<-stopped
	return err
}

func (r *syncRun) benchScale() int   { return max(1, r.scale/4) }
func (r *syncRun) latencyPairs() int { return max(1, r.pairs/3) }

type agentBench struct {
	*syncRun
	i *cluster.Instance
	s *section

	mib       float64 // changed, in all snapshots
	cpu, idle time.Duration
	with, off int // runs
}

func (b *agentBench) measure(ctx context.Context) error {
	if _, err := b.snapshot(ctx); err != nil {
		return err
	}
	if _, err := b.run(ctx, false, 0); err != nil { // warms up
		return err
	}
	b.idle, b.off = 0, 0
	var ratios, rates []float64
	for k := range b.pairs {
		var tps [2]float64
		for _, with := range []bool{k%2 == 1, k%2 == 0} {
			out, err := b.run(ctx, with, 0)
			if err != nil {
				return err
			}
			v, _, err := parsePgbench(out)
			if err != nil {
				return err
			}
			if with {
				tps[1] = v
				b.s.add("full rate, with snapshots: transactions", "1/s", v)
			} else {
				tps[0] = v
				b.s.add("full rate, without: transactions", "1/s", v)
			}
		}
		ratios, rates = append(ratios, 100*tps[1]/tps[0]), append(rates, tps[0])
	}
	mean, half := interval(ratios)
	b.s.add("full rate: with / without, mean of the pairs", "%", mean).atLeast(97)
	if len(ratios) > 1 {
		b.s.add("full rate: with / without, interval's lower end", "%", mean-half)
		b.s.add("full rate: with / without, interval's upper end", "%", mean+half)
	}
	if b.mib > 0 && b.with > 0 && b.off > 0 {
		extra := b.cpu.Seconds() - b.idle.Seconds()/float64(b.off)*float64(b.with)
		b.s.add("agent's processor time per changed MiB", "ms", 1000*extra/b.mib)
	}
	rate := int(0.7 * (&figure{samples: rates}).median())
	var p99 [2][]float64
	for k := range b.latencyPairs() {
		for _, with := range []bool{k%2 == 1, k%2 == 0} {
			v, err := b.latency(ctx, with, rate)
			if err != nil {
				return err
			}
			j := map[bool]int{true: 1}[with]
			p99[j] = append(p99[j], v)
			b.s.add(map[bool]string{true: "70 %, with snapshots: p99 of latency", false: "70 %, without: p99 of latency"}[with], "ms", v)
		}
	}
	b.s.add("70 %: p99 with / without, of medians", "", (&figure{samples: p99[1]}).median()/(&figure{samples: p99[0]}).median()).atMost(1.3)
	return nil
}

func (b *agentBench) snapshot(ctx context.Context) (api.SyncResult, error) {
	return api.NewClient(b.i.RunDir).Sync(ctx, nil)
}

// run is one run of pgbench, at a rate or (0) as fast as it goes.
func (b *agentBench) run(ctx context.Context, with bool, rate int, args ...string) (string, error) {
	conn, err := b.i.Connect(ctx)
	if err != nil {
		return "", err
	}
	_, err = conn.Exec(ctx, "checkpoint")
	if err = errors.Join(err, conn.Close(ctx)); err != nil {
		return "", err
	}
	before, err := cpuTime(b.i.AgentPID())
	if err != nil {
		return "", err
	}
	sctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- b.snapshots(sctx, with) }()
	all := []string{"pgbench", "-h", "/var/run/postgresql", "-U", "postgres", "-n", "-c", "4", "-j", "2",
		"-T", fmt.Sprint(max(1, int(b.bench.Seconds())))}
	if rate > 0 {
		all = append(all, "-R", strconv.Itoa(rate))
	}
	out, err := b.i.Exec(ctx, append(append(all, args...), "postgres")...)
	cancel()
	if err = errors.Join(err, <-done); err != nil {
		return "", err
	}
	after, err := cpuTime(b.i.AgentPID())
	if with {
		b.cpu, b.with = b.cpu+after-before, b.with+1
	} else {
		b.idle, b.off = b.idle+after-before, b.off+1
	}
	return out, err
}

// snapshots takes one a second after the begin, and then every 5 s. One that is under way at
// the end is waited for.
func (b *agentBench) snapshots(ctx context.Context, with bool) error {
	for wait := time.Second; with; wait = 5 * time.Second {
		next := time.After(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-next:
		}
		res, err := b.snapshot(context.WithoutCancel(ctx))
		if err != nil {
			if strings.Contains(err.Error(), "freeze would take too long") {
				b.s.add("with snapshots: not taken, the freeze would have been too long", "", 1)
				continue
			}
			return err
		}
		b.mib += float64(res.ChangedBytes) / mib
		b.s.addTail("with snapshots: freeze", "ms", res.FreezeMS)
		b.s.add("with snapshots: time", "ms", res.DurationMS)
		b.s.add("with snapshots: changed blocks", "MiB", float64(res.ChangedBytes)/mib)
	}
	return nil
}

// latency is the 99th percentile of one run, in milliseconds.
func (b *agentBench) latency(ctx context.Context, with bool, rate int) (float64, error) {
	if _, err := b.i.Exec(ctx, "sh", "-c", "rm -f /tmp/latency.*"); err != nil {
		return 0, err
	}
	if _, err := b.run(ctx, with, rate, "-l", "--log-prefix=/tmp/latency"); err != nil {
		return 0, err
	}
	out, err := b.i.Exec(ctx, "sh", "-c", "cut -d' ' -f3 /tmp/latency.*")
	if err != nil {
		return 0, err
	}
	f := &figure{}
	for line := range strings.Lines(out) {
		if v, err := strconv.ParseFloat(strings.TrimSpace(line), 64); err == nil {
			f.samples = append(f.samples, v/1000)
		}
	}
	if len(f.samples) == 0 {
		return 0, errors.New("pgbench logged no transaction")
	}
	return f.at(0.99), nil
}

// interval is a mean and half of its 95 % confidence interval.
func interval(v []float64) (mean, half float64) {
	for _, x := range v {
		mean += x / float64(len(v))
	}
	if len(v) < 2 {
		return mean, math.NaN()
	}
	var sum float64
	for _, x := range v {
		sum += (x - mean) * (x - mean)
	}
	// Student's t at 97.5 % by degrees of freedom.
	t := []float64{12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131}
	k := slices.Min([]int{len(v) - 2, len(t) - 1})
	n := float64(len(v))
	return mean, t[k] * math.Sqrt(sum/(n-1)/n)
}
