package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/fence"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// workerEnv makes this program a worker: the sync engine in a process of its own, so that
// its memory and its processor time are not the benchmark's.
const workerEnv = "DBSUPERVISOR_BENCH_WORKER"

// worker is such a process.
type worker struct {
	cmd *exec.Cmd
	rpc *rpc.Client
}

type pipe struct {
	io.Reader
	io.WriteCloser
}

// startWorker starts one. The caller closes it.
func startWorker(args OpenArgs) (*worker, OpenReply, error) {
	var reply OpenReply
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), workerEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, reply, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, reply, err
	}
	if err := cmd.Start(); err != nil {
		return nil, reply, fmt.Errorf("start worker: %w", err)
	}
	w := &worker{cmd: cmd, rpc: rpc.NewClient(pipe{out, in})}
	if err := w.rpc.Call("Engine.Open", args, &reply); err != nil {
		return nil, reply, errors.Join(fmt.Errorf("open volume and store: %w", err), w.close())
	}
	return w, reply, nil
}

func (w *worker) close() error {
	err := w.rpc.Call("Engine.Close", struct{}{}, &struct{}{})
	_ = w.rpc.Close()
	return errors.Join(err, w.cmd.Wait())
}

func (w *worker) snapshot(a SnapshotArgs) (r SnapshotReply, err error) {
	err = w.rpc.Call("Engine.Snapshot", a, &r)
	return r, err
}

func (w *worker) usage() (u Usage, err error) {
	err = w.rpc.Call("Engine.Usage", struct{}{}, &u)
	return u, err
}

// workIfAsked serves if this process is a worker.
func workIfAsked() (asked bool, err error) {
	if os.Getenv(workerEnv) == "" {
		return false, nil
	}
	e := &Engine{}
	go e.watchMemory()
	s := rpc.NewServer()
	if err := s.Register(e); err != nil {
		return true, err
	}
	s.ServeConn(pipe{os.Stdin, os.Stdout})
	return true, nil
}

// Engine is the sync engine as an agent uses it: a volume, a store, a lease.
type Engine struct {
	share  string
	fs     *fsx.Kept
	store  *volsync.Store
	volume *volsync.Volume
	lease  *lease.Lease
	peak   atomic.Int64
}

// OpenArgs are what an Engine needs.
type OpenArgs struct {
	Share, Local string
	Standby      bool // takes no snapshots
	Tier         string
}

// OpenReply says how change is found.
type OpenReply struct{ Tier, Why string }

// Open makes the cluster on the share if this is no standby, and begins a history.
func (e *Engine) Open(a OpenArgs, r *OpenReply) error {
	ctx := context.Background()
	boot, err := boottime.BootID()
	if err != nil {
		return err
	}
	e.share, e.fs = a.Share, &fsx.Kept{}
	if e.store, err = volsync.OpenStore(volsync.StoreConfig{FS: e.fs, Dir: a.Share}); err != nil {
		return err
	}
	if e.volume, err = volsync.OpenVolume(volsync.VolumeConfig{Dir: a.Local, BootID: boot, Rand: rand.Reader, Tier: a.Tier}); err != nil {
		return err
	}
	if a.Standby {
		return nil
	}
	fc := lease.FileConfig{FS: fsx.OS{}, Share: a.Share, Rand: rand.Reader}
	if _, err := lease.InitFile(ctx, fc, lease.Record{TTL: lease.Duration(time.Minute)}); err != nil {
		return err
	}
	reg, err := lease.OpenFile(ctx, fc)
	if err != nil {
		return err
	}
	// A term so long that no renewal comes between what is counted.
	e.lease, err = lease.New(lease.Config{
		Register: reg, Clock: boottime.Real{}, Rand: rand.Reader, FS: fsx.OS{},
		Self: lease.Holder{Instance: "bench", VolumeID: e.volume.State().ID},
		TTL:  12 * time.Hour, RenewInterval: 4 * time.Hour, OpTimeout: time.Minute, Margin: time.Second,
	})
	if err != nil {
		return err
	}
	if err := e.lease.Refresh(ctx); err != nil {
		return err
	}
	if err := errors.Join(e.lease.Acquire(ctx, nil), e.store.Init(ctx), e.volume.MarkLive(ctx, 1),
		e.volume.Baseline(ctx, e.store, volsync.SnapshotRef{})); err != nil {
		return err
	}
	r.Tier, r.Why = e.volume.Tier()
	return nil
}

// Close gives everything up.
func (e *Engine) Close(struct{}, *struct{}) error {
	var errs []error
	if e.volume != nil {
		errs = append(errs, e.volume.Close())
	}
	if e.lease != nil {
		errs = append(errs, e.lease.Close())
	}
	if e.fs != nil {
		errs = append(errs, e.fs.Close())
	}
	return errors.Join(errs...)
}

// SnapshotArgs describe one snapshot.
type SnapshotArgs struct {
	Group     cgroup.Group // what to freeze; none: nothing writes
	MaxFreeze time.Duration
}

// SnapshotReply is what it cost.
type SnapshotReply struct {
	Unchanged bool
	TooLong   bool // it was not taken: the freeze would have been too long
	Ref       volsync.SnapshotRef
	Freeze    time.Duration
	Took      time.Duration
	Capture   volsync.CaptureStats
	Store     volsync.WriteStats
	Tier      string
}

// Snapshot does what a supervisor does, from the request to the commit.
func (e *Engine) Snapshot(a SnapshotArgs, r *SnapshotReply) error {
	ctx := context.Background()
	began := time.Now()
	defer func() { r.Took = time.Since(began) }()
	r.Tier, _ = e.volume.Tier()
	basis := e.lease.View().Record
	wr := volsync.WriteRequest{Term: basis.Term, Seq: 1, Writer: "bench"}
	if basis.Head != nil {
		wr.Base, wr.Seq = e.volume.BaseTree(), basis.Head.Seq+1
	}
	cr := volsync.CaptureRequest{NoFreeze: a.Group.IsZero(), MaxFreeze: a.MaxFreeze}
	if !a.Group.IsZero() {
		cr.Freezer = &freezer{fence.NewFreezer(fence.FreezerConfig{Group: a.Group, Budget: a.MaxFreeze + time.Second})}
		cr.Pids = func() []int { pids, _ := a.Group.Pids(); return pids }
	}
	c, err := e.volume.Capture(ctx, cr)
	if errors.Is(err, volsync.ErrFreezeTooLong) {
		r.TooLong = true
		return nil
	}
	if err != nil {
		return err
	}
	r.Freeze, r.Capture = c.FreezeFor, c.Stats
	if c.Unchanged() && basis.Head != nil {
		e.volume.Abandon(c)
		r.Unchanged = true
		return nil
	}
	wr.Delta, wr.Blocks, wr.Frozen = c.Delta, c.Blocks, c.Frozen
	tree, stats, err := e.store.Write(ctx, wr)
	if err != nil {
		return err
	}
	if err := e.volume.SyncFS(ctx); err != nil {
		return err
	}
	_, err = e.lease.Commit(ctx, basis, func(rec *lease.Record) {
		rec.Head = &lease.Head{ID: tree.Ref.ID, Manifest: tree.Ref.Manifest, Hash: tree.Ref.Hash,
			Term: tree.Ref.Term, Seq: tree.Ref.Seq, Frozen: tree.Ref.Frozen}
	})
	if err != nil {
		return err
	}
	r.Ref, r.Store = tree.Ref, stats
	return e.volume.Adopt(c, tree)
}

type freezer struct{ f *fence.Freezer }

// Freeze implements volsync.Freezer.
func (f *freezer) Freeze(ctx context.Context) error { return f.f.Freeze(ctx) }

// Thaw implements volsync.Freezer.
func (f *freezer) Thaw() error { return f.f.Thaw() }

// RestoreArgs name a snapshot, and a directory to restore it to; "" is the volume itself.
type RestoreArgs struct {
	Ref volsync.SnapshotRef
	Dir string
}

// Restored is what that took.
type Restored struct {
	Took    time.Duration
	Fetched int64 // bytes of blocks
	How     string
}

// Restore brings a snapshot to the local disk.
func (e *Engine) Restore(a RestoreArgs, r *Restored) error {
	ctx := context.Background()
	began := time.Now()
	defer func() { r.Took = time.Since(began) }()
	if a.Dir != "" {
		return volsync.Restore(ctx, e.store, a.Ref, a.Dir, volsync.RestoreOptions{})
	}
	st, err := e.volume.Hydrate(ctx, e.store, a.Ref, nil)
	r.Fetched, r.How = st.FetchedBytes, st.Copy
	return err
}

// ReadPacks reads the packs that a snapshot refers to, one after another, and throws away
// what it reads.
func (e *Engine) ReadPacks(ref volsync.SnapshotRef, r *Restored) error {
	tree, err := e.store.LoadTree(context.Background(), ref)
	if err != nil {
		return err
	}
	began := time.Now()
	buf := make([]byte, 4*mib)
	for _, p := range tree.Packs {
		f, err := os.Open(filepath.Join(e.share, p.Path))
		if err != nil {
			return err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		r.Fetched += n
	}
	r.Took = time.Since(began)
	return nil
}

// Rehashed is what a rolling re-hash has read.
type Rehashed struct {
	Bytes, Alarms int64
	Took          time.Duration
}

// Rehash proves the tracker by so many bytes, as fast as it can.
func (e *Engine) Rehash(bytes int64, r *Rehashed) error {
	before, began := e.volume.Tracking(), time.Now()
	if err := e.volume.Rehash(context.Background(), bytes); err != nil {
		return err
	}
	after := e.volume.Tracking()
	r.Bytes, r.Alarms, r.Took = after.RehashedBytes-before.RehashedBytes, after.Alarms-before.Alarms, time.Since(began)
	return nil
}

// Usage is what the process has used since it began.
type Usage struct {
	CPU  time.Duration
	Peak int64 // bytes resident, at most, without what maps files
}

// Usage says it.
func (e *Engine) Usage(_ struct{}, u *Usage) error {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return err
	}
	u.CPU = time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	u.Peak = e.peak.Load()
	return nil
}

func (e *Engine) watchMemory() {
	for {
		if n, err := resident(os.Getpid()); err == nil && n > e.peak.Load() {
			e.peak.Store(n)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// resident is what a process has in memory beside the files that it maps.
func resident(pid int) (bytes int64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, err
	}
	s := bufio.NewScanner(strings.NewReader(string(b)))
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) == 3 && (f[0] == "RssAnon:" || f[0] == "RssShmem:") {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, err
			}
			bytes += n << 10
		}
	}
	return bytes, s.Err()
}

// cpuTime is what a process has used so far.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("process %d: unknown form of stat", pid)
	}
	var ticks int64
	for _, k := range []int{11, 12} {
		n, err := strconv.ParseInt(f[k], 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil // USER_HZ is 100 on every Linux
}
