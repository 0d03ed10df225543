// Package opscript is a fixed sequence of what dbsupervisor does on its share: the same code
// runs over the simulated share and over a real NFSv4.1 mount, so that what the one counts can
// be compared with what the other sends.
package opscript

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	volsync "dbsupervisor/internal/sync"
)

// Step is one part of the script. Steps run once, in their order.
type Step struct {
	Name string
	// Cold asks that the client forgets what it has cached before the step: another
	// instance, or this one later.
	Cold bool
	Run  func(ctx context.Context) error
}

// Files and FileSize are the volume of the first snapshot, Changed how many blocks of 8 KiB
// the second one finds changed. The content can't be compressed.
const (
	Files    = 8
	FileSize = 2 << 20
	Changed  = 64
	Swaps    = 10 // renewals, and loads, in a row
)

// Script is one run: it needs an empty directory on the share and one on a local disk.
type Script struct {
	share, local string
	reg          *lease.FileRegister
	lease        *lease.Lease
	store        *volsync.Store
	volume       *volsync.Volume
	random       *mrand.ChaCha8
}

// New prepares a run and touches nothing. Close it.
func New(share, local string) *Script {
	return &Script{share: share, local: local, random: mrand.NewChaCha8([32]byte{1})}
}

// Close gives up what the steps have opened. It does nothing on the share.
func (s *Script) Close() error {
	var errs []error
	if s.volume != nil {
		errs = append(errs, s.volume.Close())
	}
	if s.lease != nil {
		errs = append(errs, s.lease.Close())
	}
	return errors.Join(errs...)
}

// Steps are the script.
func (s *Script) Steps() []Step {
	return []Step{
		{Name: "initialise", Run: s.initialise},
		{Name: "acquire", Run: s.acquire},
		{Name: "first snapshot", Run: s.first},
		{Name: "snapshot", Run: s.second},
		{Name: fmt.Sprintf("%d renewals", Swaps), Run: s.swaps},
		{Name: fmt.Sprintf("%d loads", Swaps), Run: s.loads},
		{Name: "condemn, sweep, prune", Run: s.clean},
		{Name: "verify, cold", Cold: true, Run: s.verify},
		{Name: "restore, cold", Cold: true, Run: s.restore},
	}
}

func (s *Script) config() lease.FileConfig {
	return lease.FileConfig{FS: fsx.OS{}, Share: s.share, Rand: rand.Reader}
}

func (s *Script) initialise(ctx context.Context) error {
	if _, err := lease.InitFile(ctx, s.config(), lease.Record{TTL: lease.Duration(time.Minute)}); err != nil {
		return err
	}
	var err error
	// One worker each: what runs side by side would make counts depend on time.
	if s.store, err = volsync.OpenStore(volsync.StoreConfig{
		Dir: s.share, Workers: 1, Rand: mrand.NewChaCha8([32]byte{2}), // the names decide which directories are visited
	}); err != nil {
		return err
	}
	return s.store.Init(ctx)
}

func (s *Script) acquire(ctx context.Context) error {
	var err error
	if s.reg, err = lease.OpenFile(ctx, s.config()); err != nil {
		return err
	}
	s.lease, err = lease.New(lease.Config{
		Register: s.reg, Clock: boottime.Real{}, Rand: rand.Reader, FS: fsx.OS{},
		Self: lease.Holder{Instance: "script", VolumeID: "volume"},
		TTL:  time.Hour, RenewInterval: 10 * time.Minute, OpTimeout: time.Minute, Margin: time.Second,
	})
	if err != nil {
		return err
	}
	if err := s.lease.Refresh(ctx); err != nil {
		return err
	}
	return s.lease.Acquire(ctx, nil)
}

// fill writes random bytes into one of the volume's files.
func (s *Script) fill(file int, at, size int64) error {
	data := make([]byte, size)
	if _, err := s.random.Read(data); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.volume.Path(), fmt.Sprintf("file-%d", file)), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, at)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func (s *Script) first(ctx context.Context) error {
	var err error
	s.volume, err = volsync.OpenVolume(volsync.VolumeConfig{
		Dir: filepath.Join(s.local, "instance"), BootID: "boot", Rand: rand.Reader, Workers: 1,
	})
	if err != nil {
		return err
	}
	for i := range Files {
		if err := s.fill(i, 0, FileSize); err != nil {
			return err
		}
	}
	if err := s.volume.MarkLive(ctx, 1); err != nil {
		return err
	}
	if err := s.volume.Baseline(ctx, s.store, volsync.SnapshotRef{}); err != nil {
		return err
	}
	return s.snapshot(ctx)
}

func (s *Script) second(ctx context.Context) error {
	const perFile = Changed / Files
	for i := range Files {
		for k := range int64(perFile) {
			if err := s.fill(i, k*FileSize/perFile, volsync.BlockSize); err != nil {
				return err
			}
		}
	}
	return s.snapshot(ctx)
}

// snapshot is what a supervisor does, with a stopped database.
func (s *Script) snapshot(ctx context.Context) error {
	basis := s.lease.View().Record
	req := volsync.WriteRequest{Term: basis.Term, Seq: 1, Writer: "script"}
	if basis.Head != nil {
		req.Base, req.Seq = s.volume.BaseTree(), basis.Head.Seq+1
	}
	c, err := s.volume.Capture(ctx, volsync.CaptureRequest{NoFreeze: true})
	if err != nil {
		return err
	}
	req.Delta, req.Blocks, req.Frozen = c.Delta, c.Blocks, c.Frozen
	tree, _, err := s.store.Write(ctx, req)
	if err != nil {
		return err
	}
	_, err = s.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.Head = &lease.Head{ID: tree.Ref.ID, Manifest: tree.Ref.Manifest, Hash: tree.Ref.Hash,
			Term: tree.Ref.Term, Seq: tree.Ref.Seq, Frozen: tree.Ref.Frozen}
	})
	if err != nil {
		return err
	}
	return s.volume.Adopt(c, tree)
}

// swaps are renewals: a renewal is a commit that changes nothing else.
func (s *Script) swaps(ctx context.Context) error {
	for range Swaps {
		if _, err := s.lease.Commit(ctx, s.lease.View().Record, func(*lease.Record) {}); err != nil {
			return err
		}
	}
	return nil
}

func (s *Script) loads(ctx context.Context) error {
	for range Swaps {
		if _, err := s.reg.Load(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *Script) head() volsync.SnapshotRef {
	h := s.lease.View().Record.Head
	return volsync.SnapshotRef{ID: h.ID, Manifest: h.Manifest, Hash: h.Hash, Term: h.Term, Seq: h.Seq, Frozen: h.Frozen}
}

func (s *Script) clean(ctx context.Context) error {
	basis := s.lease.View().Record
	// A day later nothing but the head is retained.
	cat, _, err := s.store.Condemn(ctx, s.head(), volsync.CatalogRef{}, volsync.Policy{All: time.Second},
		time.Now().Add(24*time.Hour), basis.Term)
	if err != nil {
		return err
	}
	_, err = s.lease.Commit(ctx, basis, func(r *lease.Record) {
		r.GCSeq++
		r.Catalog, r.CatalogHash = cat.Name, cat.Hash
	})
	if err != nil {
		return err
	}
	if _, err := s.store.Sweep(ctx, cat); err != nil {
		return err
	}
	return s.reg.Prune(ctx)
}

func (s *Script) verify(ctx context.Context) error {
	rec := s.lease.View().Record
	list, err := s.store.List(ctx, s.head(), volsync.CatalogRef{Name: rec.Catalog, Hash: rec.CatalogHash})
	if err != nil {
		return err
	}
	rep, err := s.store.Verify(ctx, list, nil)
	if err != nil {
		return err
	}
	if len(rep.Problems) > 0 {
		return fmt.Errorf("verify: %v", rep.Problems)
	}
	return nil
}

func (s *Script) restore(ctx context.Context) error {
	return volsync.Restore(ctx, s.store, s.head(), filepath.Join(s.local, "restored"), volsync.RestoreOptions{Workers: 1})
}
