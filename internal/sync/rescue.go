package sync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// RescueReport is what the share alone says about the history, without a register.
type RescueReport struct {
	// Committed are the snapshots that were certainly committed, newest first: a later
	// manifest names them as its parent, or a catalog lists them.
	Committed []SnapshotInfo
	// Unproven are whole manifests that nothing proves to have been committed, newest first.
	// The last head is always among them unless a catalog was written since; so are the
	// leftovers of attempts that failed.
	Unproven []SnapshotInfo
	// Catalog is the newest catalog whose snapshots are all there; zero if there is none.
	Catalog CatalogRef
	// Problems are files that can't be read or are damaged, and signs of more than one
	// history.
	Problems []Problem
}

// Scan reads every manifest and catalog on the share and finds out which snapshots were
// committed. Whether their packs are whole is for Verify to say.
func (s *Store) Scan(ctx context.Context) (RescueReport, error) {
	var r RescueReport
	files, _, err := s.listFiles(ctx)
	if err != nil {
		return r, fmt.Errorf("scan store: %w", err)
	}
	type proof struct{ id, hash string }
	proven := map[proof]bool{}
	whole := map[proof]bool{}
	var infos []SnapshotInfo
	var catalogs []*catalog
	for _, name := range files {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		path := name.path()
		switch name.kind {
		case kindManifest:
			m, err := s.readManifest(ctx, path, "", true)
			if err != nil {
				path, what := describeProblem(path, err)
				r.Problems = append(r.Problems, Problem{Path: path, What: what})
				continue
			}
			infos = append(infos, m.info)
			whole[proof{m.info.ID, m.info.Hash}] = true
			// The writer took its parent from the register.
			proven[proof{m.parent.ID, m.parent.Hash}] = true
		case kindCatalog:
			c, err := s.readCatalog(ctx, CatalogRef{Name: path})
			if err != nil {
				path, what := describeProblem(path, err)
				r.Problems = append(r.Problems, Problem{Path: path, What: what})
				continue
			}
			catalogs = append(catalogs, c)
			for _, e := range c.entries {
				proven[proof{e.info.ID, e.info.Hash}] = true
			}
		}
	}
	for _, info := range infos {
		if proven[proof{info.ID, info.Hash}] {
			r.Committed = append(r.Committed, info)
		} else {
			r.Unproven = append(r.Unproven, info)
		}
	}
	newest := func(a, b SnapshotInfo) int {
		return cmp.Or(cmp.Compare(b.Seq, a.Seq), cmp.Compare(b.Term, a.Term), cmp.Compare(b.ID, a.ID))
	}
	slices.SortFunc(r.Committed, newest)
	slices.SortFunc(r.Unproven, newest)
	for i := 1; i < len(r.Committed); i++ {
		if a, b := r.Committed[i-1], r.Committed[i]; a.Seq == b.Seq {
			r.Problems = append(r.Problems, Problem{Path: a.Manifest,
				What: fmt.Sprintf("has the same sequence as %s, and both seem committed", b.ID), Snapshots: []string{a.ID, b.ID}})
		}
	}
	slices.SortFunc(catalogs, func(a, b *catalog) int {
		return cmp.Or(cmp.Compare(b.name.seq, a.name.seq), cmp.Compare(b.name.term, a.name.term), cmp.Compare(b.name.rand, a.name.rand))
	})
	for _, c := range catalogs {
		if !slices.ContainsFunc(c.entries, func(e catalogEntry) bool { return !whole[proof{e.info.ID, e.info.Hash}] }) {
			r.Catalog = CatalogRef{Name: c.name.path(), Hash: c.hash}
			break
		}
	}
	return r, nil
}

// Recatalog writes a catalog for a rescue in which none is left: it lists the snapshots from
// head back, as far as the manifests are whole and a full one is below them, whose packs are
// all there. It condemns nothing. term is the one under which the caller will commit it.
func (s *Store) Recatalog(ctx context.Context, head SnapshotRef, now time.Time, term uint64) (CatalogRef, error) {
	ms, err := s.walk(ctx, head, SnapshotRef{}, true)
	if err != nil && !errors.Is(err, ErrMissing) && !errors.Is(err, ErrDamaged) {
		return CatalogRef{}, fmt.Errorf("rebuild catalog: %w", err)
	}
	for len(ms) > 0 && ms[len(ms)-1].chain > 0 {
		ms = ms[:len(ms)-1]
	}
	if len(ms) == 0 {
		return CatalogRef{}, fmt.Errorf("rebuild catalog: snapshot %s can't be restored: %w", head.ID, err)
	}
	c := &catalog{name: objectName{kind: kindCatalog, term: term, seq: head.Seq}, head: head}
	if c.name.rand, err = s.random(); err != nil {
		return CatalogRef{}, err
	}
	if err := c.follow(&catalog{}, ms); err != nil {
		return CatalogRef{}, fmt.Errorf("rebuild catalog: %w", err)
	}
	files, _, err := s.listFiles(ctx)
	if err != nil {
		return CatalogRef{}, fmt.Errorf("rebuild catalog: %w", err)
	}
	there := make(map[string]bool, len(files))
	for _, f := range files {
		there[f.path()] = true
	}
	// Manifests may have outlived their packs, as bases of later ones.
	for i := range c.entries {
		e := &c.entries[i]
		if gone := slices.IndexFunc(e.packs, func(k uint32) bool { return !there[c.packs[k].Path] }); gone >= 0 {
			if i == len(c.entries)-1 {
				return CatalogRef{}, fmt.Errorf("rebuild catalog: snapshot %s can't be restored: %w", head.ID,
					&ObjectError{Path: c.packs[e.packs[gone]].Path, Kind: ErrMissing})
			}
			e.listed, e.packs = false, nil
		}
	}
	if err := c.trim(); err != nil {
		return CatalogRef{}, fmt.Errorf("rebuild catalog: %w", err)
	}
	var created createdFiles
	ref, err := s.writeCatalog(c, now.UnixNano(), &created)
	if err != nil {
		s.giveUp(&created, err)
		return CatalogRef{}, fmt.Errorf("rebuild catalog: %w", err)
	}
	return ref, nil
}

// Restorable lists what the share alone shows to be restorable, newest first: the snapshots
// that were certainly committed and, up to the newest catalog, those that it lists. It is
// List for a copy of a store that has no register. A copy that was made while only some snapshots
// were pinned has gaps: then it is those whose manifests are there.
func (s *Store) Restorable(ctx context.Context, r RescueReport) ([]SnapshotInfo, error) {
	if len(r.Committed) == 0 {
		return nil, nil
	}
	list, err := s.List(ctx, r.Committed[0].SnapshotRef, r.Catalog)
	if !errors.Is(err, ErrMissing) {
		return list, err
	}
	list = nil
	for _, info := range r.Committed {
		switch _, err := s.filesOf(ctx, info.SnapshotRef); {
		case err == nil:
			list = append(list, info)
		case !errors.Is(err, ErrMissing) && !errors.Is(err, ErrDamaged):
			return list, fmt.Errorf("list snapshots: %w", err)
		}
	}
	return list, nil
}
