package proxy

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// copySize is what is copied through this process at a time. What fills it is a bulk
	// transfer, and goes on inside of the kernel.
	copySize = 16 << 10
	// pipeSize is what is moved inside of the kernel at a time: what an unprivileged
	// process gets without asking.
	pipeSize = 64 << 10
	// sparePipes is how many pipes are kept for the next bulk transfers.
	sparePipes = 16
)

// relays is what all connections share: buffers and pipes are lent to a connection only
// while data is under way, so that idle ones cost neither memory nor files.
type relays struct {
	buffers sync.Pool

	mu    sync.Mutex
	pipes []pipe

	copied, spliced atomic.Int64 // bytes
}

type pipe struct{ r, w int }

func newRelays() *relays {
	r := &relays{}
	r.buffers.New = func() any { return new([copySize]byte) }
	return r
}

// pipe lends an empty pipe.
func (r *relays) pipe() (pipe, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.pipes); n > 0 {
		p := r.pipes[n-1]
		r.pipes = r.pipes[:n-1]
		return p, nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, fmt.Errorf("make pipe: %w", err)
	}
	return pipe{fds[0], fds[1]}, nil
}

// putBack takes a pipe back; one that is not empty is of no use to others.
func (r *relays) putBack(p pipe, empty bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if empty && len(r.pipes) < sparePipes {
		r.pipes = append(r.pipes, p)
		return
	}
	_ = unix.Close(p.r) // nothing that is still wanted
	_ = unix.Close(p.w)
}

// pump moves data in one direction. What a slow reader has not taken stays in the kernel,
// and then at the sender.
type pump struct {
	r        *relays
	dst      *net.TCPConn
	in, out  syscall.RawConn
	buf      *[copySize]byte
	n        int
	err      error
	readOnce func(fd uintptr) bool // made once: it is called for every message
}

func (r *relays) pump(dst, src *net.TCPConn) (*pump, error) {
	p := &pump{r: r, dst: dst}
	var err error
	if p.in, err = src.SyscallConn(); err != nil {
		return nil, fmt.Errorf("use connection: %w", err)
	}
	if p.out, err = dst.SyscallConn(); err != nil {
		return nil, fmt.Errorf("use connection: %w", err)
	}
	p.readOnce = func(fd uintptr) bool {
		p.buf, _ = r.buffers.Get().(*[copySize]byte)
		for {
			p.n, p.err = unix.Read(int(fd), p.buf[:]) //nolint:gosec // a file descriptor
			if !errors.Is(p.err, unix.EINTR) {
				break
			}
		}
		if errors.Is(p.err, unix.EAGAIN) {
			r.buffers.Put(p.buf)
			return false
		}
		return true
	}
	return p, nil
}

// step waits for data and moves what is there. n is what was read: 0 with a nil error is the
// end.
func (p *pump) step() (n int, err error) {
	if err := p.in.Read(p.readOnce); err != nil {
		return 0, fmt.Errorf("wait for data: %w", err)
	}
	defer p.r.buffers.Put(p.buf)
	if p.err != nil {
		return 0, fmt.Errorf("read: %w", p.err)
	}
	if p.n == 0 {
		return 0, nil
	}
	if _, err := p.dst.Write(p.buf[:p.n]); err != nil {
		return p.n, fmt.Errorf("write: %w", err)
	}
	p.r.copied.Add(int64(p.n))
	return p.n, nil
}

// run moves everything until the source ends (nil) or one of the two fails.
func (p *pump) run() error {
	for {
		n, err := p.step()
		if err != nil || n == 0 {
			return err
		}
		if n == copySize {
			if end, err := p.bulk(); err != nil || end {
				return err
			}
		}
	}
}

// bulk moves data inside of the kernel while there is some. end says that the source has ended.
func (p *pump) bulk() (end bool, err error) {
	pp, err := p.r.pipe()
	if err != nil {
		return false, nil //nolint:nilerr // without a pipe it goes on through this process
	}
	left := 0
	defer func() { p.r.putBack(pp, left == 0) }()
	for {
		rerr := p.in.Read(func(fd uintptr) bool {
			left, err = splice(int(fd), pp.w, pipeSize) //nolint:gosec // a file descriptor
			return true
		})
		switch {
		case rerr != nil:
			return false, fmt.Errorf("wait for data: %w", rerr)
		case errors.Is(err, unix.EAGAIN):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("splice: %w", err)
		case left == 0:
			return true, nil
		}
		for left > 0 {
			var n int
			werr := p.out.Write(func(fd uintptr) bool {
				n, err = splice(pp.r, int(fd), left) //nolint:gosec // a file descriptor
				return !errors.Is(err, unix.EAGAIN)
			})
			if err == nil {
				err = werr
			}
			if err != nil {
				return false, fmt.Errorf("splice: %w", err)
			}
			left -= n
			p.r.spliced.Add(int64(n))
		}
	}
}

// splice returns 0 and EAGAIN rather than wait. The counts are never negative.
func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return max(int(n), 0), err
	}
}
