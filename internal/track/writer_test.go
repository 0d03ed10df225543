package track

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	fileCount = 4
	fileSize  = 2 << 20
)

// kinds of windows.
func kinds() []string {
	return []string{"aligned", "buffered", "direct", "aio", "mmap", "uring", "copy", "truncate", "ranges", "names", "mixed"}
}

// writer is the process that changes the volume, driven through its standard input: a line
// "KIND SEED OPS" makes it do that many operations; it says "half" at half of them, without
// waiting, and "done" at the end.
type writer struct {
	t    testing.TB
	cmd  *exec.Cmd
	to   io.WriteCloser
	from *bufio.Scanner
	errs bytes.Buffer
}

func startWriter(t testing.TB, v *volume) *writer {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	w := &writer{t: t, cmd: exec.CommandContext(t.Context(), exe)}
	w.cmd.Env = append(os.Environ(), "TRACK_TEST_ROLE=writer", "TRACK_TEST_DIR="+v.root)
	w.cmd.Stderr = &w.errs
	w.to, err = w.cmd.StdinPipe()
	must(t, err)
	out, err := w.cmd.StdoutPipe()
	must(t, err)
	w.from = bufio.NewScanner(out)
	must(t, w.cmd.Start())
	t.Cleanup(w.stop)
	w.expect("ready")
	return w
}

func (w *writer) stop() {
	_ = w.to.Close()
	_ = w.cmd.Wait()
}

func (w *writer) begin(kind string, seed uint64, ops int) {
	w.t.Helper()
	_, err := fmt.Fprintln(w.to, kind, seed, ops)
	must(w.t, err)
}

func (w *writer) expect(line string) {
	w.t.Helper()
	if !w.from.Scan() || w.from.Text() != line {
		w.t.Fatalf("the writer says %q, want %q: %v %s", w.from.Text(), line, w.from.Err(), &w.errs)
	}
}

// ---- the writer's side

type writing struct {
	dir   string
	rnd   *rand.Rand
	bytes *rand.ChaCha8
	maps  map[string][]byte // mappings that stay
	ring  *uring
	aio   uintptr // context of asynchronous I/O
	buf   []byte  // page-aligned
}

func writerMain() int {
	buf, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	w := &writing{dir: os.Getenv("TRACK_TEST_DIR"), maps: map[string][]byte{}, buf: buf}
	for n := range fileCount {
		f, err := os.OpenFile(filepath.Join(w.dir, fmt.Sprint("f", n)), os.O_RDWR|os.O_CREATE, 0o644)
		if err == nil {
			err = errors.Join(f.Truncate(fileSize), f.Close())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var kind string
		var seed uint64
		var ops int
		if _, err := fmt.Sscan(in.Text(), &kind, &seed, &ops); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		var key [32]byte
		copy(key[:], fmt.Sprint(seed))
		w.rnd, w.bytes = rand.New(rand.NewPCG(seed, 1)), rand.NewChaCha8(key)
		for n := range ops {
			if n == ops/2 {
				fmt.Println("half")
			}
			if err := w.one(kind); err != nil {
				fmt.Fprintf(os.Stderr, "%s, seed %d, operation %d: %v\n", kind, seed, n, err)
				return 1
			}
		}
		fmt.Println("done")
	}
	return 0
}

func (w *writing) path() string {
	return filepath.Join(w.dir, fmt.Sprintf("f%d", w.rnd.IntN(fileCount)))
}

func (w *writing) one(kind string) error {
	if kind == "mixed" {
		kind = kinds()[w.rnd.IntN(len(kinds())-1)]
	}
	if kind == "names" {
		return w.names()
	}
	p := w.path()
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Size < fileSize/2 && kind != "truncate" && kind != "ranges" {
		if err := f.Truncate(fileSize); err != nil {
			return err
		}
	}
	switch kind {
	case "aligned":
		return w.write(f, int64(w.rnd.IntN(fileSize>>13))<<13, 8192)
	case "buffered":
		return w.buffered(f)
	case "direct", "aio":
		return w.direct(p, kind == "aio")
	case "mmap":
		return w.mmap(f, p)
	case "uring":
		return w.uring(f, p)
	case "copy":
		return w.copy(f)
	case "truncate":
		return w.truncate(f)
	case "ranges":
		return w.ranges(f, st.Size)
	}
	return fmt.Errorf("no kind %q", kind)
}

func (w *writing) fill(n int) []byte {
	b := w.buf[:n]
	_, _ = w.bytes.Read(b)
	return b
}

func (w *writing) write(f *os.File, off int64, n int) error {
	_, err := f.WriteAt(w.fill(n), off)
	return err
}

func (w *writing) size() int {
	if w.rnd.IntN(10) == 0 {
		return 1 + w.rnd.IntN(400<<10)
	}
	return 1 + w.rnd.IntN(20<<10)
}

func (w *writing) buffered(f *os.File) error {
	switch w.rnd.IntN(12) {
	case 0:
		return f.Sync()
	case 1: // appended
		a, err := os.OpenFile(f.Name(), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		defer a.Close()
		if st, err := a.Stat(); err != nil || st.Size() > 2*fileSize {
			return err
		}
		_, err = a.Write(w.fill(w.size()))
		return err
	case 2: // vectors
		_, err := unix.Pwritev(int(f.Fd()), [][]byte{w.fill(5000)[:1000], w.buf[1000:5000]}, int64(w.rnd.IntN(fileSize)))
		return err
	}
	return w.write(f, int64(w.rnd.IntN(fileSize)), w.size())
}

func (w *writing) direct(p string, async bool) error {
	fd, err := unix.Open(p, unix.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	unit := 4096
	if w.rnd.IntN(4) == 0 {
		unit = 512
	}
	off, n := int64(w.rnd.IntN(fileSize/unit)*unit), unit*(1+w.rnd.IntN(16))
	switch {
	case w.rnd.IntN(8) == 0: // reads must not look like writes
		_, err = unix.Pread(fd, w.buf[:n], off)
	case async:
		err = aioWrite(&w.aio, fd, w.fill(n), off)
	default:
		_, err = unix.Pwrite(fd, w.fill(n), off)
	}
	if errors.Is(err, unix.EINVAL) && unit == 512 {
		return nil // larger sectors
	}
	return err
}

func (w *writing) mmap(f *os.File, p string) error {
	m := w.maps[p]
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if m != nil && (w.rnd.IntN(100) == 0 || st.Size < int64(len(m))) {
		delete(w.maps, p)
		if err := unix.Munmap(m); err != nil {
			return err
		}
		m = nil
	}
	if m == nil {
		if st.Size < fileSize {
			if err := f.Truncate(fileSize); err != nil {
				return err
			}
		}
		var err error
		if m, err = unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return err
		}
		w.maps[p] = m
	}
	// Anywhere, and again and again in the same pages, which are dirty already.
	off := w.rnd.IntN(fileSize - 8)
	if w.rnd.IntN(2) == 0 {
		off = w.rnd.IntN(20)<<12 + 77
	}
	if w.rnd.IntN(4) == 0 { // so that the page is dirty before it is stored to
		if err := w.write(f, int64(off), 1); err != nil {
			return err
		}
	}
	copy(m[off:off+8], w.fill(8))
	if w.rnd.IntN(100) == 0 {
		return unix.Msync(m[:(1+w.rnd.IntN(256))<<12], unix.MS_SYNC)
	}
	return nil
}

func (w *writing) uring(f *os.File, p string) error {
	if w.ring == nil {
		r, err := newUring()
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			return w.buffered(f) // the test says so
		}
		if err != nil {
			return err
		}
		w.ring = r
	}
	flags, unit := 0, 1
	if w.rnd.IntN(2) == 0 {
		flags, unit = unix.O_DIRECT, 4096
	}
	fd, err := unix.Open(p, unix.O_RDWR|flags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Several at once, that don't overlap.
	var batch []request
	for n := range 8 {
		if w.rnd.IntN(3) == 0 {
			continue
		}
		size := unit * (1 + w.rnd.IntN(64<<10/unit))
		slot := n*(fileSize/8) + w.rnd.IntN((fileSize/8-size)/unit)*unit
		b := w.buf[n*(64<<10):][:size]
		_, _ = w.bytes.Read(b)
		batch = append(batch, request{fd: fd, b: b, off: int64(slot), async: w.rnd.IntN(2) == 0})
	}
	return w.ring.writeAll(batch)
}

func (w *writing) copy(f *os.File) error {
	from, err := os.OpenFile(w.path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	in, out := int64(w.rnd.IntN(fileSize)), int64(w.rnd.IntN(fileSize))
	n := 1 + w.rnd.IntN(100<<10)
	if from.Name() == f.Name() {
		in, out = int64(w.rnd.IntN(fileSize/2-n)), fileSize/2+int64(w.rnd.IntN(fileSize/2))
	}
	fd := int(f.Fd())
	switch w.rnd.IntN(6) {
	case 0:
		_, err = unix.CopyFileRange(int(from.Fd()), &in, fd, &out, n, 0)
	case 1:
		if _, err = f.Seek(out, io.SeekStart); err == nil {
			_, err = unix.Sendfile(fd, int(from.Fd()), &in, n)
		}
	case 2:
		err = w.splice(fd, out)
	case 3:
		err = unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
			Src_fd: int64(from.Fd()), Src_offset: uint64(in) &^ 4095, Src_length: uint64(n+4095) &^ 4095, Dest_offset: uint64(out) &^ 4095,
		})
	case 4:
		err = unix.IoctlFileDedupeRange(int(from.Fd()), &unix.FileDedupeRange{
			Src_offset: uint64(in) &^ 4095, Src_length: 4096,
			Info: []unix.FileDedupeRangeInfo{{Dest_fd: int64(fd), Dest_offset: uint64(out) &^ 4095}},
		})
	case 5:
		err = w.moveExtents(fd, uint64(in)>>12, uint64(n)>>12)
	}
	// Not on every file system, and not on every pair of ranges.
	for _, e := range []error{unix.EOPNOTSUPP, unix.EINVAL, unix.ENOTTY, unix.EBUSY, unix.ENODATA} {
		if errors.Is(err, e) {
			return w.write(f, out, n)
		}
	}
	return err
}

func (w *writing) splice(fd int, off int64) error {
	r, p, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	defer p.Close()
	b := w.fill(1 + w.rnd.IntN(60<<10))
	if _, err := p.Write(b); err != nil {
		return err
	}
	_, err = unix.Splice(int(r.Fd()), nil, fd, &off, len(b), 0)
	return err
}

func (w *writing) truncate(f *os.File) error {
	switch w.rnd.IntN(5) {
	case 0:
		return f.Truncate(int64(w.rnd.IntN(fileSize)))
	case 1: // down and up again, nothing written
		if err := f.Truncate(int64(w.rnd.IntN(fileSize))); err != nil {
			return err
		}
		return f.Truncate(fileSize)
	case 2: // through a name, all of it
		if w.rnd.IntN(4) == 0 {
			t, err := os.OpenFile(f.Name(), os.O_RDWR|os.O_TRUNC, 0)
			if err != nil {
				return err
			}
			defer t.Close()
			return w.write(t, int64(w.rnd.IntN(fileSize)), w.size())
		}
		return os.Truncate(f.Name(), fileSize/2+int64(w.rnd.IntN(fileSize)))
	}
	return w.buffered(f)
}

func (w *writing) ranges(f *os.File, size int64) error {
	const keep, punch, collapse, zero, insert = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_COLLAPSE_RANGE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_INSERT_RANGE
	off, n := int64(w.rnd.IntN(fileSize)), int64(w.size())*4
	op := []uint32{keep | punch, keep | punch, zero, zero | keep, collapse, insert, 0, keep, 99, 99, 99}[w.rnd.IntN(11)]
	switch op {
	case 99:
		return w.write(f, off, w.size())
	case collapse, insert:
		off, n = off&^4095, (n+4095)&^4095
		if op == insert && size > 2*fileSize {
			return f.Truncate(fileSize)
		}
	case 0, keep, zero:
		if off+n > 2*fileSize {
			return nil
		}
	}
	err := unix.Fallocate(int(f.Fd()), op, off, n)
	if errors.Is(err, unix.EINVAL) {
		return w.write(f, off, w.size()) // the range meets the end
	}
	return err
}

func (w *writing) names() error {
	join := func(name string) string { return filepath.Join(w.dir, name) }
	some := func(prefix string) string { return join(fmt.Sprintf("%s%d", prefix, w.rnd.IntN(6))) }
	dir := some("d")
	var err error
	switch w.rnd.IntN(13) {
	case 0: // deleted and made anew: usually with the same inode number
		p := some("n")
		_ = os.Remove(p)
		err = os.WriteFile(p, w.fill(w.size()), 0o644)
	case 1: // over another
		if err = os.WriteFile(some("n"), w.fill(w.size()), 0o644); err == nil {
			err = os.Rename(some("n"), some("n"))
		}
	case 2:
		err = os.Link(some("n"), some("h"))
	case 3:
		err = os.Remove(some("h"))
	case 4:
		err = os.Mkdir(dir, 0o755)
	case 5: // below a directory that may just have come
		if err = os.MkdirAll(filepath.Join(dir, "deep", "er"), 0o755); err == nil {
			err = os.WriteFile(filepath.Join(dir, "deep", "er", fmt.Sprint("x", w.rnd.IntN(3))), w.fill(100), 0o600)
		}
	case 6:
		err = os.Rename(dir, some("d"))
	case 7:
		err = os.RemoveAll(dir)
	case 8:
		err = os.Chmod(some("n"), os.FileMode(0o600+w.rnd.IntN(0o100)))
	case 9:
		err = unix.Setxattr(some("n"), "user.track", w.fill(8), 0)
	case 10:
		p := some("s")
		_ = os.Remove(p)
		err = os.Symlink(fmt.Sprint("to", w.rnd.IntN(100)), p)
	case 11:
		err = os.WriteFile(join("n\xff\xfe"+fmt.Sprint(w.rnd.IntN(2))), w.fill(w.size()), 0o644)
	case 12: // exchanged
		err = unix.Renameat2(unix.AT_FDCWD, some("n"), unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	}
	for _, e := range []error{unix.ENOENT, unix.EEXIST, unix.ENOTEMPTY, unix.ENOTDIR, unix.EISDIR, unix.EINVAL, unix.EPERM} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// moveExtents is what defragmentation does on ext4: the file and one without a name get each
// other's extents. With a name the other would have no content to compare: what is cached of it
// stays as it was until the kernel drops it from memory, and then it is another.
func (w *writing) moveExtents(fd int, block, blocks uint64) error {
	blocks = max(blocks, 1)
	donor, err := unix.Open(w.dir, unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(donor)
	if err := unix.Fallocate(donor, 0, 0, int64(block+blocks)<<12); err != nil {
		return err
	}
	return ioctlMoveExt(fd, donor, block, blocks)
}
