package track

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fileID is a file for as long as it lives: inode numbers are used again.
type fileID struct {
	ino   uint64
	birth unix.StatxTimestamp
}

// copied is the copy of a file that is kept up to date by nothing but what a Tracker says.
type copied struct {
	data  []byte
	holes []Range // where data was, when last looked
}

// mirror copies a volume as Drain asks its caller to.
type mirror struct {
	t       testing.TB
	v       *volume
	tr      *Tracker
	names   map[string]fileID // of files, by path
	files   map[fileID]*copied
	carried map[uint64][]Range // Dirtied since the last syncfs began
	before  map[fileID][]byte  // true content at the last freeze

	// What a broken Tracker or reader would do, for tests that must fail.
	spoil func(ino uint64, n *Inode)
	sum   tally
}

// tally is in blocks.
type tally struct{ changed, written, dirtied, asked int }

func newMirror(t testing.TB, v *volume, tr *Tracker) *mirror {
	m := &mirror{t: t, v: v, tr: tr, names: map[string]fileID{}, files: map[fileID]*copied{}, carried: map[uint64][]Range{}, before: map[fileID][]byte{}}
	drain(t, tr)
	must(t, syncfs(v.root))
	m.look(".")
	m.remember()
	return m
}

// look brings the names at and below a path up to date.
func (m *mirror) look(name string) {
	m.t.Helper()
	for p := range m.names {
		if name == "." || p == name || strings.HasPrefix(p, name+"/") {
			delete(m.names, p)
		}
	}
	err := filepath.WalkDir(m.v.path(name), func(full string, e fs.DirEntry, err error) error {
		if err != nil && gone(err) {
			return nil
		}
		must(m.t, err)
		if e.Type().IsRegular() {
			rel, err := filepath.Rel(m.v.root, full)
			must(m.t, err)
			id, ok := m.stat(unix.AT_FDCWD, full, unix.AT_SYMLINK_NOFOLLOW)
			if !ok {
				return nil
			}
			m.names[rel] = id
			if m.files[id] == nil {
				m.whole(id, full)
			}
		}
		return nil
	})
	must(m.t, err)
}

func (m *mirror) stat(dir int, name string, flags int) (fileID, bool) {
	m.t.Helper()
	var st unix.Statx_t
	err := unix.Statx(dir, name, flags, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
	if err != nil && gone(err) {
		return fileID{}, false
	}
	must(m.t, err)
	return fileID{ino: st.Ino, birth: st.Btime}, true
}

// open opens a file if it still has this name. Otherwise its copy is dropped: an event for
// another name will come, and then all of it is copied.
func (m *mirror) open(id fileID, full string) *os.File {
	m.t.Helper()
	f, err := os.Open(full)
	if err != nil && !gone(err) {
		m.t.Fatal(err)
	}
	if err == nil {
		if now, _ := m.stat(int(f.Fd()), "", unix.AT_EMPTY_PATH); now == id {
			return f
		}
		_ = f.Close()
	}
	delete(m.files, id)
	return nil
}

func (m *mirror) whole(id fileID, full string) {
	m.t.Helper()
	f := m.open(id, full)
	if f == nil {
		return
	}
	defer f.Close()
	_ = dataRanges(f) // waits for an operation on ranges
	_, err := f.Seek(0, io.SeekStart)
	must(m.t, err)
	b, err := io.ReadAll(f)
	must(m.t, err)
	m.files[id] = &copied{data: b, holes: dataRanges(f)}
}

// apply takes over changes. The ranges in dirtied are copied too.
func (m *mirror) apply(c *Changes, dirtied map[uint64][]Range) {
	m.t.Helper()
	if c.Lost != "" || c.NamesLost != "" {
		m.t.Fatalf("lost %q, names %q", c.Lost, c.NamesLost)
	}
	for _, name := range c.Names {
		m.look(name)
	}
	// A file without a name just now, because its directory is being moved, will be copied
	// whole when it has one.
	named := map[uint64]bool{}
	for _, id := range m.names {
		named[id.ino] = true
	}
	for id := range m.files {
		if (c.Inodes[id.ino] != nil || dirtied[id.ino] != nil) && !named[id.ino] {
			delete(m.files, id)
		}
	}
	done := map[fileID]bool{}
	for p, id := range m.names {
		n := c.Inodes[id.ino]
		if done[id] || n == nil && dirtied[id.ino] == nil {
			continue
		}
		done[id] = true
		if n == nil {
			n = &Inode{}
		}
		full := m.v.path(p)
		if n.Ranged {
			m.whole(id, full)
			continue
		}
		m.sum.written += blocks(n.Written)
		m.sum.dirtied += blocks(n.Dirtied)
		m.ranges(id, full, slices.Concat(n.Written, dirtied[id.ino]))
	}
}

// ranges copies ranges of a file, and what its size and holes tell.
func (m *mirror) ranges(id fileID, full string, ranges []Range) {
	m.t.Helper()
	c, f := m.files[id], m.open(id, full)
	if f == nil {
		return
	}
	defer f.Close()
	if c == nil {
		m.whole(id, full)
		return
	}
	st, err := f.Stat()
	must(m.t, err)
	data := dataRanges(f)
	ranges = slices.Concat(ranges, different(c.holes, data))
	old := int64(len(c.data))
	if size := st.Size(); size < old {
		c.data = c.data[:size]
		ranges = append(ranges, Range{size, size + 1})
	} else if size > old {
		c.data = append(c.data, make([]byte, size-old)...)
		ranges = append(ranges, Range{old - 1, old + 1})
	}
	c.holes = data
	m.sum.asked += blocks(ranges)
	for _, r := range ranges {
		from, to := max(r.From&^(BlockSize-1), 0), min((r.To+BlockSize-1)&^(BlockSize-1), int64(len(c.data)))
		if from >= to {
			continue
		}
		n, err := f.ReadAt(c.data[from:to], from)
		if n < int(to-from) { // shorter by now
			clear(c.data[int(from)+n : to])
			_ = err
		}
	}
}

func (m *mirror) drained() *Changes {
	m.t.Helper()
	c := drain(m.t, m.tr)
	if m.spoil != nil {
		for ino, n := range c.Inodes {
			m.spoil(ino, n)
		}
	}
	return c
}

// running does what is done while the volume is being written: Drain, syncfs, copy.
func (m *mirror) running() {
	m.t.Helper()
	c := m.drained()
	dirtied := m.carried
	for ino, n := range c.Inodes {
		dirtied[ino] = append(dirtied[ino], n.Dirtied...)
	}
	m.carried = map[uint64][]Range{}
	must(m.t, syncfs(m.v.root))
	m.apply(c, dirtied)
}

// frozen does what is done in the freeze, and compares. It returns what is wrong.
func (m *mirror) frozen() []string {
	m.t.Helper()
	c := m.drained()
	dirtied := map[uint64][]Range{}
	for ino, n := range c.Inodes {
		dirtied[ino] = n.Dirtied
		m.carried[ino] = append(m.carried[ino], n.Dirtied...)
	}
	m.apply(c, dirtied)
	for p, id := range m.names {
		if m.files[id] == nil { // what open dropped and is left with another name
			m.whole(id, m.v.path(p))
		}
	}
	return m.compare()
}

func (m *mirror) compare() []string {
	m.t.Helper()
	var wrong []string
	names := map[string]fileID{}
	must(m.t, filepath.WalkDir(m.v.root, func(full string, e fs.DirEntry, err error) error {
		must(m.t, err)
		if e.Type().IsRegular() {
			rel, err := filepath.Rel(m.v.root, full)
			must(m.t, err)
			names[rel], _ = m.stat(unix.AT_FDCWD, full, unix.AT_SYMLINK_NOFOLLOW)
		}
		return nil
	}))
	for p, id := range names {
		if m.names[p] != id {
			wrong = append(wrong, fmt.Sprintf("%q is not known", p))
			continue
		}
		b, err := os.ReadFile(m.v.path(p))
		must(m.t, err)
		c := m.files[id]
		if c == nil {
			wrong = append(wrong, fmt.Sprintf("%q was not copied", p))
			continue
		}
		if len(b) != len(c.data) {
			wrong = append(wrong, fmt.Sprintf("%q has %d bytes, known are %d", p, len(b), len(c.data)))
			continue
		}
		for off := 0; off < len(b); off += BlockSize {
			end := min(off+BlockSize, len(b))
			if !bytes.Equal(b[off:end], c.data[off:end]) {
				wrong = append(wrong, fmt.Sprintf("%q block %d", p, off/BlockSize))
			}
		}
	}
	for p := range m.names {
		if _, ok := names[p]; !ok {
			wrong = append(wrong, fmt.Sprintf("%q is gone", p))
		}
	}
	m.remember()
	return wrong
}

// remember counts what has truly changed since the last freeze, and forgets dead files.
func (m *mirror) remember() {
	m.t.Helper()
	now := map[fileID][]byte{}
	live := map[fileID]*copied{}
	for p, id := range m.names {
		if now[id] != nil || m.files[id] == nil {
			continue
		}
		live[id] = m.files[id]
		b, err := os.ReadFile(m.v.path(p))
		if err != nil {
			continue
		}
		now[id] = b
		old := m.before[id]
		for off := 0; old != nil && off < len(b); off += BlockSize {
			if end := min(off+BlockSize, len(b)); end > len(old) || !bytes.Equal(b[off:end], old[off:end]) {
				m.sum.changed++
			}
		}
	}
	m.before, m.files = now, live
}

func blocks(rs []Range) (n int) {
	for _, r := range rs {
		n += int((r.To+BlockSize-1)/BlockSize - r.From/BlockSize)
	}
	return n
}

// dataRanges are the parts of a file that are not holes.
func dataRanges(f *os.File) []Range {
	_, _ = f.ReadAt(make([]byte, 1), 0) // XFS: waits for an operation on ranges
	var rs []Range
	for off := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if err != nil {
			return rs
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return rs
		}
		rs = append(rs, Range{from, to})
		off = to
	}
}

// different is where exactly one of two sorted lists has data.
func different(a, b []Range) []Range {
	var edges []int64
	for _, rs := range [][]Range{a, b} {
		for _, r := range rs {
			edges = append(edges, r.From, r.To)
		}
	}
	slices.Sort(edges)
	var out []Range
	for i := 0; i+1 < len(edges); i += 2 {
		if edges[i] < edges[i+1] {
			out = append(out, Range{edges[i], edges[i+1]})
		}
	}
	return out
}
