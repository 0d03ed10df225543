package track

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is a write for io_uring.
type request struct {
	fd    int
	b     []byte
	off   int64
	async bool // by a kernel thread
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	len, rwFlags  uint32
	user          uint64
	rest          [3]uint64
}

type cqe struct {
	user  uint64
	res   int32
	flags uint32
}

type uringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
	resv                                                 [3]uint32
	sq, cq                                               struct {
		head, tail, mask, entries, a, b, c, d uint32
		user                                  uint64
	}
}

// uring is the least that io_uring needs.
type uring struct {
	fd                           int
	p                            uringParams
	ring, sqes                   []byte
	sqTail, cqHead, cqTail, mask *uint32
}

func newUring() (*uring, error) {
	r := &uring{}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 32, uintptr(unsafe.Pointer(&r.p)), 0)
	if errno != 0 {
		return nil, errno
	}
	r.fd = int(fd)
	const offRing, offSqes = 0, 0x10000000
	size := max(int(r.p.sq.c)+int(r.p.sqEntries)*4, int(r.p.cq.b)+int(r.p.cqEntries)*16) + 4096
	var err error
	if r.ring, err = unix.Mmap(r.fd, offRing, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, err
	}
	if r.sqes, err = unix.Mmap(r.fd, offSqes, int(r.p.sqEntries)*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return nil, err
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.ring[off])) }
	r.sqTail, r.mask = word(r.p.sq.tail), word(r.p.sq.mask)
	r.cqHead, r.cqTail = word(r.p.cq.head), word(r.p.cq.tail)
	return r, nil
}

func (r *uring) writeAll(batch []request) error {
	for n, q := range batch {
		tail := atomic.LoadUint32(r.sqTail)
		i := tail & *r.mask
		e := (*sqe)(unsafe.Pointer(&r.sqes[i*64]))
		*e = sqe{opcode: 23, fd: int32(q.fd), off: uint64(q.off), addr: uint64(uintptr(unsafe.Pointer(&q.b[0]))), len: uint32(len(q.b)), user: uint64(n)}
		if q.async {
			e.flags = 1 << 4 // IOSQE_ASYNC
		}
		*(*uint32)(unsafe.Pointer(&r.ring[r.p.sq.c+i*4])) = i
		atomic.StoreUint32(r.sqTail, tail+1)
	}
	if len(batch) == 0 {
		return nil
	}
	for submitted := 0; submitted < len(batch); {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(len(batch)-submitted), uintptr(len(batch)), 1, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return errno
		}
		if errno == 0 {
			submitted += int(n)
		}
	}
	for done := 0; done < len(batch); {
		head := atomic.LoadUint32(r.cqHead)
		if head == atomic.LoadUint32(r.cqTail) {
			_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 1, 1, 0, 0)
			if errno != 0 && errno != unix.EINTR {
				return errno
			}
			continue
		}
		c := (*cqe)(unsafe.Pointer(&r.ring[r.p.cq.b+(head&(r.p.cqEntries-1))*16]))
		if q := batch[c.user]; int(c.res) != len(q.b) {
			return fmt.Errorf("io_uring write of %d at %d: %d", len(q.b), q.off, c.res)
		}
		atomic.StoreUint32(r.cqHead, head+1)
		done++
	}
	runtime.KeepAlive(batch)
	return nil
}

// aioWrite writes as libaio does.
func aioWrite(context *uintptr, fd int, b []byte, off int64) error {
	if *context == 0 {
		if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(context)), 0); errno != 0 {
			return errno
		}
	}
	ctx := *context
	cb := struct {
		data          uint64
		key, rwFlags  uint32
		opcode, prio  uint16
		fd            uint32
		buf, len      uint64
		off           int64
		reserved      uint64
		flags, eventF uint32
	}{opcode: 1, fd: uint32(fd), buf: uint64(uintptr(unsafe.Pointer(&b[0]))), len: uint64(len(b)), off: off}
	p := unsafe.Pointer(&cb)
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, 1, uintptr(unsafe.Pointer(&p))); errno != 0 {
		return errno
	}
	var event struct {
		data, obj uint64
		res, res2 int64
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ctx, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		if n == 1 {
			break
		}
	}
	runtime.KeepAlive(b)
	runtime.KeepAlive(&cb)
	if event.res < 0 {
		return unix.Errno(-event.res)
	}
	if event.res != int64(len(b)) {
		return fmt.Errorf("asynchronous write of %d at %d: %d", len(b), off, event.res)
	}
	return nil
}

func ioctlMoveExt(fd, donor int, block, blocks uint64) error {
	arg := struct {
		reserved, donor          uint32
		from, to, blocks, result uint64
	}{donor: uint32(donor), from: block, to: block, blocks: blocks}
	const moveExt = 3<<30 | 40<<16 | 'f'<<8 | 15
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), moveExt, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return errno
	}
	return nil
}
