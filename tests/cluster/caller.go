package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Callers are clients that open a connection for each transaction, through one address that
// stands for the cluster: each writes one row after another.
type Callers struct {
	stop context.CancelFunc
	done sync.WaitGroup

	mu   sync.Mutex
	acks []Ack
	errs []error
	n    int64
}

const (
	// callPatience is how long a transaction may take, its connection included.
	callPatience = time.Minute
	// callPause is how long a client waits after an error.
	callPause = 100 * time.Millisecond
)

// Call makes the table and starts n clients.
func Call(ctx context.Context, url string, n int) (*Callers, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("connect to make the table: %w", err)
	}
	last := int64(0)
	_, err = conn.Exec(ctx, "create table if not exists acked (n bigint primary key, at timestamptz not null)")
	if err == nil {
		err = conn.QueryRow(ctx, "select coalesce(max(n), 0) from acked").Scan(&last)
	}
	if err = errors.Join(err, conn.Close(ctx)); err != nil {
		return nil, fmt.Errorf("make table: %w", err)
	}
	cctx, cancel := context.WithCancel(ctx)
	k := &Callers{stop: cancel, n: last}
	for range n {
		k.done.Go(func() { k.run(ctx, cctx, url) })
	}
	return k, nil
}

// run calls until stop ends; what has begun is finished under ctx.
func (k *Callers) run(ctx, stop context.Context, url string) {
	for stop.Err() == nil {
		k.mu.Lock()
		k.n++
		n := k.n
		k.mu.Unlock()
		err := callOnce(ctx, url, n)
		k.mu.Lock()
		if err == nil {
			k.acks = append(k.acks, Ack{N: n, At: time.Now()})
		} else {
			k.errs = append(k.errs, fmt.Errorf("%s: write %d: %w", time.Now().Format("15:04:05.000"), n, err))
		}
		k.mu.Unlock()
		if err != nil {
			wait(stop, callPause)
		}
	}
}

func callOnce(ctx context.Context, url string, n int64) error {
	ctx, cancel := context.WithTimeout(ctx, callPatience)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, "insert into acked values ($1, now())", n)
	return errors.Join(err, conn.Close(ctx))
}

// Stop ends the clients and returns what they saw, as Seen does.
func (k *Callers) Stop() (acks []Ack, errs []error) {
	k.stop()
	k.done.Wait()
	return k.Seen()
}

// Seen are the acknowledged writes so far, in the order of their acknowledgements, and the
// errors.
func (k *Callers) Seen() (acks []Ack, errs []error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.acks), slices.Clone(k.errs)
}

// Count is how many writes have been acknowledged.
func (k *Callers) Count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.acks)
}

// More waits for n further acknowledged writes.
func (k *Callers) More(ctx context.Context, n int) error {
	want := k.Count() + n
	if err := Until(ctx, func() bool { return k.Count() >= want }); err != nil {
		_, errs := k.Seen()
		return fmt.Errorf("no %d further writes: %w; errors so far: %w", n, err, errors.Join(errs[max(0, len(errs)-3):]...))
	}
	return nil
}

// URLAt is how a client connects to the cluster's database at a port of this machine.
func (c *Cluster) URLAt(port int) string {
	return fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/postgres?sslmode=disable", c.Password, port)
}

// FreePorts are ports of this machine that nobody uses now.
func FreePorts(n int) ([]int, error) { return freePorts(n) }
