package track

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

const (
	// What happens to names and attributes. Not IN_MODIFY: an event for each write call
	// costs several times the call (docs/TRACKING.md has figures), and writes are known.
	watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
		unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW

	// maxNames bounds the memory for names between two drains.
	maxNames = 1 << 18
)

// names watches each directory of the volume.
type names struct {
	root string
	log  hclog.Logger
	file *os.File // inotify
	raw  interface {
		Control(func(fd uintptr)) error
		Read(func(fd uintptr) bool) error
	}
	done chan struct{} // closed when the reader has ended
	work sync.WaitGroup

	mu      sync.Mutex // guards what follows, and reading
	dirs    map[int32]string
	touched map[string]struct{}
	lost    string // why what was drained last is not complete
	broken  string // why the watches are not complete
	walking bool
	closed  bool
	buf     []byte
}

// watchNames watches everything below root. That takes as long as listing all directories.
func watchNames(root string, log hclog.Logger) (*names, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EMFILE) {
			hint = " (raise fs.inotify.max_user_instances)"
		}
		return nil, fmt.Errorf("start watching names%s: %w", hint, err)
	}
	n := &names{
		root: root, log: log, file: os.NewFile(uintptr(fd), "inotify"), done: make(chan struct{}),
		dirs: map[int32]string{}, touched: map[string]struct{}{}, lost: "watching names began",
		buf: make([]byte, 64<<10),
	}
	raw, err := n.file.SyscallConn()
	if err != nil {
		_ = n.file.Close()
		return nil, fmt.Errorf("start watching names: %w", err)
	}
	n.raw = raw
	go n.read()
	n.walk()
	return n, nil
}

func (n *names) close() error {
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	err := n.file.Close()
	<-n.done
	n.work.Wait()
	return err
}

// drain returns the names touched since the last call and before this one: the kernel queues
// an event before the system call that causes it returns, so what is queued now is all.
func (n *names) drain() ([]string, string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	queued := 0
	if err := n.raw.Control(func(fd uintptr) { queued = n.queued(int(fd)) }); err != nil {
		n.lose("reading name events failed: " + err.Error())
	}
	if err := n.raw.Control(func(fd uintptr) {
		for queued > 0 {
			got, more := n.readSome(int(fd))
			if queued -= got; !more {
				return
			}
		}
	}); err != nil {
		n.lose("reading name events failed: " + err.Error())
	}
	out := make([]string, 0, len(n.touched))
	for name := range n.touched {
		out = append(out, name)
	}
	n.touched = map[string]struct{}{}
	lost := first(n.broken, n.lost) // what somebody can do something about comes first
	if n.walking {
		lost = first(lost, rewatching)
	}
	n.lost = ""
	if n.broken != "" && !n.walking && !n.closed {
		// Not in the caller's time, which may be a freeze.
		n.walking = true
		n.work.Add(1)
		go func() {
			defer n.work.Done()
			n.walk()
		}()
	}
	return out, lost
}

func (n *names) queued(fd int) int {
	q, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		n.lose("reading name events failed: " + err.Error())
	}
	return q
}

// read takes events as they come, for the kernel keeps few.
func (n *names) read() {
	defer close(n.done)
	err := n.raw.Read(func(fd uintptr) bool {
		for {
			n.mu.Lock()
			_, more := n.readSome(int(fd))
			n.mu.Unlock()
			if !more {
				return false
			}
		}
	})
	if !errors.Is(err, os.ErrClosed) {
		n.mu.Lock()
		n.broken = fmt.Sprintf("reading name events ended: %v", err)
		n.mu.Unlock()
	}
}

// readSome is called with the lock held. It returns false if there is nothing more to read.
func (n *names) readSome(fd int) (int, bool) {
	got, err := unix.Read(fd, n.buf)
	if errors.Is(err, unix.EINTR) {
		return 0, true
	}
	if err != nil || got <= 0 {
		if !errors.Is(err, unix.EAGAIN) {
			n.lose(fmt.Sprintf("reading name events failed: %v", err))
		}
		return 0, false
	}
	for b := n.buf[:got]; len(b) >= unix.SizeofInotifyEvent; {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		name := b[unix.SizeofInotifyEvent:end]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		n.event(fd, wd, mask, string(name))
		b = b[end:]
	}
	return got, true
}

func (n *names) lose(why string) {
	if n.lost == "" {
		n.lost = why
	}
}

// event is called with the lock held.
func (n *names) event(fd int, wd int32, mask uint32, name string) {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		// Directories may have appeared unseen.
		n.broken = "more names changed at once than the kernel keeps events for (raise fs.inotify.max_queued_events)"
		n.lose(n.broken)
		return
	}
	dir, ok := n.dirs[wd]
	if !ok {
		return
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(n.dirs, wd)
		if dir == "." {
			n.broken = "the volume's directory was removed, or its file system unmounted"
		}
		return
	}
	if mask&(unix.IN_MOVE_SELF|unix.IN_DELETE_SELF|unix.IN_UNMOUNT) != 0 {
		if dir == "." {
			n.broken = "the volume's directory was moved or removed, or its file system unmounted"
		}
		return // the parent says it
	}
	p := path.Join(dir, name)
	n.touch(p)
	if mask&unix.IN_ISDIR == 0 {
		return
	}
	if mask&unix.IN_MOVED_FROM != 0 {
		// Wherever it went: there it is watched anew, and looked at as a whole.
		n.forget(fd, p)
	}
	if mask&(unix.IN_CREATE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO) != 0 {
		// What is there now, which need not be what the event is about: of two directories
		// that are exchanged the first comes before the second goes.
		if err := n.add(fd, p); err != nil {
			n.broken = err.Error()
		}
	}
}

func (n *names) touch(p string) {
	if len(n.touched) >= maxNames {
		n.lose("more names changed than are kept")
		return
	}
	n.touched[p] = struct{}{}
}

func (n *names) forget(fd int, p string) {
	for wd, dir := range n.dirs {
		if dir == p || strings.HasPrefix(dir, p+"/") {
			delete(n.dirs, wd)
			_, _ = unix.InotifyRmWatch(fd, uint32(wd))
		}
	}
}

// add watches a directory and all below it. What comes into being meanwhile is either seen
// by the listing, which comes second, or raises an event.
func (n *names) add(fd int, p string) error {
	if err := n.watch(fd, p); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(n.root, p))
	if err != nil && !gone(err) {
		return fmt.Errorf("list a directory to watch it: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := n.add(fd, path.Join(p, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func (n *names) watch(fd int, p string) error {
	full := filepath.Join(n.root, p)
	wd, err := unix.InotifyAddWatch(fd, full, watchMask)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return errors.New("there are more directories than may be watched (raise fs.inotify.max_user_watches)")
	case err != nil:
		err = &os.PathError{Op: "watch", Path: full, Err: err}
		if p != "." && gone(err) {
			return nil
		}
		return fmt.Errorf("watch names: %w", err)
	}
	n.dirs[int32(wd)] = p
	return nil
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// walk watches all directories, from the root, each with the lock held only as long as it
// takes to watch one.
func (n *names) walk() {
	n.mu.Lock()
	n.broken = ""
	n.mu.Unlock()
	var failed error
	err := n.raw.Control(func(fd uintptr) {
		failed = filepath.WalkDir(n.root, func(full string, e fs.DirEntry, err error) error {
			if err != nil {
				if gone(err) && full != n.root {
					return nil
				}
				return err
			}
			if !e.IsDir() {
				return nil
			}
			p, err := filepath.Rel(n.root, full)
			if err != nil {
				return err
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.closed {
				return ErrClosed
			}
			return n.watch(int(fd), p)
		})
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.walking {
		// Names that changed before their directory was watched are known to nobody who looked
		// before now.
		n.lose(rewatching)
	}
	n.walking = false
	if err := errors.Join(err, failed); err != nil {
		n.broken = err.Error()
	}
}

// rewatching is why names are not complete while the watches are being renewed, and once
// more when they are.
const rewatching = "directories are being watched anew"
