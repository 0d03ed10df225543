package sync

import (
	"os"
	stdsync "sync"

	"golang.org/x/sys/unix"
)

// mapped is memory outside of the heap for what grows with the volume: the runtime neither
// looks through it nor keeps as much again until it is collected. It is no mapped file: who
// waits for a disk in a page fault can't be stopped by the runtime, which then stops
// everything else, and a disk that fails is a SIGBUS. Where the kernel has none the heap serves.
//
// Nothing is freed before close, by which nothing may be in use any more. A nil mapped is the
// heap.
type mapped struct {
	mu   stdsync.Mutex
	all  int64 // bytes handed out or left over in segments
	segs [][]byte
	cur  []byte // what is left of the last segment
}

const (
	segmentLeast = 256 << 10
	segmentMost  = 64 << 20
)

// alloc returns n zero bytes, aligned for any word.
func (m *mapped) alloc(n int) []byte {
	n = (n + 7) &^ 7
	if m == nil {
		return make([]byte, n)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > len(m.cur) {
		// Each segment is a quarter of what there is, so that there are few and little is
		// left unused.
		size := max(int64(n), min(max(m.all/4, segmentLeast), segmentMost))
		size = (size + int64(os.Getpagesize()) - 1) &^ (int64(os.Getpagesize()) - 1)
		seg, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return make([]byte, n)
		}
		m.segs, m.cur = append(m.segs, seg), seg
		m.all += size
	}
	b := m.cur[:n:n]
	m.cur = m.cur[n:]
	return b
}

// codes returns n codes, all of them holes.
func (m *mapped) codes(n uint64) []code {
	if n == 0 {
		return nil
	}
	if m == nil {
		return make([]code, n)
	}
	return codesIn(m.alloc(int(n)*8), n)
}

// taken is how many bytes have been taken from the system.
func (m *mapped) taken() int64 {
	if m == nil {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all
}

// close gives everything back. It is idempotent.
func (m *mapped) close() {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.segs {
		_ = unix.Munmap(b) // it was mapped as a whole
	}
	m.segs, m.cur, m.all = nil, nil, 0
}
