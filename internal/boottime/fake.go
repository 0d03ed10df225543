package boottime

import (
	"context"
	"sync"
	"time"
)

// Fake is a Clock that moves only when a test moves it. Its zero value stands at Instant 0;
// NewFake starts it at a moment that can't be mistaken for "never".
type Fake struct {
	mu      sync.Mutex
	now     Instant
	waiters map[chan struct{}]Instant
}

// NewFake returns a clock that stands at one hour after boot.
func NewFake() *Fake { return &Fake{now: Instant(time.Hour)} }

// Now implements Clock.
func (f *Fake) Now() Instant {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// Wall implements Clock: 2020-01-01 plus the fake instant.
func (f *Fake) Wall() time.Time {
	return time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(f.Now()))
}

// Advance moves the clock and wakes everyone whose moment has come.
func (f *Fake) Advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
	for ch, at := range f.waiters {
		if at <= f.now {
			close(ch)
			delete(f.waiters, ch)
		}
	}
}

// Waiters says how many callers are blocked in WaitUntil, so that a test can advance
// the clock when everyone is in place instead of sleeping.
func (f *Fake) Waiters() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waiters)
}

// WaitUntil implements Clock.
func (f *Fake) WaitUntil(ctx context.Context, at Instant) error {
	f.mu.Lock()
	if at <= f.now {
		f.mu.Unlock()
		return ctx.Err()
	}
	ch := make(chan struct{})
	if f.waiters == nil {
		f.waiters = map[chan struct{}]Instant{}
	}
	f.waiters[ch] = at
	f.mu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		f.mu.Lock()
		delete(f.waiters, ch)
		f.mu.Unlock()
		return ctx.Err()
	}
}
