package sync

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// arena is memory outside of the heap, which is gone as soon as it is not needed any more. A
// nil arena has no room.
type arena struct {
	mem  []byte
	used atomic.Int64
	heap bool
}

// newArena is memory for what a freeze reads, taken before the freeze: neither the runtime nor
// the kernel has to find any while the database stands still. It returns nil if there is none.
func newArena(size int64) *arena {
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return nil
	}
	return &arena{mem: mem}
}

// newBuffers is memory that is used bit by bit, from the heap where there is no other.
func newBuffers(size int) *arena {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return &arena{mem: make([]byte, size), heap: true}
	}
	return &arena{mem: mem}
}

// rest takes what is left.
func (a *arena) rest() []byte { return a.take(int64(len(a.mem)) - a.used.Load()) }

// take returns n bytes whose content is not defined, or nil.
func (a *arena) take(n int64) []byte {
	if a == nil {
		return nil
	}
	end := a.used.Add(n)
	if end > int64(len(a.mem)) {
		return nil
	}
	return a.mem[end-n : end : end]
}

// free gives the memory back; nothing of it may be used any more.
func (a *arena) free() {
	if a == nil || a.mem == nil {
		return
	}
	if !a.heap {
		_ = unix.Munmap(a.mem) // it was mapped as a whole
	}
	a.mem = nil
}
