package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// proxyRuns is how many rounds of pgbench there are, each with every way.
const proxyRuns = 5

func howProxy(r *rig) string {
	return fmt.Sprintf(`pgbench -S (read-only) from outside of the container for %s at a time, %d rounds, in each
round directly, through haproxy (Debian's, mode tcp, as many threads as processors) and through
dbsupervisor proxy, in an order that is turned round from round to round: 8 clients that
stay connected, then 4 that connect for each transaction (-C). Latencies are pgbench's own, of every
transaction. Client, proxy and database share the machine's processors, so that what one
takes the others lack. *Bulk* is the time for
three times COPY of a table of about %d MiB to a client that throws it away. *Processor time* is the proxy's
own, user and system, per transaction of 8 clients. *Switchover*: 4 clients that connect for each
transaction write through the proxy while the database moves to a warm standby; the pause is the
longest time without an acknowledged write; the old and the new primary share the disk.`, r.bench/4, proxyRuns, r.volume/2)
}

// way is one way to the database.
type way struct {
	name string
	port int
	pid  int // of what is in between, 0: nothing
}

// proxy compares our own proxy with haproxy, and moves the database behind it.
func (r *rig) proxy(ctx context.Context, s *section) error {
	ways, stop, err := r.startWays(ctx)
	defer stop()
	if err != nil {
		return err
	}
	for k := range proxyRuns {
		order := slices.Clone(ways)
		if k%2 == 1 {
			slices.Reverse(order)
		}
		for _, w := range order {
			r.say("proxy: round %d of %d, %s", k+1, proxyRuns, w.name)
			if err := r.proxyRound(ctx, s, w); err != nil {
				return err
			}
		}
	}
	ours, theirs := "proxy", "haproxy"
	for _, what := range []string{": 8 clients: throughput", ": 4 clients that reconnect: throughput"} {
		a, b := s.find(ours+what), s.find(theirs+what)
		f := s.add(ours+" / "+theirs+what, "", a.median()/b.median())
		f.atLeast(1)
	}
	s.add(theirs+" / "+ours+": bulk", "", s.find(theirs+": bulk").median()/s.find(ours+": bulk").median()).atLeast(1)
	direct := s.find("direct: 8 clients: p99").median()
	for _, n := range []string{theirs, ours} {
		s.add(n+": 8 clients: added p99", "ms", s.find(n+": 8 clients: p99").median()-direct)
	}
	return r.proxyMoves(ctx, s, ways[2])
}

func (r *rig) proxyRound(ctx context.Context, s *section, w way) error {
	var before, after time.Duration
	var err error
	if w.pid != 0 {
		if before, err = cpuTime(w.pid); err != nil {
			return err
		}
	}
	tps, p99, n, err := r.remotePgbench(ctx, w.port, "-c", "8", "-j", "2")
	if err != nil {
		return err
	}
	s.add(w.name+": 8 clients: throughput", "1/s", tps)
	s.add(w.name+": 8 clients: p99", "ms", p99)
	if w.pid != 0 {
		if after, err = cpuTime(w.pid); err != nil {
			return err
		}
		s.add(w.name+": 8 clients: processor time per transaction", "us", float64((after-before).Microseconds())/float64(n))
	}
	if tps, p99, _, err = r.remotePgbench(ctx, w.port, "-c", "4", "-j", "2", "-C"); err != nil {
		return err
	}
	s.add(w.name+": 4 clients that reconnect: throughput", "1/s", tps)
	s.add(w.name+": 4 clients that reconnect: p99", "ms", p99)
	began := time.Now()
	const copies = "copy pgbench_accounts to stdout"
	cmd := r.remote(ctx, r.root, w.port, "psql", "-q", "-o", "/dev/null", "-c", copies, "-c", copies, "-c", copies)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("copy out: %w: %s", err, out)
	}
	s.add(w.name+": bulk", "s", time.Since(began).Seconds())
	return nil
}

// startWays starts haproxy and our proxy in front of the first instance.
func (r *rig) startWays(ctx context.Context) (ways []way, stop func(), err error) {
	var started []*exec.Cmd
	stop = func() {
		for _, cmd := range started {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	ports, err := cluster.FreePorts(2)
	if err != nil {
		return nil, stop, err
	}
	hap := filepath.Join(r.root, "haproxy.cfg")
	ours := filepath.Join(r.root, "proxy.yaml")
	b, err := r.c.Add("") // the standby of the last part: it has a port already
	if err != nil {
		return nil, stop, err
	}
	if err := errors.Join(
		os.WriteFile(hap, fmt.Appendf(nil, "global\n  maxconn 2000\ndefaults\n  mode tcp\n  timeout connect 2s\n  timeout client 10m\n  timeout server 10m\n"+
			"listen w\n  bind 127.0.0.1:%d\n  server a 127.0.0.1:%d\n", ports[0], r.a.Port), 0o600),
		os.WriteFile(ours, fmt.Appendf(nil, "cluster: %s\nagents: [127.0.0.1:%d, 127.0.0.1:%d]\nwrite: {listen: 127.0.0.1:%d}\nhttp: {listen: \"\"}\n",
			r.c.Name, r.a.HTTP, b.HTTP, ports[1]), 0o600)); err != nil {
		return nil, stop, err
	}
	ways = []way{{"direct", r.a.Port, 0}}
	for k, argv := range [][]string{{"haproxy", "-db", "-f", hap}, {r.binary, "proxy", "--config", ours}} {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return nil, stop, fmt.Errorf("start %s: %w", argv[0], err)
		}
		started = append(started, cmd)
		ways = append(ways, way{[]string{"haproxy", "proxy"}[k], ports[k], cmd.Process.Pid})
		wctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		err := cluster.Until(wctx, func() bool {
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[k]))
			if err == nil {
				_ = c.Close()
			}
			return err == nil
		})
		cancel()
		if err != nil {
			return nil, stop, fmt.Errorf("wait for %s: %w", argv[0], err)
		}
	}
	return ways, stop, nil
}

// remote is a PostgreSQL client of the image in a container of its own, on the machine's
// network. What it writes to dir can be read here.
func (r *rig) remote(ctx context.Context, dir string, port int, args ...string) *exec.Cmd {
	run := []string{"run", "--rm", "--network", "host", "--user", "0", "-v", dir + ":" + dir, "-e", "PGHOST=127.0.0.1", "-e", "PGUSER=postgres",
		"-e", "PGPASSWORD", "-e", "PGSSLMODE=disable", "-e", "PGPORT=" + strconv.Itoa(port), "--entrypoint", args[0], r.image}
	cmd := exec.CommandContext(ctx, "docker", slices.Concat(run, args[1:], []string{"postgres"})...)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+r.c.Password)
	return cmd
}

// remotePgbench runs pgbench -S and returns transactions per second, the 99th percentile of
// their latencies (ms) and their number.
func (r *rig) remotePgbench(ctx context.Context, port int, args ...string) (tps, p99 float64, n int, err error) {
	dir, err := os.MkdirTemp(r.root, "pgbench-")
	if err != nil {
		return 0, 0, 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	args = append([]string{"pgbench", "-S", "-n", "-l", "--log-prefix=" + filepath.Join(dir, "log"), "-T", fmt.Sprint(max(1, int(r.bench.Seconds()/4)))}, args...)
	out, err := r.remote(ctx, dir, port, args...).CombinedOutput()
	if err != nil {
		return 0, 0, 0, fmt.Errorf("pgbench: %w: %s", err, out)
	}
	if tps, _, err = parsePgbench(string(out)); err != nil {
		return 0, 0, 0, err
	}
	logs, err := filepath.Glob(filepath.Join(dir, "log*"))
	if err != nil {
		return 0, 0, 0, err
	}
	var all []float64
	for _, path := range logs {
		f, err := os.Open(path)
		if err != nil {
			return 0, 0, 0, err
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if fields := strings.Fields(sc.Text()); len(fields) > 2 {
				if us, err := strconv.ParseFloat(fields[2], 64); err == nil {
					all = append(all, us/1000)
				}
			}
		}
		_ = f.Close()
	}
	if len(all) == 0 {
		return 0, 0, 0, errors.New("pgbench logged no transaction")
	}
	slices.Sort(all)
	return tps, all[len(all)*99/100], len(all), nil
}

// proxyMoves moves the database to and fro behind our proxy.
func (r *rig) proxyMoves(ctx context.Context, s *section, w way) error {
	b := r.c.Instances[len(r.c.Instances)-1]
	if _, err := r.join(ctx, b); err != nil {
		return err
	}
	from, to := r.a, b
	for k := range 2 * r.takeovers {
		r.say("proxy: switchover %d of %d", k+1, 2*r.takeovers)
		wctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		err := to.WaitWarm(wctx)
		cancel()
		if err != nil {
			return err
		}
		callers, err := cluster.Call(ctx, r.c.URLAt(w.port), 4)
		if err != nil {
			return err
		}
		if err := callers.More(ctx, 50); err != nil {
			return err
		}
		if _, err := from.CLI(ctx, "switchover", "--to", to.Name); err != nil {
			return err
		}
		if err := callers.More(ctx, 50); err != nil {
			return err
		}
		acks, errs := callers.Stop()
		gap, _ := cluster.Gap(acks)
		s.add("switchover through the proxy: client errors", "", float64(len(errs))).atMost(0)
		s.add("switchover through the proxy: longest pause", "s", gap.Seconds())
		evs, err := api.NewClient(to.RunDir).History(ctx, 20)
		if err != nil {
			return err
		}
		for _, ev := range slices.Backward(evs) {
			var took time.Duration
			if text, ok := strings.CutPrefix(ev.Text, "database answers after "); ok && ev.Kind == "started" {
				if took, err = time.ParseDuration(text); err != nil {
					return err
				}
				s.add("switchover through the proxy: of that the start of the database", "s", took.Seconds())
				s.add("switchover through the proxy: the pause without that start", "s", (gap - took).Seconds()).atMost(3)
				break
			}
		}
		from, to = to, from
	}
	// The next benchmark begins with the first instance alone.
	if err := b.Stop(ctx); err != nil {
		return err
	}
	r.c.Instances = slices.DeleteFunc(r.c.Instances, func(i *cluster.Instance) bool { return i == b })
	return b.EraseDisk()
}
