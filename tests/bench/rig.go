package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
	"dbsupervisor/tests/cluster"
)

// rig is a cluster with a loaded database that the benchmarks share.
type rig struct {
	options
	began time.Time
	root  string // everything local
	made  []string
	c     *cluster.Cluster
	a     *cluster.Instance // the first primary
	pages int               // rows, and pages, of bench_pages
	first *section          // figures of the first snapshot, taken while loading
	lost  map[int64]bool    // writes that an earlier kill has cost
}

// never is a schedule that leaves all snapshots to the benchmark.
const never = "@every 24h"

const page = volsync.BlockSize

func newRig(ctx context.Context, o options, began time.Time) (*rig, error) {
	r := &rig{options: o, began: began, lost: map[int64]bool{}}
	var err error
	if r.root, err = os.MkdirTemp(o.dir, "dbsupervisor-bench-"); err != nil {
		return nil, err
	}
	r.made = []string{r.root}
	// Volume, standby, restored copies and the snapshots of the whole run.
	if err := room(r.root, 10*o.volume*mib); err != nil {
		return nil, errors.Join(err, r.removeAll())
	}
	if r.c, err = r.cluster(r.root); err != nil {
		return nil, errors.Join(err, r.removeAll())
	}
	return r, nil
}

// cluster prepares a cluster below root.
func (r *rig) cluster(root string) (*cluster.Cluster, error) {
	c, err := cluster.New(cluster.Options{Root: root, Binary: r.binary, Image: r.image, Schedule: never, TTL: r.ttl})
	if err != nil {
		return nil, err
	}
	if r.share != "" {
		c.Share = filepath.Join(r.share, c.Name)
		if err := os.MkdirAll(c.Share, 0o755); err != nil {
			return nil, err
		}
		r.made = append(r.made, c.Share)
	}
	return c, nil
}

// remove ends and deletes everything.
func (r *rig) remove() {
	if err := errors.Join(r.c.Close(), r.removeAll()); err != nil {
		r.say("clean up: %v", err)
	}
}

func (r *rig) removeAll() error {
	var errs []error
	for _, d := range r.made {
		errs = append(errs, os.RemoveAll(d))
	}
	return errors.Join(errs...)
}

// say prints progress, apart from the tables.
func (r *rig) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// load starts the first instance and fills its database up to the volume's size: half of it
// pgbench's tables, a table with one row per page and a file for dirtying, the log, and filler.
func (r *rig) load(ctx context.Context) error {
	var err error
	if r.a, err = r.c.Add(""); err != nil {
		return err
	}
	if err := r.a.Start(); err != nil {
		return err
	}
	if _, err := r.c.WaitPrimary(ctx); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(r.a.LogPath("run")))
	}
	r.say("loading %d MiB", r.volume)
	// As much log as a small server keeps, so that most of the volume is data.
	if err := r.sql(ctx, "alter system set max_wal_size = '256MB'", "select pg_reload_conf()"); err != nil {
		return err
	}
	scale := max(1, r.volume/2/16)
	if err := r.a.Pgbench(ctx, "-i", "-q", "-s", fmt.Sprint(scale)); err != nil {
		return err
	}
	r.pages = int(r.dirty[len(r.dirty)-1]) * mib / page * 5 / 4
	if err := r.sql(ctx,
		// Half-filled pages: an update puts the new version of a row beside the old one and
		// nowhere else, so that N updated rows are N dirty pages.
		"create table bench_pages (id int primary key, body bytea not null) with (fillfactor = 50, autovacuum_enabled = off)",
		"alter table bench_pages alter body set storage plain",
		"insert into bench_pages select i, "+body("i")+" from generate_series(1, "+fmt.Sprint(r.pages)+") i",
		"checkpoint"); err != nil {
		return err
	}
	if err := r.dirtyFile(0); err != nil {
		return err
	}
	_, size, err := du(r.volumePath())
	if err != nil {
		return err
	}
	if rest := (r.volume*mib - size) / page; rest > 0 {
		// Text in hexadecimal: half of it is air, as in most databases.
		if err := r.sql(ctx,
			"create table bench_filler (body text not null) with (autovacuum_enabled = off)",
			"alter table bench_filler alter body set storage plain",
			"insert into bench_filler select (select string_agg(encode(sha512((g::text || i::text)::bytea), 'hex'), '') from generate_series(1, 60) g) from generate_series(1, "+fmt.Sprint(rest)+") i",
			"checkpoint"); err != nil {
			return err
		}
	}
	return r.sql(ctx, "vacuum bench_pages", "checkpoint")
}

// body is an expression for 3520 bytes that no compressor makes smaller.
func body(id string) string {
	return "(select string_agg(sha512((random()::text || " + id + "::text || g::text)::bytea), ''::bytea) from generate_series(1, 55) g)"
}

func (r *rig) volumePath() string { return filepath.Join(r.a.Dir, "volume") }

// sql runs statements on the first instance, one after another.
func (r *rig) sql(ctx context.Context, statements ...string) error {
	return sqlOn(ctx, r.a, statements...)
}

func sqlOn(ctx context.Context, i *cluster.Instance, statements ...string) error {
	conn, err := i.Connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	for _, s := range statements {
		if _, err := conn.Exec(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", firstLine(s), err)
		}
	}
	return nil
}

// dirtyPages updates one row in each of n pages of the table, chosen at random, and has the
// pages written out. It returns how much log that made.
func (r *rig) dirtyPages(ctx context.Context, n int) (wal int64, err error) {
	conn, err := r.a.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close(ctx) }()
	ids := mathrand.Perm(r.pages)[:n]
	for k := range ids {
		ids[k]++
	}
	var from string
	if err := conn.QueryRow(ctx, "select pg_current_wal_lsn()::text").Scan(&from); err != nil {
		return 0, err
	}
	if _, err := conn.Exec(ctx, "update bench_pages set body = "+body("id")+" where id = any($1)", ids); err != nil {
		return 0, fmt.Errorf("dirty pages: %w", err)
	}
	if _, err := conn.Exec(ctx, "checkpoint"); err != nil {
		return 0, fmt.Errorf("dirty pages: %w", err)
	}
	if err := conn.QueryRow(ctx, "select (pg_current_wal_lsn() - $1::pg_lsn)::bigint", from).Scan(&wal); err != nil {
		return 0, fmt.Errorf("ask for the log's length: %w", err)
	}
	return wal, nil
}

// fileName is a file of the benchmark's own beside the database's.
const fileName = "bench.dat"

// dirtyFile overwrites n blocks of a file in the data directory, chosen at random, in place,
// as a database does that writes without a log. The file is made when it is not there.
func (r *rig) dirtyFile(n int) error {
	f, err := os.OpenFile(filepath.Join(r.volumePath(), fileName), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, page)
	blocks := mathrand.Perm(r.pages)
	if fi, err := f.Stat(); err != nil {
		return err
	} else if fi.Size() == int64(r.pages)*page {
		blocks = blocks[:n]
	}
	for _, k := range blocks {
		if _, err := rand.Read(block); err != nil {
			return err
		}
		if _, err := f.WriteAt(block, int64(k)*page); err != nil {
			return err
		}
	}
	return f.Sync()
}

// sync takes a snapshot and says what it put on the share.
func (r *rig) sync(ctx context.Context, i *cluster.Instance) (res api.SyncResult, wrote stored, err error) {
	before, err := look(r.c.Share)
	if err != nil {
		return res, wrote, err
	}
	if res, err = api.NewClient(i.RunDir).Sync(ctx, nil); err != nil {
		return res, wrote, fmt.Errorf("take a snapshot: %w", err)
	}
	after, err := look(r.c.Share)
	return res, after.minus(before), err
}

// stored counts the files of snapshots on the share.
type stored struct{ packs, packBytes, manifests, manifestBytes int64 }

func look(shared string) (s stored, err error) {
	if s.packs, s.packBytes, err = du(filepath.Join(shared, "packs")); err != nil {
		return s, err
	}
	s.manifests, s.manifestBytes, err = du(filepath.Join(shared, "manifests"))
	return s, err
}

func (s stored) minus(o stored) stored {
	return stored{s.packs - o.packs, s.packBytes - o.packBytes, s.manifests - o.manifests, s.manifestBytes - o.manifestBytes}
}

func (s stored) bytes() int64 { return s.packBytes + s.manifestBytes }
func (s stored) files() int64 { return s.packs + s.manifests }

// du counts regular files and their lengths. What vanishes while it looks is not there.
func du(dir string) (files, bytes int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			var fi fs.FileInfo
			if fi, err = d.Info(); err == nil {
				files, bytes = files+1, bytes+fi.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return files, bytes, err
}

// head is the newest snapshot as the share has it.
func (r *rig) head(ctx context.Context) (*volsync.Tree, volsync.SnapshotInfo, error) {
	var info volsync.SnapshotInfo
	reg, err := lease.OpenFile(ctx, lease.FileConfig{FS: fsx.OS{}, Share: r.c.Share, Rand: rand.Reader})
	if err != nil {
		return nil, info, err
	}
	rec, err := reg.Load(ctx)
	if err != nil {
		return nil, info, fmt.Errorf("read register: %w", err)
	}
	if rec.Head == nil {
		return nil, info, errors.New("there is no snapshot")
	}
	h := rec.Head
	ref := volsync.SnapshotRef{ID: h.ID, Manifest: h.Manifest, Hash: h.Hash, Term: h.Term, Seq: h.Seq, Frozen: h.Frozen}
	store, err := volsync.OpenStore(volsync.StoreConfig{Dir: r.c.Share})
	if err != nil {
		return nil, info, err
	}
	list, err := store.List(ctx, ref, volsync.CatalogRef{Name: rec.Catalog, Hash: rec.CatalogHash})
	if err != nil {
		return nil, info, fmt.Errorf("list snapshots: %w", err)
	}
	tree, err := store.LoadTree(ctx, ref)
	if err != nil {
		return nil, info, fmt.Errorf("read snapshot %s: %w", ref.ID, err)
	}
	return tree, list[0], nil
}

// schedule rewrites the configuration and waits until the agent has taken it over and no
// snapshot of the old schedule is under way.
func (r *rig) schedule(ctx context.Context, i *cluster.Instance, spec string) error {
	if err := i.WriteConfig(spec); err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	agent := api.NewClient(i.RunDir)
	err := cluster.Until(wctx, func() bool {
		st, err := agent.Status(wctx)
		return err == nil && st.Sync.Schedule == spec && (spec != never || !st.Sync.Running)
	})
	if err != nil {
		return fmt.Errorf("wait for the schedule %q: %w", spec, err)
	}
	return nil
}

func tail(path string) string {
	b, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
