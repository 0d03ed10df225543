package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"dbsupervisor/tests/cluster"
)

// client is somebody who asks the database something easy all the time, over one
// connection, and notes how long each answer took. It sees a freeze from outside.
type client struct {
	stop context.CancelFunc
	done chan struct{}

	mu      sync.Mutex
	answers []answer
	err     error
}

type answer struct {
	asked time.Time
	took  time.Duration
}

func startClient(ctx context.Context, i *cluster.Instance) (*client, error) {
	conn, err := i.Connect(ctx)
	if err != nil {
		return nil, err
	}
	cctx, cancel := context.WithCancel(ctx)
	c := &client{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
		for cctx.Err() == nil {
			asked := time.Now()
			_, err := conn.Exec(ctx, "select 1")
			c.mu.Lock()
			c.answers = append(c.answers, answer{asked, time.Since(asked)})
			c.err = err
			c.mu.Unlock()
			if err != nil {
				return
			}
			select {
			case <-cctx.Done():
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return c, nil
}

// longest is the longest answer of those that were under way between two moments.
func (c *client) longest(from, to time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	var most time.Duration
	for _, a := range c.answers {
		if a.asked.Before(to) && a.asked.Add(a.took).After(from) {
			most = max(most, a.took)
		}
	}
	return most
}

// close ends the client and says whether it was cut off.
func (c *client) close() error {
	c.stop()
	<-c.done
	if c.err != nil {
		return fmt.Errorf("client beside the snapshots: %w", c.err)
	}
	return nil
}
