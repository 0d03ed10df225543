package sync

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"dbsupervisor/internal/track"
)

// volWorld changes a directory at random, as databases and people do.
type volWorld struct {
	t    *rapid.T
	root string
	n    int
	rich bool    // with what not every file system has
	hand volHand // nil: this process
}

// list returns what is there, by kind, sorted.
func (w *volWorld) list() (files, dirs, links []string) {
	dirs = []string{w.root}
	_ = filepath.WalkDir(w.root, func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case p == w.root:
		case e.IsDir():
			dirs = append(dirs, p)
		case e.Type()&fs.ModeSymlink != 0:
			links = append(links, p)
		case e.Type().IsRegular():
			files = append(files, p)
		}
		return nil
	})
	sort.Strings(files)
	sort.Strings(dirs)
	return files, dirs, links
}

func (w *volWorld) fresh(dirs []string) string {
	w.n++
	suffix := rapid.SampledFrom([]string{"", "\xff\xfe", " x", "\n", ".ä"}).Draw(w.t, "suffix")
	return filepath.Join(w.pick("dir", dirs), fmt.Sprintf("n%d%s", w.n, suffix))
}

func (w *volWorld) pick(what string, of []string) string {
	return of[rapid.IntRange(0, len(of)-1).Draw(w.t, what)]
}

func (w *volWorld) must(err error) {
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *volWorld) size() int64 {
	return rapid.OneOf(
		rapid.Int64Range(0, 20),
		rapid.SampledFrom([]int64{4096, BlockSize - 1, BlockSize, BlockSize + 1, 3 * BlockSize}),
		rapid.Int64Range(0, 20*BlockSize),
	).Draw(w.t, "size")
}

// op does something; what may fail is not done with it.
func (w *volWorld) op(o volOp) { w.must(w.by().do(o)) }

// try is for what some file systems refuse.
func (w *volWorld) try(o volOp) {
	err := w.by().do(o)
	var no unix.Errno
	if err != nil && !errors.As(err, &no) {
		w.t.Fatal(err)
	}
}

func (w *volWorld) by() volHand {
	if w.hand == nil {
		w.hand = &volDoer{maps: map[string][]byte{}}
	}
	return w.hand
}

func (w *volWorld) step() {
	files, dirs, links := w.list()
	ops := []string{"create", "create", "mkdir", "symlink", "dirmeta", "fifo"}
	if len(files) > 0 {
		ops = append(ops, "write", "write", "write", "write", "zeros", "truncate", "regrow", "rename", "renameover", "link",
			"punch", "fallocate", "fallocate", "collapse", "insert", "clone", "copyrange", "direct", "direct", "store", "store", "store", "unmap",
			"remove", "recreate", "xattr", "acl", "unxattr", "chmod", "chown", "utimes", "samewrite", "filetodir")
	}
	if len(files) > 0 && w.rich {
		ops = append(ops, "movehole", "movehole", "diracl", "bigxattr", "emptied", "emptied", "suid")
	}
	if len(dirs) > 1 {
		ops = append(ops, "dirrename", "rmdir")
	}
	if len(links) > 0 {
		ops = append(ops, "unlink", "relink")
	}
	file := func() string { return w.pick("file", files) }
	seeded := func() []byte {
		return volData(byte(rapid.IntRange(0, 255).Draw(w.t, "seed")), int(w.size()))
	}
	off := func() int64 { return rapid.Int64Range(0, 24*BlockSize).Draw(w.t, "off") }
	blocks := func(most int64) int64 { return rapid.Int64Range(0, most).Draw(w.t, "blocks") * BlockSize }
	switch op := w.pick("op", ops); op {
	case "create":
		w.op(volOp{Do: "write", Path: w.fresh(dirs), Data: volData(byte(w.n), int(w.size()))})
	case "mkdir":
		w.op(volOp{Do: "mkdir", Path: w.fresh(dirs), Mode: 0o750})
	case "symlink":
		target := rapid.SampledFrom([]string{"n1", "../nowhere", "/no/such/place", "\xff", "/proc/self", "/dev/null"}).Draw(w.t, "target")
		w.op(volOp{Do: "symlink", Path: w.fresh(dirs), To: target})
	case "dirmeta":
		d := w.pick("dir", dirs)
		w.op(volOp{Do: "chmod", Path: d, Mode: rapid.SampledFrom([]uint32{0o700, 0o755, 0o711}).Draw(w.t, "mode")})
		w.op(volOp{Do: "setxattr", Path: d, Name: "user.d", Data: []byte{byte(w.n)}})
	case "fifo":
		w.op(volOp{Do: "mknod", Path: w.fresh(dirs), Mode: unix.S_IFIFO | 0o600})
	case "write":
		w.op(volOp{Do: "write", Path: file(), Off: off(), Data: seeded()})
	case "zeros":
		w.op(volOp{Do: "write", Path: file(), Off: off(), Data: make([]byte, w.size())})
	case "direct":
		w.try(volOp{Do: "direct", Path: file(), Off: off(), Data: seeded()})
	case "store":
		w.op(volOp{Do: "store", Path: file(), Off: off(), Data: []byte{byte(w.n), 1, 2, 3}})
	case "unmap":
		w.op(volOp{Do: "unmap"})
	case "samewrite":
		w.op(volOp{Do: "same", Path: file(), N: 100})
	case "truncate":
		w.op(volOp{Do: "unmap"}) // a store behind the end would be fatal
		w.op(volOp{Do: "truncate", Path: file(), N: w.size()})
	case "regrow":
		w.op(volOp{Do: "unmap"})
		w.op(volOp{Do: "regrow", Path: file()})
	case "rename":
		w.op(volOp{Do: "rename", Path: file(), To: w.fresh(dirs)})
	case "renameover":
		w.op(volOp{Do: "rename", Path: file(), To: file()})
	case "link":
		w.op(volOp{Do: "link", Path: file(), To: w.fresh(dirs)})
	case "punch":
		w.op(volOp{Do: "fallocate", Path: file(), Mode: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
			Off: rapid.Int64Range(0, 16*BlockSize).Draw(w.t, "off"), N: rapid.Int64Range(1, 8*BlockSize).Draw(w.t, "len")})
	case "fallocate":
		mode := rapid.SampledFrom([]uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE}).Draw(w.t, "mode")
		w.try(volOp{Do: "fallocate", Path: file(), Mode: mode,
			Off: rapid.Int64Range(0, 16*BlockSize).Draw(w.t, "off"), N: rapid.Int64Range(1, 8*BlockSize).Draw(w.t, "len")})
	case "collapse", "insert":
		w.op(volOp{Do: "unmap"})
		mode := uint32(unix.FALLOC_FL_COLLAPSE_RANGE)
		if op == "insert" {
			mode = unix.FALLOC_FL_INSERT_RANGE
		}
		o := volOp{Do: "fallocate", Path: file(), Mode: mode, Off: blocks(4), N: BlockSize + blocks(2)}
		st, err := os.Stat(o.Path)
		w.must(err)
		if o.Off+o.N < st.Size() { // XFS moves mtime before it refuses
			w.try(o)
		}
	case "clone":
		w.op(volOp{Do: "unmap"})
		w.try(volOp{Do: "clone", Path: file(), To: file()})
	case "copyrange":
		from, to := file(), file()
		if from != to {
			w.try(volOp{Do: "copyrange", Path: to, To: from, Off: blocks(8), N: BlockSize + blocks(8)})
		}
	case "remove":
		w.op(volOp{Do: "remove", Path: file()})
	case "recreate": // most likely with the same inode number
		f := file()
		w.op(volOp{Do: "unmap"})
		w.op(volOp{Do: "remove", Path: f})
		w.op(volOp{Do: "write", Path: f, Data: seeded()})
	case "xattr":
		w.op(volOp{Do: "setxattr", Path: file(), Name: "user." + w.pick("name", []string{"a", "b", "long"}), Data: volData(byte(w.n), rapid.IntRange(0, 600).Draw(w.t, "len"))})
	case "acl": // user 1000 may read
		w.try(volOp{Do: "setxattr", Path: file(), Name: "system.posix_acl_access", Data: volACL(uint32(rapid.IntRange(0, 7).Draw(w.t, "perm")))})
	case "unxattr":
		w.try(volOp{Do: "removexattr", Path: file(), Name: "user.a"}) // it may have none
	case "chmod":
		w.op(volOp{Do: "chmod", Path: file(), Mode: rapid.SampledFrom([]uint32{0o600, 0o644, 0o4755, 0o2711, 0}).Draw(w.t, "mode")})
	case "chown":
		id := rapid.Int64Range(0, 3).Draw(w.t, "id") * 1000
		o := volOp{Do: "chown", Path: file(), Off: id, N: id + 1}
		if os.Geteuid() == 0 {
			w.op(o)
		} else {
			w.try(o)
		}
	case "utimes":
		w.op(volOp{Do: "utimes", Path: file(), Off: rapid.Int64Range(-1e18, 2e18).Draw(w.t, "mtime")})
	case "filetodir":
		f := file()
		w.op(volOp{Do: "remove", Path: f})
		w.op(volOp{Do: "mkdir", Path: f, Mode: 0o700})
		w.op(volOp{Do: "write", Path: filepath.Join(f, "in"), Data: []byte("inside")})
	case "movehole": // where there was a hole there is data, and the other way round
		at := rapid.Int64Range(0, 12).Draw(w.t, "at") * BlockSize
		f := file()
		w.op(volOp{Do: "fallocate", Path: f, Mode: unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, Off: at, N: 2 * BlockSize})
		w.op(volOp{Do: "write", Path: f, Off: at + 3*BlockSize, Data: volData(byte(at>>13), BlockSize)})
	case "diracl":
		w.op(volOp{Do: "setxattr", Path: w.pick("dir", dirs), Name: "system.posix_acl_default", Data: volACL(5)})
	case "bigxattr": // as large as the file system takes it
		o := volOp{Do: "setxattr", Path: file(), Name: "user.big"}
		for n := 64 << 10; n > 64; n /= 2 {
			if o.Data = volData(byte(w.n), n); w.by().do(o) == nil {
				break
			}
		}
	case "emptied":
		f := file()
		w.op(volOp{Do: "unmap"})
		w.op(volOp{Do: "truncate", Path: f})
		w.op(volOp{Do: "truncate", Path: f, N: w.size()})
		w.op(volOp{Do: "write", Path: f, Off: w.size(), Data: []byte("again")})
	case "suid":
		f := file()
		w.op(volOp{Do: "chown", Path: f, Off: 1000, N: 2000})
		w.op(volOp{Do: "chmod", Path: f, Mode: 0o6751})
	case "dirrename":
		from, to := w.pick("from", dirs[1:]), w.fresh(dirs)
		if len(to) > len(from) && to[:len(from)+1] == from+"/" {
			return // into itself
		}
		w.op(volOp{Do: "rename", Path: from, To: to})
	case "rmdir":
		w.op(volOp{Do: "removeall", Path: w.pick("dir", dirs[1:])})
	case "unlink":
		w.op(volOp{Do: "remove", Path: w.pick("link", links)})
	case "relink":
		l := w.pick("link", links)
		w.op(volOp{Do: "remove", Path: l})
		w.op(volOp{Do: "symlink", Path: l, To: "elsewhere"})
	}
}

// volACL is an access control list with an entry for user 1000.
func volACL(perm uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 6, ^uint32(0)}, {2, perm, 1000}, {4, 4, ^uint32(0)}, {0x10, 7, ^uint32(0)}, {0x20, 4, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// TestVolumeRandom: whatever happens to a directory, a restored snapshot is equal to it in
// every bit and attribute, and so is a second volume that follows with deltas, across
// failed, abandoned and interrupted steps, restarts and reboots.
func TestVolumeRandom(t *testing.T) {
	t.Run("disk", func(t *testing.T) { volRandom(t, volKit{checks: 8, temp: t.TempDir}) })
	t.Run("memory", func(t *testing.T) { volRandom(t, volKit{checks: 40, temp: func() string { return volRAM(t) }}) })
}

// TestVolumeRandomTracked: the same with what a tracker says.
func TestVolumeRandomTracked(t *testing.T) {
	t.Run("disk", func(t *testing.T) { volRandom(t, volKit{checks: 10, temp: t.TempDir, tracked: true}) })
	t.Run("memory", func(t *testing.T) {
		volRandom(t, volKit{checks: 40, temp: func() string { return volRAM(t) }, tracked: true})
	})
}

// volKit is what a run of random operations is made with.
type volKit struct {
	checks  int
	temp    func() string // makes directories
	tracked bool
	hand    volHand // the tracker is the kernel's: nil means one that compares
}

func volRandom(t *testing.T, kit volKit) {
	temp := kit.temp
	volChecks(t, kit.checks)
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		rig := newVolRig(t)
		rig.temp = temp
		dir, follow := temp(), temp()
		oracle := &volOracle{}
		edit := func(d string) func(*VolumeConfig) {
			switch {
			case kit.tracked && d == dir && kit.hand != nil:
				return func(c *VolumeConfig) { c.Tier = TierTracked }
			case kit.tracked && d == dir:
				return volTracked(t, oracle)
			}
			return func(*VolumeConfig) {}
		}
		v := rig.open(dir, edit(dir))
		f := rig.open(follow, nil)
		defer func() {
			_ = v.Close()
			_ = f.Close()
			_ = track.Discard(filepath.Join(pinRoot, pinName(dir)))
		}()
		volOK(t, v.MarkLive(ctx, 1))
		volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
		w := &volWorld{t: rt, root: v.Path(), hand: kit.hand, rich: kit.hand != nil}
		defer func() { volOK(t, w.by().do(volOp{Do: "unmap"})) }()
		boot := 1
		again := func(old *Volume, which string) *Volume {
			volOK(t, old.Close())
			if rapid.Bool().Draw(rt, "reboot") {
				boot++
				if which == dir {
					*oracle = volOracle{}
				}
			}
			return rig.open(which, func(c *VolumeConfig) { c.BootID = fmt.Sprint("boot-", boot); edit(which)(c) })
		}
		for range rapid.IntRange(1, 5).Draw(rt, "snapshots") {
			for range rapid.IntRange(0, 12).Draw(rt, "steps") {
				w.step()
			}
			// More happens between the pre-copy and the freeze, and after a failure.
			late := rapid.IntRange(0, 3).Draw(rt, "late")
			// Nothing but the mappings themselves tells of stores where pages are never cleaned.
			pids := func() []int { return []int{os.Getpid()} }
			req := CaptureRequest{Freezer: &volFreezer{}, Pids: pids, BeforeFreeze: func(context.Context) error {
				for range late {
					w.step()
				}
				return nil
			}}
			switch rapid.IntRange(0, 5).Draw(rt, "event") {
			case 0: // not committed
				c, err := v.Capture(ctx, req)
				volOK(t, err)
				if rapid.Bool().Draw(rt, "shipped") {
					rig.write(c)
				}
				v.Abandon(c)
				w.step()
			case 1: // the freeze is broken
				_, err := v.Capture(ctx, CaptureRequest{Freezer: &volFreezer{thawErr: ErrFreezeBroken}, Pids: pids})
				volIs(t, err, ErrFreezeBroken)
				w.step()
			case 2:
				v = again(v, dir)
				volOK(t, v.Baseline(ctx, rig.store, rig.ref()))
			case 3: // the agent dies between the commit and Adopt
				c, err := v.Capture(ctx, req)
				volOK(t, err)
				rig.head = rig.write(c)
				v = again(v, dir)
				volOK(t, v.Baseline(ctx, rig.store, rig.ref()))
			}
			_, ref := rig.snapshot(v, req)
			want := volDescribe(t, v.Path())
			volSame(rt, "restored", want, rig.restored(ref))
			if rapid.Bool().Draw(rt, "follow") {
				if rapid.IntRange(0, 3).Draw(rt, "restart") == 0 {
					f = again(f, follow)
				}
				if f.State().Phase == PhaseClean && rapid.IntRange(0, 3).Draw(rt, "tamper") == 0 {
					tw := &volWorld{t: rt, root: f.Path(), n: 1000}
					tw.step()
				}
				_, err := f.Hydrate(ctx, rig.store, ref, nil)
				volOK(t, err)
				volSame(rt, "hydrated", want, volDescribe(t, f.Path()))
			}
		}
	})
}

// volChecks limits rapid: every check makes real files durable.
func volChecks(t *testing.T, n int) {
	t.Helper()
	f := flag.Lookup("rapid.checks")
	old := f.Value.String()
	if old != f.DefValue {
		return // asked for on the command line
	}
	volOK(t, f.Value.Set(fmt.Sprint(n)))
	t.Cleanup(func() { _ = f.Value.Set(old) })
}
