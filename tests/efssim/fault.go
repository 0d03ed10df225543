package efssim

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Fault is what happens to operations from now on. Faults add up: of those that match an
// operation each delays it, the first that hangs holds it, the first with an error number
// fails it.
type Fault struct {
	// Ops are the kinds that it happens to; empty means all.
	Ops []Op `json:"ops,omitempty"`
	// Under restricts it to a path and what is below, relative to the mount point.
	Under string `json:"under,omitempty"`
	// Times is how many operations it happens to; 0 means until Heal.
	Times int `json:"times,omitempty"`
	// Hang holds operations until Heal. As on a hard NFS mount only SIGKILL frees their
	// callers. An operation that is held takes effect when it is let go.
	Hang bool `json:"hang,omitempty"`
	// Errno fails operations.
	Errno syscall.Errno `json:"errno,omitempty"`
	// After lets the operation take effect before it hangs or fails: the lost reply.
	After bool `json:"after,omitempty"`
	// Delay is added to each operation.
	Delay time.Duration `json:"delay,omitempty"`
	// Rate limits reads and writes, in bytes a second for all of them together.
	Rate int64 `json:"rate,omitempty"`
	// Stale shows listings as they were when the fault began.
	Stale bool `json:"stale,omitempty"`
	// Room lets so many written bytes pass before the fault begins.
	Room int64 `json:"room,omitempty"`
}

// Stats counts what reached the file system. A held or failed operation counts.
type Stats struct {
	Ops     map[Op]uint64 `json:"ops"`
	Read    int64         `json:"read"`    // bytes asked for
	Written int64         `json:"written"` // bytes
	Held    int           `json:"held"`    // operations that hang right now
	// NFS is what an NFSv4.1 client would have sent for all that.
	NFS Wire `json:"nfs"`
}

// Wire is what goes over the wire.
type Wire struct {
	Ops     map[Proc]uint64 `json:"ops"`
	Read    int64           `json:"read"`    // bytes
	Written int64           `json:"written"` // bytes
}

// Total is the number of operations.
func (w Wire) Total() uint64 {
	var n uint64
	for _, v := range w.Ops {
		n += v
	}
	return n
}

// Since is what came after an earlier count.
func (w Wire) Since(earlier Wire) Wire {
	d := Wire{Ops: map[Proc]uint64{}, Read: w.Read - earlier.Read, Written: w.Written - earlier.Written}
	for p, n := range w.Ops {
		if n > earlier.Ops[p] {
			d.Ops[p] = n - earlier.Ops[p]
		}
	}
	return d
}

// String lists the operations by kind.
func (w Wire) String() string {
	var b strings.Builder
	for _, p := range slices.Sorted(maps.Keys(w.Ops)) {
		fmt.Fprintf(&b, "%s %d, ", p, w.Ops[p])
	}
	fmt.Fprintf(&b, "%d in all; %d bytes read, %d written", w.Total(), w.Read, w.Written)
	return b.String()
}

// Total is the number of operations.
func (s Stats) Total() uint64 {
	var n uint64
	for _, v := range s.Ops {
		n += v
	}
	return n
}

// active is a fault that was injected.
type active struct {
	Fault
	left int                        // of Times
	room int64                      // left of Room
	next time.Time                  // when Rate lets the next bytes pass
	gone chan struct{}              // closed by heal
	old  map[string][]fuse.DirEntry // Stale: listings by path
}

// faults decides about every operation.
type faults struct {
	backing string

	mu     sync.Mutex
	list   []*active
	stats  Stats
	closed chan struct{}
	isShut bool
}

func newFaults(backing string) *faults {
	return &faults{backing: backing, stats: Stats{Ops: map[Op]uint64{}}, closed: make(chan struct{})}
}

func (f *faults) inject(ft Fault) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	ft.Under = strings.Trim(ft.Under, "/")
	a := &active{Fault: ft, left: ft.Times, room: ft.Room, gone: make(chan struct{})}
	if ft.Stale {
		var err error
		if a.old, err = listings(f.backing, ft.Under); err != nil {
			return fmt.Errorf("inject stale listings: %w", err)
		}
	}
	f.list = append(f.list, a)
	return nil
}

// listings are those of all directories at and below a path.
func listings(backing, under string) (map[string][]fuse.DirEntry, error) {
	out := map[string][]fuse.DirEntry{}
	err := filepath.WalkDir(filepath.Join(backing, under), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(backing, path)
		if err != nil {
			return err
		}
		if rel == "." {
			rel = ""
		}
		if d.IsDir() {
			out[rel] = []fuse.DirEntry{}
		}
		if path == filepath.Join(backing, under) {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := fuse.DirEntry{Name: d.Name(), Mode: syscall.S_IFREG}
		if d.IsDir() {
			e.Mode = syscall.S_IFDIR
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			e.Ino, e.Mode = st.Ino, st.Mode
		}
		parent := filepath.Dir(rel)
		if parent == "." {
			parent = ""
		}
		e.Off = uint64(len(out[parent]) + 1)
		out[parent] = append(out[parent], e)
		return nil
	})
	return out, err
}

func (f *faults) heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.list {
		close(a.gone)
	}
	f.list = nil
}

// shut ends all operations that are held, for good.
func (f *faults) shut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.isShut {
		f.isShut = true
		close(f.closed)
	}
}

func (f *faults) snapshot() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	s.Ops = make(map[Op]uint64, len(f.stats.Ops))
	for k, v := range f.stats.Ops {
		s.Ops[k] = v
	}
	return s
}

// verdict is what happens to one operation.
type verdict struct {
	hang  *active
	errno syscall.Errno
	after bool // both take place after the effect
	delay time.Duration
}

// judge counts an operation that moves size bytes at path and says what happens to it.
func (f *faults) judge(op Op, path string, size int) verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stats.Ops[op]++
	switch op {
	case OpRead:
		f.stats.Read += int64(size)
	case OpWrite:
		f.stats.Written += int64(size)
	}
	var v verdict
	for _, a := range f.list {
		if len(a.Ops) > 0 && !slices.Contains(a.Ops, op) {
			continue
		}
		if a.Under != "" && path != a.Under && !strings.HasPrefix(path, a.Under+"/") {
			continue
		}
		if op == OpWrite && a.room > 0 {
			if a.room -= int64(size); a.room >= 0 {
				continue
			}
			a.room = 0
		} else if a.room > 0 {
			continue
		}
		if a.Times > 0 {
			if a.left == 0 {
				continue
			}
			a.left--
		}
		v.delay += a.Delay
		if a.Rate > 0 && size > 0 {
			now := time.Now()
			if a.next.Before(now) {
				a.next = now
			}
			a.next = a.next.Add(time.Duration(float64(size) / float64(a.Rate) * float64(time.Second)))
			v.delay += a.next.Sub(now)
		}
		if v.hang == nil && v.errno == 0 && (a.Hang || a.Errno != 0) {
			v.after = a.After
			v.errno = a.Errno
			if a.Hang {
				v.hang = a
			}
		}
	}
	return v
}

// run does an operation under the faults. The caller is the thread that asked.
func (f *faults) run(op Op, path string, size int, caller uint32, effect func() fuse.Status) fuse.Status {
	v := f.judge(op, path, size)
	if st := f.pause(v.delay); !st.Ok() {
		return st
	}
	if v.after {
		if st := effect(); !st.Ok() {
			return st
		}
	}
	if v.hang != nil {
		if st := f.hold(v.hang, caller); !st.Ok() {
			return st
		}
	}
	if v.errno != 0 {
		return fuse.Status(v.errno)
	}
	if v.after {
		return fuse.OK
	}
	return effect()
}

// pause waits, but not beyond the end of the file system.
func (f *faults) pause(d time.Duration) fuse.Status {
	if d <= 0 {
		return fuse.OK
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return fuse.OK
	case <-f.closed:
		return fuse.Status(syscall.ENOTCONN)
	}
}

// listing is what a directory shows: nil without a fault, the truth.
func (f *faults) listing(path string) []fuse.DirEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.list {
		if l, ok := a.old[path]; ok {
			return l
		}
	}
	return nil
}

// hold blocks until the fault is healed. Signals other than SIGKILL make no difference:
// the Go runtime sends itself some all the time, and a hard mount does not answer them.
func (f *faults) hold(a *active, caller uint32) fuse.Status {
	f.mu.Lock()
	f.stats.Held++
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.stats.Held--
		f.mu.Unlock()
	}()
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-a.gone:
			return fuse.OK
		case <-f.closed:
			return fuse.Status(syscall.ENOTCONN)
		case <-t.C:
			if dying(caller) {
				return fuse.EINTR
			}
		}
	}
}

// dying says whether a thread has a SIGKILL pending or is on its way out (it closes its
// files then, which asks us again). The kernel does not let it go before we answer.
func dying(tid uint32) bool {
	if tid == 0 { // the kernel itself
		return false
	}
	dir := "/proc/" + strconv.FormatUint(uint64(tid), 10)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return os.IsNotExist(err)
	}
	for line := range bytes.Lines(status) {
		for _, key := range []string{"SigPnd:", "ShdPnd:"} {
			if rest, ok := bytes.CutPrefix(line, []byte(key)); ok {
				set, err := strconv.ParseUint(string(bytes.TrimSpace(rest)), 16, 64)
				if err == nil && set&(1<<(uint(syscall.SIGKILL)-1)) != 0 {
					return true
				}
			}
		}
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return os.IsNotExist(err)
	}
	// pid (name) state ppid pgrp session tty tpgid flags; the name may have blanks.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 7 {
		return false
	}
	const exiting = 0x4 // PF_EXITING
	flags, err := strconv.ParseUint(string(fields[6]), 10, 64)
	return err == nil && flags&exiting != 0
}
