package fsx

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// keptMost is how many directories a Kept holds open at once.
const keptMost = 512

// Kept is the real file system with the handles of directories kept open: opening,
// creating, removing and syncing by name costs a network file system that one operation,
// not a look-up of every directory on the way. A handle that the server has forgotten or
// whose file system is gone is opened again by its path. The zero value is ready; Close
// gives the handles up.
//
// While handles are open, a share can be unmounted lazily only.
type Kept struct {
	OS
	mu   sync.Mutex
	dirs map[string]*os.File
}

var _ FS = (*Kept)(nil)

// Close closes the directories. The Kept can be used again.
func (k *Kept) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	for p, d := range k.dirs {
		errs = append(errs, d.Close())
		delete(k.dirs, p)
	}
	return errors.Join(errs...)
}

// dir returns a directory's handle, and whether it had been open already.
func (k *Kept) dir(path string) (*os.File, bool, error) {
	k.mu.Lock()
	d, ok := k.dirs[path]
	k.mu.Unlock()
	if ok {
		return d, true, nil
	}
	// Outside of the lock: this may hang.
	d, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, false, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if other, ok := k.dirs[path]; ok {
		_ = d.Close() // another was faster
		return other, true, nil
	}
	if k.dirs == nil {
		k.dirs = map[string]*os.File{}
	}
	for p, old := range k.dirs {
		if len(k.dirs) < keptMost {
			break
		}
		delete(k.dirs, p)
		_ = old.Close() // whoever uses it goes on until done
	}
	k.dirs[path] = d
	return d, false, nil
}

// drop forgets a handle that did not serve.
func (k *Kept) drop(path string, d *os.File) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dirs[path] == d {
		delete(k.dirs, path)
	}
	_ = d.Close()
}

// in calls f with a directory's descriptor, a second time with a fresh one if the first was
// kept from before and may be what failed.
func (k *Kept) in(path string, f func(fd int) error) error {
	for {
		d, kept, err := k.dir(path)
		if err != nil {
			return err
		}
		c, err := d.SyscallConn()
		if err == nil {
			var ferr error
			// The descriptor stays valid while f runs, also if the handle is closed.
			if err = c.Control(func(fd uintptr) { ferr = ignoringEINTR(func() error { return f(int(fd)) }) }); err == nil {
				err = ferr
				if err == nil || errors.Is(err, fs.ErrExist) {
					return err
				}
			}
		}
		k.drop(path, d)
		if !kept || !worthRetry(err) {
			return err
		}
	}
}

// worthRetry says whether a fresh handle may do better.
func worthRetry(err error) bool {
	for _, e := range []error{unix.ESTALE, unix.ENOENT, unix.ENOTCONN, unix.EBADF, os.ErrClosed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (k *Kept) open(path string, flags int) (File, error) {
	var out *os.File
	err := k.in(filepath.Dir(path), func(dir int) error {
		fd, err := unix.Openat(dir, filepath.Base(path), flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			out = os.NewFile(uintptr(fd), path)
		}
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return out, nil
}

// Open implements FS.
func (k *Kept) Open(path string) (File, error) { return k.open(path, unix.O_RDONLY) }

// Create implements FS.
func (k *Kept) Create(path string) (File, error) {
	return k.open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
}

// Remove implements FS.
func (k *Kept) Remove(path string) error {
	err := k.in(filepath.Dir(path), func(dir int) error { return unix.Unlinkat(dir, filepath.Base(path), 0) })
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) {
		return k.OS.Remove(path)
	}
	if err != nil {
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// SyncDir implements FS.
func (k *Kept) SyncDir(path string) error {
	if err := k.in(path, unix.Fsync); err != nil {
		return &fs.PathError{Op: "fsync", Path: path, Err: err}
	}
	return nil
}
