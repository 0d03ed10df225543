// Command bench measures what a cluster costs and how fast it is: with real agents, guards,
// containers and a real PostgreSQL. It prints tables, writes build/bench/NAME.json, and with
// -md a page for docs/.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"dbsupervisor/tests/efssim"
)

// options are the command line.
type options struct {
	binary, image, out, md string
	dir, share             string
	only                   string
	quick                  bool
	volume                 int64 // MiB
	dirty                  []int64
	reps                   int           // snapshots per dirtied size
	freeze                 time.Duration // of snapshots one after another
	rate                   int           // transactions per second meanwhile
	pairs                  int           // of pgbench without and with snapshots
	bench                  time.Duration // of one pgbench run
	takeovers              int
	restores               int
	every                  time.Duration // schedule of the last two
	ttl                    time.Duration

	sync, full  bool // the sync engine beside other tools instead of all that
	scale       int  // of its pgbench
	files       int  // of the volume on which freezes are measured
	freezeCount int
}

func main() {
	if code, asked := efssim.ServeIfAsked(); asked {
		os.Exit(code)
	}
	for _, serve := range []func() (bool, error){workIfAsked, writeIfAsked} {
		if asked, err := serve(); asked {
			if err != nil {
				fmt.Fprintln(os.Stderr, "bench:", err)
				os.Exit(1)
			}
			return
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&o.binary, "binary", "build/dbsupervisor", "the program to measure")
	fs.StringVar(&o.image, "image", "dbsupervisor/postgres:15", "PostgreSQL image")
	fs.StringVar(&o.out, "out", "build/bench", "directory for NAME.json")
	fs.StringVar(&o.md, "md", "", "also write the tables as Markdown to this file")
	fs.StringVar(&o.dir, "dir", "", "where local disks (and the share) are made; default: the system's temporary directory")
	fs.StringVar(&o.share, "share", "", "make the shared directory in here (an NFS mount, say) instead of in -dir")
	fs.StringVar(&o.only, "only", "", "only these benchmarks, separated by commas: "+strings.Join(names(), ","))
	fs.BoolVar(&o.quick, "quick", false, "a run of two minutes on a small volume, to try the benchmark itself")
	fs.Int64Var(&o.volume, "volume", 1024, "size of the volume, MiB")
	fs.IntVar(&o.reps, "reps", 9, "snapshots per dirtied size")
	fs.DurationVar(&o.freeze, "freeze", 90*time.Second, "how long snapshots are taken one after another for the freeze's distribution")
	fs.IntVar(&o.rate, "rate", 100, "pgbench transactions per second meanwhile")
	fs.IntVar(&o.pairs, "pairs", 4, "pairs of pgbench runs, without and with snapshots")
	fs.DurationVar(&o.bench, "pgbench", 20*time.Second, "length of one pgbench run")
	fs.IntVar(&o.takeovers, "takeovers", 3, "how many times a primary is killed")
	fs.IntVar(&o.restores, "restores", 3, "restores of one snapshot")
	fs.BoolVar(&o.sync, "sync", false, "measure the sync engine beside rsync, rclone, restic and borg instead")
	fs.BoolVar(&o.full, "full", false, "with -sync: growth from 3 to 30 GiB")
	fs.IntVar(&o.scale, "scale", 200, "with -sync: pgbench's scale, 16 MiB each")
	fs.IntVar(&o.files, "files", 50000, "with -sync: files of the volume on which freezes are measured")
	fs.IntVar(&o.freezeCount, "freezes", 500, "with -sync: how many freezes")
	o.every, o.ttl, o.dirty = 5*time.Second, 10*time.Second, []int64{1, 16, 128}
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.quick {
		given := map[string]bool{}
		fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
		set := func(name, value string) {
			if !given[name] {
				_ = fs.Set(name, value) // constants, known to be right
			}
		}
		set("volume", "192")
		set("reps", "3")
		set("freeze", "8s")
		set("pairs", "2")
		set("pgbench", "8s")
		set("takeovers", "1")
		set("restores", "2")
		o.dirty = []int64{1, 4, 16}
	}
	if o.sync {
		given := map[string]bool{}
		fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
		if !given["pairs"] {
			o.pairs = 10
		}
		if !given["pgbench"] {
			o.bench = 5 * time.Second
		}
		return o, o.checkSync()
	}
	if most := o.dirty[len(o.dirty)-1]; o.volume < 4*most {
		return o, fmt.Errorf("-volume %d is too small: %d MiB of it are dirtied", o.volume, most)
	}
	return o, o.check()
}

func (o options) check() error {
	for _, n := range strings.Split(o.only, ",") {
		if n != "" && !strings.Contains(","+strings.Join(names(), ",")+",", ","+n+",") {
			return fmt.Errorf("-only %s: there are %s", n, strings.Join(names(), ", "))
		}
	}
	if o.reps < 1 || o.pairs < 1 || o.takeovers < 1 || o.restores < 1 {
		return errors.New("-reps, -pairs, -takeovers and -restores must be at least 1")
	}
	return nil
}

func (o options) checkSync() error {
	var known []string
	for _, p := range syncParts() {
		known = append(known, p.name)
	}
	for _, n := range strings.Split(o.only, ",") {
		if n != "" && !slices.Contains(known, n) {
			return fmt.Errorf("-only %s: there are %s", n, strings.Join(known, ", "))
		}
	}
	if o.scale < 1 || o.files < 2048 || o.freezeCount < 1 || o.pairs < 1 {
		return errors.New("-scale, -freezes and -pairs must be at least 1, -files at least 2048")
	}
	return nil
}

// wanted says whether the benchmark was asked for.
func (o options) wanted(name string) bool {
	return o.only == "" || strings.Contains(","+o.only+",", ","+name+",")
}

func run(ctx context.Context, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if o.binary, err = filepath.Abs(o.binary); err != nil {
		return err
	}
	version, err := exec.CommandContext(ctx, o.binary, "version").Output()
	if err != nil {
		return fmt.Errorf("ask %s for its version: %w", o.binary, err)
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	began := time.Now()
	if o.sync {
		ss, machine, err := runSync(ctx, o)
		h := header{command: strings.Join(append([]string{"scripts/bench-sync.sh"}, shown(args)...), " "), version: firstLine(string(version)),
			machine: machine, options: o, at: began, took: time.Since(began)}
		if err == nil && o.md != "" {
			err = writeMarkdown(o.md, "bench-sync", h.syncMarkdown, ss)
		}
		return err
	}
	r, err := newRig(ctx, o, began)
	if err != nil {
		return err
	}
	defer r.remove()
	ss, err := r.measure(ctx)
	if err != nil {
		return err
	}
	h := header{
		command: strings.Join(append([]string{"scripts/bench.sh"}, shown(args)...), " "),
		version: firstLine(string(version)), machine: describe(ctx, r.root), options: o, at: began, took: time.Since(began),
	}
	fmt.Printf("\n%s\n%s, %s\n", h.machine, h.version, h.took.Round(time.Second))
	if o.md == "" {
		return nil
	}
	return writeMarkdown(o.md, "bench", h.markdown, ss)
}

// shown leaves out what scripts/bench.sh adds by itself.
func shown(args []string) []string {
	var out []string
	for k := 0; k < len(args); k++ {
		if args[k] == "-binary" || args[k] == "-out" {
			k++
			continue
		}
		out = append(out, args[k])
	}
	return out
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return l
}
