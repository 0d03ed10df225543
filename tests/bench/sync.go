package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"dbsupervisor/tests/efssim"
)

// syncRun measures the sync engine beside other tools: the same frozen volume, the same
// changes, each with a simulated share of its own.
type syncRun struct {
	options
	began    time.Time
	root     string
	cleanups []func() error
	sections []*section
	peak     int64 // bytes resident of any process of ours, at most
}

// syncParts are the tables, in their order.
func syncParts() []struct {
	name, title string
	run         func(*syncRun, context.Context, *section) error
} {
	return []struct {
		name, title string
		run         func(*syncRun, context.Context, *section) error
	}{
		{"changes", "A snapshot beside other tools", (*syncRun).changes},
		{"files", "Very many files beside other tools", (*syncRun).manyFiles},
		{"rehash", "The rolling re-hash", (*syncRun).rehash},
		{"freeze", "Freeze", (*syncRun).freezes},
		{"growth", "Growth", (*syncRun).growth},
		{"pgbench-xfs", "pgbench with and without snapshots, XFS", func(r *syncRun, ctx context.Context, s *section) error {
			return r.pgbench(ctx, s, "xfs")
		}},
		{"pgbench-ext4", "pgbench with and without snapshots, ext4", func(r *syncRun, ctx context.Context, s *section) error {
			return r.pgbench(ctx, s, "ext4")
		}},
	}
}

// runSync measures what was asked for, prints the tables and writes build/bench/sync.json.
func runSync(ctx context.Context, o options) (ss []*section, where string, err error) {
	r := &syncRun{options: o, began: time.Now()}
	if r.root, err = os.MkdirTemp(o.dir, "dbsupervisor-bench-sync-"); err != nil {
		return nil, "", err
	}
	r.cleanups = append(r.cleanups, func() error { return os.RemoveAll(r.root) })
	defer func() {
		err = errors.Join(err, r.cleanup(0))
	}()
	where = describe(ctx, r.root)
	if err := r.room(); err != nil {
		return nil, where, err
	}
	for _, p := range syncParts() {
		if r.only != "" && !r.wanted(p.name) {
			continue
		}
		r.say("measuring: %s", strings.ToLower(p.title))
		s := &section{name: p.name, title: p.title, machine: newMachine()}
		kept := len(r.cleanups)
		err := s.machine.probe(r.root)
		if err == nil {
			err = p.run(r, ctx, s)
		}
		if err == nil {
			err = s.machine.probe(r.root)
		}
		if err := errors.Join(err, r.cleanup(kept)); err != nil {
			return r.sections, where, fmt.Errorf("%s: %w", p.name, err)
		}
		r.sections = append(r.sections, s)
		if err := errors.Join(saveAll(r.out, "sync", r.sections), s.text(os.Stdout)); err != nil {
			return r.sections, where, err
		}
	}
	m := &section{name: "memory", title: "Memory"}
	m.how = `The most that any process of ours had resident during all of the above, beside files that it
maps (RssAnon and RssShmem, looked at every 10 ms): the engine's, the standby's, the agents'.`
	m.add("resident at most", "MiB", float64(r.peak)/mib).atMost(128)
	r.sections = append(r.sections, m)
	return r.sections, where, errors.Join(saveAll(r.out, "sync", r.sections), m.text(os.Stdout))
}

func (r *syncRun) room() error {
	volume := int64(r.scale) * 16 * 3 / 2 * mib
	need := 8*volume + 2<<30
	if r.full {
		need = max(need, 90<<30)
	}
	return room(r.root, need)
}

// cleanup undoes what was set up after the first keep steps.
func (r *syncRun) cleanup(keep int) error {
	var errs []error
	for k := len(r.cleanups) - 1; k >= keep; k-- {
		errs = append(errs, r.cleanups[k]())
	}
	r.cleanups = r.cleanups[:keep]
	return errors.Join(errs...)
}

func (r *syncRun) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// loop makes a file system in a file and mounts it.
func (r *syncRun) loop(ctx context.Context, kind string, size int64) (dir string, err error) {
	image := filepath.Join(r.root, kind+".img")
	if dir, err = os.MkdirTemp(r.root, kind+"-"); err != nil {
		return "", err
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(image, size); err != nil {
		return "", err
	}
	mkfs := []string{"mkfs." + kind, "-q", image}
	if err := command(ctx, nil, mkfs...); err != nil {
		return "", err
	}
	if err := command(ctx, nil, "mount", "-o", "loop,discard", image, dir); err != nil {
		return "", err
	}
	r.cleanups = append(r.cleanups, func() error {
		return errors.Join(command(context.WithoutCancel(ctx), nil, "umount", dir), os.Remove(image))
	})
	return dir, nil
}

// share mounts a simulated EFS of its own.
func (r *syncRun) share(name string, o efssim.Options) (*sharedDir, error) {
	d := &sharedDir{name: name, backing: filepath.Join(r.root, "backing-"+name), at: filepath.Join(r.root, "share-"+name)}
	if err := errors.Join(os.MkdirAll(d.backing, 0o755), os.MkdirAll(d.at, 0o755)); err != nil {
		return nil, err
	}
	return d, r.mount(d, d.at, o)
}

func (r *syncRun) mount(d *sharedDir, at string, o efssim.Options) error {
	o.Volatile = true // the simulated server's disk is this machine's too
	sim, err := efssim.SpawnWith(d.backing, at, o)
	if err != nil {
		return err
	}
	d.sim = sim
	r.cleanups = append(r.cleanups, func() error {
		return errors.Join(sim.Close(), os.RemoveAll(d.backing))
	})
	return nil
}

// sharedDir is a simulated share.
type sharedDir struct {
	name, backing, at string
	sim               *efssim.Remote
}

// count says what an action asks of the share and how long it takes.
func (d *sharedDir) count(f func() error) (w efssim.Wire, took time.Duration, err error) {
	before, err := d.sim.Stats()
	if err != nil {
		return w, 0, err
	}
	began := time.Now()
	if err := f(); err != nil {
		return w, 0, err
	}
	took = time.Since(began)
	after, err := d.sim.Stats()
	return after.NFS.Since(before.NFS), took, err
}

// command runs a program and keeps its output for the error.
func command(ctx context.Context, env []string, args ...string) error {
	_, err := output(ctx, env, args...)
	return err
}

func output(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		text := strings.TrimSpace(string(out))
		return text, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, text[max(0, len(text)-500):])
	}
	return string(out), nil
}
