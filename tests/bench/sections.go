package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/tests/cluster"
)

// benchmark is one kind of measurement; they run in this order on one cluster.
type benchmark struct {
	name, title string
	how         func(*rig) string
	run         func(*rig, context.Context, *section) error
}

func benchmarks() []benchmark {
	return []benchmark{
		{"restore", "Restore of the first snapshot", howRestore, (*rig).restore},
		{"snapshot", "Snapshots", howSnapshot, (*rig).snapshots},
		{"freeze", "Freeze", howFreeze, (*rig).freezes},
		{"restore-later", "Restore after many snapshots", howRestoreLater, (*rig).restore},
		{"pgbench", "pgbench with and without snapshots", howPgbench, (*rig).pgbench},
		{"proxy", "The proxy", howProxy, (*rig).proxy},
		{"takeover", "Takeover", howTakeover, (*rig).takeover},
		{"operations", "Operations on the share", howOperations, (*rig).operations},
	}
}

func names() []string {
	var out []string
	for _, b := range benchmarks() {
		out = append(out, b.name)
	}
	return out
}

// measure loads the database and runs what was asked for. Each table is printed and saved as
// soon as it is there.
func (r *rig) measure(ctx context.Context) ([]*section, error) {
	var ss []*section
	if err := r.load(ctx); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	r.first = &section{}
	if err := r.firstSnapshot(ctx, r.first); err != nil {
		return nil, fmt.Errorf("first snapshot: %w", err)
	}
	for _, b := range benchmarks() {
		if !r.wanted(b.name) {
			continue
		}
		r.say("measuring: %s", strings.ToLower(b.title))
		s := &section{name: b.name, title: b.title, machine: newMachine()}
		err := s.machine.probe(r.root)
		if err == nil {
			err = b.run(r, ctx, s)
		}
		if err == nil {
			err = s.machine.probe(r.root)
		}
		if err != nil {
			r.say("last lines of the first instance's log:\n%s", tail(r.a.LogPath("run")))
			return ss, fmt.Errorf("%s: %w", b.name, err)
		}
		s.how = b.how(r)
		ss = append(ss, s)
		if err := errors.Join(s.save(r.out), s.text(os.Stdout)); err != nil {
			return ss, err
		}
	}
	return ss, nil
}

// firstSnapshot is the one that has everything.
func (r *rig) firstSnapshot(ctx context.Context, s *section) error {
	res, wrote, err := r.sync(ctx, r.a)
	if err != nil {
		return err
	}
	_, info, err := r.head(ctx)
	if err != nil {
		return err
	}
	s.add("volume", "MiB", float64(info.LogicalSize)/mib)
	s.add("first snapshot: changed blocks", "MiB", float64(res.ChangedBytes)/mib)
	s.add("first snapshot: written to the share", "MiB", float64(wrote.bytes())/mib)
	s.add("first snapshot: time", "s", res.DurationMS/1000)
	s.add("first snapshot: freeze", "ms", res.FreezeMS)
	return nil
}

func howSnapshot(r *rig) string {
	return fmt.Sprintf(`One instance, otherwise idle, schedule off, snapshots asked for one by one. Before each
snapshot N MiB are dirtied in one of two ways, both with random bytes that do not compress.
*Table*: one row in each of N MiB / 8 KiB pages, chosen at random from a table of %d pages that
holds one row of 3.5 KiB per page with room for its next version, is updated in place in one
transaction, then a checkpoint writes the pages out. PostgreSQL logs whole pages, so the log
grows by as much again, which is changed blocks too. *File*: N MiB / 8 KiB blocks of a file
beside PostgreSQL's, chosen at random, are overwritten in place and fsynced. Time is from the request to the
commit in the register. Bytes are the lengths of the files that appeared below packs/ and
manifests/; nothing else on the share depends on the snapshot.`, r.pages)
}

// snapshots measures time and bytes for each dirtied size.
func (r *rig) snapshots(ctx context.Context, s *section) error {
	s.figures = append(s.figures, r.first.figures...)
	for _, n := range r.dirty {
		for range r.reps {
			wal, err := r.dirtyPages(ctx, int(n*mib/page))
			if err != nil {
				return err
			}
			what := fmt.Sprintf("table, %d MiB dirtied: ", n)
			s.add(what+"log written meanwhile", "MiB", float64(wal)/mib)
			if err := r.oneSnapshot(ctx, s, what); err != nil {
				return err
			}
		}
	}
	// What the last checkpoint left is not the file's.
	if _, _, err := r.sync(ctx, r.a); err != nil {
		return err
	}
	for _, n := range r.dirty {
		for range (r.reps + 1) / 2 {
			if err := r.dirtyFile(int(n * mib / page)); err != nil {
				return err
			}
			if err := r.oneSnapshot(ctx, s, fmt.Sprintf("file, %d MiB dirtied: ", n)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *rig) oneSnapshot(ctx context.Context, s *section, what string) error {
	res, wrote, err := r.sync(ctx, r.a)
	if err != nil {
		return err
	}
	s.add(what+"changed blocks", "MiB", float64(res.ChangedBytes)/mib)
	s.add(what+"written to the share", "MiB", float64(wrote.bytes())/mib)
	s.add(what+"of that manifests", "KiB", float64(wrote.manifestBytes)/1024)
	s.add(what+"files written to the share", "", float64(wrote.files()))
	s.add(what+"time", "ms", res.DurationMS)
	s.add(what+"freeze", "ms", res.FreezeMS)
	return nil
}

func howFreeze(r *rig) string {
	return fmt.Sprintf(`*Freeze* is what the agent counts and sync.max_freeze bounds: from the request to freeze, which
waits for a probe that is under way and for the guard, until the guard has confirmed the
thaw; the database stands still for less. *A client's longest wait* is seen from outside: the
longest answer to "select 1" around the same snapshot, over one connection that asks every
millisecond; all competition for processors is in it. *Nothing to do*: an idle database,
nothing has changed; what remains is freezing and looking at every file. *Under load*: one
snapshot after another with 250 ms between them for %s, while pgbench (4 clients, %d
transactions per second) writes; the same load without snapshots comes first, for two thirds
as long.`, r.freeze, r.rate)
}

// idleSnapshots is how many are taken of an unchanged volume.
const idleSnapshots = 20

// freezes measures the distribution of freezes, from inside and from outside.
func (r *rig) freezes(ctx context.Context, s *section) error {
	if err := r.sql(ctx, "checkpoint"); err != nil {
		return err
	}
	cl, err := startClient(ctx, r.a)
	if err != nil {
		return err
	}
	defer func() { _ = cl.close() }()
	for range idleSnapshots {
		began := time.Now()
		res, _, err := r.sync(ctx, r.a)
		if err != nil {
			return err
		}
		if res.Unchanged {
			s.addTail("nothing to do: freeze", "ms", res.FreezeMS)
			s.addTail("nothing to do: a client's longest wait", "ms", millis(cl.longest(began, time.Now())))
		}
	}
	load := make(chan error, 1)
	go func() { load <- r.a.Pgbench(ctx, r.loadArgs(2*r.freeze/3)...) }()
	if err := r.quiet(ctx, s, cl, load); err != nil {
		return err
	}
	go func() { load <- r.a.Pgbench(ctx, r.loadArgs(r.freeze)...) }()
	for {
		select {
		case err := <-load:
			return errors.Join(err, cl.close())
		case <-time.After(250 * time.Millisecond):
		}
		began := time.Now()
		res, _, err := r.sync(ctx, r.a)
		if err != nil {
			return err
		}
		s.addTail("under load: freeze", "ms", res.FreezeMS)
		s.addTail("under load: a client's longest wait", "ms", millis(cl.longest(began, time.Now())))
		s.add("under load: changed blocks per snapshot", "MiB", float64(res.ChangedBytes)/mib)
		s.add("under load: time per snapshot", "ms", res.DurationMS)
	}
}

func (r *rig) loadArgs(d time.Duration) []string {
	return []string{"-n", "-c", "4", "-j", "2", "-R", fmt.Sprint(r.rate), "-T", fmt.Sprint(max(1, int(d.Seconds())))}
}

// quiet is the same load without snapshots.
func (r *rig) quiet(ctx context.Context, s *section, cl *client, load chan error) error {
	for {
		began := time.Now()
		select {
		case err := <-load:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		s.addTail("under load, no snapshot: a client's longest wait in a second", "ms", millis(cl.longest(began, time.Now())))
	}
}

func howPgbench(r *rig) string {
	return fmt.Sprintf(`pgbench as fast as it goes (4 clients, the standard transaction, no vacuum) for %s at a time on
the same instance: %d pairs, one run without and one with snapshots every %s, the order
turned round from pair to pair. The schedule is switched by rewriting the configuration, which the agent
reloads. A checkpoint precedes each run; a first run is thrown away. The spread of the runs
without snapshots is what pgbench itself varies by. Share, database, pgbench and agent use
the same processors and the same disk.`, r.bench, r.pairs, r.every)
}

// pgbench measures what snapshots cost the database.
func (r *rig) pgbench(ctx context.Context, s *section) error {
	if _, _, err := r.pgbenchOnce(ctx); err != nil {
		return err
	}
	for k := range r.pairs {
		var tps [2]float64
		for _, with := range []bool{k%2 == 1, k%2 == 0} {
			v, err := r.pgbenchRun(ctx, s, with)
			if err != nil {
				return err
			}
			if with {
				tps[1] = v
			} else {
				tps[0] = v
			}
		}
		s.add("with snapshots / without, of each pair", "", tps[1]/tps[0])
	}
	return nil
}

func (r *rig) pgbenchRun(ctx context.Context, s *section, with bool) (tps float64, err error) {
	spec, name := never, "without snapshots"
	if with {
		spec, name = "@every "+r.every.String(), "with snapshots"
	}
	if err := r.sql(ctx, "checkpoint"); err != nil {
		return 0, err
	}
	if err := r.schedule(ctx, r.a, spec); err != nil {
		return 0, err
	}
	stop := r.watchCommits(ctx, r.a)
	tps, latency, err := r.pgbenchOnce(ctx)
	commits := stop()
	if err != nil {
		return 0, err
	}
	s.add(name+": throughput", "1/s", tps)
	s.add(name+": average latency", "ms", latency)
	if with {
		s.add("with snapshots: commits in a run", "", float64(len(commits)))
		for _, c := range commits {
			s.addTail("with snapshots: freeze", "ms", c.FreezeMS)
			s.add("with snapshots: time per snapshot", "ms", c.DurationMS)
			s.add("with snapshots: written to the share per snapshot", "MiB", float64(c.StoredBytes)/mib)
		}
	}
	return tps, r.schedule(ctx, r.a, never)
}

func (r *rig) pgbenchOnce(ctx context.Context) (tps, latency float64, err error) {
	out, err := r.a.Exec(ctx, "pgbench", "-h", "/var/run/postgresql", "-U", "postgres", "-n", "-c", "4", "-j", "2",
		"-T", fmt.Sprint(max(1, int(r.bench.Seconds()))), "postgres")
	if err != nil {
		return 0, 0, err
	}
	return parsePgbench(out)
}

// parsePgbench finds throughput and average latency (ms) in pgbench's report.
func parsePgbench(out string) (tps, latency float64, err error) {
	for line := range strings.Lines(out) {
		_, _ = fmt.Sscanf(line, "tps = %f", &tps)
		_, _ = fmt.Sscanf(line, "latency average = %f ms", &latency)
	}
	if tps == 0 || latency == 0 {
		return 0, 0, fmt.Errorf("pgbench reported no throughput: %s", out)
	}
	return tps, latency, nil
}

// watchCommits collects the instance's commits until stop is called.
func (r *rig) watchCommits(ctx context.Context, i *cluster.Instance) (stop func() []api.LastCommit) {
	wctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	var out []api.LastCommit
	cl := api.NewClient(i.RunDir)
	last := ""
	if st, err := cl.Status(ctx); err == nil && st.LastCommit != nil {
		last = st.LastCommit.ID
	}
	go func() {
		defer close(done)
		for {
			if st, err := cl.Status(wctx); err == nil && st.LastCommit != nil && st.LastCommit.ID != last {
				last = st.LastCommit.ID
				out = append(out, *st.LastCommit)
			}
			select {
			case <-wctx.Done():
				return
			case <-time.After(500 * time.Millisecond):
			}
		}
	}()
	return func() []api.LastCommit { cancel(); <-done; return out }
}
