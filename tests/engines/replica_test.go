package engines

import (
	"testing"

	"dbsupervisor/tests/cluster"
	"dbsupervisor/tests/workload"
)

// TestReadOnly: a replica of every engine shows what head has, and refuses the writes of the
// engine's most powerful user, also after that user has tried to undo it.
func TestReadOnly(t *testing.T) {
	for _, e := range workload.Engines() {
		t.Run(e.Name, func(t *testing.T) {
			r := newRig(t, e, func(o *cluster.Options) { o.Replica = "  enabled: true\n  interval: 1s" })
			a := r.primary()
			for n := int64(1); n <= 3; n++ {
				must(t, second(r.k.Do(r.ctx, a, e.Write(n))))
			}
			b := r.standby()
			r.sync(a)
			seen := map[int64]bool{}
			r.until("the replica shows what was written", func() bool {
				if !b.Is(r.ctx, "replica") {
					return false
				}
				have, err := r.k.NumbersAt(r.ctx, b.ReadPort)
				seen = have
				return err == nil && have[1] && have[2] && have[3]
			})
			refused := r.k.Try(r.ctx, b.ReadPort, e.Write(1000))
			undo := r.k.Try(r.ctx, b.ReadPort, e.Undo(b.ReadPort))
			again := r.k.Try(r.ctx, b.ReadPort, e.Write(1001))
			t.Logf("a write: %.200q\nundoing: %.400q\na write: %.200q", refused, undo, again)
			have, err := r.k.NumbersAt(r.ctx, b.ReadPort)
			must(t, err)
			if len(have) != len(seen) || have[1000] || have[1001] {
				t.Errorf("the replica has taken a write: %d numbers, before %d", len(have), len(seen))
			}
			if !b.Is(r.ctx, "replica") {
				t.Error("the replica serves no more after these attempts")
			}
		})
	}
}
