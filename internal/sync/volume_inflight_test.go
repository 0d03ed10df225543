package sync

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/track"
)

// flyer keeps direct writes to a file under way, as libaio does.
//
//	fly   Path, N: seed; goes on until land
//	land  returns when all have arrived
type flyer struct {
	stop, done chan struct{}
	err        error
}

const (
	flyerDepth  = 16
	flyerBlocks = 256
)

type aioBlock struct {
	data         uint64
	key, rwFlags uint32
	opcode, prio uint16
	fd           uint32
	buf, len     uint64
	off          int64
	_            [2]uint64
}

func (f *flyer) fly(op volOp) error {
	fd, err := unix.Open(op.Path, unix.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, flyerDepth*BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	var ring uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, flyerDepth, uintptr(unsafe.Pointer(&ring)), 0); errno != 0 {
		return errors.Join(errno, unix.Munmap(mem), unix.Close(fd))
	}
	f.stop, f.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(f.done)
		f.err = f.run(ring, fd, mem, rand.New(rand.NewPCG(uint64(op.N), 5)))
		_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, ring, 0, 0)
		f.err = errors.Join(f.err, unix.Munmap(mem), unix.Close(fd))
	}()
	return nil
}

func (f *flyer) run(ring uintptr, fd int, mem []byte, rnd *rand.Rand) error {
	var cbs [flyerDepth]aioBlock
	var free []int
	for i := range cbs {
		free = append(free, i)
	}
	reap := func() error {
		var events [flyerDepth]struct {
			data, obj uint64
			res, res2 int64
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ring, 1, flyerDepth, uintptr(unsafe.Pointer(&events)), 0, 0)
		if errno == unix.EINTR {
			return nil
		}
		if errno != 0 {
			return errno
		}
		for _, e := range events[:n] {
			if e.res != BlockSize {
				return fmt.Errorf("asynchronous write: %d", e.res)
			}
			free = append(free, int(e.data))
		}
		return nil
	}
	for {
		select {
		case <-f.stop:
			for len(free) < flyerDepth {
				if err := reap(); err != nil {
					return err
				}
			}
			return nil
		default:
		}
		if len(free) == 0 {
			if err := reap(); err != nil {
				return err
			}
			continue
		}
		i := free[len(free)-1]
		free = free[:len(free)-1]
		b := mem[i*BlockSize : (i+1)*BlockSize]
		for k := 0; k < len(b); k += 8 {
			*(*uint64)(unsafe.Pointer(&b[k])) = rnd.Uint64() | 1
		}
		cbs[i] = aioBlock{data: uint64(i), opcode: 1, fd: uint32(fd), buf: uint64(uintptr(unsafe.Pointer(&b[0]))), len: BlockSize, off: rnd.Int64N(flyerBlocks) * BlockSize}
		p := unsafe.Pointer(&cbs[i])
		if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ring, 1, uintptr(unsafe.Pointer(&p))); errno != 0 {
			return errno
		}
		runtime.KeepAlive(&cbs)
	}
}

func (f *flyer) land() error {
	if f.stop == nil {
		return nil
	}
	close(f.stop)
	<-f.done
	f.stop = nil
	return f.err
}

// stopFreezer stops a process for real: what it has submitted goes on to arrive.
type stopFreezer struct {
	pid int
}

func (f *stopFreezer) Freeze(ctx context.Context) error {
	if err := unix.Kill(f.pid, unix.SIGSTOP); err != nil {
		return err
	}
	for ctx.Err() == nil {
		all := true
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", f.pid))
		if err != nil {
			return err
		}
		for _, task := range tasks {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", f.pid, task.Name()))
			all = all && (err != nil || strings.HasPrefix(string(b[strings.LastIndexByte(string(b), ')')+1:]), " T"))
		}
		if all {
			return nil
		}
		runtime.Gosched()
	}
	return ctx.Err()
}

func (f *stopFreezer) Thaw() error { return unix.Kill(f.pid, unix.SIGCONT) }

// TestTrackedInFlight: direct writes that were submitted before a freeze and arrive in it, or
// after, move no time and are in the next snapshot.
func TestTrackedInFlight(t *testing.T) {
	volKernel(t, func(t *testing.T, temp func() string) {
		rig, dir, hand := newVolRig(t), temp(), newVolOther(t)
		last := ""
		rig.temp = func() string { volOK(t, os.RemoveAll(last)); last = temp(); return last }
		v := rig.open(dir, func(c *VolumeConfig) { c.Tier = TierTracked })
		t.Cleanup(func() { _ = track.Discard(filepath.Join(pinRoot, pinName(dir))) })
		volOK(t, v.MarkLive(t.Context(), 1))
		volOK(t, v.Baseline(t.Context(), rig.store, SnapshotRef{}))
		p := filepath.Join(v.Path(), "f")
		volOK(t, hand.do(volOp{Do: "write", Path: p, Data: volData(1, flyerBlocks*BlockSize)}))
		fr := &stopFreezer{hand.pid}
		var late uint64
		for n := range 15 {
			volOK(t, hand.do(volOp{Do: "fly", Path: p, N: int64(n)}))
			rig.snapshot(v, CaptureRequest{Freezer: fr})
			volOK(t, hand.do(volOp{Do: "land"}))
			c, ref := rig.snapshot(v, CaptureRequest{Freezer: fr})
			late += c.Blocks.Blocks()
			volSame(t, fmt.Sprint("round ", n), volDescribe(t, v.Path()), rig.restored(ref))
		}
		if late == 0 {
			t.Fatal("nothing was written after the freezes")
		}
	})
}
