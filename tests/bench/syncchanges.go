package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	volsync "dbsupervisor/internal/sync"
	"dbsupervisor/tests/efssim"
)

func (r *syncRun) howChanges() string {
	return fmt.Sprintf(`A PostgreSQL data directory on XFS in a file: "pgbench -i -s %d" and a third as much in rows of
random bytes. A change is made, the engine takes its snapshot of the running database, then the
database is frozen and every other tool copies the very same files, one after another, each to
a simulated EFS of its own (docs/EFSSIM.md). *B* is 3000 transactions (in 60 s with -full, else in
15 s), *C* 10 s at full speed, each with a checkpoint at the end; *compressible*: pgbench's own
transaction, *incompressible*: one row of 1000 random bytes is updated. *Changed*: the pages of 8 KiB in which the directory differs from the copy that rsync
had made before. The page cache is warm for all. The engine's caches and the tools' are as the
run before left them. Wall time of the engine is from the request to the commit in the register.
The first copies of the other tools, and without -full their copies of C, are made side by side:
only their amounts are told. rclone and rsync --inplace start from copies that are not counted.`, r.scale)
}

// efs is the share that all copy to.
func (r *syncRun) efs() efssim.Options { return efssim.EFS() }

// rival is what the best of the other tools needed.
type rival struct {
	bytes int64
	took  time.Duration
	names [2]string
}

// changes measures first copies, changes and restores.
func (r *syncRun) changes(ctx context.Context, s *section) (err error) {
	s.how = r.howChanges()
	disk, err := r.loop(ctx, "xfs", max(2<<30, int64(r.scale)*16*mib*8))
	if err != nil {
		return err
	}
	own, err := r.share("ours", r.efs())
	if err != nil {
		return err
	}
	standbyShare := &sharedDir{name: "standby", backing: own.backing, at: filepath.Join(r.root, "share-standby")}
	if err := errors.Join(os.Mkdir(standbyShare.at, 0o755), r.mount(standbyShare, standbyShare.at, r.efs())); err != nil {
		return err
	}
	local := filepath.Join(disk, "instance")
	w, opened, err := startWorker(OpenArgs{Share: own.at, Local: local})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, w.close)
	r.say("tier %s (%s); loading at scale %d", opened.Tier, opened.Why, r.scale)
	db, err := r.postgres(ctx, filepath.Join(local, "volume"))
	if err != nil {
		return err
	}
	if err := db.load(ctx, r.scale); err != nil {
		return err
	}
	tools, err := r.peers(db.path, r.efs())
	if err != nil {
		return err
	}
	c := &comparison{syncRun: r, s: s, db: db, own: own, w: w, tools: tools}
	if err := c.firstCopies(ctx); err != nil {
		return err
	}
	standby, _, err := startWorker(OpenArgs{Share: standbyShare.at, Local: filepath.Join(disk, "standby"), Standby: true})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, standby.close)
	if err := standby.rpc.Call("Engine.Restore", RestoreArgs{Ref: c.last.Ref}, &Restored{}); err != nil {
		return err
	}
	if err := c.nothing(ctx); err != nil {
		return err
	}
	for _, k := range []struct {
		name string
		load []string
		big  bool
	}{
		{"B, compressible", map[bool][]string{true: {"-R", "50", "-T", c.seconds(60)}, false: {"-R", "200", "-T", c.seconds(15)}}[c.full], true},
		{"C, compressible", []string{"-T", c.seconds(10)}, false},
		{"B, incompressible", []string{"-f", randomScript, "-R", "200", "-T", c.seconds(15)}, true},
		{"C, incompressible", []string{"-f", randomScript, "-T", c.seconds(10)}, false},
	} {
		if err := c.change(ctx, k.name, k.big, k.load...); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		if err := c.delta(k.name, standby, standbyShare); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
	}
	if err := c.restores(ctx, disk, standby, standbyShare); err != nil {
		return err
	}
	return errors.Join(r.resident(s, "all of that: dbsupervisor", w), r.resident(s, "all of that: a standby", standby))
}

// comparison is the state of the measurement.
type comparison struct {
	*syncRun
	s     *section
	db    *source
	own   *sharedDir
	w     *worker
	tools []*peer
	last  SnapshotReply
}

func (c *comparison) seconds(n int) string {
	if c.scale < 50 { // trying the benchmark itself
		n = max(2, n/6)
	}
	return fmt.Sprint(n)
}

// report adds what one tool's copy cost.
func (c *comparison) report(what string, w efssim.Wire, took time.Duration) {
	c.s.add(what+": time", "s", took.Seconds())
	c.amounts(what, w)
}

// amounts adds what does not depend on this machine.
func (c *comparison) amounts(what string, w efssim.Wire) {
	c.s.add(what+": written to the share", "MiB", float64(w.Written)/mib)
	c.s.add(what+": read from the share", "MiB", float64(w.Read)/mib)
	c.s.add(what+": operations", "", float64(w.Total()))
}

// kinds lists the operations by kind.
func (c *comparison) kinds(what string, w efssim.Wire) {
	for _, p := range slices.Sorted(maps.Keys(w.Ops)) {
		c.s.add(what+": "+string(p), "", float64(w.Ops[p]))
	}
}

func (c *comparison) snapshot(a SnapshotArgs) (efssim.Wire, SnapshotReply, error) {
	var rep SnapshotReply
	w, _, err := c.own.count(func() (err error) {
		rep, err = c.w.snapshot(a)
		if err == nil && rep.TooLong {
			err = errors.New("the freeze would have been too long")
		}
		return err
	})
	if err == nil && !rep.Unchanged {
		c.last = rep
	}
	return w, rep, err
}

func (c *comparison) live() SnapshotArgs {
	return SnapshotArgs{Group: c.db.group, MaxFreeze: 2 * time.Second}
}

// firstCopies brings all to the same state.
func (c *comparison) firstCopies(ctx context.Context) error {
	c.say("first copies")
	w, rep, err := c.snapshot(c.live())
	if err != nil {
		return err
	}
	_, size, err := du(c.db.path)
	if err != nil {
		return err
	}
	c.s.add("volume", "MiB", float64(size)/mib)
	c.report("first copy: dbsupervisor", w, rep.Took)
	if err := c.resident(c.s, "first copy: dbsupervisor", c.w); err != nil {
		return err
	}
	if err := c.db.freeze(ctx); err != nil {
		return err
	}
	var count []*peer
	for _, p := range c.tools {
		if p.seeded {
			if err := p.seed(ctx, c.db.path); err != nil {
				return err
			}
		} else if err := p.prepare(ctx); err != nil {
			return err
		} else {
			count = append(count, p)
		}
	}
	if err := c.sideBySide(ctx, "first copy", count); err != nil {
		return err
	}
	return c.db.thaw()
}

// sideBySide has tools copy at the same time and counts what each asks of its share.
func (c *comparison) sideBySide(ctx context.Context, name string, tools []*peer) error {
	type copied struct {
		p    *peer
		w    efssim.Wire
		took time.Duration
		err  error
	}
	done := make(chan copied)
	for _, p := range tools {
		go func() {
			f := copied{p: p}
			f.w, f.took, f.err = p.share.count(func() error { return p.run(ctx) })
			done <- f
		}()
	}
	var errs []error
	got := map[*peer]copied{}
	for range tools {
		f := <-done
		errs, got[f.p] = append(errs, f.err), f
		c.say("%s: %s, beside the others: %s, %v", name, f.p.name, f.took.Round(time.Millisecond), f.w)
	}
	for _, p := range tools { // always in the same order
		c.amounts(name+": "+p.name, got[p].w)
	}
	return errors.Join(errs...)
}

// nothing measures a copy of what has not changed.
func (c *comparison) nothing(ctx context.Context) error {
	// What the first copies' freeze and the database's own housekeeping left.
	if _, _, err := c.snapshot(c.live()); err != nil {
		return err
	}
	if err := c.db.freeze(ctx); err != nil {
		return err
	}
	if err := c.unchanged(ctx); err != nil {
		return err
	}
	return c.db.thaw()
}

// unchanged has everybody copy what has not changed.
func (c *comparison) unchanged(ctx context.Context) error {
	w, rep, err := c.snapshot(SnapshotArgs{})
	if err != nil {
		return err
	}
	if !rep.Unchanged { // pages that the syncfs of the one before has cleaned
		if w, rep, err = c.snapshot(SnapshotArgs{}); err != nil {
			return err
		}
	}
	c.report("nothing changed: dbsupervisor", w, rep.Took)
	c.s.add("nothing changed: dbsupervisor: source read", "MiB", float64(rep.Capture.ReadBytes+rep.Capture.FrozenBytes)/mib)
	c.s.add("nothing changed: writes to the share besides a commit", "", float64(w.Ops[efssim.ProcWrite])).atMost(0)
	for _, p := range c.tools {
		// As minutes after its last copy: its client believes nothing of what it knew.
		if err := p.share.sim.Forget(); err != nil {
			return err
		}
		w, took, err := p.share.count(func() error { return p.run(ctx) })
		if err != nil {
			return err
		}
		c.report("nothing changed: "+p.name, w, took)
	}
	return nil
}

// change makes a change and has everybody copy it.
func (c *comparison) change(ctx context.Context, name string, big bool, load ...string) error {
	c.say("change %s", name)
	if err := c.db.pgbench(ctx, append([]string{"-n", "-c", "4", "-j", "2"}, load...)...); err != nil {
		return err
	}
	if err := c.db.sql(ctx, "checkpoint"); err != nil {
		return err
	}
	want := margins{}
	if big {
		want = margins{fewer: map[bool]float64{true: 5, false: 2}[name == "B, compressible"], faster: 10}
	}
	err := c.compare(ctx, name, c.live(), func() (int64, error) {
		if err := c.db.freeze(ctx); err != nil {
			return 0, err
		}
		pages, err := differ(ctx, c.db.path, filepath.Join(c.tools[0].share.backing, "copy"))
		return pages * page, err
	}, want)
	if err != nil {
		return err
	}
	return c.db.thaw()
}

// margins are how many times fewer bytes than the best of the others we are to write, and how
// many times faster than the fastest to be; 0: no goal.
type margins struct{ fewer, faster float64 }

// compare has everybody copy a change. size tells how large it was, and is called between our own
// snapshot and the others' copies.
func (c *comparison) compare(ctx context.Context, name string, a SnapshotArgs, size func() (int64, error), want margins) error {
	before, err := c.w.usage()
	if err != nil {
		return err
	}
	w, rep, err := c.snapshot(a)
	if err != nil {
		return err
	}
	after, err := c.w.usage()
	if err != nil {
		return err
	}
	bytes, err := size()
	if err != nil {
		return err
	}
	changed := float64(bytes)
	read := float64(rep.Capture.ReadBytes + rep.Capture.FrozenBytes)
	c.say("%s: %.1f MiB changed, captured %.1f, read %.1f, %v, %s, freeze %s, %+v", name, changed/mib,
		float64(rep.Store.ChangedBytes)/mib, read/mib, w, rep.Took, rep.Freeze, rep.Capture)
	us := name + ": dbsupervisor"
	c.s.tier(rep.Tier)
	c.s.add(name+": changed pages of 8 KiB", "MiB", changed/mib)
	c.report(us, w, rep.Took)
	c.kinds(us, w)
	c.s.add(us+": source read", "MiB", read/mib)
	c.s.add(us+": freeze", "ms", millis(rep.Freeze))
	c.s.add(us+": processor time per changed MiB", "ms", millis(after.CPU-before.CPU)/(changed/mib))
	if rep.Tier == volsync.TierTracked {
		c.s.add(us+": source read / changed", "", read/changed).atMost(1.5)
	} else {
		c.s.add(us+": source read / changed (tier "+rep.Tier+")", "", read/changed)
	}
	c.s.add(us+": written / changed", "", float64(w.Written)/changed).atMost(1.1)
	// The commit's eight are counted with pack and manifest here.
	c.s.add(us+": operations beyond 1 for each MiB begun", "", float64(w.Total())-float64((w.Written+mib-1)/mib)).atMost(20)
	if want == (margins{}) && !c.full {
		return c.sideBySide(ctx, name, c.tools)
	}
	best := rival{}
	for _, p := range c.tools {
		pw, took, err := p.share.count(func() error { return p.run(ctx) })
		if err != nil {
			return err
		}
		c.say("%s: %s: %s, %v", name, p.name, took.Round(time.Millisecond), pw)
		c.report(name+": "+p.name, pw, took)
		if best.bytes == 0 || pw.Written < best.bytes {
			best.bytes, best.names[0] = pw.Written, p.name
		}
		if best.took == 0 || took < best.took {
			best.took, best.names[1] = took, p.name
		}
	}
	f := c.s.add(name+": fewest bytes written by another ("+best.names[0]+") / ours", "", float64(best.bytes)/float64(w.Written))
	g := c.s.add(name+": time of the fastest other ("+best.names[1]+") / ours", "", best.took.Seconds()/rep.Took.Seconds())
	if want.fewer > 0 {
		f.atLeast(want.fewer)
	}
	if want.faster > 0 {
		g.atLeast(want.faster)
	}
	return nil
}

// delta brings a standby from the snapshot before to this one.
func (c *comparison) delta(name string, standby *worker, sh *sharedDir) error {
	var got Restored
	w, _, err := sh.count(func() error {
		return standby.rpc.Call("Engine.Restore", RestoreArgs{Ref: c.last.Ref}, &got)
	})
	if err != nil {
		return err
	}
	wrote := float64(c.last.Store.StoredBytes + c.last.Store.ManifestBytes)
	c.s.add(name+": a standby's refresh: time", "s", got.Took.Seconds())
	c.s.add(name+": a standby's refresh: read from the share", "MiB", float64(w.Read)/mib)
	c.s.add(name+": a standby's refresh: operations", "", float64(w.Total()))
	c.s.add(name+": a standby's refresh: read / bytes of that change", "", float64(w.Read)/wrote).atMost(1.2)
	return nil
}

// restores brings the newest snapshot back as a whole.
func (c *comparison) restores(ctx context.Context, disk string, standby *worker, sh *sharedDir) error {
	c.say("restores")
	if err := c.db.freeze(ctx); err != nil {
		return err
	}
	// What the database has written by itself since the last copy.
	if _, _, err := c.snapshot(SnapshotArgs{}); err != nil {
		return err
	}
	_, size, err := du(c.db.path)
	if err != nil {
		return err
	}
	var packs, all Restored
	if err := sh.sim.Forget(); err != nil {
		return err
	}
	if err := standby.rpc.Call("Engine.ReadPacks", c.last.Ref, &packs); err != nil {
		return err
	}
	to := filepath.Join(disk, "restored")
	if err := errors.Join(sh.sim.Forget(), command(ctx, nil, "sync")); err != nil {
		return err
	}
	w, _, err := sh.count(func() error {
		return standby.rpc.Call("Engine.Restore", RestoreArgs{Ref: c.last.Ref, Dir: to}, &all)
	})
	if err != nil {
		return err
	}
	pages, err := differ(ctx, c.db.path, to)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	c.s.add("full restore: files", "MiB", float64(size)/mib)
	c.s.add("full restore: pages that differ from the source", "", float64(pages)).atMost(0)
	c.s.add("full restore: the packs alone: read", "MiB", float64(packs.Fetched)/mib)
	c.s.add("full restore: the packs alone: time", "s", packs.Took.Seconds())
	c.report("full restore: dbsupervisor", w, all.Took)
	for _, p := range c.tools {
		if p.name != "restic" {
			continue
		}
		if err := errors.Join(p.share.sim.Forget(), command(ctx, nil, "sync")); err != nil {
			return err
		}
		args := append(slices.Clone(p.copy[:6]), "restore", "latest", "--target", to)
		rw, took, err := p.share.count(func() error { return command(ctx, p.env, args...) })
		if err != nil {
			return err
		}
		c.report("full restore: restic", rw, took)
		c.s.add("full restore: restic's time / ours", "", took.Seconds()/all.Took.Seconds()).atLeast(1)
	}
	packRate := float64(packs.Fetched) / packs.Took.Seconds()
	c.s.add("full restore: rate of reading / that of the packs alone", "", float64(w.Read)/all.Took.Seconds()/packRate).atLeast(0.9)
	return errors.Join(os.RemoveAll(to), c.db.thaw())
}
