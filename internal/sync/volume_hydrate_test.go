package sync

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// volTwo makes a store with two snapshots that differ in everything a snapshot has.
func volTwo(t *testing.T) (rig *volRig, one, two SnapshotRef, descs map[string]map[string]volDesc) {
	t.Helper()
	rig = newVolRig(t)
	v := rig.open(volRAM(t), nil)
	volOK(t, v.MarkLive(context.Background(), 1))
	volOK(t, v.Baseline(context.Background(), rig.store, SnapshotRef{}))
	p := func(name string) string { return filepath.Join(v.Path(), name) }
	for _, d := range []string{"base", "base/sub", "moved", "moved/in", "gone", "todir.d", "empty"} {
		volOK(t, os.Mkdir(p(d), 0o750))
	}
	volWrite(t, p("base/a"), 0, volData(1, 9*BlockSize+100))
	volWrite(t, p("base/b"), 0, volData(2, 3*BlockSize))
	volWrite(t, p("base/sub/sparse"), 40*BlockSize, volData(3, 100))
	volWrite(t, p("moved/in/wal"), 0, volData(4, 12*BlockSize))
	volWrite(t, p("moved/x"), 0, volData(5, BlockSize))
	volWrite(t, p("gone/file"), 0, volData(6, 100))
	volWrite(t, p("swap1"), 0, volData(7, 2*BlockSize))
	volWrite(t, p("swap2"), 0, volData(8, 2*BlockSize))
	volWrite(t, p("filetodir"), 0, volData(9, 10))
	volWrite(t, p("todir.d/f"), 0, volData(10, 10))
	volWrite(t, p("linked1"), 0, volData(11, BlockSize))
	volOK(t, os.Link(p("linked1"), p("base/linked2")))
	volOK(t, os.Symlink("a", p("base/link")))
	volWrite(t, p("tail"), 0, volData(12, 2*BlockSize+100))
	volWrite(t, p("suid"), 0, volData(13, 10))
	volOK(t, unix.Chmod(p("suid"), 0o4755))
	volOK(t, unix.Setxattr(p("suid"), "user.gone", []byte("x"), 0))
	_, one = rig.snapshot(v, CaptureRequest{NoFreeze: true})
	descs = map[string]map[string]volDesc{one.ID: volDescribe(t, v.Path())}

	volWrite(t, p("base/a"), 4*BlockSize, volData(20, BlockSize))
	volOK(t, os.Truncate(p("base/b"), BlockSize+7))
	volWrite(t, p("base/sub/sparse"), 10*BlockSize, volData(21, 2*BlockSize))
	volOK(t, os.Rename(p("moved"), p("base/sub/elsewhere")))
	volOK(t, os.Rename(p("base/sub/elsewhere/in/wal"), p("base/sub/elsewhere/in/wal2")))
	volOK(t, os.RemoveAll(p("gone")))
	volOK(t, os.Rename(p("swap1"), p("tmp")))
	volOK(t, os.Rename(p("swap2"), p("swap1")))
	volOK(t, os.Rename(p("tmp"), p("swap2")))
	volOK(t, os.Remove(p("filetodir")))
	volOK(t, os.Mkdir(p("filetodir"), 0o700))
	volWrite(t, p("filetodir/f"), 0, volData(22, 3*BlockSize))
	volOK(t, os.RemoveAll(p("todir.d")))
	volWrite(t, p("todir.d"), 0, volData(23, 20))
	volOK(t, os.Remove(p("linked1")))
	volWrite(t, p("linked1"), 0, volData(24, BlockSize))
	volOK(t, os.Link(p("base/linked2"), p("linked3")))
	volOK(t, os.Remove(p("base/link")))
	volOK(t, os.Symlink("b", p("base/link")))
	volOK(t, os.Chmod(p("empty"), 0o711))
	volOK(t, os.Truncate(p("tail"), BlockSize)) // from here on a hole
	volOK(t, os.Truncate(p("tail"), 2*BlockSize+100))
	if os.Geteuid() == 0 {
		volOK(t, os.Chown(p("suid"), 1000, 1000)) // clears the bit
	}
	volOK(t, unix.Chmod(p("suid"), 0o4755))
	volOK(t, unix.Removexattr(p("suid"), "user.gone"))
	volOK(t, unix.Setxattr(p("base/a"), "user.x", []byte("y"), 0))
	_, two = rig.snapshot(v, CaptureRequest{NoFreeze: true})
	descs[two.ID] = volDescribe(t, v.Path())
	return rig, one, two, descs
}

// TestVolumeHydrateCrash: a crash at every single operation of a Hydrate leaves a volume
// that is whole, old or new, where there is a second copy, and otherwise either still the
// old snapshot or marked as half applied; and the next Hydrate, to either snapshot, makes it
// whole.
func TestVolumeHydrateCrash(t *testing.T) {
	rig, one, two, descs := volTwo(t)
	for _, spare := range []string{SpareAuto, SpareNever} {
		t.Run(spare, func(t *testing.T) { volHydrateCrash(t, spare, rig, one, two, descs) })
	}
}

func volHydrateCrash(t *testing.T, spare string, rig *volRig, one, two SnapshotRef, descs map[string]map[string]volDesc) {
	ctx := context.Background()
	total := 0
	for _, from := range []SnapshotRef{{}, one} {
		every := 1
		if testing.Short() {
			every = 7
		}
		for n, crashed := 1, true; crashed; n += every {
			hook := &volHook{}
			dir := volRAM(t)
			v, err := OpenVolume(VolumeConfig{Dir: dir, FS: hook.fs(), Rand: rand.Reader, BootID: "boot-1", Workers: 1, SpareCopy: spare})
			volOK(t, err)
			if from.ID != "" {
				_, err := v.Hydrate(ctx, rig.store, from, nil)
				volOK(t, err)
			}
			crashed = false
			left, label := n, ""
			hook.set(func(op fsx.Op, path string) error {
				if left--; left > 0 {
					return nil
				}
				if !crashed {
					label = fmt.Sprint(op, " ", strings.ReplaceAll(path, dir, ""))
				}
				crashed = true
				return fsx.ErrCrash // and nothing works any more
			})
			_, err = v.Hydrate(ctx, rig.store, two, nil)
			what := fmt.Sprintf("from %q, crash at operation %d (%s)", from.ID, n, label)
			if crashed && err == nil && !strings.Contains(label, "index") {
				t.Fatalf("%s: no error", what)
			}
			volOK(t, v.Close())
			total++

			v = rig.open(dir, func(c *VolumeConfig) { c.SpareCopy = spare })
			st := v.State()
			if spare == SpareAuto && from.ID != "" && st.Phase != PhaseClean {
				t.Fatalf("%s: the old snapshot is lost before the new one is whole: %s", what, st.Phase)
			}
			switch {
			case st.Phase == PhaseClean:
				volSame(t, what+": clean", descs[st.Base.ID], volDescribe(t, v.Path()))
			case st.Phase == PhaseEmpty && from.ID == "", st.Phase == PhaseApplying:
			default:
				t.Fatalf("%s: phase %s", what, st.Phase)
			}
			if st.Phase == PhaseApplying {
				if err := v.MarkLive(ctx, 2); !errors.Is(err, ErrPhase) {
					t.Fatalf("%s: a database may start on it: %v", what, err)
				}
			}
			next := two
			if n%3 == 0 {
				next = one
			}
			if _, err := v.Hydrate(ctx, rig.store, next, nil); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			volSame(t, what+": hydrated again", descs[next.ID], volDescribe(t, v.Path()))
			es, err := os.ReadDir(v.spoolDir())
			volOK(t, err)
			if len(es) > 0 {
				t.Fatalf("%s: %d files are left in the spool", what, len(es))
			}
			volOK(t, v.Close())
		}
	}
	t.Logf("%d crashes", total)
}

// TestVolumeHydrateFetchesLittle: a delta fetches what changed, and after a crash what is
// not there yet.
func TestVolumeHydrateFetchesLittle(t *testing.T) {
	ctx := context.Background()
	rig, one, two, descs := volTwo(t)
	hook := &volHook{}
	v := rig.open(t.TempDir(), func(c *VolumeConfig) { c.FS, c.Workers = hook.fs(), 1 })
	full, err := v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	delta, err := v.Hydrate(ctx, rig.store, two, nil)
	volOK(t, err)
	// Changed: a 1, b 1 (cut), sparse 2, filetodir 3, todir.d 1, linked1 1.
	if want := int64(9 * BlockSize); delta.FetchedBytes != want || !delta.Staged {
		t.Fatalf("delta fetched %d bytes instead of %d (a full one %d)", delta.FetchedBytes, want, full.FetchedBytes)
	}
	if again, err := v.Hydrate(ctx, rig.store, two, nil); err != nil || again.FetchedBytes != 0 {
		t.Fatalf("a second time: %+v, %v", again, err)
	}
	// Reboots lose the index, not the data.
	volOK(t, v.Close())
	v = rig.open(v.cfg.Dir, func(c *VolumeConfig) { c.BootID, c.FS, c.Workers = "boot-2", hook.fs(), 1 })
	if again, err := v.Hydrate(ctx, rig.store, two, nil); err != nil || again.FetchedBytes != 0 {
		t.Fatalf("after a reboot: %+v, %v", again, err)
	}
	_, err = v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	volSame(t, "after a reboot", descs[one.ID], volDescribe(t, v.Path()))

	// Nine tenths done.
	v.cfg.SpareCopy = SpareNever
	writes := 0
	hook.set(func(op fsx.Op, path string) error {
		if volPoint("apply-meta", op, path) {
			if writes++; writes > 3 {
				return fsx.ErrCrash
			}
		}
		return nil
	})
	if _, err := v.Hydrate(ctx, rig.store, two, nil); !errors.Is(err, fsx.ErrCrash) {
		t.Fatal(err)
	}
	hook.set(nil)
	rest, err := v.Hydrate(ctx, rig.store, two, nil)
	volOK(t, err)
	if rest.FetchedBytes != 0 {
		t.Fatalf("all blocks were there, but %d bytes were fetched again", rest.FetchedBytes)
	}
	volSame(t, "after a crash", descs[two.ID], volDescribe(t, v.Path()))
}

// TestVolumeHydrateBitRot: after a reboot a file that is not what its snapshot says is
// found and mended.
func TestVolumeHydrateBitRot(t *testing.T) {
	ctx := context.Background()
	rig, one, _, descs := volTwo(t)
	v := rig.open(t.TempDir(), nil)
	_, err := v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	volWrite(t, filepath.Join(v.Path(), "base/a"), 2*BlockSize, []byte("lost page cache"))
	// No stat shows what a crash loses: make the index agree with the file's.
	found, err := scan(ctx, v.Path(), scanConfig{})
	volOK(t, err)
	v.idx.files[v.base.Names["base/a"]].key = found.names["base/a"].key
	v.idx.logged = 0
	v.logIndex(v.State().Copy, v.idx, "", one.Hash).end()
	volOK(t, v.Close())
	v = rig.open(v.cfg.Dir, func(c *VolumeConfig) { c.BootID = "boot-2" })
	st, err := v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	if st.FetchedBytes != BlockSize {
		t.Errorf("%d bytes were fetched", st.FetchedBytes)
	}
	volSame(t, "mended", descs[one.ID], volDescribe(t, v.Path()))
}

// TestVolumeHydrateTampered: a clean volume's file that somebody has changed is noticed by
// its stat.
func TestVolumeHydrateTampered(t *testing.T) {
	ctx := context.Background()
	rig, one, two, descs := volTwo(t)
	for _, c := range []struct{ system, spare string }{{"ext4", SpareAuto}, {"ext4", SpareNever}, {"xfs", SpareAuto}} {
		spare := c.spare
		v := rig.open(volTemps(t, volLoop(t, c.system))(), func(c *VolumeConfig) { c.SpareCopy = spare })
		_, err := v.Hydrate(ctx, rig.store, one, nil)
		volOK(t, err)
		volWrite(t, filepath.Join(v.Path(), "base/a"), 2*BlockSize, []byte("tampered"))
		_, err = v.Hydrate(ctx, rig.store, two, nil)
		volOK(t, err)
		volSame(t, "mended", descs[two.ID], volDescribe(t, v.Path()))
		if v.State().Spare.Phase == "" {
			continue
		}
		// The same for the second copy, which is at the first snapshot now.
		volWrite(t, filepath.Join(v.sparePath(), "base/a"), 2*BlockSize, []byte("tampered"))
		_, err = v.Hydrate(ctx, rig.store, one, nil)
		volOK(t, err)
		volSame(t, "second copy mended", descs[one.ID], volDescribe(t, v.Path()))
	}
}

// TestVolumeHydrateBadStore: when the store lacks something, the error names it and a clean
// volume stays as it was, ready for its own snapshot and for a later one.
func TestVolumeHydrateBadStore(t *testing.T) {
	ctx := context.Background()
	for name, harm := range map[string]func(t *testing.T, path string){
		"missing":   func(t *testing.T, path string) { volOK(t, os.Remove(path)) },
		"truncated": func(t *testing.T, path string) { volOK(t, os.Truncate(path, 100)) },
		"flipped": func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			volOK(t, err)
			b[len(b)/3] ^= 1
			volOK(t, os.WriteFile(path, b, 0o600))
		},
	} {
		for _, object := range []string{"manifest", "pack"} {
			t.Run(name+" "+object, func(t *testing.T) {
				rig, one, two, descs := volTwo(t)
				bad := two.Manifest
				if object == "pack" {
					for _, p := range rig.head.Packs {
						if strings.Contains(p.Path, two.ID) {
							bad = p.Path
						}
					}
				}
				v := rig.open(t.TempDir(), nil)
				_, err := v.Hydrate(ctx, rig.store, one, nil)
				volOK(t, err)
				harm(t, filepath.Join(rig.store.cfg.Dir, bad))
				_, err = v.Hydrate(ctx, rig.store, two, nil)
				if !errors.Is(err, ErrMissing) && !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), bad) {
					t.Fatalf("error does not name %s: %v", bad, err)
				}
				if st := v.State(); st.Phase != PhaseClean || st.Base != one {
					t.Fatalf("the volume is %s at %s", st.Phase, st.Base.ID)
				}
				volSame(t, "untouched", descs[one.ID], volDescribe(t, v.Path()))
				_, err = v.Hydrate(ctx, rig.store, one, nil)
				volOK(t, err)
				err = Restore(ctx, rig.store, two, filepath.Join(t.TempDir(), "r"), RestoreOptions{})
				if err == nil || !strings.Contains(err.Error(), bad) {
					t.Fatalf("restore: error does not name %s: %v", bad, err)
				}
			})
		}
	}
}

// TestVolumeHydrateNoRoom: without room nothing is changed, and with room it goes on.
func TestVolumeHydrateNoRoom(t *testing.T) {
	ctx := context.Background()
	rig, one, two, descs := volTwo(t)
	v := rig.open(t.TempDir(), nil)
	v.cfg.MinFree = 1 << 60
	_, err := v.Hydrate(ctx, rig.store, one, nil)
	volIs(t, err, ErrNoRoom)
	if st := v.State(); st.Phase != PhaseEmpty {
		t.Fatalf("the volume is %s", st.Phase)
	}
	v.cfg.MinFree = 0
	_, err = v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	v.cfg.MinFree = 1 << 60
	_, err = v.Hydrate(ctx, rig.store, two, nil)
	volIs(t, err, ErrNoRoom)
	if st := v.State(); st.Phase != PhaseClean || st.Base != one {
		t.Fatalf("the volume is %s at %s", st.Phase, st.Base.ID)
	}
	volSame(t, "untouched", descs[one.ID], volDescribe(t, v.Path()))
	v.cfg.MinFree = 0
	_, err = v.Hydrate(ctx, rig.store, two, nil)
	volOK(t, err)
	volSame(t, "with room", descs[two.ID], volDescribe(t, v.Path()))
}

// TestVolumeDiskFull: on a file system that is really full, capturing and hydrating fail
// with ErrNoRoom, and go on when there is room.
func TestVolumeDiskFull(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skip("may not mount here: ", err)
	}
	t.Cleanup(func() { volOK(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	rig := newVolRig(t)
	v := rig.open(filepath.Join(dir, "v"), nil)
	volOK(t, v.MarkLive(ctx, 1))
	volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
	volWrite(t, filepath.Join(v.Path(), "f"), 0, volData(1, 6<<20))
	_, one := rig.snapshot(v, CaptureRequest{})
	desc := volDescribe(t, v.Path())
	volWrite(t, filepath.Join(v.Path(), "f"), 0, volData(2, 6<<20))
	fill := filepath.Join(dir, "fill")
	volWrite(t, fill, 0, volData(3, 14<<20))
	fr := &volFreezer{}
	_, err := v.Capture(ctx, CaptureRequest{Freezer: fr})
	volIs(t, err, ErrNoRoom)
	if fr.isFrozen() {
		t.Fatal("the database stands still")
	}
	volOK(t, os.Remove(fill))
	_, two := rig.snapshot(v, CaptureRequest{})
	volSame(t, "captured with room", volDescribe(t, v.Path()), rig.restored(two))
	volOK(t, v.Close())

	f := rig.open(filepath.Join(dir, "w"), nil)
	_, err = f.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	volWrite(t, fill, 0, volData(3, 8<<20))
	_, err = f.Hydrate(ctx, rig.store, two, nil)
	volIs(t, err, ErrNoRoom)
	volSame(t, "untouched", desc, volDescribe(t, f.Path()))
	volOK(t, os.Remove(fill))
	_, err = f.Hydrate(ctx, rig.store, two, nil)
	volOK(t, err)
	volSame(t, "hydrated with room", volDescribe(t, v.Path()), volDescribe(t, f.Path()))
}

// TestVolumeForks: data is set aside whole, the new volume has another identity, takes
// blocks from the fork where they are right, and forks are deleted after their time.
func TestVolumeForks(t *testing.T) {
	ctx := context.Background()
	rig, one, two, descs := volTwo(t)
	v := rig.open(t.TempDir(), nil)
	_, err := v.Hydrate(ctx, rig.store, one, nil)
	volOK(t, err)
	volOK(t, v.MarkLive(ctx, 7))
	volWrite(t, filepath.Join(v.Path(), "base/a"), 3*BlockSize, []byte("acknowledged and never shipped"))
	beyond := volDescribe(t, v.Path())
	if _, err := v.Hydrate(ctx, rig.store, two, nil); !errors.Is(err, ErrPhase) {
		t.Fatalf("a live volume was overwritten: %v", err)
	}
	old := v.State()
	f, err := v.SetAside(ctx, "beta held term 8", two)
	volOK(t, err)
	if st := v.State(); st.ID == old.ID || st.Phase != PhaseEmpty || st.Base != (SnapshotRef{}) {
		t.Fatalf("new state %+v", st)
	}
	forks, err := v.Forks()
	volOK(t, err)
	if len(forks) != 1 || forks[0].Name != f.Name || forks[0].Reason != "beta held term 8" || forks[0].VolumeID != old.ID ||
		forks[0].Head.ID != two.ID || forks[0].Base.ID != one.ID || forks[0].LiveTerm != 7 || forks[0].Path != f.Path {
		t.Fatalf("forks %+v", forks)
	}
	volSame(t, "fork", beyond, volDescribe(t, f.Path))

	st, err := v.Hydrate(ctx, rig.store, two, nil)
	volOK(t, err)
	volSame(t, "beside the fork", descs[two.ID], volDescribe(t, v.Path()))
	// In common under the same name: base/a 8 (2 changed), base/b 1, sparse 1, linked2 1,
	// tail 1, suid 1.
	if st.ReusedBytes != 13*BlockSize || st.ReusedBytes+st.FetchedBytes != dataBytes(rig.head) {
		t.Fatalf("%+v of %d bytes", st, dataBytes(rig.head))
	}
	volSame(t, "fork afterwards", beyond, volDescribe(t, f.Path))

	gone, err := v.PruneForks(func(Fork) bool { return false })
	volOK(t, err)
	if len(gone) != 0 {
		t.Fatalf("deleted too early: %v", gone)
	}
	gone, err = v.PruneForks(func(g Fork) bool { return g.Name == f.Name })
	volOK(t, err)
	if len(gone) != 1 || gone[0] != f.Name {
		t.Fatalf("deleted %v", gone)
	}
	if es, _ := os.ReadDir(v.forksDir()); len(es) != 0 {
		t.Fatalf("%d entries are left", len(es))
	}
}

// TestVolumeSetAsideCrash: a crash at any operation loses neither data nor identity.
func TestVolumeSetAsideCrash(t *testing.T) {
	ctx := context.Background()
	for n, crashed := 1, true; crashed; n++ {
		hook := &volHook{}
		dir := volRAM(t)
		v, err := OpenVolume(VolumeConfig{Dir: dir, FS: hook.fs(), Rand: rand.Reader, BootID: "boot-1"})
		volOK(t, err)
		volOK(t, v.MarkLive(ctx, 3))
		volWrite(t, filepath.Join(v.Path(), "f"), 0, []byte("precious"))
		old := v.State()
		crashed = false
		left := n
		hook.set(func(fsx.Op, string) error {
			if left--; left > 0 {
				return nil
			}
			crashed = true
			return fsx.ErrCrash
		})
		_, err = v.SetAside(ctx, "test", SnapshotRef{})
		if crashed != (err != nil) {
			t.Fatalf("operation %d: error %v", n, err)
		}
		volOK(t, v.Close())
		v, err = OpenVolume(VolumeConfig{Dir: dir, Rand: rand.Reader, BootID: "boot-1"})
		volOK(t, err)
		forks, err := v.Forks()
		volOK(t, err)
		st := v.State()
		data := filepath.Join(v.Path(), "f")
		if len(forks) == 1 {
			data = filepath.Join(forks[0].Path, "f")
			if st.Phase != PhaseEmpty || st.ID == old.ID || forks[0].VolumeID != old.ID || forks[0].Reason != "test" {
				t.Fatalf("operation %d: state %+v, fork %+v", n, st, forks[0])
			}
			if empty, err := dirEmpty(v.Path()); !empty || err != nil {
				t.Fatalf("operation %d: new volume is not empty: %v", n, err)
			}
		} else if st.Phase != PhaseLive || st.ID != old.ID {
			t.Fatalf("operation %d: no fork, but state %+v", n, st)
		}
		if b, err := os.ReadFile(data); err != nil || string(b) != "precious" {
			t.Fatalf("operation %d: %q, %v", n, b, err)
		}
		_, err = v.PruneForks(func(f Fork) bool { return time.Since(f.Time) > time.Hour })
		volOK(t, err)
		if again, err := v.Forks(); err != nil || len(again) != len(forks) {
			t.Fatalf("operation %d: pruning took a whole fork: %v", n, err)
		}
		volOK(t, v.Close())
	}
}

// TestVolumePhases: what is allowed when.
func TestVolumePhases(t *testing.T) {
	ctx := context.Background()
	rig, one, two, _ := volTwo(t)
	capture := func(v *Volume) error {
		_, err := v.Capture(ctx, CaptureRequest{NoFreeze: true})
		return err
	}
	hydrate := func(v *Volume) error { _, err := v.Hydrate(ctx, rig.store, two, nil); return err }
	mark := func(v *Volume) error { return v.MarkLive(ctx, 2) }
	clean := func(v *Volume) error { return v.MarkClean(ctx, one) }
	base := func(v *Volume) error { return v.Baseline(ctx, rig.store, one) }
	imp := func(v *Volume) error { _, err := v.Import(ctx, t.TempDir(), nil); return err }
	for _, c := range []struct {
		phase Phase
		name  string
		do    func(v *Volume) error
		want  error
		then  Phase
	}{
		{PhaseEmpty, "capture", capture, ErrPhase, PhaseEmpty},
		{PhaseEmpty, "hydrate", hydrate, nil, PhaseClean},
		{PhaseEmpty, "live", mark, nil, PhaseLive},
		{PhaseEmpty, "clean", clean, ErrPhase, PhaseEmpty},
		{PhaseEmpty, "baseline", base, ErrPhase, PhaseEmpty},
		{PhaseEmpty, "import", imp, nil, PhaseLive},
		{PhaseApplying, "capture", capture, ErrPhase, PhaseApplying},
		{PhaseApplying, "hydrate", hydrate, nil, PhaseClean},
		{PhaseApplying, "live", mark, ErrPhase, PhaseApplying},
		{PhaseApplying, "clean", clean, ErrPhase, PhaseApplying},
		{PhaseApplying, "baseline", base, ErrPhase, PhaseApplying},
		{PhaseApplying, "import", imp, nil, PhaseLive},
		{PhaseClean, "capture", capture, nil, PhaseClean},
		{PhaseClean, "hydrate", hydrate, nil, PhaseClean},
		{PhaseClean, "live", mark, nil, PhaseLive},
		{PhaseClean, "clean", clean, nil, PhaseClean},
		{PhaseClean, "baseline", base, nil, PhaseClean},
		{PhaseClean, "import", imp, ErrPhase, PhaseClean},
		{PhaseLive, "capture", capture, nil, PhaseLive},
		{PhaseLive, "hydrate", hydrate, ErrPhase, PhaseLive},
		{PhaseLive, "live", mark, nil, PhaseLive},
		{PhaseLive, "clean", clean, nil, PhaseClean},
		{PhaseLive, "clean elsewhere", func(v *Volume) error { return v.MarkClean(ctx, two) }, ErrPhase, PhaseLive},
		{PhaseLive, "baseline", base, nil, PhaseLive},
		{PhaseLive, "import", imp, ErrPhase, PhaseLive},
	} {
		t.Run(string(c.phase)+" "+c.name, func(t *testing.T) {
			v := rig.open(t.TempDir(), nil)
			if c.phase == PhaseClean || c.phase == PhaseLive {
				_, err := v.Hydrate(ctx, rig.store, one, nil)
				volOK(t, err)
			}
			if c.phase == PhaseLive {
				volOK(t, v.MarkLive(ctx, 1))
			}
			if c.phase == PhaseApplying {
				volOK(t, v.markApplying())
			}
			volIs(t, c.do(v), c.want)
			if got := v.State(); got.Phase != c.then {
				t.Fatalf("phase is %s instead of %s", got.Phase, c.then)
			}
			volOK(t, v.Close())
			v = rig.open(v.cfg.Dir, nil)
			if got := v.State(); got.Phase != c.then {
				t.Fatalf("durable phase is %s instead of %s", got.Phase, c.then)
			}
		})
	}
}

// TestVolumeOpen: one agent per directory, and no guessing about unknown data.
func TestVolumeOpen(t *testing.T) {
	dir := t.TempDir()
	cfg := VolumeConfig{Dir: dir, Rand: rand.Reader, BootID: "boot-1"}
	v, err := OpenVolume(cfg)
	volOK(t, err)
	if _, err := OpenVolume(cfg); !errors.Is(err, ErrVolumeLocked) {
		t.Fatalf("opened twice: %v", err)
	}
	volOK(t, v.Close())
	volWrite(t, filepath.Join(v.Path(), "stranger"), 0, []byte("x"))
	v, err = OpenVolume(cfg)
	volOK(t, err)
	rig, one, _, _ := volTwo(t)
	_, err = v.Hydrate(context.Background(), rig.store, one, nil)
	volIs(t, err, ErrNotEmpty)
	volOK(t, v.Close())
	volOK(t, os.Remove(v.statePath()))
	if _, err := OpenVolume(cfg); err == nil {
		t.Fatal("data without a state was taken for a volume")
	}
	for _, bad := range []string{"", "{", `{"format":2,"phase":"clean"}`, `{"format":1,"phase":"tidy"}`} {
		volOK(t, os.WriteFile(v.statePath(), []byte(bad), 0o600))
		if _, err := OpenVolume(cfg); err == nil {
			t.Errorf("state %q was accepted", bad)
		}
	}
}

// TestVolumeImport: an existing directory becomes the first snapshot, with everything.
func TestVolumeImport(t *testing.T) {
	ctx := context.Background()
	src := t.TempDir()
	p := func(name string) string { return filepath.Join(src, name) }
	volOK(t, os.Mkdir(p("d"), 0o2750))
	volWrite(t, p("d/f"), 0, volData(1, 5*BlockSize+11))
	volOK(t, os.Link(p("d/f"), p("g")))
	volWrite(t, p("sparse"), 100*BlockSize, []byte("end"))
	volWrite(t, p("\xff\xfe"), 0, nil)
	volOK(t, os.Symlink("d/f", p("link")))
	volOK(t, os.Chmod(p("d/f"), 0o4755))
	volOK(t, unix.Mkfifo(p("fifo"), 0o600))
	// An access control list: user::rwx user:1000:r-- group::r-x mask::r-x other::---
	acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x05\x00\xff\xff\xff\xff\x10\x00\x05\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	for _, name := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		volOK(t, unix.Setxattr(p("d"), name, []byte(acl), 0))
	}
	if os.Geteuid() == 0 {
		volOK(t, os.Chown(p("sparse"), 1234, 5678))
	}
	want := volDescribe(t, src)
	if len(want["d"].XAttrs) != 2 {
		t.Fatalf("no access control list: %+v", want["d"])
	}
	hook := &volHook{}
	rig := newVolRig(t)
	v := rig.open(t.TempDir(), func(c *VolumeConfig) { c.FS = hook.fs() })
	for _, label := range []string{"apply-create", "apply-content", "apply-meta"} {
		hook.set(func(op fsx.Op, path string) error {
			if volPoint(label, op, path) {
				return fsx.ErrCrash
			}
			return nil
		})
		if _, err := v.Import(ctx, src, nil); !errors.Is(err, fsx.ErrCrash) {
			t.Fatal(label, err)
		}
		if st := v.State(); st.Phase != PhaseApplying {
			t.Fatalf("phase is %s after a crash", st.Phase)
		}
	}
	hook.set(nil)
	st, err := v.Import(ctx, src, nil)
	volOK(t, err)
	if len(st.Skipped) != 1 || st.Skipped[0] != "fifo" || st.Files != 3 {
		t.Fatalf("%+v", st)
	}
	volSame(t, "imported", want, volDescribe(t, v.Path()))
	volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
	_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	volOK(t, v.MarkClean(ctx, ref))
	volSame(t, "restored", want, rig.restored(ref))
	volSame(t, "source", want, volDescribe(t, src))

	w := rig.open(t.TempDir(), nil)
	volOK(t, os.Symlink(t.TempDir(), p("tablespace")))
	_, err = w.Import(ctx, src, nil)
	volIs(t, err, ErrEscapes)
	if st := w.State(); st.Phase != PhaseEmpty {
		t.Fatalf("phase is %s", st.Phase)
	}
	if _, err := w.Import(ctx, filepath.Dir(w.cfg.Dir), nil); err == nil {
		t.Fatal("a directory was imported into itself")
	}
}

// TestVolumeImportClones: where the file system can, files are cloned. XFS can.
func TestVolumeImportClones(t *testing.T) {
	ctx := context.Background()
	img, mnt := filepath.Join(t.TempDir(), "xfs"), t.TempDir()
	volOK(t, os.WriteFile(img, nil, 0o600))
	volOK(t, os.Truncate(img, 320<<20))
	for _, cmd := range [][]string{{"mkfs.xfs", "-q", img}, {"mount", "-o", "loop", img, mnt}} {
		if out, err := exec.CommandContext(ctx, cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Skipf("no XFS here: %s: %v: %s", cmd[0], err, out)
		}
	}
	t.Cleanup(func() { volOK(t, unix.Unmount(mnt, unix.MNT_DETACH)) })
	src := filepath.Join(mnt, "src")
	volOK(t, os.Mkdir(src, 0o700))
	volWrite(t, filepath.Join(src, "f"), 0, volData(1, 50*BlockSize+1))
	volWrite(t, filepath.Join(src, "sparse"), 90*BlockSize, []byte("x"))
	rig := newVolRig(t)
	v := rig.open(filepath.Join(mnt, "v"), nil)
	st, err := v.Import(ctx, src, nil)
	volOK(t, err)
	if st.Cloned != 2 {
		t.Fatalf("%+v", st)
	}
	volSame(t, "cloned", volDescribe(t, src), volDescribe(t, v.Path()))
	// A clone is a copy: writing one leaves the other alone.
	want := volDescribe(t, src)
	volWrite(t, filepath.Join(v.Path(), "f"), 0, []byte("written"))
	volSame(t, "source", want, volDescribe(t, src))
	volOK(t, v.Close())
}

// TestVolumeRestoreRefuses: a directory with something in it is left alone.
func TestVolumeRestoreRefuses(t *testing.T) {
	rig, one, _, _ := volTwo(t)
	dir := t.TempDir()
	volWrite(t, filepath.Join(dir, "mine"), 0, []byte("x"))
	volIs(t, Restore(context.Background(), rig.store, one, dir, RestoreOptions{}), ErrNotEmpty)
	volIs(t, Restore(context.Background(), rig.store, one, filepath.Join(dir, "r"), RestoreOptions{MinFree: 1 << 60}), ErrNoRoom)
}
