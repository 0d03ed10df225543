package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
)

// pass is one attempt to capture.
type pass struct {
	v       *Volume
	p       *pending
	req     CaptureRequest
	det     detector
	stats   CaptureStats
	reader  *reader         // of the last round
	links   map[string]bool // symbolic links that have been checked: name and target
	views   []view
	handles *handles // files that stay open until the capture ends
	arena   *arena   // for what the freeze reads
	spoiled bool     // pending work can't be used any more
}

func (p *pass) run(ctx context.Context) (*Capture, error) {
	pids := p.req.Pids
	if pids == nil {
		pids = func() []int { return nil }
	}
	p.views, p.links = viewsOf(p.v.Path(), pids()), map[string]bool{}
	p.handles = newHandles()
	defer p.handles.close()
	defer func() { p.arena.free() }()
	c := &Capture{}
	var err error
	if p.req.NoFreeze {
		if err = p.precopyStopped(ctx); err == nil {
			c.Frozen = p.v.cfg.Clock.Wall()
			err = p.round(ctx, roundFrozen, p.v.cfg.Workers)
		}
	} else {
		err = p.precopy(ctx)
		if err == nil {
			err = p.prepared(ctx, func() error {
				return bracket(ctx, "the freeze", p.req.BeforeFreeze, p.req.AfterFreeze, func() error { return p.frozen(ctx, c) })
			})
		}
	}
	if p.reader != nil {
		// Whatever became of the attempt: what was held counts as read. It is little.
		if serr := p.reader.settle(context.WithoutCancel(ctx)); serr != nil {
			p.spoiled = true
			err = errors.Join(err, serr)
		}
		p.arena.free() // nothing refers to it any more
	}
	if err != nil {
		return nil, err
	}
	if c.found, err = p.det.census(); err != nil {
		return nil, err
	}
	if err := p.v.explainSuspects(); err != nil {
		return nil, err
	}
	c.Skipped = c.found.others()
	c.Delta, c.Blocks, err = p.p.delta(c.found)
	if err != nil {
		p.spoiled = true // the next attempt must not meet the same
		return nil, err
	}
	p.count(c)
	return c, nil
}

// sumUp adds an attempt to the volume's sums, whatever became of it.
func (p *pass) sumUp(c *Capture, err error) {
	p.stats.Tier, _ = p.v.Tier()
	lost := int64(0)
	if f := p.v.follow; f != nil {
		lost, f.losses = f.losses, 0
		p.stats.Unexplained = f.unexplained
	}
	p.stats.Lost = int(lost)
	if c != nil {
		c.Stats = p.stats
	}
	p.v.count(func(t *TrackStats) {
		t.ReadBytes += p.stats.ReadBytes
		t.FrozenBytes += p.stats.FrozenBytes
		t.Lost += lost
		t.Predicted = p.stats.Predicted
		if errors.Is(err, ErrFreezeTooLong) {
			t.TooLong++
		}
	})
}

func (p *pass) count(c *Capture) {
	p.stats.Files, p.stats.Dirs, p.stats.Symlinks = c.found.files, c.found.dirs, c.found.symlinks()
	p.stats.ChangedFiles = len(c.Delta.Inodes)
	p.stats.ChangedBytes = int64(c.Blocks.Blocks()) * BlockSize
}

// prepared lets the engine get ready, reads what that wrote and goes on.
func (p *pass) prepared(ctx context.Context, f func() error) error {
	if p.req.Prepare == nil {
		return f()
	}
	return bracket(ctx, "the last look", p.req.Prepare, p.req.Finish, func() error {
		if err := p.precopy(ctx); err != nil {
			return err
		}
		return f()
	})
}

// bracket calls f between the two, each of which may be nil. after is called whenever before
// succeeded.
func bracket(ctx context.Context, what string, before, after func(context.Context) error, f func() error) error {
	if before != nil {
		if err := before(ctx); err != nil {
			return fmt.Errorf("before %s: %w", what, err)
		}
	}
	err := f()
	if after != nil {
		// Also when ctx has ended: what was begun in the database must be ended.
		if aerr := after(context.WithoutCancel(ctx)); aerr != nil {
			return errors.Join(err, fmt.Errorf("after %s: %w", what, aerr))
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
	done := make(chan error, 1)
	go func() {
		done <- p.round(fctx, roundFrozen, frozenWorkers)
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
	return nil
}

// holdMost bounds what is kept in memory in a freeze; what is beyond is spooled at once.
const holdMost = 32 << 20

// round looks at the volume once and reads what may have changed since it was last read.
func (p *pass) round(ctx context.Context, kind roundKind, workers int) error {
	frozen := kind == roundFrozen
	nodes, rd, err := p.det.look(ctx, kind, p.p)
	if err != nil {
		return p.spoil(ctx, err)
	}
	if err := p.checkLinks(p.det.links()); err != nil {
		p.spoiled = true
		return err
	}
	var jobs []*readJob
	var blocks uint64
	for _, n := range nodes {
		if n.id == 0 {
			n.id = p.p.identify(n)
		}
		job := p.p.consider(n, rd)
		if job == nil {
			p.det.considered(n, nil)
			continue
		}
		jobs = append(jobs, job)
		blocks += job.blocks()
	}
	// Large files first, so that the workers end together.
	sort.SliceStable(jobs, func(i, j int) bool { return jobs[i].blocks() > jobs[j].blocks() })
	if err := p.affordable(frozen, blocks); err != nil {
		for _, j := range jobs {
			j.recall()
			j.missed.Store(true)
			p.det.considered(j.n, j)
		}
		return err
	}
	root, err := os.Open(p.v.Path())
	if err != nil {
		p.spoiled = true
		return err
	}
	defer root.Close()
	r := &reader{fs: p.v.fs, root: root, spool: p.p.spool, tolerant: !frozen, progress: p.req.Progress, handles: p.handles}
	// The rounds after the first must be short: the freeze reads what is written meanwhile.
	r.gently = kind == roundSync && !p.req.NoFreeze
	if frozen {
		r.hold, r.arena = holdMost, p.arena
	}
	p.reader = r
	began := p.v.cfg.Clock.Now()
	err = r.run(ctx, jobs, workers)
	for _, j := range jobs {
		p.det.considered(j.n, j)
	}
	p.v.pace.note(frozen, r.bytes.Load(), p.v.cfg.Clock.Now().Sub(began))
	p.stats.Candidates += int64(blocks)
	p.stats.Names += len(nodes)
	if frozen {
		p.stats.FrozenNames = len(nodes)
		p.stats.FrozenFiles += len(jobs)
		p.stats.FrozenBytes += r.bytes.Load()
	} else {
		p.stats.ReadFiles += len(jobs)
		p.stats.ReadBytes += r.bytes.Load()
	}
	if err != nil {
		return p.spoil(ctx, err)
	}
	return nil
}

// spoil gives up what was read, unless the attempt was only cut short.
func (p *pass) spoil(ctx context.Context, err error) error {
	if ctx.Err() == nil && !errors.Is(err, errLostFrozen) {
		p.spoiled = true
	}
	return err
}

// checkLinks refuses symbolic links that lead to data outside. Each is looked at once per
// capture, which is mostly before the freeze.
func (p *pass) checkLinks(links map[string]*node) error {
	for name, n := range links {
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
