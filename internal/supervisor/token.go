package supervisor

import (
	"context"
	"fmt"
	"slices"
	"time"

	"dbsupervisor/internal/api"
)

// mostTokens is how many may wait for the next snapshot at once.
const mostTokens = 1024

// Token implements api.Agent.
func (s *Supervisor) Token(ctx context.Context) (api.Token, error) {
	if !s.lease.View().Holding {
		return api.Token{}, s.notPrimary()
	}
	ch := make(chan syncOutcome, 1)
	s.mu.Lock()
	if len(s.tokens) >= mostTokens {
		s.mu.Unlock()
		return api.Token{}, fmt.Errorf("wait for the next snapshot: %w", api.ErrBusy)
	}
	s.tokens = append(s.tokens, ch)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.tokens = slices.DeleteFunc(s.tokens, func(c chan syncOutcome) bool { return c == ch })
		s.mu.Unlock()
	}()
	for {
		select {
		case out := <-ch:
			if out.err != nil {
				return api.Token{}, fmt.Errorf("next snapshot failed: %w", out.err)
			}
			return out.token, nil
		case <-ctx.Done():
			return api.Token{}, fmt.Errorf("wait for the next snapshot: %w", ctx.Err())
		case <-time.After(pollMove):
		}
		if !s.lease.View().Holding {
			return api.Token{}, s.notPrimary()
		}
	}
}
