package replica

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/tests/cluster"
)

// readers read from a standby's read port all the time: some through a connection per read,
// some through connections that they keep for a while.
type readers struct {
	stop  context.CancelFunc
	wg    sync.WaitGroup
	reads atomic.Int64
	last  atomic.Int64 // the newest value that any of them has seen
	fails chan error
}

const readSQL = "select coalesce(max(n), 0)::int from counter"

func startReaders(t *testing.T, i *cluster.Instance, addresses ...string) *readers {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r := &readers{stop: cancel, fails: make(chan error, 1000)}
	t.Cleanup(func() { cancel(); r.wg.Wait() })
	for _, a := range addresses {
		for _, reads := range []int{1, 1, 50} {
			r.wg.Go(func() { r.run(ctx, i.ReadURL(a), reads) })
		}
	}
	return r
}

func (r *readers) run(ctx context.Context, url string, reads int) {
	for ctx.Err() == nil {
		if err := r.session(url, reads); err != nil {
			select {
			case r.fails <- err:
			default:
			}
		}
	}
}

// session is one connection with some reads. It is not cut short by the end of the test: what
// fails, has failed.
func (r *readers) session(url string, reads int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	for range reads {
		n := int64(0)
		if err := conn.QueryRow(ctx, readSQL).Scan(&n); err != nil {
			return err
		}
		r.reads.Add(1)
		for old := r.last.Load(); n > old && !r.last.CompareAndSwap(old, n); old = r.last.Load() {
		}
	}
	return nil
}

// end stops the readers and returns what has failed.
func (r *readers) end() []error {
	r.stop()
	r.wg.Wait()
	var out []error
	for {
		select {
		case err := <-r.fails:
			out = append(out, err)
		default:
			return out
		}
	}
}

// counter writes to the primary all the time, one higher each time.
func counter(t *testing.T, p *cluster.Instance) (stop func()) {
	t.Helper()
	write(t, p, "create table if not exists counter (n bigint)")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		var conn *pgx.Conn
		for n := 1; ctx.Err() == nil; n++ {
			if conn == nil {
				conn, _ = pgx.Connect(ctx, p.URL())
			}
			if conn != nil {
				if _, err := conn.Exec(ctx, "insert into counter values ($1)", n); err != nil {
					_ = conn.Close(context.Background())
					conn = nil
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		if conn != nil {
			_ = conn.Close(context.Background())
		}
	}()
	return func() { cancel(); <-done }
}

// refreshes is how often the standby has refreshed.
func refreshes(ctx context.Context, i *cluster.Instance) int64 {
	st, err := i.Status(ctx)
	if err != nil || st.Replica == nil {
		return 0
	}
	return st.Replica.Refreshes
}

// The copy behind the read port is replaced again and again under load, and no read fails.
func TestRefreshUnderLoad(t *testing.T) {
	t.Parallel()
	_, p, s := start(t, "  interval: 1s\n  drain: 30s\n")
	ctx := t.Context()
	stop := counter(t, p)
	defer stop()
	within(t, time.Minute, "the table on the replica", func() bool {
		n, err := ask(ctx, s, readSQL)
		return err == nil && n > 0
	})
	r := startReaders(t, s, "127.0.0.1", ownAddress(t))
	// A long query of the copy that serves now, which two refreshes must not disturb: the second
	// one waits for it.
	slow := connect(t, s.ReadURL("127.0.0.1"))
	began := time.Now()
	before, seen := refreshes(ctx, s), r.last.Load()
	slowDone := make(chan error, 1)
	go func() {
		_, err := slow.Exec(ctx, "select pg_sleep(8)")
		slowDone <- err
		_ = slow.Close(context.Background())
	}()
	most := 0
	watch := func(n int64) func() bool {
		return func() bool {
			copies, err := s.Copies(ctx)
			must(t, err)
			most = max(most, len(copies))
			return refreshes(ctx, s) >= before+n
		}
	}
	within(t, time.Minute, "a first refresh", watch(1))
	if err := <-slowDone; err != nil {
		t.Errorf("a query of %s was disturbed: %v", time.Since(began).Round(time.Second), err)
	}
	within(t, 2*time.Minute, "five refreshes", watch(5))
	fails := r.end()
	t.Logf("%d reads, %d refreshes in %s", r.reads.Load(), refreshes(ctx, s)-before, time.Since(began).Round(time.Second))
	for i, err := range fails {
		if i < 10 {
			t.Errorf("a read failed: %v", err)
		}
	}
	if most > 2 {
		t.Errorf("%d copies ran at the same time", most)
	}
	if r.last.Load() <= seen || r.reads.Load() == 0 {
		t.Errorf("readers have seen %d after %d", r.last.Load(), seen)
	}
}
