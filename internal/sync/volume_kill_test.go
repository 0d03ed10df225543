package sync

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	stdsync "sync"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// killJob is what a process that is going to be killed does.
type killJob struct {
	Dir, Store, Spare string
	To                SnapshotRef
	At                int // it dies before this operation; 0: never
}

const killEnv = "VOLSYNC_KILL_JOB"

// TestVolumeKillChild is no test: it is the process that TestVolumeKill kills.
func TestVolumeKillChild(t *testing.T) {
	s := os.Getenv(killEnv)
	if s == "" {
		t.Skip("only as a child")
	}
	var j killJob
	volOK(t, json.Unmarshal([]byte(s), &j))
	var mu stdsync.Mutex
	n, last := 0, ""
	hooked := &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		mu.Lock()
		defer mu.Unlock()
		n++
		last = fmt.Sprint(op, " ", strings.ReplaceAll(path, j.Dir, ""))
		if n == j.At {
			fmt.Println("killed at", last)
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
		return nil
	}}
	v, err := OpenVolume(VolumeConfig{Dir: j.Dir, FS: hooked, Rand: rand.Reader, BootID: "boot-1", Workers: 2, SpareCopy: j.Spare})
	volOK(t, err)
	_, err = v.Hydrate(t.Context(), newTestStore(t, hooked, j.Store), j.To, nil)
	volOK(t, err)
	volOK(t, v.Close())
	fmt.Println("operations", n)
}

// run does the job in a process of its own: what it says, and whether it lived.
func (j killJob) run(t *testing.T) (string, bool) {
	t.Helper()
	b, err := json.Marshal(j)
	volOK(t, err)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVolumeKillChild$")
	cmd.Env = append(os.Environ(), killEnv+"="+string(b))
	out, err := cmd.CombinedOutput()
	if err != nil && !strings.Contains(string(out), "killed at") {
		t.Fatalf("child: %v\n%s", err, out)
	}
	return strings.TrimSpace(string(out)), err == nil
}

// TestVolumeKill: a process that is killed at any operation while a volume becomes another
// snapshot leaves, with a second copy, a volume that is whole, the old or the new one; in
// place it leaves one that is known to be half done. The next process makes it whole.
func TestVolumeKill(t *testing.T) {
	for _, c := range []struct{ system, spare string }{{"ext4", SpareAuto}, {"xfs", SpareAuto}, {"btrfs", SpareAuto}, {"ext4", SpareNever}} {
		t.Run(c.system+" "+c.spare, func(t *testing.T) {
			rig, one, two, descs := volTwo(t)
			temp := volTemps(t, volLoop(t, c.system))
			step := 1 + killStride(t, rig, one, two, temp(), c.spare)
			for at, lived := step, false; !lived; at += step {
				dir := temp()
				volKillOnce(t, rig, killJob{Dir: dir, Store: rig.store.cfg.Dir, Spare: c.spare, To: two, At: at}, one, descs, &lived)
				volOK(t, os.RemoveAll(dir))
			}
		})
	}
}

// killStride leaves operations out so that the test doesn't take minutes.
func killStride(t *testing.T, rig *volRig, one, two SnapshotRef, dir, spare string) int {
	t.Helper()
	volAt(t, rig, dir, spare, one)
	out, _ := killJob{Dir: dir, Store: rig.store.cfg.Dir, Spare: spare, To: two}.run(t)
	_, num, _ := strings.Cut(out, "operations ")
	n, err := strconv.Atoi(strings.Fields(num)[0])
	volOK(t, err)
	if n < 100 {
		t.Fatalf("only %d operations are seen", n)
	}
	if volLong() {
		return 0
	}
	return n / 30
}

func volAt(t *testing.T, rig *volRig, dir, spare string, ref SnapshotRef) {
	t.Helper()
	v := rig.open(dir, func(c *VolumeConfig) { c.SpareCopy = spare })
	_, err := v.Hydrate(t.Context(), rig.store, ref, nil)
	volOK(t, err)
	volOK(t, v.Close())
}

func volKillOnce(t *testing.T, rig *volRig, j killJob, one SnapshotRef, descs map[string]map[string]volDesc, lived *bool) {
	t.Helper()
	volAt(t, rig, j.Dir, j.Spare, one)
	var out string
	out, *lived = j.run(t)
	v := rig.open(j.Dir, func(c *VolumeConfig) { c.SpareCopy = j.Spare })
	defer v.Close()
	volUsable(t, out, v, j.Spare, descs)
	_, err := v.Hydrate(t.Context(), rig.store, j.To, nil)
	volOK(t, err)
	volSame(t, out+", then hydrated", descs[j.To.ID], volDescribe(t, v.Path()))
}

// volUsable fails unless a volume is whole, or, in place, known not to be.
func volUsable(t *testing.T, what string, v *Volume, spare string, descs map[string]map[string]volDesc) {
	t.Helper()
	switch st := v.State(); {
	case st.Phase == PhaseClean:
		volSame(t, what, descs[st.Base.ID], volDescribe(t, v.Path()))
	case spare == SpareNever && st.Phase == PhaseApplying:
	default:
		t.Fatalf("%s: the volume is %s", what, st.Phase)
	}
}

// volLong says whether a test may take minutes.
func volLong() bool { return os.Getenv("TEST_LONG") != "" }

// TestVolumePowerCut: what has reached the disk at any operation, without what is only in
// memory, is a volume that is whole too.
func TestVolumePowerCut(t *testing.T) {
	for _, c := range []struct{ system, opts string }{{"ext4", "loop"}, {"xfs", "loop,nouuid"}} {
		t.Run(c.system, func(t *testing.T) {
			rig, one, two, descs := volTwo(t)
			mnt, img := volLoopImage(t, c.system)
			cuts := volRAM(t)
			type cut struct{ img, at string }
			var all []cut
			hook := &volHook{}
			dir := filepath.Join(mnt, "v")
			open := func(dir, boot string) *Volume {
				return rig.open(dir, func(c *VolumeConfig) { c.FS, c.BootID, c.Workers = hook.fs(), boot, 1 })
			}
			v := open(dir, "boot-1")
			_, err := v.Hydrate(t.Context(), rig.store, one, nil)
			volOK(t, err)
			n := 0
			seen := map[string]bool{}
			hook.set(func(op fsx.Op, path string) error {
				at := fmt.Sprint(op, " ", strings.ReplaceAll(path, dir, ""))
				n++
				// Every step from the moment the copy is complete, and some before.
				if seen["syncfs"] || n%25 == 0 {
					f := filepath.Join(cuts, fmt.Sprint(len(all)))
					volRun(t, "cp", "--sparse=always", img, f)
					all = append(all, cut{f, at})
				}
				if volPoint("syncfs", op, path) {
					seen["syncfs"] = true
				}
				return nil
			})
			_, err = v.Hydrate(t.Context(), rig.store, two, nil)
			volOK(t, err)
			hook.set(nil)
			volOK(t, v.Close())
			after := map[string]int{}
			for i, c2 := range all {
				m := filepath.Join(cuts, fmt.Sprint("m", i))
				volOK(t, os.Mkdir(m, 0o700))
				volMount(t, c2.img, m, c.opts)
				v := open(filepath.Join(m, "v"), "boot-2")
				volUsable(t, "power cut at "+c2.at, v, SpareAuto, descs)
				after[v.State().Base.ID]++
				_, err := v.Hydrate(context.Background(), rig.store, two, nil)
				volOK(t, err)
				volSame(t, "power cut at "+c2.at+", then hydrated", descs[two.ID], volDescribe(t, v.Path()))
				volOK(t, v.Close())
				volOK(t, unix.Unmount(m, 0))
				volOK(t, os.Remove(c2.img))
			}
			if after[one.ID] == 0 || after[two.ID] == 0 {
				t.Fatalf("volumes found: %v", after)
			}
			t.Logf("%d cuts: %v", len(all), after)
		})
	}
}
