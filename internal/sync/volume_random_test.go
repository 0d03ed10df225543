package sync

import (
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// volWorld changes a directory at random, as databases and people do.
type volWorld struct {
	t    *rapid.T
	root string
	n    int
	rich bool // with what not every file system has
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

// open makes an edit to a file's content and closes it.
func (w *volWorld) open(p string, edit func(f *os.File) error) {
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o640)
	w.must(err)
	w.must(edit(f))
	w.must(f.Close())
}

func (w *volWorld) step() {
	files, dirs, links := w.list()
	ops := []string{"create", "create", "mkdir", "symlink", "dirmeta"}
	if len(files) > 0 {
		ops = append(ops, "write", "write", "write", "write", "zeros", "truncate", "regrow", "rename", "renameover", "link",
			"punch", "fallocate", "remove", "recreate", "xattr", "unxattr", "chmod", "chown", "utimes", "samewrite", "filetodir")
	}
	if len(files) > 0 && w.rich {
		ops = append(ops, "movehole", "movehole", "collapse", "insert", "zerorange", "acl", "bigxattr", "clonerange", "emptied", "emptied", "suid")
	}
	if len(dirs) > 1 {
		ops = append(ops, "dirrename", "rmdir")
	}
	if len(links) > 0 {
		ops = append(ops, "unlink", "relink")
	}
	file := func() string { return w.pick("file", files) }
	switch op := w.pick("op", ops); op {
	case "create":
		w.open(w.fresh(dirs), func(f *os.File) error {
			_, err := f.Write(volData(byte(w.n), int(w.size())))
			return err
		})
	case "mkdir":
		w.must(os.Mkdir(w.fresh(dirs), 0o750))
	case "symlink":
		target := rapid.SampledFrom([]string{"n1", "../nowhere", "/no/such/place", "\xff", "/proc/self", "/dev/null"}).Draw(w.t, "target")
		w.must(os.Symlink(target, w.fresh(dirs)))
	case "dirmeta":
		d := w.pick("dir", dirs)
		w.must(os.Chmod(d, fs.FileMode(rapid.SampledFrom([]uint32{0o700, 0o755, 0o711}).Draw(w.t, "mode"))))
		w.must(unix.Setxattr(d, "user.d", []byte{byte(w.n)}, 0))
	case "write", "zeros":
		off := rapid.Int64Range(0, 24*BlockSize).Draw(w.t, "off")
		data := volData(byte(rapid.IntRange(0, 255).Draw(w.t, "seed")), int(w.size()))
		if op == "zeros" {
			clear(data)
		}
		w.open(file(), func(f *os.File) error { _, err := f.WriteAt(data, off); return err })
	case "samewrite":
		w.open(file(), func(f *os.File) error {
			b := make([]byte, 100)
			n, _ := f.ReadAt(b, 0)
			_, err := f.WriteAt(b[:n], 0)
			return err
		})
	case "truncate":
		w.must(os.Truncate(file(), w.size()))
	case "regrow":
		f := file()
		st, err := os.Stat(f)
		w.must(err)
		w.must(os.Truncate(f, st.Size()/2))
		w.must(os.Truncate(f, st.Size()))
	case "rename":
		w.must(os.Rename(file(), w.fresh(dirs)))
	case "renameover":
		w.must(os.Rename(file(), file()))
	case "link":
		w.must(os.Link(file(), w.fresh(dirs)))
	case "punch", "fallocate":
		mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
		if op == "fallocate" {
			mode = 0
		}
		off, n := rapid.Int64Range(0, 16*BlockSize).Draw(w.t, "off"), rapid.Int64Range(1, 8*BlockSize).Draw(w.t, "len")
		w.open(file(), func(f *os.File) error { return unix.Fallocate(int(f.Fd()), mode, off, n) })
	case "remove":
		w.must(os.Remove(file()))
	case "recreate": // most likely with the same inode number
		f := file()
		w.must(os.Remove(f))
		w.open(f, func(h *os.File) error {
			_, err := h.Write(volData(byte(rapid.IntRange(0, 255).Draw(w.t, "seed")), int(w.size())))
			return err
		})
	case "xattr":
		w.must(unix.Setxattr(file(), "user."+w.pick("name", []string{"a", "b", "long"}), volData(byte(w.n), rapid.IntRange(0, 600).Draw(w.t, "len")), 0))
	case "unxattr":
		_ = unix.Removexattr(file(), "user.a") // it may have none
	case "chmod":
		w.must(unix.Chmod(file(), rapid.SampledFrom([]uint32{0o600, 0o644, 0o4755, 0o2711, 0}).Draw(w.t, "mode")))
	case "chown":
		id := rapid.IntRange(0, 3).Draw(w.t, "id") * 1000
		if err := os.Chown(file(), id, id+1); err != nil && os.Geteuid() == 0 {
			w.t.Fatal(err)
		}
	case "utimes":
		ts := unix.NsecToTimespec(rapid.Int64Range(-1e18, 2e18).Draw(w.t, "mtime"))
		w.must(unix.UtimesNanoAt(unix.AT_FDCWD, file(), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	case "filetodir":
		f := file()
		w.must(os.Remove(f))
		w.must(os.Mkdir(f, 0o700))
		w.open(filepath.Join(f, "in"), func(h *os.File) error { _, err := h.Write([]byte("inside")); return err })
	case "movehole": // where there was a hole there is data, and the other way round
		at := rapid.Int64Range(0, 12).Draw(w.t, "at") * BlockSize
		w.open(file(), func(f *os.File) error {
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, 2*BlockSize); err != nil {
				return err
			}
			_, err := f.WriteAt(volData(byte(at>>13), BlockSize), at+3*BlockSize)
			return err
		})
	case "collapse", "insert", "zerorange":
		mode := map[string]uint32{"collapse": unix.FALLOC_FL_COLLAPSE_RANGE, "insert": unix.FALLOC_FL_INSERT_RANGE, "zerorange": unix.FALLOC_FL_ZERO_RANGE}[op]
		at := rapid.Int64Range(0, 12).Draw(w.t, "at") * 4096
		w.open(file(), func(f *os.File) error {
			_ = unix.Fallocate(int(f.Fd()), mode, at, 4096) // not everywhere, and not behind the end
			return nil
		})
	case "acl":
		// user::rwx user:1000:r-- group::r-x mask::r-x other::---
		acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x05\x00\xff\xff\xff\xff\x10\x00\x05\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
		w.must(unix.Setxattr(file(), "system.posix_acl_access", []byte(acl), 0))
		w.must(unix.Setxattr(w.pick("dir", dirs), "system.posix_acl_default", []byte(acl), 0))
	case "bigxattr": // as large as the file system takes it
		f := file()
		for n := 64 << 10; n > 64 && unix.Setxattr(f, "user.big", volData(byte(w.n), n), 0) != nil; {
			n /= 2
		}
	case "clonerange": // shared extents inside the volume, where there are any
		from, to := file(), file()
		w.open(to, func(f *os.File) error {
			src, err := os.Open(from)
			if err != nil {
				return err
			}
			defer src.Close()
			_ = unix.IoctlFileClone(int(f.Fd()), int(src.Fd()))
			return nil
		})
	case "emptied":
		f := file()
		w.must(os.Truncate(f, 0))
		w.must(os.Truncate(f, w.size()))
		w.open(f, func(h *os.File) error { _, err := h.WriteAt([]byte("again"), w.size()); return err })
	case "suid":
		f := file()
		w.must(os.Chown(f, 1000, 2000))
		w.must(unix.Chmod(f, 0o6751))
	case "dirrename":
		from, to := w.pick("from", dirs[1:]), w.fresh(dirs)
		if len(to) > len(from) && to[:len(from)+1] == from+"/" {
			return // into itself
		}
		w.must(os.Rename(from, to))
	case "rmdir":
		w.must(os.RemoveAll(w.pick("dir", dirs[1:])))
	case "unlink":
		w.must(os.Remove(w.pick("link", links)))
	case "relink":
		l := w.pick("link", links)
		w.must(os.Remove(l))
		w.must(os.Symlink("elsewhere", l))
	}
}

// TestVolumeRandom: whatever happens to a directory, a restored snapshot is equal to it in
// every bit and attribute, and so is a second volume that follows with deltas, across
// failed, abandoned and interrupted steps, restarts and reboots.
func TestVolumeRandom(t *testing.T) {
	t.Run("disk", func(t *testing.T) { volRandom(t, 8, func() string { return t.TempDir() }, false) })
	t.Run("memory", func(t *testing.T) { volRandom(t, 40, func() string { return volRAM(t) }, false) })
}

// TestVolumeRandomTracked: the same with what a tracker says.
func TestVolumeRandomTracked(t *testing.T) {
	t.Run("disk", func(t *testing.T) { volRandom(t, 10, func() string { return t.TempDir() }, true) })
	t.Run("memory", func(t *testing.T) { volRandom(t, 40, func() string { return volRAM(t) }, true) })
}

func volRandom(t *testing.T, checks int, temp func() string, tracked bool) {
	volChecks(t, checks)
	rapid.Check(t, func(rt *rapid.T) {
		ctx := context.Background()
		rig := newVolRig(t)
		rig.temp = temp
		dir, follow := temp(), temp()
		oracle := &volOracle{}
		edit := func(d string) func(*VolumeConfig) {
			if tracked && d == dir {
				return volTracked(t, oracle)
			}
			return func(*VolumeConfig) {}
		}
		v := rig.open(dir, edit(dir))
		f := rig.open(follow, nil)
		defer func() { _ = v.Close(); _ = f.Close() }()
		volOK(t, v.MarkLive(ctx, 1))
		volOK(t, v.Baseline(ctx, rig.store, SnapshotRef{}))
		w := &volWorld{t: rt, root: v.Path()}
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
			req := CaptureRequest{Freezer: &volFreezer{}, BeforeFreeze: func(context.Context) error {
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
				_, err := v.Capture(ctx, CaptureRequest{Freezer: &volFreezer{thawErr: ErrFreezeBroken}})
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
