package sync

import (
	"errors"
	"io"
	"os"
	stdsync "sync"

	"golang.org/x/sys/unix"
)

// blockFile is what blocks are read from: an *os.File, or a rawFile where opening and closing
// must be cheap.
type blockFile interface {
	io.ReaderAt
	Fd() uintptr
	Name() string
}

// rawFile is a regular file that the runtime knows nothing of: an *os.File asks the kernel
// three times more before the first byte is read.
type rawFile struct {
	fd   int
	name string // below the volume
}

// openRaw is openBelow for a rawFile. The caller closes it.
func openRaw(rootfd int, rel string) (rawFile, error) {
	fd, err := openBelowFD(rootfd, rel)
	if err != nil {
		return rawFile{}, &os.PathError{Op: "open", Path: rel, Err: err}
	}
	return rawFile{fd, rel}, nil
}

// Fd returns the descriptor.
func (f rawFile) Fd() uintptr { return uintptr(f.fd) }

// Name returns the path below the volume.
func (f rawFile) Name() string { return f.name }

// ReadAt implements io.ReaderAt.
func (f rawFile) ReadAt(b []byte, off int64) (int, error) {
	read := 0
	for read < len(b) {
		n, err := unix.Pread(f.fd, b[read:], off+int64(read))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return read, err // the caller says of what
		case n == 0:
			return read, io.EOF
		default:
			read += n
		}
	}
	return read, nil
}

func (f rawFile) close() { _ = unix.Close(f.fd) } // nothing was written

// handles keeps files of the volume open from one round of a capture to the next: a round
// that reads a page of each of many files, above all the frozen one, then need not look for
// them by name. An inode that is open keeps its number, so that what is held for a number is
// that inode, whatever its names are by now.
//
// They are closed when the capture ends, for a file that is deleted keeps its room on the
// disk until then.
type handles struct {
	mu   stdsync.Mutex
	most int
	held map[uint64]rawFile
}

// mostHandles bounds the descriptors that a capture keeps; a quarter of what the process may
// have bounds them too.
const mostHandles = 8192

func newHandles() *handles {
	h := &handles{most: mostHandles, held: map[uint64]rawFile{}}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		h.most = 0
	} else if lim.Cur/4 < mostHandles {
		h.most = int(lim.Cur / 4)
	}
	return h
}

// get returns the open file of an inode. It stays open until close.
func (h *handles) get(ino uint64) (rawFile, bool) {
	if h == nil {
		return rawFile{}, false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	f, ok := h.held[ino]
	return f, ok
}

// put takes a file over that is not needed for now, which may be one that get has returned.
// It is closed if there is no room, or if the inode has been opened twice.
func (h *handles) put(ino uint64, f rawFile) {
	if h != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		old, ok := h.held[ino]
		if ok && old.fd == f.fd {
			return
		}
		if !ok && len(h.held) < h.most {
			h.held[ino] = f
			return
		}
	}
	f.close()
}

// close closes all. Nothing may be reading any more.
func (h *handles) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range h.held {
		f.close()
	}
	clear(h.held)
}
