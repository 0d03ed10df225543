package sync

import (
	"context"
	"maps"
	"slices"
	stdsync "sync"
	"time"

	"dbsupervisor/internal/boottime"
)

// listEvery is how often a Keeper lists the store's directories, to find what no catalog and
// no manifest tells of: leftovers of agents that died, of commits whose outcome stayed
// unknown. All that is usual it knows without looking.
const listEvery = 6 * time.Hour

// Keeper does the store's upkeep for the holder of a term: it decides what is condemned and
// unlinks it when its time has come. It remembers what a store doesn't: since when each file
// has been condemned, as seen on this machine's own clock, and which readers' pins are alive.
// A new holder makes a new one, which starts over with all of that. It is safe for concurrent
// use.
type Keeper struct {
	s     *Store
	clock boottime.Clock
	pins  PinWatch

	mu        stdsync.Mutex
	catalog   CatalogRef
	since     map[string]boottime.Instant // condemned files: when first seen so
	gone      map[string]bool             // condemned files that have been removed
	known     []string                    // further files that are there: older catalogs, moved packs
	spare     map[string]bool             // files that the next snapshot is going to refer to
	ready     *Moves                      // complete, and not in any snapshot yet
	taken     bool                        // the job's moves are in a snapshot
	compacted int64                       // packs rewritten so far
	listAt    boottime.Instant
	listed    bool

	working stdsync.Mutex // a Compact; guards what follows
	job     *compaction
	idle    CatalogRef                   // there was nothing to compact by this catalog
	bad     map[string]bool              // packs that could not be read
	blocks  map[string]uint64            // of packs, by path
	unions  map[string]map[string]uint64 // by snapshot and pack: blocks that it refers to
}

// NewKeeper makes a Keeper for one term.
func (s *Store) NewKeeper() *Keeper {
	return &Keeper{s: s, clock: s.cfg.Clock, since: map[string]boottime.Instant{}, gone: map[string]bool{}, spare: map[string]bool{},
		bad: map[string]bool{}, blocks: map[string]uint64{}, unions: map[string]map[string]uint64{}}
}

// Follow notes what a committed catalog condemns: the grace of a name counts from the first
// Follow that sees it. Condemn and Sweep call it; calling it as soon as a catalog is
// committed lets the grace begin then.
func (k *Keeper) Follow(ctx context.Context, cat CatalogRef) error {
	k.mu.Lock()
	same := k.catalog == cat
	k.mu.Unlock()
	if same || cat.Name == "" {
		return nil
	}
	c, err := k.s.knownCatalog(ctx, cat)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.clock.Now()
	since := make(map[string]boottime.Instant, len(c.condemned))
	gone := map[string]bool{}
	for _, p := range c.condemned {
		since[p] = now
		if at, ok := k.since[p]; ok {
			since[p] = at
		}
		if k.gone[p] {
			gone[p] = true
		}
	}
	if k.catalog.Name != "" {
		k.known = append(k.known, k.catalog.Name)
	}
	// Those that are condemned or retained are in the catalog now.
	retained := map[string]bool{}
	for _, p := range c.packs {
		retained[p.Path] = true
	}
	k.known = slices.DeleteFunc(k.known, func(p string) bool { _, ok := since[p]; return ok || retained[p] })
	k.catalog, k.since, k.gone = cat, since, gone
	return nil
}

// Condemn is Store.Condemn without listing the directories, but for the first time and then
// once in a few hours. The next snapshot's spare packs are left alone.
func (k *Keeper) Condemn(ctx context.Context, r CondemnRequest) (CatalogRef, Summary, error) {
	if err := k.Follow(ctx, r.Catalog); err != nil {
		return CatalogRef{}, Summary{}, err
	}
	k.mu.Lock()
	now := k.clock.Now()
	list := !k.listed || now >= k.listAt
	scope := condemnScope{list: list, known: slices.Clone(k.known), gone: maps.Clone(k.gone), spare: maps.Clone(k.spare)}
	k.mu.Unlock()
	ref, sum, err := k.s.condemn(ctx, r, scope)
	if err != nil {
		return ref, sum, err
	}
	if list {
		k.mu.Lock()
		k.listed, k.listAt = true, now.Add(listEvery)
		k.mu.Unlock()
	}
	return ref, sum, nil
}

// KeeperReport is what a Keeper has done in its term.
type KeeperReport struct {
	Condemned int   // files that wait for their grace or for a reader
	Compacted int64 // packs whose live blocks have been brought together
}

// Report tells what has been done.
func (k *Keeper) Report() KeeperReport {
	k.mu.Lock()
	defer k.mu.Unlock()
	return KeeperReport{Condemned: len(k.since) - len(k.gone), Compacted: k.compacted}
}

// Ripe says whether a Sweep with this grace would have something to look at.
func (k *Keeper) Ripe(grace time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.clock.Now()
	for p, at := range k.since {
		if !k.gone[p] && now.Sub(at) >= grace {
			return true
		}
	}
	return false
}

// Sweep unlinks what the committed catalog condemns, what this Keeper has seen condemned for
// at least the grace, and what no reader's pin covers. It may be interrupted at any time and
// goes on the next time.
func (k *Keeper) Sweep(ctx context.Context, cat CatalogRef, grace time.Duration) (SweepStats, error) {
	if err := k.Follow(ctx, cat); err != nil {
		return SweepStats{}, err
	}
	return k.s.sweep(ctx, cat, &k.pins, func(path string) bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		at, ok := k.since[path]
		return ok && !k.gone[path] && k.clock.Now().Sub(at) >= grace
	}, func(path string) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.gone[path] = true
	})
}
