// Command demo shows the main job on one machine: two instances, a real PostgreSQL, the
// primary killed the hard way while a client writes, then a planned switchover. It prints a
// timeline of what the client saw.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"dbsupervisor/tests/cluster"
)

func main() {
	binary := flag.String("binary", "build/dbsupervisor", "the program to show")
	image := flag.String("image", "dbsupervisor/postgres:15", "PostgreSQL image")
	engine := flag.String("engine", "postgres", "another engine: a short demo with its own client")
	keep := flag.Bool("keep", false, "leave everything running at the end")
	scale := flag.Int("scale", 10, "pgbench scale: about 15 MiB each")
	stopOld := flag.Bool("stop", false, "end what an earlier -keep left running")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *stopOld {
		err := cluster.StopKept(stateFile)
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Println("nothing is running that an earlier demo left")
			return
		}
		if err == nil {
			fmt.Println("ended what the demo had left running")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	d := &demo{began: time.Now(), keep: *keep, scale: *scale}
	show := func() error { return d.run(ctx, *binary, *image) }
	if *engine != "postgres" {
		show = func() error { return d.engineDemo(ctx, *binary, *engine) }
	}
	if err := show(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// stateFile remembers what -keep left running.
const stateFile = "build/demo.json"

type demo struct {
	began time.Time
	keep  bool
	scale int
	c     *cluster.Cluster
}

// say prints one line of the timeline.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("%7.1fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) run(ctx context.Context, binary, image string) (err error) {
	root, err := os.MkdirTemp("", "dbsupervisor-demo-")
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	d.c, err = cluster.New(cluster.Options{Root: root, Binary: abs, Image: image, Schedule: "@every 5s"})
	if err != nil {
		return err
	}
	defer func() {
		if d.keep && err == nil {
			return
		}
		if cerr := d.c.Close(); err == nil {
			err = cerr
		}
		_ = os.RemoveAll(root)
	}()
	a, b, err := d.twoInstances(ctx)
	if err != nil {
		return err
	}
	w, err := d.c.StartWriter(ctx)
	if err != nil {
		return err
	}
	if err := d.crash(ctx, a, b, w); err != nil {
		return err
	}
	if err := d.switchover(ctx, a, b, w); err != nil {
		return err
	}
	if !d.keep {
		return nil
	}
	if err := d.c.Keep(stateFile); err != nil {
		return err
	}
	d.instructions(a, b)
	return nil
}

func (d *demo) twoInstances(ctx context.Context) (a, b *cluster.Instance, err error) {
	d.say("cluster %s: snapshot every 5 s, lease TTL %s, shared directory %s", d.c.Name, d.c.TTL, d.c.Share)
	if a, err = d.c.Add(""); err != nil {
		return nil, nil, err
	}
	if err = a.Start(); err != nil {
		return nil, nil, err
	}
	if _, err = d.c.WaitPrimary(ctx); err != nil {
		return nil, nil, err
	}
	d.say("instance %s is primary, database answers on 127.0.0.1:%d", a.Name, a.Port)
	if err = a.Pgbench(ctx, "-i", "-q", "-s", fmt.Sprint(d.scale)); err != nil {
		return nil, nil, err
	}
	out, err := a.CLI(ctx, "sync")
	if err != nil {
		return nil, nil, err
	}
	d.say("pgbench loaded (scale %d); %s", d.scale, firstLine(out))
	if b, err = d.c.Add(""); err != nil {
		return nil, nil, err
	}
	if err = b.Start(); err != nil {
		return nil, nil, err
	}
	if err = b.WaitWarm(ctx); err != nil {
		return nil, nil, err
	}
	d.say("instance %s is a warm standby", b.Name)
	return a, b, nil
}

// crash kills the primary while the client writes.
func (d *demo) crash(ctx context.Context, a, b *cluster.Instance, w *cluster.Writer) error {
	d.say("a client writes one row after another, through whichever instance is primary")
	time.Sleep(12 * time.Second) // let some snapshots pass, as in life
	st, err := a.Status(ctx)
	if err != nil {
		return err
	}
	if st.Head == nil || st.LossWindowSeconds == nil {
		return fmt.Errorf("no snapshot was committed")
	}
	safe := st.Head.Frozen
	d.say("last commit %s; status says %.1f s of writes would be lost now", st.Head.ID, *st.LossWindowSeconds)
	killed := time.Now()
	if err := a.Crash(ctx); err != nil {
		return err
	}
	d.say("KILL -9: agent, guard and database of %s", a.Name)
	if _, err := d.c.WaitPrimary(ctx, a); err != nil {
		return err
	}
	d.say("instance %s is primary, %.1f s after the kill", b.Name, time.Since(killed).Seconds())
	if err := waitWriter(ctx, w, b); err != nil {
		return err
	}
	acks := w.Acks()
	missing, err := d.c.Missing(ctx, b, acks)
	if err != nil {
		return err
	}
	older, olderLost := 0, 0
	for _, k := range acks {
		if k.At.Before(safe) {
			older++
		}
	}
	for _, m := range missing {
		if m.At.Before(safe) {
			olderLost++
		}
	}
	gap, at := cluster.Gap(acks)
	d.say("client: last write acknowledged at %.1fs, accepted again at %.1fs: %.1f s without writes",
		at.Sub(d.began).Seconds(), at.Add(gap).Sub(d.began).Seconds(), gap.Seconds())
	d.say("acknowledged before the last commit: %d writes, %d of them lost", older, olderLost)
	d.say("acknowledged after it:               %d writes lost (they were %.1f s old at most)", len(missing)-olderLost, killed.Sub(safe).Seconds())
	if olderLost > 0 {
		return fmt.Errorf("%d writes older than the last commit are lost", olderLost)
	}
	return nil
}

// switchover moves the primary back in a planned way.
func (d *demo) switchover(ctx context.Context, a, b *cluster.Instance, w *cluster.Writer) error {
	if err := a.Start(); err != nil {
		return err
	}
	if err := a.WaitWarm(ctx); err != nil {
		return err
	}
	st, err := a.Status(ctx)
	if err != nil {
		return err
	}
	for _, f := range st.Forks {
		d.say("instance %s is back; what it had beyond the last commit is kept as a fork: %s", a.Name, f.Name)
	}
	from := len(w.Acks())
	out, err := b.CLI(ctx, "switchover")
	if err != nil {
		return err
	}
	d.say("planned switchover: %s", firstLine(out))
	if err := waitWriter(ctx, w, a); err != nil {
		return err
	}
	acks := w.Stop()[from:]
	missing, err := d.c.Missing(ctx, a, acks)
	if err != nil {
		return err
	}
	gap, _ := cluster.Gap(acks)
	d.say("client: %d writes around the switchover, %d lost, %.1f s without writes", len(acks), len(missing), gap.Seconds())
	if len(missing) > 0 {
		return fmt.Errorf("%d writes lost in a planned switchover", len(missing))
	}
	return nil
}

func waitWriter(ctx context.Context, w *cluster.Writer, on *cluster.Instance) error {
	wctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	n := len(w.Acks())
	return cluster.Until(wctx, func() bool {
		acks := w.Acks()
		return len(acks) > n && acks[len(acks)-1].By == on.Name
	})
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return l
}

func (d *demo) instructions(a, b *cluster.Instance) {
	fmt.Printf("\nEverything is still running. Look around:\n")
	for _, i := range []*cluster.Instance{a, b} {
		fmt.Printf("  build/dbsupervisor status --config %s\n", i.Config)
	}
	fmt.Printf("  build/dbsupervisor snapshots --config %s\n  psql '%s'\n", a.Config, a.URL())
	fmt.Printf("End it with: make demo STOP=1\n")
}
