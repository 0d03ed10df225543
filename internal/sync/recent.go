package sync

import (
	stdsync "sync"
	"time"
)

// recentMost bounds what recentFiles remembers, in references to packs and snapshots.
const recentMost = 32 << 10

// recentFiles remembers what manifests and catalogs that were written or read lately say, so
// that upkeep in the steady state doesn't read back what it has just written. Files never
// change under their hash; whether they are still there, or damaged by now, is not what it is
// asked for. Its zero value is ready.
type recentFiles struct {
	mu        stdsync.Mutex
	manifests map[string]*manifest // by hash; packs and header only
	order     []string
	size      int
	last      *catalog
}

func (r *recentFiles) manifest(path, hash string) *manifest {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.manifests[hash]; m != nil && m.info.Manifest == path {
		return m
	}
	return nil
}

// putManifest remembers the header and the packs of a manifest.
func (r *recentFiles) putManifest(m *manifest) {
	brief := *m
	brief.change = treeChange{packs: m.change.packs, nextID: m.change.nextID}
	// As if it had been read: times without a location, what follows from the rest filled in.
	brief.info.Parent, brief.info.Full = m.parent.ID, m.chain == 0
	if m.parent.ID != "" {
		brief.parent.Frozen = time.Unix(0, m.parent.Frozen.UnixNano()).UTC()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.manifests[m.info.Hash] != nil {
		return
	}
	if r.manifests == nil {
		r.manifests = map[string]*manifest{}
	}
	r.manifests[m.info.Hash] = &brief
	r.order = append(r.order, m.info.Hash)
	r.size += weight(&brief)
	for r.size > recentMost && len(r.order) > 1 {
		r.size -= weight(r.manifests[r.order[0]])
		delete(r.manifests, r.order[0])
		r.order = r.order[1:]
	}
}

func weight(m *manifest) int { return 4 + len(m.change.packs) + len(m.dropped) }

func (r *recentFiles) catalog(ref CatalogRef) *catalog {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != nil && ref.Hash != "" && r.last.hash == ref.Hash && r.last.name.path() == ref.Name {
		return r.last
	}
	return nil
}

func (r *recentFiles) putCatalog(c *catalog) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = c
}
