package leasetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/lease"
)

// Call is one operation on a register.
type Call struct {
	Swap          bool
	Prev          uint64 // swap: the version and nonce that were expected
	PrevNonce     string
	Version       uint64 // load: what was read; swap: what was written or offered
	Nonce         string
	Outcome       string // "ok", "conflict", "unknown"
	Begin, Return boottime.Instant
}

// Recorder is a register that notes every call to the one below it.
type Recorder struct {
	lease.Register
	Clock boottime.Clock

	mu    sync.Mutex
	calls []Call
}

// Take returns what was noted since the last Take.
func (r *Recorder) Take() []Call {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *Recorder) note(c Call, err error) {
	c.Return = r.Clock.Now()
	switch {
	case err == nil:
		c.Outcome = "ok"
	case errors.Is(err, lease.ErrConflict):
		c.Outcome = "conflict"
	case errors.Is(err, lease.ErrUnknown):
		c.Outcome = "unknown"
	default:
		return // certainly without effect
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

// Load implements lease.Register.
func (r *Recorder) Load(ctx context.Context) (lease.Record, error) {
	begin := r.Clock.Now()
	rec, err := r.Register.Load(ctx)
	r.note(Call{Version: rec.Version, Nonce: rec.Nonce, Begin: begin}, err)
	return rec, err
}

// CompareAndSwap implements lease.Register.
func (r *Recorder) CompareAndSwap(ctx context.Context, prev, next lease.Record) (lease.Record, error) {
	begin := r.Clock.Now()
	rec, err := r.Register.CompareAndSwap(ctx, prev, next)
	r.note(Call{Swap: true, Prev: prev.Version, PrevNonce: prev.Nonce, Version: rec.Version, Nonce: rec.Nonce, Begin: begin}, err)
	return rec, err
}

// registerModel is what a register is: its state is the version and nonce that it holds.
func registerModel(version uint64, nonce string) porcupine.Model {
	type state struct {
		version uint64
		nonce   string
	}
	return porcupine.Model{
		Init: func() any { return state{version, nonce} },
		Step: func(st, in, _ any) (bool, any) {
			s, c := st.(state), in.(Call)
			if !c.Swap {
				return s == state{c.Version, c.Nonce}, s
			}
			expected := s == state{c.Prev, c.PrevNonce}
			switch c.Outcome {
			case "ok":
				return expected && c.Version == c.Prev+1, state{c.Version, c.Nonce}
			case "conflict":
				return !expected, s
			default:
				// It may take effect at any time until the end, or never, which is
				// the same as at the end of all.
				if expected {
					return true, state{c.Version, c.Nonce}
				}
				return true, s
			}
		},
		DescribeOperation: func(in, _ any) string { return fmt.Sprintf("%+v", in) },
	}
}

// Linearizable says whether what a register answered to its clients, all on one clock, is
// what one register that began with this version and nonce can answer.
func Linearizable(version uint64, nonce string, calls [][]Call) porcupine.CheckResult {
	var ops []porcupine.Operation
	for id, cs := range calls {
		for _, c := range cs {
			ret := int64(c.Return)
			if c.Outcome == "unknown" {
				ret = math.MaxInt64
			}
			ops = append(ops, porcupine.Operation{ClientId: id, Input: c, Call: int64(c.Begin), Return: ret})
		}
	}
	return porcupine.CheckOperationsTimeout(registerModel(version, nonce), ops, time.Minute)
}
