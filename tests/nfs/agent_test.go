package nfs_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	mrand "math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/leasetest"
	volsync "dbsupervisor/internal/sync"
	"dbsupervisor/tests/efssim/opscript"
)

const (
	mountPoint = "/mnt/share"
	clusterDir = mountPoint + "/cluster"
	diskDir    = "/mnt/disk"
	contenders = 2 // in each guest
)

// serveHost is a guest's whole life: it calls the host and does what it is told.
func serveHost(addr string) error {
	if err := os.MkdirAll(diskDir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("/dev/vda", diskDir, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	c, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return err
	}
	srv := rpc.NewServer()
	if err := srv.RegisterName("Agent", &Agent{}); err != nil {
		return err
	}
	srv.ServeConn(c)
	return nil
}

// Agent is what the host can ask of a guest: the code under test, on a real mount.
type Agent struct {
	name  string
	reg   *leasetest.Recorder
	file  *lease.FileRegister
	lease *lease.Lease
	fight []*fighter
	stop  context.CancelFunc // of the renewals
	store *volsync.Store
	vol   *volsync.Volume

	script *opscript.Script
	steps  []opscript.Step

	mu sync.Mutex
}

// None is an argument or a result that says nothing.
type None struct{}

// Mount mounts the share as docs say. Options says what the host knows: address and port.
func (a *Agent) Mount(options string, _ *None) error {
	if err := os.MkdirAll(mountPoint, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("10.0.2.2:/share", mountPoint, "nfs4", 0, options); err != nil {
		return fmt.Errorf("mount share: %w", err)
	}
	return nil
}

// Remount makes the client forget everything.
func (a *Agent) Remount(options string, _ *None) error {
	if err := unix.Unmount(mountPoint, 0); err != nil {
		return fmt.Errorf("unmount share: %w", err)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		return err
	}
	return a.Mount(options, nil)
}

// Clock is the guest's clock.
func (a *Agent) Clock(_ None, now *boottime.Instant) error {
	*now = boottime.Real{}.Now()
	return nil
}

// Command is a program to run.
type Command struct {
	Args []string
	Env  []string
}

// Exec runs a program, whose output is the guest's, and returns its exit status.
func (a *Agent) Exec(c Command, status *int) error {
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		*status, err = exit.ExitCode(), nil
	}
	return err
}

// Init makes the cluster and the store.
func (a *Agent) Init(ttl time.Duration, clusterID *string) error {
	ctx := context.Background()
	if err := os.MkdirAll(clusterDir, 0o700); err != nil {
		return err
	}
	cfg := lease.FileConfig{FS: fsx.OS{}, Share: clusterDir, Rand: rand.Reader}
	id, err := lease.InitFile(ctx, cfg, lease.Record{TTL: lease.Duration(ttl)})
	if err != nil {
		return err
	}
	*clusterID = id
	s, err := volsync.OpenStore(volsync.StoreConfig{Dir: clusterDir})
	if err != nil {
		return err
	}
	return s.Init(ctx)
}

// Member says as whom a guest opens the cluster.
type Member struct {
	Name, ClusterID string
	TTL             time.Duration
}

// Open opens the register, the store and a volume on the guest's own disk.
func (a *Agent) Open(m Member, _ *None) error {
	a.name = m.Name
	var err error
	if a.reg, a.file, err = openRegister(m); err != nil {
		return err
	}
	if a.lease, err = newLease(m, a.reg, m.TTL); err != nil {
		return err
	}
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr})
	if a.store, err = volsync.OpenStore(volsync.StoreConfig{Dir: clusterDir, Log: log}); err != nil {
		return err
	}
	a.vol, err = volsync.OpenVolume(volsync.VolumeConfig{
		Dir: filepath.Join(diskDir, "instance"), BootID: "boot", Rand: rand.Reader, Workers: 2, Log: log,
	})
	return err
}

func openRegister(m Member) (*leasetest.Recorder, *lease.FileRegister, error) {
	cfg := lease.FileConfig{FS: fsx.OS{}, Share: clusterDir, ClusterID: m.ClusterID, Rand: rand.Reader}
	file, err := lease.OpenFile(context.Background(), cfg)
	if err != nil {
		return nil, nil, err
	}
	return &leasetest.Recorder{Register: file, Clock: boottime.Real{}}, file, nil
}

func newLease(m Member, reg lease.Register, ttl time.Duration) (*lease.Lease, error) {
	return lease.New(lease.Config{
		Register: reg, Clock: boottime.Real{}, Rand: rand.Reader, FS: fsx.OS{},
		Self: lease.Holder{Instance: m.Name, VolumeID: "volume-" + m.Name},
		TTL:  ttl, RenewInterval: ttl / 5, OpTimeout: ttl / 5, Margin: ttl / 10,
		SeenFile: filepath.Join(diskDir, "seen-"+m.Name), RunFile: "/run/lease-" + m.Name, BootID: "boot",
	})
}

// fighter is one who wants the lease.
type fighter struct {
	file  *lease.FileRegister
	reg   *leasetest.Recorder
	lease *lease.Lease
}

// Report is what a guest's fighters did in a round, one entry for each.
type Report struct {
	Calls  [][]leasetest.Call
	Terms  [][]uint64 // won
	Errors []string   // operations that certainly had no effect
}

// OpenFighters opens as many handles as there are contenders.
func (a *Agent) OpenFighters(m Member, _ *None) error {
	a.fight = nil
	for i := range contenders {
		who := m
		who.Name = fmt.Sprintf("%s-%d", m.Name, i)
		reg, file, err := openRegister(who)
		if err != nil {
			return err
		}
		l, err := newLease(who, reg, m.TTL)
		if err != nil {
			return err
		}
		a.fight = append(a.fight, &fighter{file, reg, l})
	}
	return nil
}

// Fight lets each fighter try to get the lease, use it for a moment and give it back.
func (a *Agent) Fight(tries int, rep *Report) error {
	rep.Calls, rep.Terms = make([][]leasetest.Call, len(a.fight)), make([][]uint64, len(a.fight))
	errs := make([]error, len(a.fight))
	var wg sync.WaitGroup
	for i, f := range a.fight {
		wg.Go(func() {
			for range tries {
				term, err := f.try()
				if errs[i] = err; err != nil {
					break
				}
				if term > 0 {
					rep.Terms[i] = append(rep.Terms[i], term)
				}
			}
			rep.Calls[i] = f.reg.Take()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// try returns the term that it won, or 0.
func (f *fighter) try() (uint64, error) {
	ctx := context.Background()
	if err := f.lease.Refresh(ctx); err != nil {
		return 0, err
	}
	switch err := f.lease.Acquire(ctx, nil); {
	case errors.Is(err, lease.ErrConflict), errors.Is(err, lease.ErrNotYet):
		return 0, nil
	case err != nil:
		return 0, err
	}
	v := f.lease.View()
	if !v.Holding {
		return 0, fmt.Errorf("acquired but not holding: %+v", v)
	}
	if _, err := f.lease.Commit(ctx, v.Record, func(*lease.Record) {}); err != nil {
		return 0, err
	}
	if err := f.lease.Release(ctx, ""); err != nil {
		return 0, err
	}
	return v.Record.Term, nil
}

// Race lets each fighter look at the register and swap what it saw, again and again. Errors
// are told and are no reason to stop.
func (a *Agent) Race(tries int, rep *Report) error {
	rep.Calls, rep.Terms = make([][]leasetest.Call, len(a.fight)), make([][]uint64, len(a.fight))
	ctx := context.Background()
	var wg sync.WaitGroup
	for i, f := range a.fight {
		wg.Go(func() {
			for range tries {
				rec, err := f.reg.Load(ctx)
				if err == nil {
					_, err = f.reg.CompareAndSwap(ctx, rec, rec)
				}
				if err != nil && !errors.Is(err, lease.ErrConflict) && !errors.Is(err, lease.ErrUnknown) {
					a.mu.Lock()
					rep.Errors = append(rep.Errors, err.Error())
					a.mu.Unlock()
				}
			}
			rep.Calls[i] = f.reg.Take()
		})
	}
	wg.Wait()
	return nil
}

// Duel is a swap that both guests do on the same record, at about the same time.
type Duel struct{ Prev lease.Record }

// Shot is how it ended.
type Shot struct {
	Record  lease.Record
	Outcome string
}

// Swap does one bare compare-and-swap.
func (a *Agent) Swap(d Duel, s *Shot) error {
	rec, err := a.file.CompareAndSwap(context.Background(), d.Prev, d.Prev)
	s.Record, s.Outcome = rec, "ok"
	switch {
	case errors.Is(err, lease.ErrConflict):
		s.Outcome = "conflict"
	case errors.Is(err, lease.ErrUnknown):
		s.Outcome = "unknown"
	case err != nil:
		return err
	}
	return nil
}

// register is the guest's own, or that of its first fighter.
func (a *Agent) register() *lease.FileRegister {
	if a.file == nil {
		return a.fight[0].file
	}
	return a.file
}

// Load looks at the register.
func (a *Agent) Load(_ None, rec *lease.Record) error {
	var err error
	*rec, err = a.register().Load(context.Background())
	return err
}

// History returns the newest records.
func (a *Agent) History(_ None, recs *[]lease.Record) error {
	var err error
	*recs, err = a.register().History(context.Background())
	return err
}

// Acquire takes the lease, waiting for its end where somebody else holds it, and renews it
// from then on.
func (a *Agent) Acquire(limit time.Duration, term *uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	for {
		if err := a.lease.Refresh(ctx); err != nil {
			if ctx.Err() != nil {
				return err
			}
			continue
		}
		err := a.lease.Acquire(ctx, nil)
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return err
		}
		if !errors.Is(err, lease.ErrNotYet) && !errors.Is(err, lease.ErrConflict) {
			return err
		}
		if at := a.lease.View().ChallengeAt; at > 0 {
			// The version may move while this waits.
			if err := (boottime.Real{}).WaitUntil(ctx, min(at, boottime.Real{}.Now().Add(500*time.Millisecond))); err != nil {
				return err
			}
		}
	}
	*term = a.lease.View().Record.Term
	rctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	go func() {
		if err := a.lease.Run(rctx); err != nil && rctx.Err() == nil {
			fmt.Println("lease ends:", err)
		}
	}()
	return nil
}

// Release gives the lease up.
func (a *Agent) Release(_ None, _ *None) error {
	a.stop()
	return a.lease.Release(context.Background(), "")
}

// View says whether the guest holds the lease.
func (a *Agent) View(_ None, holding *bool) error {
	*holding = a.lease.View().Holding
	return nil
}

// Fill is a change of the volume.
type Fill struct {
	Seed        byte
	Files, Size int
}

// Fill writes files that can't be compressed, here and there in a directory tree.
func (a *Agent) Fill(f Fill, _ *None) error {
	random := mrand.NewChaCha8([32]byte{f.Seed})
	data := make([]byte, f.Size)
	for i := range f.Files {
		if _, err := random.Read(data); err != nil {
			return err
		}
		name := filepath.Join(a.vol.Path(), fmt.Sprintf("dir-%d", i%3), fmt.Sprintf("file-%d-%d", f.Seed, i))
		if err := os.MkdirAll(filepath.Dir(name), 0o750); err != nil {
			return err
		}
		if err := os.WriteFile(name, data, 0o640); err != nil {
			return err
		}
	}
	return nil
}

// Live begins to work on the volume: a database runs on it from now on.
func (a *Agent) Live(_ None, _ *None) error {
	ctx := context.Background()
	rec := a.lease.View().Record
	if err := a.vol.MarkLive(ctx, rec.Term); err != nil {
		return err
	}
	return a.vol.Baseline(ctx, a.store, refOf(rec.Head))
}

func refOf(h *lease.Head) volsync.SnapshotRef {
	if h == nil {
		return volsync.SnapshotRef{}
	}
	return volsync.SnapshotRef{ID: h.ID, Manifest: h.Manifest, Hash: h.Hash, Term: h.Term, Seq: h.Seq, Frozen: h.Frozen}
}

// Publish captures the volume, ships it and makes it the head, as a supervisor does.
func (a *Agent) Publish(_ None, ref *volsync.SnapshotRef) error {
	ctx := context.Background()
	basis := a.lease.View().Record
	req := volsync.WriteRequest{Term: basis.Term, Seq: 1, Writer: a.name}
	if basis.Head != nil {
		req.Base, req.Seq = a.vol.BaseTree(), basis.Head.Seq+1
	}
	c, err := a.vol.Capture(ctx, volsync.CaptureRequest{NoFreeze: true})
	if err != nil {
		return err
	}
	req.Delta, req.Blocks, req.Frozen = c.Delta, c.Blocks, c.Frozen
	tree, _, err := a.store.Write(ctx, req)
	if err != nil {
		a.vol.Abandon(c)
		return err
	}
	if _, err := a.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.Head = &lease.Head{ID: tree.Ref.ID, Manifest: tree.Ref.Manifest, Hash: tree.Ref.Hash,
			Term: tree.Ref.Term, Seq: tree.Ref.Seq, Frozen: tree.Ref.Frozen}
	}); err != nil {
		a.vol.Abandon(c)
		return err
	}
	*ref = tree.Ref
	return a.vol.Adopt(c, tree)
}

// Follow brings a volume on which nothing runs to the head.
func (a *Agent) Follow(_ None, ref *volsync.SnapshotRef) error {
	ctx := context.Background()
	rec, err := a.file.Load(ctx)
	if err != nil {
		return err
	}
	if rec.Head == nil {
		return errors.New("there is no head")
	}
	*ref = refOf(rec.Head)
	_, err = a.vol.Hydrate(ctx, a.store, *ref, nil)
	return err
}

// Digest is everything about the volume's tree in one line for each name.
func (a *Agent) Digest(_ None, lines *[]string) error {
	root := a.vol.Path()
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %s %d", strings.TrimPrefix(p, root), st.Mode(), st.ModTime().UnixNano())
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x", len(data), sha256.Sum256(data))
		}
		*lines = append(*lines, line)
		return nil
	})
}

// Verdict is what a look at the whole store finds.
type Verdict struct {
	Snapshots, Packs int
	Problems         []string
}

// Verify checks every snapshot of the store.
func (a *Agent) Verify(_ None, v *Verdict) error {
	ctx := context.Background()
	rec, err := a.file.Load(ctx)
	if err != nil {
		return err
	}
	list, err := a.store.List(ctx, refOf(rec.Head), volsync.CatalogRef{Name: rec.Catalog, Hash: rec.CatalogHash})
	if err != nil {
		return err
	}
	rep, err := a.store.Verify(ctx, list, nil)
	if err != nil {
		return err
	}
	v.Snapshots, v.Packs = rep.Snapshots, rep.Packs
	for _, p := range rep.Problems {
		v.Problems = append(v.Problems, fmt.Sprintf("%+v", p))
	}
	return nil
}

// Clean condemns what nothing refers to and unlinks it; it returns how many files went.
func (a *Agent) Clean(_ None, removed *int) error {
	ctx := context.Background()
	basis := a.lease.View().Record
	now := time.Now()
	cat, _, err := a.store.Condemn(ctx, refOf(basis.Head), volsync.CatalogRef{Name: basis.Catalog, Hash: basis.CatalogHash},
		volsync.Policy{All: 24 * time.Hour}, now, basis.Term)
	if err != nil {
		return err
	}
	if _, err := a.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.GCSeq++
		r.Catalog, r.CatalogHash = cat.Name, cat.Hash
	}); err != nil {
		return err
	}
	stats, err := a.store.Sweep(ctx, cat)
	*removed = stats.Removed
	return err
}

// Named is a step of the script.
type Named struct {
	Name string
	Cold bool
}

// StepNames are the steps of the script whose operations are counted.
func (a *Agent) StepNames(_ None, steps *[]Named) error {
	share := filepath.Join(mountPoint, "script")
	if err := os.Mkdir(share, 0o700); err != nil {
		return err
	}
	a.script = opscript.New(share, diskDir)
	a.steps = a.script.Steps()
	for _, s := range a.steps {
		*steps = append(*steps, Named{s.Name, s.Cold})
	}
	return nil
}

// Step does one of them.
func (a *Agent) Step(i int, _ *None) error { return a.steps[i].Run(context.Background()) }

// Mountstats returns what the client counted for the share.
func (a *Agent) Mountstats(_ None, counts *map[string]int) error {
	data, err := os.ReadFile("/proc/self/mountstats")
	if err != nil {
		return err
	}
	*counts = parseMountstats(data, mountPoint)
	return nil
}

// parseMountstats reads the lines "OP: operations transmissions ..." of one mount.
func parseMountstats(data []byte, mount string) map[string]int {
	counts := map[string]int{}
	ours, ops := false, false
	for line := range bytes.Lines(data) {
		s := strings.TrimSpace(string(line))
		switch {
		case strings.HasPrefix(s, "device "):
			ours, ops = strings.Contains(s, " mounted on "+mount+" "), false
		case s == "per-op statistics":
			ops = true
		case ours && ops:
			var n int
			name, rest, ok := strings.Cut(s, ":")
			if _, err := fmt.Sscan(rest, &n); ok && err == nil && n > 0 {
				counts[name] = n
			}
		}
	}
	return counts
}
