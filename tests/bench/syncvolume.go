package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"dbsupervisor/internal/cgroup"
)

// source is a PostgreSQL in a container of its own, without an agent.
type source struct {
	id    string
	path  string // its data directory
	group cgroup.Group
}

// postgres starts one on a directory.
func (r *syncRun) postgres(ctx context.Context, path string) (*source, error) {
	name := "dbsupervisor-bench-" + strconv.Itoa(os.Getpid())
	out, err := output(ctx, nil, "docker", "run", "-d", "--rm", "--name", name, "--network", "none",
		"-v", path+":/var/lib/postgresql/data", "-e", "POSTGRES_HOST_AUTH_METHOD=trust", r.image,
		"postgres", "-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "max_wal_size=1GB", "-c", "shared_buffers=256MB", "-c", "autovacuum=off")
	if err != nil {
		return nil, err
	}
	s := &source{id: lastLine(out), path: path}
	r.cleanups = append(r.cleanups, func() error {
		return errors.Join(s.thaw(), command(context.WithoutCancel(ctx), nil, "docker", "rm", "-f", s.id))
	})
	if s.group, err = groupOf(s.id); err != nil {
		return nil, err
	}
	for end := time.Now().Add(time.Minute); ; {
		// The server that makes the cluster answers, too; the file comes after it.
		if _, err = os.Stat(filepath.Join(path, "PG_VERSION")); err == nil {
			err = s.sql(ctx, "select 1")
		}
		if err == nil {
			return s, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("wait for PostgreSQL: %w", err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func groupOf(id string) (cgroup.Group, error) {
	gs, err := cgroup.Find(id)
	if err != nil {
		return cgroup.Group{}, err
	}
	if len(gs) == 0 {
		return cgroup.Group{}, fmt.Errorf("container %s has no control group", id)
	}
	return gs[0], nil
}

func (s *source) exec(ctx context.Context, args ...string) (string, error) {
	return output(ctx, nil, append([]string{"docker", "exec", s.id}, args...)...)
}

func (s *source) sql(ctx context.Context, statements ...string) error {
	for _, t := range statements {
		if _, err := s.exec(ctx, "psql", "-h", "/var/run/postgresql", "-U", "postgres", "-qAtc", t); err != nil {
			return err
		}
	}
	return nil
}

func (s *source) pgbench(ctx context.Context, args ...string) error {
	_, err := s.exec(ctx, append([]string{"pgbench", "-h", "/var/run/postgresql", "-U", "postgres"}, append(args, "postgres")...)...)
	return err
}

func (s *source) freeze(ctx context.Context) error { return s.group.Freeze(ctx) }
func (s *source) thaw() error                      { return s.group.Thaw() }

// rowSize is the length of a row that does not compress; six of them fit into a page, with
// room for another.
const rowSize = 1000

// randomScript updates one row with new random bytes.
const randomScript = "/tmp/random.sql"

// load fills the database: pgbench's tables at the scale, and a third as much in rows that no
// compressor makes smaller.
func (s *source) load(ctx context.Context, scale int) error {
	rows := max(1000, scale*16*mib/3/8192*6)
	if err := s.pgbench(ctx, "-i", "-q", "-I", "dtGvp", "-s", strconv.Itoa(scale)); err != nil {
		return err
	}
	if _, err := s.exec(ctx, "sh", "-c", fmt.Sprintf(`printf '\\set id random(1, %d)\nupdate bench_random set body = gen_random_bytes(%d) where id = :id;\n' >%s`,
		rows, rowSize, randomScript)); err != nil {
		return err
	}
	return s.sql(ctx,
		"create extension pgcrypto",
		// In one transaction: what is filled in the transaction that makes it is not logged.
		fmt.Sprintf(`begin; create table bench_random (id int primary key, body bytea not null) with (fillfactor = 85);
			alter table bench_random alter body set storage plain;
			insert into bench_random select i, gen_random_bytes(%d) from generate_series(1, %d) i; commit`, rowSize, rows),
		"vacuum bench_random", "checkpoint")
}

// differ counts the pages of 8 KiB in which a directory differs from an older copy of it: the
// truth about a change, found without any of the programs that are measured.
func differ(ctx context.Context, dir, older string) (pages int64, err error) {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	counts := make(chan int64, 64)
	total := make(chan int64)
	go func() {
		var n int64
		for c := range counts {
			n += c
		}
		total <- n
	}()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		g.Go(func() error {
			n, err := differFile(ctx, path, filepath.Join(older, rel))
			counts <- n
			return err
		})
		return nil
	})
	err = errors.Join(err, g.Wait())
	close(counts)
	return <-total, err
}

func differFile(ctx context.Context, path, older string) (pages int64, err error) {
	a, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer a.Close()
	var b io.Reader = strings.NewReader("")
	if f, err := os.Open(older); err == nil {
		defer f.Close()
		b = f
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	x, y, zeros := make([]byte, 64*page), make([]byte, 64*page), make([]byte, page)
	for ctx.Err() == nil {
		n, err := io.ReadFull(a, x)
		m, berr := io.ReadFull(b, y)
		for _, e := range []error{err, berr} {
			if e != nil && !errors.Is(e, io.EOF) && !errors.Is(e, io.ErrUnexpectedEOF) {
				return pages, e
			}
		}
		for k := 0; k < n; k += page {
			end := min(k+page, n)
			// What was not there before and is zero has not been written, or need not be.
			if k >= m && !bytes.Equal(x[k:end], zeros[:end-k]) || k < m && (end > m || !bytes.Equal(x[k:end], y[k:end])) {
				pages++
			}
		}
		if err != nil {
			break
		}
	}
	return pages, ctx.Err()
}
