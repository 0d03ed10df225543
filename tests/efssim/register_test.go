package efssim_test

import (
	"crypto/rand"
	"testing"
	"time"

	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/tests/efssim"
)

// TestRegisterKeepsToItsBudget: what the lease asks of the share again and again, every few
// seconds on every machine. docs/REGISTER.md has the numbers.
func TestRegisterKeepsToItsBudget(t *testing.T) {
	backing := t.TempDir()
	a, ra := mount(t, backing, patient())
	b, rb := mount(t, backing, patient())
	ctx := t.Context()
	open := func(share string) *lease.FileRegister {
		r, err := lease.OpenFile(ctx, lease.FileConfig{FS: fsx.OS{}, Share: share, Rand: rand.Reader})
		must(t, err)
		return r
	}
	_, err := lease.InitFile(ctx, lease.FileConfig{FS: fsx.OS{}, Share: a, Rand: rand.Reader}, lease.Record{TTL: lease.Duration(time.Minute)})
	must(t, err)
	holder, standby := open(a), open(b)
	rec, err := holder.Load(ctx)
	must(t, err)
	renew := func(n int) {
		for range n {
			rec, err = holder.CompareAndSwap(ctx, rec, rec)
			must(t, err)
		}
	}
	look := func() {
		got, err := standby.Load(ctx)
		must(t, err)
		if got.Version != rec.Version {
			t.Errorf("the standby sees version %d of %d", got.Version, rec.Version)
		}
	}
	renew(80)
	must(t, holder.Prune(ctx))
	renew(1)
	look()
	for _, c := range []struct {
		name string
		r    *efssim.Remote
		most uint64
		do   func()
	}{
		{"10 renewals", ra, 70, func() { renew(10) }},
		{"a standby's look after them", rb, 7, look},
		{"its next one, after none", rb, 2, look},
		{"the holder's own look", ra, 5, func() {
			_, err := holder.Load(ctx)
			must(t, err)
		}},
		{"pruning, 11 records", ra, 33, func() { must(t, holder.Prune(ctx)) }},
	} {
		before := wire(t, c.r)
		c.do()
		got := wire(t, c.r).Since(before)
		t.Logf("%s: %v", c.name, got)
		if got.Total() > c.most {
			t.Errorf("%s: %v; at most %d are allowed", c.name, got, c.most)
		}
	}
}
