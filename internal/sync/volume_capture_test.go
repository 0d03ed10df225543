package sync

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// volPair is a program that keeps an invariant over two files: a is never behind b, and
// never more than one ahead. It takes half a step at a time and stands still when frozen.
type volPair struct {
	t      *testing.T
	dir    string
	frozen func() bool
	a, b   uint64
}

func (w *volPair) step() {
	if w.frozen() {
		return
	}
	var buf [8]byte
	name, n := "a", &w.a
	if w.a != w.b {
		name, n = "b", &w.b
	}
	*n++
	binary.LittleEndian.PutUint64(buf[:], *n)
	volWrite(w.t, filepath.Join(w.dir, name), 5*BlockSize, buf[:])
}

func volPairOf(t *testing.T, dir string) (a, b uint64) {
	t.Helper()
	read := func(name string) uint64 {
		data, err := os.ReadFile(filepath.Join(dir, name))
		volOK(t, err)
		return binary.LittleEndian.Uint64(data[5*BlockSize:])
	}
	return read("a"), read("b")
}

// TestVolumeCaptureIsOnePoint: with the freezer the captured pair keeps the invariant
// although the program writes whenever it may; without it, it doesn't.
func TestVolumeCaptureIsOnePoint(t *testing.T) {
	for _, freeze := range []bool{true, false} {
		t.Run(map[bool]string{true: "frozen", false: "not frozen"}[freeze], func(t *testing.T) {
			hook := &volHook{}
			rig := newVolRig(t)
			v := rig.live(func(c *VolumeConfig) { c.FS, c.Workers = hook.fs(), 1 })
			fr := &volFreezer{}
			w := &volPair{t: t, dir: v.Path(), frozen: fr.isFrozen}
			w.step()
			w.step()
			broken := 0
			for range 5 {
				// Whenever a file is about to be read, the program does three half steps.
				hook.set(func(op fsx.Op, path string) error {
					if volPoint("capture-read", op, path) {
						w.step()
						w.step()
						w.step()
					}
					return nil
				})
				req := CaptureRequest{Freezer: fr, NoFreeze: !freeze}
				_, ref := rig.snapshot(v, req)
				hook.set(nil)
				dir := filepath.Join(t.TempDir(), "r")
				volOK(t, Restore(context.Background(), rig.store, ref, dir, RestoreOptions{}))
				if a, b := volPairOf(t, dir); a < b || a > b+1 {
					broken++
				}
			}
			if freeze && broken > 0 {
				t.Fatalf("%d of 5 snapshots are no point in time", broken)
			}
			if !freeze && broken == 0 {
				t.Fatal("the test can't tell a consistent snapshot from another")
			}
		})
	}
}

// TestVolumeRacyWrites: a write in the same tick of the clock as the capture is found next
// time, also if it changes neither size nor mtime.
func TestVolumeRacyWrites(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	for i := range 30 {
		volWrite(t, p, 0, volData(byte(i), 2*BlockSize))
		rig.snapshot(v, CaptureRequest{NoFreeze: true})
		volWrite(t, p, BlockSize, volData(byte(i+100), BlockSize))
		mtime := unix.NsecToTimespec(1e18)
		volOK(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{mtime, mtime}, 0))
		_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
		volSame(t, "after a quick write", volDescribe(t, v.Path()), rig.restored(ref))
	}
}

// TestVolumeDetector: what a stat in a round says about the next.
func TestVolumeDetector(t *testing.T) {
	synced := 0
	d := &statDetector{sync: func(context.Context) error { synced++; return nil }}
	rd, err := d.begin(context.Background(), false)
	volOK(t, err)
	if synced != 1 {
		t.Fatal("a round while the database runs must begin with a syncfs")
	}
	now := d.since
	old := now - int64(time.Minute)
	key := statKey{Ino: 7, Birth: 1, Size: 9 * BlockSize, MTime: old, CTime: old}
	for name, c := range map[string]struct {
		ctime int64
		want  bool
	}{
		"long before":      {old, true},
		"before":           {now - int64(racyWindow) - 1, true},
		"within the tick":  {now - int64(racyWindow), false},
		"during the round": {now + 1, false},
	} {
		k := key
		k.CTime = c.ctime
		if got := rd.settled(k); got != c.want {
			t.Errorf("%s: settled is %v", name, got)
		}
	}
	if r, _ := rd.suspect(key, key, true); r != nil {
		t.Errorf("unchanged file is suspected: %v", r)
	}
	if r, _ := rd.suspect(key, key, false); len(r) != 1 || r[0] != (blockRange{0, 9}) {
		t.Errorf("unsettled file is not suspected: %v", r)
	}
	for i, change := range []func(k *statKey){
		func(k *statKey) { k.Ino++ }, func(k *statKey) { k.Birth++ }, func(k *statKey) { k.Size++ },
		func(k *statKey) { k.MTime++ }, func(k *statKey) { k.CTime++ },
	} {
		k := key
		change(&k)
		if r, _ := rd.suspect(k, key, true); r == nil {
			t.Errorf("change %d is not suspected", i)
		}
	}
	// In the freeze there is no second syncfs, and what is young is looked at again.
	rd, err = d.begin(context.Background(), true)
	volOK(t, err)
	k := key
	k.CTime = now - int64(500*time.Millisecond)
	if synced != 1 || rd.settled(k) || !rd.settled(key) {
		t.Errorf("frozen round: %d syncs, young settled %v, old settled %v", synced, rd.settled(k), rd.settled(key))
	}
	// A file that is mapped is suspected whatever its stat says, and never settled.
	d.pids = func() []int { return []int{os.Getpid()} }
	p := filepath.Join(t.TempDir(), "f")
	volWrite(t, p, 0, volData(1, BlockSize))
	m := volMap(t, p)
	defer func() { volOK(t, unix.Munmap(m)) }()
	var st unix.Stat_t
	volOK(t, unix.Stat(p, &st))
	rd, err = d.begin(context.Background(), true)
	volOK(t, err)
	mapped := key
	mapped.Ino = st.Ino
	if r, _ := rd.suspect(mapped, mapped, true); r == nil || rd.settled(mapped) {
		t.Error("a mapped file is believed")
	}
	// Somebody set the clock: nothing read now can be trusted.
	d.offset += time.Hour
	rd, err = d.begin(context.Background(), true)
	volOK(t, err)
	if rd.settled(key) {
		t.Error("a file is settled although the clock was set")
	}
}

// volMap maps a file shared and writable.
func volMap(t *testing.T, p string) []byte {
	t.Helper()
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	volOK(t, err)
	defer f.Close()
	st, err := f.Stat()
	volOK(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	volOK(t, err)
	return m
}

// TestVolumeMappedStores: stores through a shared mapping touch no time once a page is
// dirty. They are captured all the same, whether the mapping lasts until the freeze or not.
func TestVolumeMappedStores(t *testing.T) {
	for _, unmap := range []bool{false, true} {
		t.Run(map[bool]string{false: "mapped", true: "unmapped before the freeze"}[unmap], func(t *testing.T) {
			rig := newVolRig(t)
			v := rig.live(nil)
			p := filepath.Join(v.Path(), "f")
			volWrite(t, p, 0, volData(1, 4*BlockSize))
			m := volMap(t, p)
			defer func() {
				if m != nil {
					_ = unix.Munmap(m)
				}
			}()
			m[3*BlockSize] = 100 // dirties the page, and moves ctime
			volOld(t, p)
			for i := range 3 {
				_, ref := rig.snapshot(v, CaptureRequest{
					Pids: func() []int { return []int{os.Getpid()} },
					BeforeFreeze: func(context.Context) error {
						// After the pre-copy. Where the page is still dirty, ctime doesn't move.
						m[3*BlockSize]++
						if unmap && i == 2 {
							volOK(t, unix.Munmap(m))
							m = nil
						}
						return nil
					},
				})
				volSame(t, "with stores", volDescribe(t, v.Path()), rig.restored(ref))
			}
		})
	}
}

// TestVolumeMappedIsReadAlways: a file that is mapped shared and writable is read in the
// freeze whatever its times say.
func TestVolumeMappedIsReadAlways(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	volWrite(t, p, 0, volData(1, 4*BlockSize))
	volOld(t, p)
	rig.snapshot(v, CaptureRequest{NoFreeze: true})
	m := volMap(t, p)
	defer func() { _ = unix.Munmap(m) }()
	pids := func() []int { return []int{os.Getpid()} }
	c, _ := rig.snapshot(v, CaptureRequest{Pids: pids})
	if c.Stats.FrozenFiles != 1 {
		t.Fatalf("the mapped file was not read in the freeze: %+v", c.Stats)
	}
}

// TestVolumeShipsOnlyChanges: a changed block ships one block; a renamed file and an
// untouched one ship nothing and are not even read.
func TestVolumeShipsOnlyChanges(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	wal, data := filepath.Join(v.Path(), "wal-1"), filepath.Join(v.Path(), "data")
	volWrite(t, wal, 0, volData(1, 64*BlockSize))
	volWrite(t, data, 0, volData(2, 64*BlockSize))
	c, _ := rig.snapshot(v, CaptureRequest{})
	id := rig.head.Names["wal-1"]
	if c.Blocks.Blocks() != 128 || len(c.Delta.Inodes) != 3 {
		t.Fatalf("first capture has %d blocks and %d inodes", c.Blocks.Blocks(), len(c.Delta.Inodes))
	}

	volOK(t, os.Rename(wal, filepath.Join(v.Path(), "wal-2"))) // recycled
	volWrite(t, data, 7*BlockSize+100, []byte("changed"))
	c, _ = rig.snapshot(v, CaptureRequest{})
	if c.Blocks.Blocks() != 1 {
		t.Fatalf("%d blocks were shipped instead of 1", c.Blocks.Blocks())
	}
	if rig.head.Names["wal-2"] != id {
		t.Fatal("a renamed file got a new number")
	}
	for _, e := range rig.head.Inodes[id].Extents {
		if int(e.Pack) >= len(rig.head.Packs) || strings.Contains(rig.head.Packs[e.Pack].Path, rig.ref().ID) {
			t.Fatal("a renamed file's blocks were shipped again")
		}
	}

	volOld(t, data)
	rig.snapshot(v, CaptureRequest{}) // settles what was young
	var c2 *Capture
	deadline := time.Now().Add(10 * time.Second)
	for c2 == nil || c2.Stats.ReadFiles+c2.Stats.FrozenFiles > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("an untouched volume is read again and again: %+v", c2.Stats)
		}
		c2, _ = rig.snapshot(v, CaptureRequest{})
	}
	if !c2.Unchanged() {
		t.Fatalf("an untouched volume has changed: %+v", c2.Delta)
	}
}

// TestVolumeReusedInode: a new file with an old one's inode number keeps nothing of it.
func TestVolumeReusedInode(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	volWrite(t, p, 0, volData(1, 8*BlockSize))
	rig.snapshot(v, CaptureRequest{})
	reused := false
	for i := range 20 {
		var before, after unix.Stat_t
		volOK(t, unix.Stat(p, &before))
		id := rig.head.Names["f"]
		volOK(t, os.Remove(p))
		volWrite(t, p, 0, volData(byte(i), 8*BlockSize))
		mtime := []unix.Timespec{before.Atim, before.Mtim}
		volOK(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, mtime, 0))
		volOK(t, unix.Stat(p, &after))
		reused = reused || before.Ino == after.Ino
		_, ref := rig.snapshot(v, CaptureRequest{})
		volSame(t, "recreated", volDescribe(t, v.Path()), rig.restored(ref))
		if before.Ino == after.Ino && rig.head.Names["f"] == id {
			t.Fatal("another file has kept the number of the one before it")
		}
	}
	if !reused {
		t.Skip("this file system doesn't reuse inode numbers")
	}
}

// TestVolumeFreezeTooLong: at the end of the budget the database runs again, although a
// read still hangs; the next attempt has less to do.
func TestVolumeFreezeTooLong(t *testing.T) {
	hook := &volHook{}
	rig := newVolRig(t)
	v := rig.live(func(c *VolumeConfig) { c.FS = hook.fs() })
	volWrite(t, filepath.Join(v.Path(), "big"), 0, volData(1, 200*BlockSize))
	volOld(t, filepath.Join(v.Path(), "big"))
	thawed := make(chan struct{})
	fr := &volFreezer{}
	fr.onThaw = func() { close(thawed) }
	hook.set(func(op fsx.Op, path string) error {
		if fr.isFrozen() && volPoint("capture-read", op, path) {
			select { // a disk that doesn't answer
			case <-thawed:
			case <-time.After(5 * time.Second):
				t.Error("the database was not thawed at the end of the budget")
			}
		}
		return nil
	})
	late := func(context.Context) error {
		volWrite(t, filepath.Join(v.Path(), "late"), 0, []byte("x"))
		return nil
	}
	after := 0
	_, err := v.Capture(context.Background(), CaptureRequest{Freezer: fr, MaxFreeze: 50 * time.Millisecond,
		BeforeFreeze: late, AfterFreeze: func(context.Context) error { after++; return nil }})
	volIs(t, err, ErrFreezeTooLong)
	if fr.freezes != 1 || fr.thaws != 1 || after != 1 {
		t.Fatalf("%d freezes, %d thaws, %d calls after", fr.freezes, fr.thaws, after)
	}
	hook.set(nil)
	fr.onThaw = nil
	c, ref := rig.snapshot(v, CaptureRequest{Freezer: fr})
	if c.Stats.ReadBytes+c.Stats.FrozenBytes > 10*BlockSize {
		t.Fatalf("the second attempt reads all again: %+v", c.Stats)
	}
	volSame(t, "after giving up once", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestVolumeCaptureFailures: whatever fails, the database runs afterwards and a later
// snapshot is right.
func TestVolumeCaptureFailures(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		req  func(fr *volFreezer, v *Volume) CaptureRequest
		hook func(fr *volFreezer) fsx.Hook
		want error
	}{
		"before": {want: boom, req: func(fr *volFreezer, _ *Volume) CaptureRequest {
			return CaptureRequest{BeforeFreeze: func(context.Context) error { return boom }, AfterFreeze: func(context.Context) error { panic("not begun") }}
		}},
		"after": {want: boom, req: func(fr *volFreezer, _ *Volume) CaptureRequest {
			return CaptureRequest{AfterFreeze: func(context.Context) error { return boom }}
		}},
		"freeze": {want: boom, req: func(fr *volFreezer, _ *Volume) CaptureRequest { fr.freezeErr = boom; return CaptureRequest{} }},
		"thaw":   {want: boom, req: func(fr *volFreezer, _ *Volume) CaptureRequest { fr.thawErr = boom; return CaptureRequest{} }},
		"broken": {want: ErrFreezeBroken, req: func(fr *volFreezer, _ *Volume) CaptureRequest {
			fr.thawErr = errors.Join(boom, ErrFreezeBroken)
			return CaptureRequest{}
		}},
		"no room before": {want: ErrNoRoom, req: func(_ *volFreezer, v *Volume) CaptureRequest {
			v.pend.spool.minFree = 1 << 60
			return CaptureRequest{}
		}},
		"no room in the freeze": {want: ErrNoRoom, req: func(fr *volFreezer, v *Volume) CaptureRequest {
			return CaptureRequest{BeforeFreeze: func(context.Context) error {
				v.pend.spool.minFree = 1 << 60
				v.pend.spool.asked = 0
				volWrite(t, filepath.Join(v.Path(), "late"), 0, volData(9, 3*BlockSize))
				return nil
			}}
		}},
		"disk full": {want: ErrNoRoom, hook: func(fr *volFreezer) fsx.Hook {
			return func(op fsx.Op, path string) error {
				if op == fsx.OpWrite && strings.Contains(path, "spool") {
					return &os.PathError{Op: "write", Path: path, Err: unix.ENOSPC}
				}
				return nil
			}
		}},
		"read error in the freeze": {want: unix.EIO, hook: func(fr *volFreezer) fsx.Hook {
			return func(op fsx.Op, path string) error {
				if fr.isFrozen() && volPoint("capture-scan", op, path) {
					return unix.EIO
				}
				return nil
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			hook, fr := &volHook{}, &volFreezer{}
			rig := newVolRig(t)
			v := rig.live(func(c *VolumeConfig) { c.FS = hook.fs() })
			volWrite(t, filepath.Join(v.Path(), "f"), 0, volData(1, 5*BlockSize))
			rig.snapshot(v, CaptureRequest{})
			volWrite(t, filepath.Join(v.Path(), "f"), 2*BlockSize, volData(2, 2*BlockSize))
			// An abandoned capture leaves a spool, which the failing one goes on with.
			got, err := v.Capture(context.Background(), CaptureRequest{Freezer: &volFreezer{}})
			volOK(t, err)
			v.Abandon(got)
			volWrite(t, filepath.Join(v.Path(), "g"), 0, volData(3, 2*BlockSize))
			req := CaptureRequest{}
			if c.req != nil {
				req = c.req(fr, v)
			}
			if c.hook != nil {
				hook.set(c.hook(fr))
			}
			req.Freezer = fr
			if v.pend != nil {
				v.pend.spool.asked = 0
			}
			_, err = v.Capture(context.Background(), req)
			volIs(t, err, c.want)
			if fr.isFrozen() {
				t.Fatal("the database stands still")
			}
			hook.set(nil)
			if errors.Is(c.want, ErrNoRoom) && v.pend != nil {
				t.Fatal("the room was not given back")
			}
			_, ref := rig.snapshot(v, CaptureRequest{})
			volSame(t, "after a failure", volDescribe(t, v.Path()), rig.restored(ref))
		})
	}
}

// TestVolumeCancelledCapture: a capture whose context ends thaws and returns.
func TestVolumeCancelledCapture(t *testing.T) {
	hook, fr := &volHook{}, &volFreezer{}
	rig := newVolRig(t)
	v := rig.live(func(c *VolumeConfig) { c.FS = hook.fs() })
	volWrite(t, filepath.Join(v.Path(), "f"), 0, volData(1, 5*BlockSize))
	ctx, cancel := context.WithCancel(context.Background())
	fr.onFreeze = cancel
	_, err := v.Capture(ctx, CaptureRequest{Freezer: fr, MaxFreeze: time.Minute})
	volIs(t, err, context.Canceled)
	if fr.thaws != 1 {
		t.Fatal("not thawed")
	}
	_, ref := rig.snapshot(v, CaptureRequest{})
	volSame(t, "after cancelling", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestVolumeSettling: one capture at a time, settled by its owner.
func TestVolumeSettling(t *testing.T) {
	ctx := context.Background()
	rig := newVolRig(t)
	v := rig.live(nil)
	req := CaptureRequest{NoFreeze: true}
	c, err := v.Capture(ctx, req)
	volOK(t, err)
	if _, err := v.Capture(ctx, req); err == nil {
		t.Fatal("a second capture while the first is waiting")
	}
	tree := rig.write(c)
	if err := v.Adopt(c, &Tree{Ref: tree.Ref}); err == nil {
		t.Fatal("another tree was adopted")
	}
	if err := v.Adopt(&Capture{}, tree); err == nil {
		t.Fatal("another capture was adopted")
	}
	volOK(t, v.Adopt(c, tree))
	if err := v.Adopt(c, tree); err == nil {
		t.Fatal("adopted twice")
	}
	v.Abandon(c) // ignored
	if got := v.State(); got.Base != tree.Ref {
		t.Fatalf("base is %+v", got.Base)
	}
}

// TestVolumeSpoolSlots: a block that was spooled, went back to what it was, and is then
// shipped because the file is cut in it, is not shipped with what it was in between.
func TestVolumeSpoolSlots(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	was := append(volData(1, BlockSize+800), make([]byte, 3000)...)
	abandoned := func() {
		t.Helper()
		c, err := v.Capture(context.Background(), CaptureRequest{NoFreeze: true})
		volOK(t, err)
		v.Abandon(c)
	}
	volWrite(t, p, 0, was)
	rig.snapshot(v, CaptureRequest{NoFreeze: true})
	volWrite(t, p, 0, volData(2, len(was)))
	abandoned()
	volWrite(t, p, 0, was)
	abandoned()
	volOK(t, os.Truncate(p, BlockSize+1000))
	_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	volSame(t, "cut", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestVolumeHalfRead: a file of which a read was begun and not finished is not believed.
func TestVolumeHalfRead(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	volWrite(t, p, 0, volData(1, BlockSize))
	c, err := v.Capture(context.Background(), CaptureRequest{NoFreeze: true})
	volOK(t, err)
	v.Abandon(c)
	n := c.found.names["f"]
	v.pend.work[n.id].settled = false
	if v.pend.consider(n, &statRound{before: math.MaxInt64}) == nil {
		t.Fatal("an unsettled file is not read")
	}
	// ... and the reader dies.
	if _, _, err := v.pend.delta(c.found); !errors.Is(err, ErrFreezeBroken) {
		t.Fatalf("believed: %v", err)
	}
}

// TestVolumeEscapes: what leaves the volume and is data is refused; what is no data stays.
func TestVolumeEscapes(t *testing.T) {
	outside := t.TempDir()
	volWrite(t, filepath.Join(outside, "file"), 0, []byte("x"))
	volOK(t, os.Symlink(outside, filepath.Join(outside, "link")))
	for name, c := range map[string]struct {
		target string
		want   error
	}{
		"directory":             {outside, ErrEscapes},
		"file":                  {outside + "/file", ErrEscapes},
		"through a link":        {outside + "/link", ErrEscapes},
		"file through a link":   {outside + "/link/file", ErrEscapes},
		"up and out":            {"../../spool", ErrEscapes},
		"dangling":              {"/no/such/tablespace", nil},
		"dangling up":           {"../../../nowhere", nil},
		"device":                {"/dev/null", nil},
		"proc":                  {"/proc/self/status", nil},
		"proc directory":        {"/proc/sys", nil},
		"inside":                {"../in", nil},
		"inside, the long way":  {"VOLUME/in", nil},
		"up and inside again":   {"../../volume/in", nil},
		"itself":                {"link", nil},
		"the volume's own root": {"..", nil},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newVolRig(t)
			v := rig.live(nil)
			volOK(t, os.MkdirAll(filepath.Join(v.Path(), "in", "deep"), 0o700))
			target := strings.Replace(c.target, "VOLUME", v.Path(), 1)
			volOK(t, os.Symlink(target, filepath.Join(v.Path(), "in", "link")))
			fr := &volFreezer{}
			_, err := v.Capture(context.Background(), CaptureRequest{Freezer: fr})
			volIs(t, err, c.want)
			if c.want != nil && fr.freezes > 0 {
				t.Error("the database was frozen for nothing")
			}
			if c.want != nil && !strings.Contains(err.Error(), filepath.Join(v.Path(), "in/link")) {
				t.Errorf("the link is not named: %v", err)
			}
		})
	}
}

// TestVolumeMountPoint: a mount point inside the volume is refused.
func TestVolumeMountPoint(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	src := t.TempDir()
	for name, mount := range map[string]func(p string) error{
		"another file system":  func(p string) error { return unix.Mount("tmpfs", p, "tmpfs", 0, "size=1m") },
		"the same file system": func(p string) error { return unix.Mount(src, p, "", unix.MS_BIND, "") },
	} {
		p := filepath.Join(v.Path(), "mnt")
		volOK(t, os.Mkdir(p, 0o700))
		if err := mount(p); errors.Is(err, unix.EPERM) {
			t.Skip("may not mount here")
		} else {
			volOK(t, err)
		}
		_, err := v.Capture(context.Background(), CaptureRequest{NoFreeze: true})
		volOK(t, unix.Unmount(p, 0))
		if !errors.Is(err, ErrEscapes) {
			t.Errorf("%s: got %v", name, err)
		}
		volOK(t, os.Remove(p))
	}
}

// TestVolumeSkipped: what no snapshot keeps is named.
func TestVolumeSkipped(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	volOK(t, unix.Mkfifo(filepath.Join(v.Path(), "fifo"), 0o600))
	volOK(t, unix.Mknod(filepath.Join(v.Path(), "sock"), unix.S_IFSOCK|0o600, 0))
	c, ref := rig.snapshot(v, CaptureRequest{})
	if got := strings.Join(c.Skipped, " "); got != "fifo sock" {
		t.Fatalf("skipped: %q", got)
	}
	volSame(t, "without them", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestVolumeSparse: holes stay holes and preallocated room stays allocated.
func TestVolumeSparse(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	sparse, full := filepath.Join(v.Path(), "sparse"), filepath.Join(v.Path(), "full")
	volWrite(t, sparse, 500*BlockSize, []byte("end"))
	volWrite(t, full, 0, []byte("begin"))
	f, err := os.OpenFile(full, os.O_RDWR, 0)
	volOK(t, err)
	volOK(t, unix.Fallocate(int(f.Fd()), 0, 0, 300*BlockSize))
	volOK(t, f.Close())
	c, ref := rig.snapshot(v, CaptureRequest{})
	if c.Blocks.Blocks() != 2 {
		t.Fatalf("%d blocks of data instead of 2", c.Blocks.Blocks())
	}
	dir := filepath.Join(t.TempDir(), "r")
	volOK(t, Restore(context.Background(), rig.store, ref, dir, RestoreOptions{}))
	var fsinfo unix.Statfs_t
	volOK(t, unix.Statfs(dir, &fsinfo))
	var st unix.Stat_t
	volOK(t, unix.Stat(filepath.Join(dir, "sparse"), &st))
	if st.Blocks*512 > 10*BlockSize {
		t.Errorf("the sparse file takes %d bytes", st.Blocks*512)
	}
	volOK(t, unix.Stat(filepath.Join(dir, "full"), &st))
	if st.Blocks*512 < 300*BlockSize && fsinfo.Type != unix.TMPFS_MAGIC {
		t.Errorf("the preallocated file takes only %d bytes", st.Blocks*512)
	}
	volSame(t, "sparse", volDescribe(t, v.Path()), volDescribe(t, dir))
}

// TestVolumeRestart: after a restart of the agent in the same boot nothing is read that
// has not changed; after a reboot, or with a damaged index, all is.
func TestVolumeRestart(t *testing.T) {
	ctx := context.Background()
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	volWrite(t, p, 0, volData(1, 50*BlockSize))
	settle := func() { // what was young
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for {
			c, _ := rig.snapshot(v, CaptureRequest{NoFreeze: true})
			if c.Stats.FrozenFiles == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("never settled")
			}
		}
	}
	settle()
	boot := "boot-1"
	again := func() *Capture {
		t.Helper()
		volOK(t, v.Close())
		v = rig.open(v.cfg.Dir, func(c *VolumeConfig) { c.BootID = boot })
		if _, err := v.Capture(ctx, CaptureRequest{NoFreeze: true}); !errors.Is(err, ErrNoBaseline) {
			t.Fatalf("capture without a baseline: %v", err)
		}
		volOK(t, v.Baseline(ctx, rig.store, rig.ref()))
		c, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
		volSame(t, "after a restart", volDescribe(t, v.Path()), rig.restored(ref))
		return c
	}
	if c := again(); c.Stats.FrozenFiles != 0 {
		t.Fatalf("all is read again: %+v", c.Stats)
	}
	volWrite(t, p, 0, []byte("x"))
	if c := again(); c.Blocks.Blocks() != 1 || c.Stats.FrozenFiles != 1 {
		t.Fatalf("a change before the restart: %+v", c.Stats)
	}
	settle()
	// A crash of the machine lost what was only in the page cache, and no stat shows it.
	boot = "boot-2"
	if c := again(); c.Stats.FrozenFiles != 1 || !c.Unchanged() {
		t.Fatalf("the index was believed after a reboot: %+v, delta %+v", c.Stats, c.Delta)
	}
	for name, harm := range map[string]func(b []byte) []byte{
		"cut":     func(b []byte) []byte { return b[:len(b)-1] },
		"flipped": func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"empty":   func([]byte) []byte { return nil },
		"longer":  func(b []byte) []byte { return append(b, 0) },
	} {
		settle()
		b, err := os.ReadFile(v.indexPath())
		volOK(t, err)
		volOK(t, os.WriteFile(v.indexPath(), harm(b), 0o600))
		if c := again(); c.Stats.FrozenFiles != 1 || !c.Unchanged() {
			t.Fatalf("%s index was believed: %+v", name, c.Stats)
		}
	}
}

// TestVolumeIndexOfAnotherSnapshot: when the agent died between a commit and Adopt, the
// index describes the snapshot before and must not be believed for the new head.
func TestVolumeIndexOfAnotherSnapshot(t *testing.T) {
	ctx := context.Background()
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	was := volData(1, 3*BlockSize)
	volWrite(t, p, 0, was)
	rig.snapshot(v, CaptureRequest{NoFreeze: true})
	volWrite(t, p, BlockSize, volData(2, BlockSize))
	c, err := v.Capture(ctx, CaptureRequest{NoFreeze: true})
	volOK(t, err)
	rig.head = rig.write(c) // committed
	volWrite(t, p, 0, was)  // as it was in the snapshot before
	volOK(t, v.Close())
	v = rig.open(v.cfg.Dir, nil)
	volOK(t, v.Baseline(ctx, rig.store, rig.ref()))
	_, ref := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	volSame(t, "after the commit", volDescribe(t, v.Path()), rig.restored(ref))
}

// TestVolumeIndexLog: the log is compacted and says the same as memory.
func TestVolumeIndexLog(t *testing.T) {
	rig := newVolRig(t)
	v := rig.live(nil)
	p := filepath.Join(v.Path(), "f")
	for i := range 12 {
		volWrite(t, p, int64(i)*BlockSize, volData(byte(i), 30*BlockSize))
		if i == 6 {
			v.idx.logged += 10 << 20 // as if it had grown
		}
		rig.snapshot(v, CaptureRequest{NoFreeze: true})
		idx := v.loadIndex(rig.ref())
		if idx == nil {
			t.Fatalf("round %d: no index", i)
		}
		if idx.logged != v.idx.logged || len(idx.files) != len(v.idx.files) {
			t.Fatalf("round %d: log of %d bytes and %d files, memory %d and %d", i, idx.logged, len(idx.files), v.idx.logged, len(v.idx.files))
		}
		for id, f := range v.idx.files {
			g := idx.files[id]
			if g == nil || g.key != f.key || g.settled != f.settled || len(g.codes) != len(f.codes) {
				t.Fatalf("round %d: file %d: %+v, %+v", i, id, f, g)
			}
			for b := range f.codes {
				if f.codes[b] != g.codes[b] {
					t.Fatalf("round %d: file %d: block %d differs", i, id, b)
				}
			}
		}
	}
}

// TestVolumeNeverFreezesInVain: where reading what changes takes much longer than the
// budget again and again, the database is not even frozen.
func TestVolumeNeverFreezesInVain(t *testing.T) {
	hook, fr := &volHook{}, &volFreezer{}
	clock := boottime.NewFake()
	rig := newVolRig(t)
	v := rig.live(func(c *VolumeConfig) { c.FS, c.Clock = hook.fs(), clock })
	hook.set(func(op fsx.Op, path string) error {
		if volPoint("capture-scan", op, path) {
			clock.Advance(9 * time.Second)
		}
		return nil
	})
	req := CaptureRequest{Freezer: fr, MaxFreeze: 2 * time.Second, BeforeFreeze: func(context.Context) error { panic("no freeze") }}
	_, err := v.Capture(context.Background(), req)
	volIs(t, err, ErrFreezeTooLong)
	if fr.freezes != 0 {
		t.Fatal("frozen although it could not have been done")
	}
	hook.set(nil)
	_, ref := rig.snapshot(v, CaptureRequest{Freezer: fr})
	volSame(t, "later", volDescribe(t, v.Path()), rig.restored(ref))
}
