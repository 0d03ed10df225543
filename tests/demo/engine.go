package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/workload"
)

// engineDemo is the demo with another engine than PostgreSQL, with its own client program.
func (d *demo) engineDemo(ctx context.Context, binary, name string) (err error) {
	e, err := workload.Find(name)
	if err != nil {
		return err
	}
	root, err := os.MkdirTemp("", "dbsupervisor-demo-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(root) }()
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	if d.c, err = cluster.New(e.Options(cluster.Options{Root: root, Binary: binary, Schedule: "@every 5s"})); err != nil {
		return err
	}
	defer func() {
		if cerr := d.c.Close(); err == nil {
			err = cerr
		}
	}()
	a, err := d.join(ctx)
	if err != nil {
		return err
	}
	if _, err := d.c.WaitPrimary(ctx); err != nil {
		return err
	}
	d.say("instance %s is primary, %s answers on 127.0.0.1:%d", a.Name, name, a.Port)
	k, err := workload.Start(ctx, e, d.c)
	if err != nil {
		return err
	}
	if e.Setup != "" {
		if _, err := k.Do(ctx, a, e.Setup); err != nil {
			return err
		}
	}
	out, err := a.CLI(ctx, "sync")
	if err != nil {
		return err
	}
	d.say("%s", firstLine(out))
	b, err := d.join(ctx)
	if err != nil {
		return err
	}
	if err := b.WaitWarm(ctx); err != nil {
		return err
	}
	d.say("instance %s is a warm standby", b.Name)
	w := k.StartWriter(ctx, 0)
	defer w.Stop()
	d.say("a client writes one number after another, through whichever instance is primary")
	time.Sleep(12 * time.Second) // let some snapshots pass, as in life
	return d.loseAndMove(ctx, k, w, a, b)
}

func (d *demo) join(ctx context.Context) (*cluster.Instance, error) {
	i, err := d.c.Add("")
	if err != nil {
		return nil, err
	}
	return i, i.Start()
}

// loseAndMove kills the primary and moves the database back.
func (d *demo) loseAndMove(ctx context.Context, k *workload.Client, w *workload.Writer, a, b *cluster.Instance) error {
	st, err := a.Status(ctx)
	if err != nil {
		return err
	}
	if st.Head == nil {
		return fmt.Errorf("no snapshot was committed")
	}
	killed := time.Now()
	if err := a.Crash(ctx); err != nil {
		return err
	}
	d.say("KILL -9: agent, guard and database of %s; last commit %s", a.Name, st.Head.ID)
	if _, err := d.c.WaitPrimary(ctx, a); err != nil {
		return err
	}
	d.say("instance %s is primary, %.1f s after the kill", b.Name, time.Since(killed).Seconds())
	acks := w.Acks()
	missing, err := k.Missing(ctx, b, acks)
	if err != nil {
		return err
	}
	for _, m := range missing {
		if m.At.Before(st.Head.Frozen) {
			return fmt.Errorf("write %d, older than the last commit, is lost", m.N)
		}
	}
	d.say("%d writes acknowledged, %d lost, all of them younger than the last commit", len(acks), len(missing))
	if err := a.Start(); err != nil {
		return err
	}
	if err := a.WaitWarm(ctx); err != nil {
		return err
	}
	out, err := b.CLI(ctx, "switchover")
	if err != nil {
		return err
	}
	d.say("planned switchover: %s", firstLine(out))
	if _, err := d.c.WaitPrimary(ctx, b); err != nil {
		return err
	}
	all := w.Stop()[len(acks):]
	if missing, err = k.Missing(ctx, a, all); err != nil {
		return err
	}
	d.say("%d writes since the failover, %d lost", len(all), len(missing))
	if len(missing) > 0 {
		return fmt.Errorf("%d writes lost in a planned switchover", len(missing))
	}
	return nil
}
