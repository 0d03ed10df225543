package sync

import (
	"context"
	"fmt"
	"os"
	"testing"

	"pgregory.net/rapid"
)

// TestVolumeDeltaFromEvery: from every earlier state of a directory, whatever happened to
// it since, a volume comes to the newest one, equal in every bit, hole and attribute, on
// every file system, with a second copy and in place; and so does a new directory.
func TestVolumeDeltaFromEvery(t *testing.T) {
	checks := 3
	if volLong() {
		checks = 100
	}
	for _, system := range loopSystems() {
		t.Run(system, func(t *testing.T) { volDeltaFromEvery(t, volLoop(t, system), checks) })
	}
}

func volDeltaFromEvery(t *testing.T, mnt string, checks int) {
	volChecks(t, checks)
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		round++
		root := fmt.Sprint(mnt, "/r", round)
		volOK(t, os.Mkdir(root, 0o700))
		defer func() { _ = os.RemoveAll(root) }()
		temp := volTemps(t, root)
		rig := newVolRig(t)
		rig.temp = temp
		v := rig.open(temp(), nil)
		defer v.Close()
		volOK(t, v.MarkLive(ctx, 1))
		volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
		w := &volWorld{t: rt, root: v.Path(), rich: true}
		type state struct {
			ref       SnapshotRef
			want      map[string]volDesc
			followers [2]*Volume // that stay there until the end, and one that goes along
		}
		var states []state
		along := rig.open(temp(), nil)
		defer along.Close()
		for range rapid.IntRange(2, 5).Draw(rt, "snapshots") {
			for range rapid.IntRange(1, 15).Draw(rt, "steps") {
				w.step()
			}
			// What XFS allocated ahead for shared blocks would look like data once it is read.
			volOK(t, v.SyncFS(ctx))
			trimClones(v.Path())
			_, ref := rig.snapshot(v, CaptureRequest{Freezer: &volFreezer{}})
			st := state{ref: ref, want: volDescribe(t, v.Path())}
			for i, spare := range []string{SpareAuto, SpareNever} {
				f := rig.open(temp(), func(c *VolumeConfig) { c.SpareCopy = spare })
				defer f.Close()
				_, err := f.Hydrate(ctx, rig.store, ref, nil)
				volOK(t, err)
				st.followers[i] = f
			}
			states = append(states, st)
			_, err := along.Hydrate(ctx, rig.store, ref, nil)
			volOK(t, err)
			volSame(rt, "going along", st.want, volDescribe(t, along.Path()))
		}
		last := states[len(states)-1]
		volSame(rt, "restored", last.want, rig.restored(last.ref))
		for i, st := range states {
			for _, f := range st.followers {
				what := fmt.Sprintf("from state %d of %d, second copy %s", i, len(states), f.cfg.SpareCopy)
				volSame(rt, what+", before", st.want, volDescribe(t, f.Path()))
				_, err := f.Hydrate(ctx, rig.store, last.ref, nil)
				volOK(t, err)
				volSame(rt, what, last.want, volDescribe(t, f.Path()))
				// And back again: the second copy is another one now.
				_, err = f.Hydrate(ctx, rig.store, states[0].ref, nil)
				volOK(t, err)
				volSame(rt, what+", back", states[0].want, volDescribe(t, f.Path()))
			}
		}
	})
}
