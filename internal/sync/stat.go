package sync

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"
)

// StoreStats says what is in a store and what it is for. Bytes are of the share unless they
// are called raw.
type StoreStats struct {
	Snapshots int
	Packs     int   // that retained snapshots refer to
	Bytes     int64 // of them
	LiveBytes int64 // their blocks that any retained snapshot needs
	DeadBytes int64 // the rest of them
	HeadBytes int64 // their blocks that the head needs

	Manifests     int
	ManifestBytes int64
	// Condemned files are to be deleted, Stray ones neither needed nor condemned: attempts
	// under way, or left over.
	Condemned      int
	CondemnedBytes int64
	Stray          int
	StrayBytes     int64

	RawBytes     int64 // all blocks of the packs
	RawLiveBytes int64 // blocks that any retained snapshot needs, each once
	RawAllBytes  int64 // blocks of every retained snapshot, each as often as it is there
	Ages         []AgeStats
}

// Dedup is how many times the store would be larger if each snapshot had its own blocks.
func (s *StoreStats) Dedup() float64 { return ratio(s.RawAllBytes, s.RawLiveBytes) }

// Compression is how much larger the packs' blocks are than what they take.
func (s *StoreStats) Compression() float64 { return ratio(s.RawBytes, s.Bytes) }

func ratio(a, b int64) float64 {
	if b == 0 {
		return 1
	}
	return float64(a) / float64(b)
}

// AgeStats are the snapshots of one age, counted back from the newest, and the packs that
// came with them: those that no older retained snapshot refers to.
type AgeStats struct {
	UpTo      time.Duration // 0: older than all others
	Snapshots int
	Packs     int
	Bytes     int64
	LiveBytes int64
}

// packStat is what Stat knows of one pack.
type packStat struct {
	ref    PackRef
	age    int
	blocks uint64
	live   uint64
	head   uint64
}

// Stat finds out what the store is made of. It reads manifests and the packs' footers, and
// lists the directories. snaps are those to be retained, newest first, as from List.
func (s *Store) Stat(ctx context.Context, snaps []SnapshotInfo, cat CatalogRef, p Progress) (StoreStats, error) {
	st := StoreStats{Snapshots: len(snaps)}
	for _, upTo := range []time.Duration{time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, 0} {
		st.Ages = append(st.Ages, AgeStats{UpTo: upTo})
	}
	packs := map[string]*packStat{}
	v := &verifier{s: s, snaps: snaps}
	n := 0
	var broken error
	err := v.eachTree(ctx, false, func(info *SnapshotInfo, t *Tree) {
		n++
		if p != nil {
			p.Set("reading manifests", int64(n), int64(len(snaps)))
		}
		age := st.age(snaps[0].Frozen.Sub(info.Frozen))
		st.Ages[age].Snapshots++
		// A block that is dead stays dead: what any snapshot needs of a pack is what the
		// one needs that needs most.
		for i, live := range liveOf(t) {
			if live == 0 {
				continue
			}
			st.RawAllBytes += int64(live) * BlockSize //nolint:gosec // far below
			ps := packs[t.Packs[i].Path]
			if ps == nil { // the oldest come first
				ps = &packStat{ref: t.Packs[i], age: age}
				packs[ps.ref.Path] = ps
			}
			ps.live = max(ps.live, live)
			if info.ID == snaps[0].ID {
				ps.head = live
			}
		}
	})
	if err == nil && n != len(snaps) {
		broken = fmt.Errorf("%d of %d snapshots: %w", len(snaps)-n, len(snaps), ErrDamaged)
	}
	if err == nil {
		err = s.countBlocks(ctx, packs)
	}
	if err == nil {
		st.count(packs)
		err = s.statFiles(ctx, &st, snaps, packs, cat)
	}
	if err = errors.Join(err, broken); err != nil {
		return st, fmt.Errorf("measure store: %w", err)
	}
	return st, nil
}

// age is the class of an age.
func (s *StoreStats) age(d time.Duration) int {
	for i, a := range s.Ages {
		if d <= a.UpTo {
			return i
		}
	}
	return len(s.Ages) - 1
}

// countBlocks reads how many blocks the packs have.
func (s *Store) countBlocks(ctx context.Context, packs map[string]*packStat) error {
	var refs []PackRef
	var stats []*packStat
	for _, ps := range packs {
		refs, stats = append(refs, ps.ref), append(stats, ps)
	}
	return s.eachFooter(ctx, refs, func(i int, foot *footer) error {
		stats[i].blocks = uint64(len(foot.hashes)) // each by one only
		return nil
	})
}

func (s *StoreStats) count(packs map[string]*packStat) {
	for _, p := range packs {
		part := func(n uint64) int64 { return int64(float64(p.ref.Size) * float64(n) / float64(max(p.blocks, 1))) }
		live := part(p.live)
		s.Packs++
		s.Bytes += p.ref.Size
		s.LiveBytes += live
		s.HeadBytes += part(p.head)
		s.RawBytes += int64(p.blocks) * BlockSize   //nolint:gosec // far below
		s.RawLiveBytes += int64(p.live) * BlockSize //nolint:gosec // far below
		a := &s.Ages[p.age]
		a.Packs++
		a.Bytes += p.ref.Size
		a.LiveBytes += live
	}
	s.DeadBytes = s.Bytes - s.LiveBytes
}

// statFiles looks at the files that are not packs of retained snapshots.
func (s *Store) statFiles(ctx context.Context, st *StoreStats, snaps []SnapshotInfo, packs map[string]*packStat, cat CatalogRef) error {
	files, _, err := s.listFiles(ctx)
	if err != nil {
		return err
	}
	kept, condemned := map[string]bool{cat.Name: true}, map[string]bool{}
	for _, i := range snaps {
		kept[i.Manifest] = true
	}
	if cat.Name != "" {
		c, err := s.readCatalog(ctx, cat)
		if err != nil {
			return err
		}
		for i := range c.entries {
			kept[c.entries[i].info.Manifest] = true
		}
		for _, path := range c.condemned {
			condemned[path] = true
		}
	}
	for _, name := range files {
		path := name.path()
		if packs[path] != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := s.cfg.FS.Stat(s.path(path))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return fmt.Errorf("look at %s: %w", path, err)
		case condemned[path]:
			st.Condemned, st.CondemnedBytes = st.Condemned+1, st.CondemnedBytes+info.Size()
		case kept[path] && name.kind == kindManifest:
			st.Manifests, st.ManifestBytes = st.Manifests+1, st.ManifestBytes+info.Size()
		case !kept[path]:
			st.Stray, st.StrayBytes = st.Stray+1, st.StrayBytes+info.Size()
		}
	}
	return nil
}
