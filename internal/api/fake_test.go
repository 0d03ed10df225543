package api

import (
	"context"
	"sync"
	"time"
)

// fakeAgent answers with what a test put into it.
type fakeAgent struct {
	mu       sync.Mutex
	live     Live
	status   Status
	err      error
	progress []Progress
	hold     chan struct{} // Sync waits for it, or for the end of its context
	ended    chan error    // gets the context's error when Sync was cut off
	calls    []any
}

func (f *fakeAgent) call(v any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, v)
	return f.err
}

func (f *fakeAgent) Live() Live {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live
}

func (f *fakeAgent) Status(context.Context) (Status, error) { return f.status, f.call("status") }

func (f *fakeAgent) Sync(ctx context.Context, report Report) (SyncResult, error) {
	for _, p := range f.progress {
		report(p)
	}
	if f.hold != nil {
		select {
		case <-f.hold:
		case <-ctx.Done():
			f.ended <- ctx.Err()
			return SyncResult{}, ctx.Err()
		}
	}
	go report(Progress{Phase: "too late"}) // must do no harm
	return SyncResult{ID: "3-7-ab", ChangedBytes: 42}, f.call("sync")
}

func (f *fakeAgent) Switchover(_ context.Context, q SwitchoverRequest, _ Report) (MoveResult, error) {
	return MoveResult{Primary: q.To, Term: 4, Lossless: true}, f.call(q)
}

func (f *fakeAgent) Failover(_ context.Context, q FailoverRequest, _ Report) (MoveResult, error) {
	return MoveResult{Primary: q.To, Term: 5}, f.call(q)
}

func (f *fakeAgent) Pause(_ context.Context, paused bool) error { return f.call(paused) }

func (f *fakeAgent) Rollback(_ context.Context, q RollbackRequest, _ Report) (RollbackResult, error) {
	return RollbackResult{Head: "4-9-cd", From: q.Snapshot}, f.call(q)
}

func (f *fakeAgent) Restart(context.Context) error { return f.call("restart") }

func (f *fakeAgent) History(_ context.Context, n int) ([]Event, error) {
	return []Event{{Kind: "acquired", Term: uint64(n), At: time.Unix(5, 0).UTC()}}, f.call(n) //nolint:gosec // small test numbers
}

func (f *fakeAgent) Forks(context.Context) ([]Fork, error) {
	return []Fork{{Name: "f1"}}, f.call("forks")
}

func (f *fakeAgent) Token(context.Context) (Token, error) {
	return Token{Term: 3, Seq: 7}, f.call("token")
}
