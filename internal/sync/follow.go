package sync

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/track"
)

// follower is the detector of the tier "tracked". It lives as long as the agent and keeps
// what the kernel told and what is known of the volume from one capture to the next.
//
// A page that is dirty raises no event when a program stores into it again through a
// mapping, so the event is good for more than one look: until a syncfs that began after it
// has cleaned the page. Therefore the pages that became dirty since the last syncfs began
// (carry) are looked at again in the frozen round, and once more after the syncfs of the next
// capture. Operations on ranges may be under way when they are
// reported: their files are looked at again too.
type follower struct {
	tracker tracker
	log     hclog.Logger
	clock   boottime.Clock
	root    string
	sync    func(ctx context.Context) error
	scan    func(ctx context.Context, tolerant bool, p *pending) (*scanned, error)
	forget  func() error // makes a restart know nothing of the time before
	stat    statDetector
	gently  bool // the database runs: it must not wait for the disk

	now *census // nil: everything must be scanned

	since touches // reported since the baseline, and carry of before
	todo  touches // of these, what has not been read
	carry touches // reported since the last syncfs began

	names     map[string]bool // touched and not looked at
	lost      string          // why files must be found by their stat in the next round
	lostSince string          // the same, kept until the next baseline
	blind     bool            // carry isn't complete: another syncfs is needed
	doubts    map[uint64]bool // files that changed without a report, so far
	fresh     []*node         // what the last round looked at
	frozen    bool            // the last round was

	looked      int   // names that were looked at in this capture
	unexplained int   // files read as a whole because nothing explained their change
	losses      int64 // how often reports were lost
}

func newFollower(t tracker) *follower {
	return &follower{tracker: t, since: touches{}, todo: touches{}, carry: touches{}, names: map[string]bool{}, doubts: map[uint64]bool{}}
}

// settleGap lies between the last events that a syncfs is taken to clean and its beginning:
// an event is reported a moment before the page can be found dirty.
const settleGap = 10 * time.Millisecond

// errLostFrozen: the tracker lost reports when it was too late to do without them.
var errLostFrozen = errors.New("changes were not reported")

func (f *follower) look(ctx context.Context, kind roundKind, p *pending) ([]*node, round, error) {
	frozen := kind == roundFrozen
	if kind == roundSync {
		if err := f.drainAndSync(ctx); err != nil {
			return nil, nil, err
		}
	} else {
		if err := f.drain(ctx, f.carry); err != nil {
			return nil, nil, err
		}
		if frozen { // before, it would be for nothing
			f.todo.addAll(f.carry)
		}
	}
	rd := &trackRound{f: f, frozen: frozen, lost: f.lost != ""}
	if frozen && (rd.lost || f.blind) {
		return nil, nil, fmt.Errorf("%w: %s", errLostFrozen, f.lostSince)
	}
	var err error
	if rd.stat, err = f.stat.rules(frozen); err != nil {
		return nil, nil, err
	}
	if rd.lost || f.now == nil {
		err = f.lookAtAll(ctx, !frozen, p)
	} else {
		err = f.lookAtTouched(ctx, !frozen, p)
	}
	if err != nil {
		return nil, nil, err
	}
	clear(f.names)
	for ino := range f.doubts {
		if f.now.byIno[ino] == nil {
			delete(f.doubts, ino) // it is gone; should it come back it is looked at again
		}
	}
	f.frozen = frozen
	if !f.blind {
		// Otherwise pages that were reported, and lost, since the last syncfs began may be
		// dirty still: what is stored into them after this look is found after the next.
		f.lost = ""
	}
	return f.fresh, rd, nil
}

// drainAndSync cleans all pages. What was reported before it began needs to be read once,
// after it; what is reported from then on is carried.
func (f *follower) drainAndSync(ctx context.Context) error {
	if err := f.drain(ctx, nil); err != nil {
		return err
	}
	if f.gently && f.now != nil {
		wrote, err := f.writeOut(ctx)
		if err == nil && wrote {
			err = f.drain(ctx, nil) // that took a while
		}
		if err != nil {
			return err
		}
	}
	if err := f.clock.WaitUntil(ctx, f.clock.Now().Add(settleGap)); err != nil {
		return err
	}
	carry, blind := touches{}, f.blind
	f.blind = false
	since, offset := coarseNow()
	// Reports of the gap may be of pages that the syncfs does not find dirty yet.
	err := f.drain(ctx, carry)
	if err == nil {
		err = f.sync(ctx)
	}
	if err == nil {
		err = f.drain(ctx, carry)
	}
	if err != nil {
		f.carry.addAll(carry)
		f.blind = f.blind || blind
		return err
	}
	f.stat.since, f.stat.offset = since, offset
	f.todo.addAll(f.carry)
	f.carry = carry
	return nil
}

// drain takes what the tracker has, into carry too if it isn't nil.
func (f *follower) drain(ctx context.Context, carry touches) error {
	if err := ctx.Err(); err != nil {
		return err // nothing has been asked, so nothing is lost
	}
	ch, err := f.tracker.Drain(ctx)
	if err != nil {
		f.loss("it can't be asked: "+err.Error(), carry)
		return fmt.Errorf("ask the tracker: %w", err)
	}
	if ch.Lost != "" {
		f.loss(ch.Lost, carry)
	}
	if ch.NamesLost != "" {
		f.log.Info("the tracker can't name what was touched; all names are looked at", "why", ch.NamesLost)
		f.now = nil
	}
	for _, name := range ch.Names {
		f.names[name] = true
	}
	for ino, in := range ch.Inodes {
		blocks := blocksOfRanges(in.Written, in.Dirtied)
		f.since.add(ino, blocks, in.Ranged)
		f.todo.add(ino, blocks, in.Ranged)
		if dirtied := blocksOfRanges(in.Dirtied); carry != nil && (len(dirtied) > 0 || in.Ranged) {
			e := carry.add(ino, dirtied, false)
			e.Again = e.Again || in.Ranged
		}
	}
	return nil
}

// loss notes that reports are missing: files are found by their stat instead, once.
func (f *follower) loss(why string, carry touches) {
	f.losses++
	f.log.Warn("the tracker lost reports; files whose stat has changed are read as a whole", "why", why)
	f.lost, f.lostSince = why, why
	if err := f.forget(); err != nil {
		f.log.Error("can't note that reports were lost; don't restart the agent before the next snapshot", "error", err)
	}
	f.blind = f.blind || carry != nil
}

func blocksOfRanges(lists ...[]track.Range) []blockRange {
	var out []blockRange
	for _, rs := range lists {
		for _, r := range rs {
			if r.To > r.From {
				out = append(out, blockRange{uint64(r.From) / BlockSize, (uint64(r.To) + BlockSize - 1) / BlockSize})
			}
		}
	}
	return mergeBlocks(out)
}

func (f *follower) lookAtAll(ctx context.Context, tolerant bool, p *pending) error {
	found, err := f.scan(ctx, tolerant, p)
	if err != nil {
		return err
	}
	for _, n := range found.nodes {
		n.id = p.identify(n)
	}
	if f.now, err = newCensus(found); err != nil {
		return err
	}
	f.fresh = found.nodes
	f.looked += len(found.names)
	return nil
}

func (f *follower) lookAtTouched(ctx context.Context, tolerant bool, p *pending) error {
	names := make([]string, 0, len(f.names)+len(f.todo))
	for name := range f.names {
		names = append(names, name)
	}
	touched := func(ino uint64) {
		n := f.now.byIno[ino]
		if n == nil || n.typ != TypeRegular {
			return
		}
		names = append(names, n.names...) // one of them may be gone
	}
	for ino := range f.todo {
		touched(ino)
	}
	for ino := range f.doubts {
		if f.todo[ino] == nil {
			touched(ino)
		}
	}
	l := &looker{c: f.now, root: f.root, tolerant: tolerant, identify: p.identify}
	var err error
	f.fresh, err = l.look(ctx, names)
	f.looked += len(names)
	return err
}

func (f *follower) considered(n *node, j *readJob) {
	if j != nil && !j.done() {
		for _, name := range n.names { // it may have been named only, and not be in todo
			f.names[name] = true
		}
		return
	}
	delete(f.todo, n.key.Ino)
	if j != nil {
		delete(f.doubts, n.key.Ino)
		if j.whole() || j.holes {
			n.mapped = n.alloc
		}
	}
}

func (f *follower) links() map[string]*node {
	if !f.frozen {
		return f.now.links
	}
	out := map[string]*node{}
	for _, n := range f.fresh {
		if n.typ == TypeSymlink {
			for _, name := range n.names {
				out[name] = n
			}
		}
	}
	return out
}

func (f *follower) expect() (uint64, int, bool, bool) {
	return f.carry.blocks(), len(f.carry) + len(f.fresh), f.blind || len(f.doubts) > 0, true
}

func (f *follower) census() (*census, error) {
	for ino := range f.todo {
		if n := f.now.byIno[ino]; n != nil && n.typ == TypeRegular {
			return nil, fmt.Errorf("%q was touched and not read", n.names[0])
		}
	}
	return f.now, nil
}

// adopted makes the state of the last frozen round the new baseline.
func (f *follower) adopted() {
	keep := func(t touches) touches {
		out := touches{}
		for ino, e := range t {
			if f.now != nil && f.now.byIno[ino] != nil {
				out[ino] = e
			}
		}
		return out
	}
	f.carry = keep(f.carry)
	f.since, f.todo = keep(f.carry), touches{}
	f.lostSince = ""
	if f.now != nil {
		f.now.clear()
	}
}

// restart forgets what was read since the baseline, but not what was reported.
func (f *follower) restart() {
	f.now, f.fresh = nil, nil
	f.todo = touches{}
	f.todo.addAll(f.since)
	f.lost = f.lostSince
	clear(f.names)
	clear(f.doubts)
}

// trackRound judges files in one round.
type trackRound struct {
	f      *follower
	stat   *statRound
	frozen bool
	lost   bool
}

func (r *trackRound) settled(now statKey) bool { return r.stat.settled(now) }

func (r *trackRound) suspect(now, prev statKey, settled bool) ([]blockRange, suspicion) {
	t, n := r.f.todo[now.Ino], r.f.now.byIno[now.Ino]
	switch {
	case prev == (statKey{}):
		return wholeFile(now), onlyThose // never read, or not to its end
	case r.lost && (now != prev || !settled):
		return wholeFile(now), onlyThose
	case t != nil && (t.Ranged || t.Again && (now != prev || !settled)):
		return wholeFile(now), onlyThose
	case now.Size < prev.Size, t == nil && (now.Size != prev.Size || now.MTime != prev.MTime):
		// A change that nobody reported. While the database runs it may be one whose report
		// was just on its way.
		if !r.frozen && !r.f.doubts[now.Ino] {
			r.f.doubts[now.Ino] = true
			return nil, decideLate
		}
		r.f.unexplained++
		return wholeFile(now), onlyThose
	}
	delete(r.f.doubts, now.Ino)
	what := onlyThose
	if n == nil || n.alloc != n.mapped || !t.some() && now.CTime != prev.CTime {
		what = alsoHoles // room was allocated, or only the inode was touched
	}
	if !t.some() {
		return nil, what
	}
	blocks := cutBlocks(t.Blocks, blocksOf(now.Size))
	if grown := (blockRange{blocksOf(prev.Size), blocksOf(now.Size)}); grown.From < grown.To {
		blocks = mergeBlocks(append(append([]blockRange{}, blocks...), grown))
	}
	return blocks, what
}
