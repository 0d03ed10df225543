package sync

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	stdsync "sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// volStormer changes a directory at random, on its own or a number of times, as a database
// does that nobody waits for. It lives in the other process.
//
//	storm  Path: the directory, N: seed; goes on until calm
//	calm   returns when nothing is under way; fails if nothing was ever done
//	steps  Path, N: seed, Off: how many; a storm stands still meanwhile
type volStormer struct {
	volDoer
	flyer
	mu   stdsync.Mutex // held for each step
	stop chan struct{} // closed to end the storm; nil: there is none
	done chan struct{}
	view *stormView
}

// stormView is the directory as the storm sees it.
type stormView struct {
	root string
	rnd  *rand.Rand
	n    int
	maps []stormMap
	did  int // steps that succeeded
}

type stormMap struct {
	f *os.File
	b []byte
}

const (
	stormFiles = 40             // about as many there are
	stormSize  = 40 * BlockSize // at most, of one
	stormMaps  = 6
	// stormSpares is what the names begin with that a storm leaves alone.
	stormSpares = "own-"
)

func (s *volStormer) do(op volOp) error {
	switch op.Do {
	case "storm":
		if s.stop != nil {
			return errors.New("it storms already")
		}
		s.look(op.Path, op.N)
		s.stop, s.done = make(chan struct{}), make(chan struct{})
		go s.blow(s.stop, s.done)
		return nil
	case "calm":
		if s.stop == nil {
			return nil
		}
		close(s.stop)
		<-s.done
		s.stop = nil
		return nil
	case "fly":
		return s.fly(op)
	case "land":
		return s.land()
	case "steps":
		s.mu.Lock()
		defer s.mu.Unlock()
		s.look(op.Path, op.N)
		before := s.view.did
		for range op.Off {
			s.view.step()
		}
		if op.Off > 20 && s.view.did == before {
			return errors.New("no step succeeded")
		}
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.volDoer.do(op)
}

func (s *volStormer) look(root string, seed int64) {
	if s.view == nil || s.view.root != root {
		s.view = &stormView{root: root}
	}
	s.view.rnd = rand.New(rand.NewPCG(uint64(seed), 7))
}

func (s *volStormer) blow(stop, done chan struct{}) {
	defer close(done)
	for {
		select {
		case <-stop:
			return
		default:
		}
		s.mu.Lock()
		s.view.step()
		s.mu.Unlock()
	}
}

// step does one thing. That it fails is no matter: names collide, ranges end outside.
func (w *stormView) step() {
	files, dirs := w.list()
	if w.one(files, dirs) == nil {
		w.did++
	}
}

func (w *stormView) list() (files, dirs []string) {
	dirs = []string{w.root}
	_ = filepath.WalkDir(w.root, func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case p == w.root:
		case strings.HasPrefix(e.Name(), stormSpares):
		case e.IsDir():
			dirs = append(dirs, p)
		case e.Type().IsRegular():
			files = append(files, p)
		}
		return nil
	})
	return files, dirs
}

func (w *stormView) pick(of []string) string { return of[w.rnd.IntN(len(of))] }

func (w *stormView) fresh(dirs []string) string {
	w.n++
	return filepath.Join(w.pick(dirs), fmt.Sprintf("s%d%s", w.n, w.pick([]string{"", " x", "\xff", "\n"})))
}

// data is what no other call returns.
func (w *stormView) data(n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		v := w.rnd.Uint64() | 1
		for k := i; k < min(i+8, n); k++ {
			b[k] = byte(v >> (8 * (k - i)))
		}
	}
	return b
}

func (w *stormView) off() int64 { return w.rnd.Int64N(stormSize - 4*BlockSize) }

func (w *stormView) size() int { return 1 + w.rnd.IntN(3*BlockSize) }

func (w *stormView) one(files, dirs []string) error {
	if len(files) < stormFiles/2 || len(files) < stormFiles && w.rnd.IntN(12) == 0 {
		return os.WriteFile(w.fresh(dirs), w.data(w.size()), 0o640)
	}
	f := w.pick(files)
	if len(files) > stormFiles {
		return os.Remove(f)
	}
	switch k := w.rnd.IntN(100); {
	case k < 15:
		return w.open(f, 0, func(f *os.File) error { _, err := f.WriteAt(w.data(w.size()), w.off()); return err })
	case k < 30:
		return w.direct(f)
	case k < 45:
		return w.store(f)
	case k < 62:
		return w.ranges(f)
	case k < 72:
		return w.attributes(f, dirs)
	case k < 76:
		return w.open(f, 0, (*os.File).Sync)
	default:
		return w.names(f, files, dirs)
	}
}

func (w *stormView) open(p string, flags int, edit func(f *os.File) error) error {
	f, err := os.OpenFile(p, os.O_RDWR|unix.O_NOFOLLOW|flags, 0)
	if err != nil {
		return err
	}
	return errors.Join(edit(f), f.Close())
}

func (w *stormView) direct(p string) error {
	return w.open(p, unix.O_DIRECT, func(f *os.File) error {
		n := 4096 * (1 + w.rnd.IntN(6))
		raw := make([]byte, n+4096)
		b := raw[4096-int(uintptr(unsafe.Pointer(&raw[0]))&4095):][:n]
		copy(b, w.data(n))
		_, err := f.WriteAt(b, w.off()&^4095)
		return err
	})
}

// store changes a mapped file, often one that was mapped long ago and is dirty.
func (w *stormView) store(p string) error {
	if len(w.maps) == 0 || len(w.maps) < stormMaps && w.rnd.IntN(3) == 0 {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		b, err := unix.Mmap(int(f.Fd()), 0, stormSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		w.maps = append(w.maps, stormMap{f, b})
	}
	i := w.rnd.IntN(len(w.maps))
	m := w.maps[i]
	st, err := m.f.Stat()
	if err != nil {
		return err
	}
	if w.rnd.IntN(20) == 0 || st.Size() < 8 {
		w.maps = append(w.maps[:i], w.maps[i+1:]...)
		return errors.Join(unix.Munmap(m.b), m.f.Close())
	}
	off := w.rnd.Int64N(min(st.Size(), stormSize) - 7)
	if w.rnd.IntN(2) == 0 {
		off = min(off, 77) // the same page again and again
	}
	copy(m.b[off:off+8], w.data(8))
	return nil
}

func (w *stormView) ranges(p string) error {
	const keep, punch, collapse, zero, insert = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_INSERT_RANGE
	return w.open(p, 0, func(f *os.File) error {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		off, n, size := w.off(), int64(w.size()), st.Size()
		switch w.rnd.IntN(8) {
		case 0:
			return f.Truncate(w.off())
		case 1: // nothing of the end stays
			return errors.Join(f.Truncate(size/2), f.Truncate(size))
		case 2:
			return unix.Fallocate(int(f.Fd()), keep|punch, off, n)
		case 3:
			return unix.Fallocate(int(f.Fd()), []uint32{zero, zero | keep}[w.rnd.IntN(2)], off, n)
		case 4:
			return unix.Fallocate(int(f.Fd()), []uint32{0, keep}[w.rnd.IntN(2)], off, n)
		case 5:
			op := []uint32{collapse, insert}[w.rnd.IntN(2)]
			off, n = off&^4095, (n+4095)&^4095
			if off+n >= size || op == insert && size > stormSize-n {
				return unix.EINVAL // XFS would move mtime and then refuse
			}
			return unix.Fallocate(int(f.Fd()), op, off, n)
		default:
			in, out := int64(0), w.off()
			_, err := unix.CopyFileRange(int(f.Fd()), &in, int(f.Fd()), &out, int(min(out, n)), 0)
			return err
		}
	})
}

func (w *stormView) attributes(f string, dirs []string) error {
	p := f
	if w.rnd.IntN(4) == 0 && len(dirs) > 1 {
		p = w.pick(dirs[1:])
	}
	switch w.rnd.IntN(5) {
	case 0:
		return os.Chmod(p, os.FileMode(0o700+w.rnd.IntN(0o100)))
	case 1:
		return os.Lchown(p, w.rnd.IntN(3)*1000, w.rnd.IntN(3)*1000)
	case 2:
		return unix.Setxattr(p, "user."+w.pick([]string{"a", "b"}), w.data(1+w.rnd.IntN(300)), 0)
	case 3:
		return unix.Removexattr(p, "user.a")
	default:
		ts := unix.NsecToTimespec(w.rnd.Int64N(1e18))
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, 0)
	}
}

func (w *stormView) names(f string, files, dirs []string) error {
	switch w.rnd.IntN(10) {
	case 0:
		return os.Rename(f, w.fresh(dirs))
	case 1:
		return os.Rename(f, w.pick(files))
	case 2:
		return os.Link(f, w.fresh(dirs))
	case 3: // most likely the same inode number
		return errors.Join(os.Remove(f), os.WriteFile(f, w.data(w.size()), 0o600))
	case 4:
		if len(dirs) > 8 {
			return os.RemoveAll(w.pick(dirs[1:]))
		}
		return os.Mkdir(w.fresh(dirs), 0o750)
	case 5, 6:
		if len(dirs) == 1 {
			return os.Mkdir(w.fresh(dirs), 0o750)
		}
		return os.Rename(w.pick(dirs[1:]), w.fresh(dirs)) // not into itself
	case 7:
		return os.Symlink(w.pick([]string{"s1", "nowhere"}), w.fresh(dirs))
	case 8:
		return unix.Renameat2(unix.AT_FDCWD, f, unix.AT_FDCWD, w.pick(append(dirs, files...)), unix.RENAME_EXCHANGE)
	default:
		return os.Remove(f)
	}
}
