package lease

import (
	"context"
	"fmt"
	"sync/atomic"
)

// workers runs file operations that may hang (a hard NFS mount blocks for ever) away from
// their callers. A caller leaves when its context ends; the operation goes on and keeps its
// slot until the file system answers, so that a dead share can't collect goroutines.
type workers chan struct{}

func newWorkers(n int) workers { return make(workers, n) }

// errLeft is returned by inBackground when the caller's context ended first.
type errLeft struct{ cause error }

func (e *errLeft) Error() string { return "operation on the share did not answer: " + e.cause.Error() }
func (e *errLeft) Unwrap() error { return e.cause }

// inBackground calls f in a goroutine and returns what it returned, or *errLeft when ctx
// ended before. If no slot became free before ctx ended, f was never called and the error
// is not *errLeft.
func inBackground[T any](ctx context.Context, w workers, f func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, err
	}
	select {
	case w <- struct{}{}:
	case <-ctx.Done():
		return zero, fmt.Errorf("%d earlier operations on the share still hang: %w", cap(w), ctx.Err())
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-w }()
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		return zero, &errLeft{ctx.Err()}
	}
}

// offer decides, between a caller who gives up and a worker that is about to offer a name,
// who was first. Exactly one of the two methods returns true.
type offer struct{ state atomic.Int32 }

// make is called by the worker directly before the name is offered.
func (o *offer) make() bool { return o.state.CompareAndSwap(0, 1) }

// withdraw is called by the leaving caller; true means that nothing was or will be offered.
func (o *offer) withdraw() bool { return o.state.CompareAndSwap(0, 2) }
