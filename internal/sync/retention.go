package sync

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"
)

const (
	// ageStep is the most that one snapshot can be older than the next as far as retention
	// goes. A clock that was wrong for a while then ages the history by a day, not by years.
	ageStep = 24 * time.Hour
	// catalogEvery is after how many snapshots a new catalog is worth writing only to
	// shorten the walk from head.
	catalogEvery = 32
)

// Condemn decides by the policy which snapshots are retained and writes a catalog that says
// so, and that condemns every other file of the store that can't be in flight: snapshots
// not retained, orphans of failed and uncommitted attempts, old catalogs. Nothing is deleted
// yet. The caller commits the returned reference, with gcseq raised by one, on the basis of
// exactly this head and catalog; until then it means nothing. term is the one that the
// caller holds; now is only noted.
//
// A snapshot that is being written meanwhile survives: names of this term with a sequence
// beyond head's are in flight. But its tree must be checked with CheckNotCondemned before
// it is committed after a catalog that it didn't know.
//
// It lists the store's directories. A Keeper does that only now and then.
func (s *Store) Condemn(ctx context.Context, head SnapshotRef, cat CatalogRef, p Policy, now time.Time, term uint64) (CatalogRef, Summary, error) {
	return s.condemn(ctx, CondemnRequest{Head: head, Catalog: cat, Policy: p, Now: now, Term: term}, condemnScope{list: true})
}

// CondemnRequest is what a condemnation is computed from.
type CondemnRequest struct {
	Head    SnapshotRef // of the register, as is
	Catalog CatalogRef  // the register's
	Policy  Policy
	Now     time.Time // wall clock, only noted
	Term    uint64    // the one that the caller holds
}

// condemnScope says where to look for files, beside those that the old catalog and the
// manifests since tell of.
type condemnScope struct {
	list  bool            // list the directories
	known []string        // files that are there; only without list
	gone  map[string]bool // condemned files that have been removed; only without list
	spare map[string]bool // files that a later snapshot is going to refer to
}

func (s *Store) condemn(ctx context.Context, r CondemnRequest, scope condemnScope) (CatalogRef, Summary, error) {
	next, sum, err := s.condemnNow(ctx, r, scope)
	if err != nil {
		return CatalogRef{}, Summary{}, fmt.Errorf("condemn files: %w", err)
	}
	return next, sum, nil
}

func (s *Store) condemnNow(ctx context.Context, r CondemnRequest, scope condemnScope) (CatalogRef, Summary, error) {
	var sum Summary
	head, cat := r.Head, r.Catalog
	if head.ID == "" {
		return cat, Summary{Unchanged: true}, nil // no snapshot yet: everything may be in flight
	}
	old := &catalog{}
	if cat.Name != "" {
		var err error
		if old, err = s.knownCatalog(ctx, cat); err != nil {
			return cat, sum, err
		}
	}
	ms, err := s.walk(ctx, head, old.head, false)
	if err != nil {
		return cat, sum, err
	}
	next := &catalog{name: objectName{kind: kindCatalog, term: r.Term, seq: head.Seq}, head: head}
	if next.name.rand, err = s.random(); err != nil {
		return cat, sum, err
	}
	if err := next.follow(old, ms); err != nil {
		return cat, sum, err
	}
	forgotten := next.expire(r.Policy)
	if err := next.trim(); err != nil {
		return cat, sum, err
	}
	files, err := s.candidates(ctx, old, ms, scope, &sum)
	if err != nil {
		return cat, sum, err
	}
	seen := next.condemn(files, cat, r.Term, scope.spare, &sum)
	for _, e := range next.entries {
		if e.listed {
			sum.Retained++
		}
	}
	for _, path := range next.condemned {
		name, _ := parseName(path)
		if _, known := slices.BinarySearch(old.condemned, path); !known && name.kind != kindCatalog {
			sum.New++
		}
	}
	swept := slices.ContainsFunc(old.condemned, func(path string) bool { return !seen[path] })
	if cat.Name != "" && sum.New == 0 && !forgotten && !swept && len(ms) < catalogEvery {
		sum.Unchanged = true
		return cat, sum, nil
	}
	var created createdFiles
	ref, err := s.writeCatalog(next, r.Now.UnixNano(), &created)
	if err != nil {
		s.giveUp(&created, err)
		return cat, sum, fmt.Errorf("write catalog: %w", err)
	}
	return ref, sum, nil
}

// follow fills in the old catalog's entries and those of the manifests since (newest first).
func (c *catalog) follow(old *catalog, ms []*manifest) error {
	c.packs = slices.Clone(old.packs)
	c.entries = slices.Clone(old.entries)
	number := make(map[string]uint32, len(c.packs))
	for i, p := range c.packs {
		number[p.Path] = uint32(i)
	}
	for _, m := range slices.Backward(ms) {
		e := catalogEntry{info: m.info, parent: m.parent, chain: m.chain, listed: true}
		var before []uint32
		if n := len(c.entries); n > 0 {
			last := &c.entries[n-1]
			e.aged = last.aged + int64(min(max(m.info.Frozen.Sub(last.info.Frozen), 0), ageStep))
			before = last.packs
		} else {
			e.aged = m.info.Frozen.UnixNano()
			if m.chain > 0 {
				return damaged(m.info.Manifest, "is a delta but has nothing below it")
			}
		}
		var added, dropped []uint32
		for _, p := range m.change.packs {
			i, ok := number[p.Path]
			if !ok {
				i = uint32(len(c.packs))
				number[p.Path] = i
				c.packs = append(c.packs, p)
			}
			added = append(added, i)
		}
		slices.Sort(added)
		if m.chain > 0 {
			for _, p := range m.dropped {
				if i, ok := number[p]; ok {
					dropped = append(dropped, i)
				}
			}
			slices.Sort(dropped)
			e.packs = union(minus(before, dropped), added)
		} else {
			e.packs = slices.Compact(added)
		}
		c.entries = append(c.entries, e)
	}
	return nil
}

// expire applies the policy: entries that it does not keep are no longer listed. It says
// whether there were any.
func (c *catalog) expire(p Policy) (forgotten bool) {
	n := len(c.entries)
	newest := c.entries[n-1].aged
	hours, days := map[int64]bool{}, map[int64]bool{}
	for i := range c.entries {
		e := &c.entries[i]
		if !e.listed {
			continue
		}
		hour, day := e.aged/int64(time.Hour), e.aged/int64(24*time.Hour)
		age := time.Duration(newest - e.aged)
		keep := i == n-1 || age <= p.All ||
			age <= p.Hourly && !hours[hour] ||
			age <= p.Daily && !days[day]
		// The first of an hour or a day stays the first as time goes on.
		hours[hour], days[day] = true, true
		if !keep {
			e.listed, e.packs = false, nil
			forgotten = true
		}
	}
	return forgotten
}

// trim drops the entries that are neither listed nor below one that is, and the packs that
// no listed one refers to.
func (c *catalog) trim() error {
	n := len(c.entries)
	byID := make(map[string]int, n)
	for i := range c.entries {
		byID[c.entries[i].info.ID] = i
	}
	needed := make([]bool, n)
	for i := range c.entries {
		if !c.entries[i].listed {
			continue
		}
		for j := i; !needed[j]; {
			needed[j] = true
			e := &c.entries[j]
			if e.chain == 0 {
				break
			}
			up, ok := byID[e.parent.ID]
			if !ok || c.entries[up].chain != e.chain-1 || c.entries[up].info.SnapshotRef != e.parent {
				return damaged(e.info.Manifest, "is based on %s, which is not known", e.parent.ID)
			}
			j = up
		}
	}
	var entries []catalogEntry
	used := make([]bool, len(c.packs))
	for i := range c.entries {
		if needed[i] {
			entries = append(entries, c.entries[i])
			for _, k := range c.entries[i].packs {
				used[k] = true
			}
		}
	}
	c.entries = entries
	c.renumber(used)
	return nil
}

// renumber drops the packs that are not used.
func (c *catalog) renumber(used []bool) {
	number := make([]uint32, len(c.packs))
	var packs []PackRef
	for i, p := range c.packs {
		if used[i] {
			number[i] = uint32(len(packs))
			packs = append(packs, p)
		}
	}
	c.packs = packs
	for i := range c.entries {
		list := slices.Clone(c.entries[i].packs)
		for k := range list {
			list[k] = number[list[k]]
		}
		c.entries[i].packs = list
	}
}

// candidates are the files that a new catalog has to decide about.
func (s *Store) candidates(ctx context.Context, old *catalog, ms []*manifest, scope condemnScope, sum *Summary) ([]objectName, error) {
	if scope.list {
		files, unknown, err := s.listFiles(ctx)
		sum.Unknown = unknown
		return files, err
	}
	paths := map[string]bool{}
	for _, p := range slices.Concat(old.condemned, scope.known) {
		paths[p] = !scope.gone[p]
	}
	for i := range old.entries {
		paths[old.entries[i].info.Manifest] = true
	}
	for _, p := range old.packs {
		paths[p.Path] = true
	}
	for _, m := range ms {
		paths[m.info.Manifest] = true
		for _, p := range m.change.packs {
			paths[p.Path] = true
		}
	}
	var out []objectName
	for p, there := range paths {
		if name, ok := parseName(p); ok && there {
			out = append(out, name)
		}
	}
	return out, nil
}

// condemn condemns those of the files that the catalog doesn't need and that can't be in
// flight. It returns all of them.
func (c *catalog) condemn(files []objectName, current CatalogRef, term uint64, spare map[string]bool, sum *Summary) map[string]bool {
	kept := map[string]bool{current.Name: true}
	for i := range c.entries {
		kept[c.entries[i].info.Manifest] = true
	}
	for _, p := range c.packs {
		kept[p.Path] = true
	}
	seen := make(map[string]bool, len(files))
	for _, name := range files {
		path := name.path()
		seen[path] = true
		if kept[path] || spare[path] || inFlight(name, c.head, term) {
			continue
		}
		c.condemned = append(c.condemned, path)
		switch name.kind {
		case kindPack:
			sum.Packs++
		case kindManifest:
			sum.Manifests++
		case kindCatalog:
			sum.Catalogs++
		}
	}
	slices.Sort(c.condemned)
	return seen
}

// inFlight says whether a file that nothing committed refers to may still become part of a
// commit. Older terms can't commit any more. In this term, an attempt at the next head is
// named with a sequence beyond head's, and one at the next catalog with head's own; once
// head has moved on, their compare-and-swaps can't succeed any more.
func inFlight(name objectName, head SnapshotRef, term uint64) bool {
	switch {
	case name.term != term:
		return name.term > term
	case name.kind == kindCatalog:
		return name.seq >= head.Seq
	default:
		return name.seq > head.Seq
	}
}

// listFiles lists the store. A missing directory is an error: a share that is not mounted
// must not look like an empty store.
func (s *Store) listFiles(ctx context.Context) (files []objectName, unknown int, err error) {
	list := func(dir string) ([]fs.DirEntry, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, err := s.cfg.FS.ReadDir(s.path(dir))
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", dir, err)
		}
		return e, nil
	}
	dirs := []string{manifestDir, catalogDir}
	shards, err := list(packDir)
	if err != nil {
		return nil, 0, err
	}
	for _, d := range shards {
		if d.IsDir() {
			dirs = append(dirs, packDir+"/"+d.Name())
		} else {
			unknown++
		}
	}
	for _, dir := range dirs {
		entries, err := list(dir)
		if err != nil {
			return nil, 0, err
		}
		for _, e := range entries {
			if name, ok := parseName(dir + "/" + e.Name()); ok {
				files = append(files, name)
			} else {
				unknown++
			}
		}
	}
	return files, unknown, nil
}

// sweepBatch is how many files are unlinked between two looks at the readers' pins.
const sweepBatch = 256

// Sweep unlinks what a committed catalog condemns and no reader's pin covers. The caller has
// waited for the grace since it saw the commit, and holds the term. It is idempotent, and
// harmless when it comes late: condemned names are never used again.
func (s *Store) Sweep(ctx context.Context, cat CatalogRef) (SweepStats, error) {
	return s.sweep(ctx, cat, &PinWatch{}, func(string) bool { return true }, func(string) {})
}

// sweep is Sweep for what is ripe. It tells of every file that is gone. The pins are looked at
// after the condemnation was committed, and that is what makes a pin safe: see WithPin.
func (s *Store) sweep(ctx context.Context, cat CatalogRef, w *PinWatch, ripe func(path string) bool, gone func(path string)) (SweepStats, error) {
	var stats SweepStats
	if cat.Name == "" {
		return stats, nil
	}
	c, err := s.readCatalog(ctx, cat)
	if err != nil {
		return stats, fmt.Errorf("sweep store: %w", err)
	}
	var pins *pinned
	looked := 0
	for _, path := range c.condemned {
		if err := ctx.Err(); err != nil {
			return stats, err
		}
		if !ripe(path) {
			stats.Early++
			continue
		}
		if looked%sweepBatch == 0 {
			if pins, err = s.livePins(ctx, w); err != nil {
				return stats, fmt.Errorf("sweep store: %w", err)
			}
		}
		looked++
		if pins.covers(path) {
			stats.Pinned++
			continue
		}
		err := s.cfg.FS.Remove(s.path(path))
		switch {
		case err == nil:
			stats.Removed++
		case errors.Is(err, fs.ErrNotExist):
			stats.Gone++
		default:
			return stats, fmt.Errorf("sweep store: %w", err)
		}
		gone(path)
	}
	return stats, nil
}
