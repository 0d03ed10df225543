package sync

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sort"
	"time"
)

// CaptureRequest says how one capture is made.
type CaptureRequest struct {
	Freezer Freezer
	// MaxFreeze bounds how long the database may stand still. 0 means two seconds.
	MaxFreeze time.Duration
	// BeforeFreeze and AfterFreeze may be nil. AfterFreeze is called after the thaw
	// whenever BeforeFreeze succeeded, whatever happened in between.
	BeforeFreeze, AfterFreeze func(ctx context.Context) error
	// Pids are the database's processes, as this machine numbers them: their shared
	// mappings are looked at, and symbolic links as they see them. May be nil.
	Pids     func() []int
	Progress Progress // may be nil
	// NoFreeze says that the database is stopped: nothing writes the volume.
	NoFreeze bool
}

// CaptureStats counts what a capture did.
type CaptureStats struct {
	Files, Dirs, Symlinks int
	Rounds                int   // pre-copy rounds while the database ran
	ReadFiles             int   // read while it ran
	ReadBytes             int64 //
	FrozenFiles           int   // read in the freeze
	FrozenBytes           int64 //
	ChangedFiles          int   // inodes in the delta
	ChangedBytes          int64 // data blocks in the delta
}

// Capture is the volume at one moment. It must be settled with Adopt or Abandon before the
// next one.
type Capture struct {
	Delta     *Delta
	Blocks    BlockSource   // readable until Adopt or Abandon
	Frozen    time.Time     // wall clock of the freeze
	FreezeFor time.Duration // how long the database stood still
	Stats     CaptureStats
	Skipped   []string // paths of sockets, fifos and devices, which no snapshot keeps

	found *scanned
}

// Unchanged says that nothing differs from the base.
func (c *Capture) Unchanged() bool {
	d := c.Delta
	return len(d.Inodes)+len(d.Removed)+len(d.Names)+len(d.Unnamed) == 0
}

const (
	defaultMaxFreeze = 2 * time.Second
	maxRounds        = 5        // pre-copy rounds before a freeze
	littleToRead     = 16 << 20 // bytes that are not worth another round
	frozenWorkers    = 2
)

// Capture takes the volume as it is at one moment: it reads what has changed while the
// database runs, again what has changed meanwhile, and only the rest while the database is
// frozen. The database is thawed when it returns, whatever happened. After an error that
// is no lack of room, the next attempt starts from what this one has read.
//
// It returns ErrFreezeTooLong, ErrFreezeBroken, ErrNoRoom, ErrEscapes, ErrNoBaseline and
// ErrPhase.
func (v *Volume) Capture(ctx context.Context, req CaptureRequest) (*Capture, error) {
	v.op.Lock()
	defer v.op.Unlock()
	c, err := v.capture(ctx, req)
	if errors.Is(err, ErrNoRoom) {
		// The second copy gives way, also to the database: it may be short of room itself.
		if gone, gerr := v.giveWay(err.Error()); gerr == nil && gone {
			c, err = v.capture(ctx, req)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("capture volume: %w", err)
	}
	return c, nil
}

func (v *Volume) capture(ctx context.Context, req CaptureRequest) (*Capture, error) {
	if ph := v.State().Phase; ph != PhaseLive && ph != PhaseClean {
		return nil, fmt.Errorf("%w: it is %s", ErrPhase, ph)
	}
	switch {
	case v.base == nil:
		return nil, ErrNoBaseline
	case v.out != nil:
		return nil, errors.New("the previous capture has been neither adopted nor abandoned")
	case req.Freezer == nil && !req.NoFreeze:
		return nil, errors.New("no freezer")
	}
	if req.MaxFreeze <= 0 {
		req.MaxFreeze = defaultMaxFreeze
	}
	if err := room(v.cfg.Dir, v.cfg.MinFree, 0); errors.Is(err, ErrNoRoom) {
		if _, err := v.giveWay(err.Error()); err != nil {
			return nil, err
		}
	}
	if v.pend == nil {
		sp, err := v.newSpool()
		if err != nil {
			return nil, err
		}
		v.pend = newPending(v.base, v.idx, sp)
	}
	p := &pass{v: v, p: v.pend, req: req, det: &statDetector{root: v.Path(), pids: req.Pids, sync: v.SyncFS}}
	c, err := p.run(ctx)
	if err != nil {
		if p.spoiled {
			v.dropWork() // gives the room back
		}
		return nil, err
	}
	v.out = c
	return c, nil
}

// Adopt makes a capture that has been committed as tree the new baseline.
func (v *Volume) Adopt(c *Capture, tree *Tree) error {
	v.op.Lock()
	defer v.op.Unlock()
	if c == nil || v.out != c {
		return errors.New("adopt capture: it is not the one that is waiting")
	}
	if tree.Ref.ID == "" || len(tree.Names) != len(c.found.names) {
		return fmt.Errorf("adopt capture: snapshot %q has %d names, the capture %d", tree.Ref.ID, len(tree.Names), len(c.found.names))
	}
	rec := indexRecord{From: v.base.Ref.Hash, To: tree.Ref.Hash}
	for _, id := range c.Delta.Removed {
		v.idx.remove(id)
		rec.Removed = append(rec.Removed, id)
	}
	for _, n := range c.found.nodes {
		w := v.pend.work[n.id]
		if w == nil {
			continue // as the index has it
		}
		var old []code
		if f := v.idx.files[n.id]; f != nil {
			old = f.codes
		}
		f := &indexed{typ: n.typ, key: w.key, settled: w.settled, codes: w.codes}
		v.idx.set(n.id, f)
		rec.Files = append(rec.Files, indexFileOf(n.id, f, old))
	}
	v.base = tree
	v.dropWork()
	v.logIndex(rec)
	if err := v.setState(func(st *VolumeState) { st.Base = tree.Ref }); err != nil {
		return fmt.Errorf("adopt capture: %w", err)
	}
	return nil
}

// Abandon settles a capture that has not been committed: its blocks will be part of the
// next one. A capture that has been settled already is ignored.
func (v *Volume) Abandon(c *Capture) {
	v.op.Lock()
	defer v.op.Unlock()
	if c != nil && v.out == c {
		v.out = nil
	}
}

// Baseline loads what the volume descends from, after a restart of the agent: for a live
// volume the cluster's head, if nobody else has held the term since; for a clean one its
// base. The zero reference means that there is no snapshot yet. What the index does not
// know, or knows only from before a reboot, is read again by the next capture.
func (v *Volume) Baseline(ctx context.Context, s *Store, ref SnapshotRef) error {
	v.op.Lock()
	defer v.op.Unlock()
	if err := v.baseline(ctx, s, ref); err != nil {
		return fmt.Errorf("load baseline %q: %w", ref.ID, err)
	}
	return nil
}

func (v *Volume) baseline(ctx context.Context, s *Store, ref SnapshotRef) error {
	st := v.State()
	switch {
	case st.Phase == PhaseLive:
	case st.Phase == PhaseClean && st.Base.Hash == ref.Hash:
	default:
		return fmt.Errorf("%w: it is %s at %q", ErrPhase, st.Phase, st.Base.ID)
	}
	if v.base != nil && v.idx != nil && v.base.Ref.ID == ref.ID && v.base.Ref.Hash == ref.Hash {
		return nil
	}
	tree, idx, err := v.loadBase(ctx, s, ref)
	if err != nil {
		return err
	}
	if st.Base.Hash != ref.Hash {
		if err := v.setState(func(st *VolumeState) { st.Base = ref }); err != nil {
			return err
		}
	}
	v.dropWork()
	v.base, v.idx = tree, idx
	return nil
}

func (v *Volume) loadBase(ctx context.Context, s *Store, ref SnapshotRef) (*Tree, *index, error) {
	if ref.ID == "" {
		return emptyTree(), newIndex(), nil
	}
	tree, err := s.LoadTree(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	if idx := v.loadIndex(ref); idx != nil && idx.fits(tree) {
		return tree, idx, nil
	}
	hashes, err := s.BlockHashes(ctx, tree)
	if err != nil {
		return nil, nil, err
	}
	idx, err := indexFromHashes(tree, hashes)
	return tree, idx, err
}

func emptyTree() *Tree {
	return &Tree{Inodes: map[FileID]*Inode{}, Names: map[string]FileID{}, NextID: 1}
}

// pass is one attempt to capture.
type pass struct {
	v       *Volume
	p       *pending
	req     CaptureRequest
	det     detector
	stats   CaptureStats
	links   map[string]bool // symbolic links that have been checked: name and target
	views   []view
	spoiled bool // pending work can't be used any more
}

func (p *pass) run(ctx context.Context) (*Capture, error) {
	pids := p.req.Pids
	if pids == nil {
		pids = func() []int { return nil }
	}
	p.views, p.links = viewsOf(p.v.Path(), pids()), map[string]bool{}
	c := &Capture{}
	var err error
	if p.req.NoFreeze {
		c.Frozen = p.v.cfg.Clock.Wall()
		c.found, err = p.round(ctx, true, p.v.cfg.Workers)
	} else {
		err = p.precopy(ctx)
		if err == nil {
			err = p.withHooks(ctx, func() error { return p.frozen(ctx, c) })
		}
	}
	if err != nil {
		return nil, err
	}
	c.Skipped = c.found.skipped
	c.Delta, c.Blocks, err = p.p.delta(c.found)
	if err != nil {
		return nil, err
	}
	p.count(c)
	c.Stats = p.stats
	return c, nil
}

func (p *pass) count(c *Capture) {
	for _, n := range c.found.nodes {
		switch n.typ {
		case TypeRegular:
			p.stats.Files++
		case TypeDir:
			p.stats.Dirs++
		case TypeSymlink:
			p.stats.Symlinks++
		}
	}
	p.stats.ChangedFiles = len(c.Delta.Inodes)
	p.stats.ChangedBytes = int64(c.Blocks.Blocks()) * BlockSize
}

// precopy reads what has changed while the database runs, until what a freeze would have
// to read is little, or gets no less.
func (p *pass) precopy(ctx context.Context) error {
	for before := int64(math.MaxInt64); ; {
		start, read := p.v.cfg.Clock.Now(), p.stats.ReadBytes
		if _, err := p.round(ctx, false, p.v.cfg.Workers); err != nil {
			return err
		}
		p.stats.Rounds++
		took := p.v.cfg.Clock.Now().Sub(start)
		read = p.stats.ReadBytes - read
		// A freeze has to do at most what this round did, if as much changes during a round
		// as did before it; it reads with fewer workers, but does not sync. Files that were
		// written in the very moment of a round are read again in the next, for nothing.
		quick, little := took <= p.req.MaxFreeze/4, read <= littleToRead || read > before/2
		switch {
		case quick && little:
			return nil
		case p.stats.Rounds < maxRounds:
		case took > 4*p.req.MaxFreeze:
			return fmt.Errorf("%w: what changes while the database runs takes %s to read", ErrFreezeTooLong, took.Round(time.Millisecond))
		default:
			return nil
		}
		before = read
	}
}

func (p *pass) withHooks(ctx context.Context, f func() error) error {
	if p.req.BeforeFreeze != nil {
		if err := p.req.BeforeFreeze(ctx); err != nil {
			return fmt.Errorf("before the freeze: %w", err)
		}
	}
	err := f()
	if p.req.AfterFreeze != nil {
		// Also when ctx has ended: what was begun in the database must be ended.
		if aerr := p.req.AfterFreeze(context.WithoutCancel(ctx)); aerr != nil {
			return errors.Join(err, fmt.Errorf("after the freeze: %w", aerr))
		}
	}
	return err
}

// frozen freezes the database, reads the rest and thaws it, at the end of the budget at
// the latest, even while a read hangs.
func (p *pass) frozen(ctx context.Context, c *Capture) error {
	clock := p.v.cfg.Clock
	fctx, cancel := context.WithTimeout(ctx, p.req.MaxFreeze)
	defer cancel()
	start := clock.Now()
	if err := p.req.Freezer.Freeze(fctx); err != nil {
		if fctx.Err() != nil && ctx.Err() == nil {
			return fmt.Errorf("%w: freezing took longer than %s: %w", ErrFreezeTooLong, p.req.MaxFreeze, err)
		}
		return fmt.Errorf("freeze: %w", err)
	}
	c.Frozen = clock.Wall()
	var found *scanned
	done := make(chan error, 1)
	go func() {
		var err error
		found, err = p.round(fctx, true, frozenWorkers)
		done <- err
	}()
	var err error
	select {
	case err = <-done:
		done = nil
	case <-fctx.Done():
		err = fctx.Err()
	}
	terr := p.req.Freezer.Thaw()
	c.FreezeFor = clock.Now().Sub(start)
	if done != nil {
		// The reader may have met something worse than the end of its time.
		if rerr := <-done; rerr != nil {
			err = rerr
		}
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && fctx.Err() != nil && errors.Is(err, fctx.Err()):
		return fmt.Errorf("%w: not done after %s (sync.max_freeze)", ErrFreezeTooLong, p.req.MaxFreeze)
	case err != nil:
		return err
	case errors.Is(terr, ErrFreezeBroken):
		return terr
	case terr != nil:
		return fmt.Errorf("thaw: %w", terr)
	}
	c.found = found
	return nil
}

// round looks at the whole volume once and reads the files that may have changed since
// they were last read.
func (p *pass) round(ctx context.Context, frozen bool, workers int) (*scanned, error) {
	spoil := func(err error) error {
		if ctx.Err() == nil {
			p.spoiled = true
		}
		return err
	}
	rd, err := p.det.begin(ctx, frozen)
	if err != nil {
		return nil, spoil(err)
	}
	if err := p.v.fs.At("capture-scan", p.v.Path()); err != nil {
		return nil, spoil(err)
	}
	found, err := scan(ctx, p.v.Path(), scanConfig{known: p.p.known, tolerant: !frozen})
	if err != nil {
		return nil, spoil(err)
	}
	if err := p.checkLinks(found); err != nil {
		return nil, spoil(err)
	}
	var jobs []*readJob
	for _, n := range found.nodes {
		n.id = p.p.identify(n)
		if job := p.p.consider(n, rd); job != nil {
			jobs = append(jobs, job)
		}
	}
	// Large files first, so that the workers end together.
	sort.SliceStable(jobs, func(i, j int) bool { return jobs[i].n.key.Size > jobs[j].n.key.Size })
	root, err := os.Open(p.v.Path())
	if err != nil {
		return nil, spoil(err)
	}
	defer root.Close()
	r := &reader{fs: p.v.fs, root: root, spool: p.p.spool, tolerant: !frozen, progress: p.req.Progress}
	if err := r.run(ctx, jobs, workers); err != nil {
		return nil, spoil(err)
	}
	if frozen {
		p.stats.FrozenFiles += len(jobs)
		p.stats.FrozenBytes += r.bytes.Load()
	} else {
		p.stats.ReadFiles += len(jobs)
		p.stats.ReadBytes += r.bytes.Load()
	}
	return found, nil
}

// checkLinks refuses symbolic links that lead to data outside. Each is looked at once per
// capture, which is mostly before the freeze.
func (p *pass) checkLinks(found *scanned) error {
	for name, n := range found.names {
		if n.typ != TypeSymlink {
			continue
		}
		key := name + "\x00" + string(n.meta.Target)
		if p.links[key] {
			continue
		}
		if err := checkLink(p.v.Path(), name, n.meta.Target, p.views); err != nil {
			return err
		}
		p.links[key] = true
	}
	return nil
}
