package cluster

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Ack is one write that the database acknowledged.
type Ack struct {
	N  int64
	At time.Time // when the acknowledgement arrived
	By string    // instance
}

// Writer is a client as it stands behind a load balancer: it writes one row after another
// to whichever instance is primary, and remembers what was acknowledged. A write whose
// answer was lost is not counted as acknowledged (it may be there all the same).
type Writer struct {
	c    *Cluster
	stop context.CancelFunc
	done chan struct{}

	mu   sync.Mutex
	acks []Ack
	errs int
	last string
}

// StartWriter makes the table and begins to write.
func (c *Cluster) StartWriter(ctx context.Context) (*Writer, error) {
	p, err := c.WaitPrimary(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := p.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.Exec(ctx, "create table if not exists acked (n bigint primary key, at timestamptz not null)"); err != nil {
		return nil, fmt.Errorf("create table: %w", err)
	}
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &Writer{c: c, stop: cancel, done: make(chan struct{})}
	go w.run(wctx)
	return w, nil
}

func (w *Writer) run(ctx context.Context) {
	defer close(w.done)
	var conn *pgx.Conn
	var at *Instance
	n := int64(0)
	for ctx.Err() == nil {
		if conn == nil {
			if at = w.c.Primary(ctx); at == nil {
				wait(ctx, 10*time.Millisecond)
				continue
			}
			cctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			var err error
			conn, err = at.Connect(cctx)
			cancel()
			if err != nil {
				w.failed(err)
				conn = nil
				wait(ctx, 10*time.Millisecond)
				continue
			}
		}
		n++
		wctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := conn.Exec(wctx, "insert into acked values ($1, now()) on conflict do nothing", n)
		cancel()
		if err != nil {
			w.failed(err)
			_ = conn.Close(ctx)
			conn = nil
			continue
		}
		w.mu.Lock()
		w.acks = append(w.acks, Ack{N: n, At: time.Now(), By: at.Name})
		w.mu.Unlock()
		wait(ctx, time.Millisecond)
	}
	if conn != nil {
		cctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(cctx)
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (w *Writer) failed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errs++
	w.last = err.Error()
}

// Stop ends the writer and returns what was acknowledged.
func (w *Writer) Stop() []Ack {
	w.stop()
	<-w.done
	return w.Acks()
}

// Acks is what has been acknowledged so far.
func (w *Writer) Acks() []Ack {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Ack(nil), w.acks...)
}

// Errors is how many attempts failed, and the last error.
func (w *Writer) Errors() (int, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.errs, w.last
}

// Gap is the longest time between two acknowledgements, and when it began.
func Gap(acks []Ack) (time.Duration, time.Time) {
	var gap time.Duration
	var at time.Time
	for i := 1; i < len(acks); i++ {
		if d := acks[i].At.Sub(acks[i-1].At); d > gap {
			gap, at = d, acks[i-1].At
		}
	}
	return gap, at
}

// Missing returns the acknowledged writes that the database on i does not have.
func (c *Cluster) Missing(ctx context.Context, i *Instance, acks []Ack) ([]Ack, error) {
	conn, err := i.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(ctx) }()
	rows, err := conn.Query(ctx, "select n from acked")
	if err != nil {
		return nil, err
	}
	have := map[int64]bool{}
	ns, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, err
	}
	for _, n := range ns {
		have[n] = true
	}
	var missing []Ack
	for _, a := range acks {
		if !have[a.N] {
			missing = append(missing, a)
		}
	}
	return missing, nil
}
