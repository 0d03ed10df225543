// Package fsx is the seam between dbsupervisor and the file systems it writes: the
// shared directory and the instance's own state. Every operation has a label, so that
// a test can fail, delay or "crash" exactly one step and then look at what is left.
package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrCrash is what a test's hook returns to say that the process dies here: the code
// under test must not clean up after it (clean-up would not have happened).
var ErrCrash = errors.New("simulated crash")

// Op names a kind of file system operation, the first half of a label.
type Op string

// The operations of FS and File.
const (
	OpOpen    Op = "open"    // open an existing file for reading
	OpCreate  Op = "create"  // exclusive creation
	OpMkdir   Op = "mkdir"   //
	OpLink    Op = "link"    // link(2), the exclusive creation of a complete file
	OpSymlink Op = "symlink" // symlink(2), the exclusive creation of a short text in one step
	OpFollow  Op = "follow"  // readlink(2)
	OpRename  Op = "rename"  // only inside the instance's own directory, never on the share
	OpRemove  Op = "remove"  //
	OpReadDir Op = "readdir" //
	OpStat    Op = "stat"    //
	OpRead    Op = "read"    //
	OpWrite   Op = "write"   //
	OpSync    Op = "sync"    // fsync of a file
	OpSyncDir Op = "syncdir" // fsync of a directory
	OpClose   Op = "close"   // close reports write errors on NFS
	OpPoint   Op = "point"   // a labelled step that is not one of these calls (see FS.At)
)

// File is an open file. Close must be called, and its error counts after writing.
type File interface {
	io.Reader
	io.ReaderAt
	io.Writer
	io.WriterAt
	io.Closer
	Sync() error
	Stat() (fs.FileInfo, error)
	Name() string
}

// FS is the part of a file system that the shared directory and local state need.
// Paths are ordinary absolute paths. Errors are *fs.PathError or *os.LinkError.
type FS interface {
	Open(path string) (File, error)
	// Create makes the file, which must not exist, open for reading and writing, mode 0600.
	Create(path string) (File, error)
	Mkdir(path string) error    // mode 0700; the parent must exist
	MkdirAll(path string) error // mode 0700
	Link(oldPath, newPath string) error
	// Symlink makes a symbolic link with this target, of which nothing is expected.
	Symlink(target, path string) error
	Readlink(path string) (string, error)
	Rename(oldPath, newPath string) error
	Remove(path string) error
	ReadDir(path string) ([]fs.DirEntry, error)
	Stat(path string) (fs.FileInfo, error)
	// Identify asks for a file's identity past every cache of attributes: on a network file
	// system the server answers. The name is looked up like any other, and a symbolic link is
	// not followed. It labels as OpStat.
	Identify(path string) (Identity, error)
	// Glance is Identify as the caches have it: it asks the server no more than a look-up does.
	Glance(path string) (Identity, error)
	// SyncDir makes the directory's entries durable.
	SyncDir(path string) error
	// At is a labelled point for steps that bypass this interface (raw system calls on
	// the volume). The real file system does nothing and returns nil.
	At(label, path string) error
}

// Identity tells one state of a file from every other: two that are equal, seen one after the
// other under one name, are the same file with the same names and the same bytes.
type Identity struct {
	Dev, Inode   uint64
	Size         int64
	Links        uint32
	Mtime, Ctime int64 // nanoseconds
}

// OS is the real file system.
type OS struct{}

var _ FS = OS{}

// Open implements FS.
func (OS) Open(path string) (File, error) { return os.Open(path) }

// Create implements FS.
func (OS) Create(path string) (File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// Mkdir implements FS.
func (OS) Mkdir(path string) error { return os.Mkdir(path, 0o700) }

// MkdirAll implements FS.
func (OS) MkdirAll(path string) error { return os.MkdirAll(path, 0o700) }

// Link implements FS.
func (OS) Link(o, n string) error { return os.Link(o, n) }

// Rename implements FS.
func (OS) Rename(o, n string) error { return os.Rename(o, n) }

// Remove implements FS.
func (OS) Remove(path string) error { return os.Remove(path) }

// ReadDir implements FS.
func (OS) ReadDir(path string) ([]fs.DirEntry, error) { return os.ReadDir(path) }

// Stat implements FS (it follows symbolic links).
func (OS) Stat(path string) (fs.FileInfo, error) { return os.Stat(path) }

// Symlink implements FS.
func (OS) Symlink(target, path string) error { return os.Symlink(target, path) }

// Readlink implements FS.
func (OS) Readlink(path string) (string, error) { return os.Readlink(path) }

// Identify implements FS.
func (OS) Identify(path string) (Identity, error) { return identify(path, unix.AT_STATX_FORCE_SYNC) }

// Glance implements FS.
func (OS) Glance(path string) (Identity, error) { return identify(path, unix.AT_STATX_SYNC_AS_STAT) }

func identify(path string, flags int) (Identity, error) {
	var st unix.Statx_t
	for {
		err := unix.Statx(unix.AT_FDCWD, path, flags|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return Identity{}, &fs.PathError{Op: "statx", Path: path, Err: err}
		}
	}
	ns := func(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
	return Identity{
		Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Inode: st.Ino, Size: int64(st.Size), Links: st.Nlink,
		Mtime: ns(st.Mtime), Ctime: ns(st.Ctime),
	}, nil
}

// SyncDir implements FS.
func (OS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// At implements FS.
func (OS) At(string, string) error { return nil }

// ReadFile reads a whole file of at most limit bytes; a larger one is an error, so that
// a damaged or hostile file can't take the memory.
func ReadFile(fsys FS, path string, limit int64) ([]byte, error) {
	f, err := fsys.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadAll(f, limit)
}

// ReadAll is ReadFile for a file that is open.
func ReadAll(f File, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: larger than %d bytes", f.Name(), limit)
	}
	return b, nil
}

// CreateWhole creates a new file with these bytes and makes it durable (file and
// directory). After an error the file may exist in part.
func CreateWhole(fsys FS, path string, data []byte) error {
	f, err := fsys.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// ReplaceLocal replaces a file of the instance's own state atomically and durably.
// It must not be used on the share, where rename overwrites without a word.
func ReplaceLocal(fsys FS, path string, data []byte) error {
	tmp := path + ".tmp"
	if err := fsys.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := CreateWhole(fsys, tmp, data); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, path); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
}
