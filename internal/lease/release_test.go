package lease_test

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
)

func TestReleaseToSuccessor(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b, c := newNode(t, share, "a"), newNode(t, share, "b"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.PutOrder(testContext(t), lease.Order{ID: "o", Kind: lease.OrderSwitchover, Term: 1}))
	must(t, a.Release(testContext(t), "b"))
	v := a.View()
	if v.Holding || v.Expired || !v.Record.Released || v.Record.Successor != "b" || v.Record.Order != nil {
		t.Errorf("after the release: %+v", v)
	}
	if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run file after the release: %v", err)
	}
	if v = a.step(t); v.Record.Version != 4 {
		t.Errorf("a released term was renewed: %+v", v.Record)
	}
	want(t, a.Acquire(testContext(t), nil), lease.ErrNotYet)
	c.refresh(t)
	want(t, c.Acquire(testContext(t), nil), lease.ErrNotYet)
	if v = b.refresh(t); v.ChallengeAt != 0 {
		t.Errorf("the successor has to wait until %d", v.ChallengeAt)
	}
	b.hold(t)
}

func TestSilentSuccessorIsReplacedAfterTTL(t *testing.T) {
	share := newShare(t, quickFS{})
	a, c := newNode(t, share, "a"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.Release(testContext(t), "b"))
	c.refresh(t)
	c.clock.Advance(ttl - 1)
	want(t, c.Acquire(testContext(t), nil), lease.ErrNotYet)
	c.clock.Advance(1)
	c.hold(t)
}

func TestReleaseToAnybody(t *testing.T) {
	share := newShare(t, quickFS{})
	a, c := newNode(t, share, "a"), newNode(t, share, "c")
	a.hold(t)
	must(t, a.Release(testContext(t), ""))
	c.hold(t)
}

// Rule 10: once a release was sent, nothing but an own later swap makes the lease held again,
// whatever became of the release.
func TestReleaseOfUnknownOutcomeDoesNotHold(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	a.share.Hang()
	want(t, a.Release(shortly(t), "b"), lease.ErrUnknown)
	v := a.View()
	if v.Holding || !v.Unknown || len(a.Offered()) != 1 || !a.Offered()[0].Released {
		t.Errorf("while the release hangs: %+v, offered %+v", v, a.Offered())
	}
	if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run file after the release: %v", err)
	}
	// It has no effect yet. The register still names a as the holder; a does not go on.
	a.share.set(nil, nil)
	if v = a.step(t); v.Holding || !v.Unknown || v.Record.Version != 2 {
		t.Errorf("after a look: %+v", v)
	}
	// It takes effect late.
	a.share.Heal()
	eventually(t, "the release takes effect", func() bool { return b.refresh(t).Record.Released })
	if v = a.step(t); v.Holding || v.Unknown || len(a.Offered()) > 0 {
		t.Errorf("after the release took effect: %+v", v)
	}
	b.hold(t)
}

func TestReleaseSettlesItself(t *testing.T) {
	share := newShare(t, quickFS{})
	a := newNode(t, share, "a")
	a.hold(t)
	a.share.set(func(op fsx.Op, _ string) error {
		if op == fsx.OpSymlink {
			a.share.set(nil, nil)
			return syscall.EIO // without effect
		}
		return nil
	}, nil)
	must(t, a.Release(testContext(t), ""))
	if v := a.refresh(t); !v.Record.Released || v.Unknown || v.Holding {
		t.Errorf("after the release: %+v", v)
	}
}

func TestRelinquish(t *testing.T) {
	share := newShare(t, quickFS{})
	a, b := newNode(t, share, "a"), newNode(t, share, "b")
	a.hold(t)
	a.Relinquish()
	v := a.step(t)
	if v.Holding || v.Expired || v.Record.Version != 2 {
		t.Errorf("after relinquishing: %+v", v)
	}
	a.restart(t)
	want(t, a.Resume(testContext(t)), lease.ErrNotYet)
	b.refresh(t)
	b.clock.Advance(ttl)
	b.hold(t)
}

// What is under way when the lease is relinquished does not count when it ends.
func TestRelinquishDuringSwap(t *testing.T) {
	for _, op := range []string{"renew", "acquire"} {
		t.Run(op, func(t *testing.T) {
			a := newNode(t, newShare(t, quickFS{}), "a")
			a.refresh(t)
			if op == "renew" {
				a.hold(t)
			}
			a.share.set(func(op fsx.Op, _ string) error {
				if op == fsx.OpSymlink {
					a.Relinquish()
				}
				return nil
			}, nil)
			if op == "renew" {
				must(t, a.Step(testContext(t)))
			} else {
				want(t, a.Acquire(testContext(t), nil), lease.ErrNotHeld)
			}
			a.share.set(nil, nil)
			if told := len(a.fence); told != map[string]int{"renew": 1, "acquire": 0}[op] {
				t.Errorf("the fence was told %v", a.fence)
			}
			if v := a.step(t); v.Holding {
				t.Errorf("holding after relinquishing: %+v", v)
			}
			if _, err := os.Stat(a.cfg.RunFile); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("run file is left: %v", err)
			}
		})
	}
}
