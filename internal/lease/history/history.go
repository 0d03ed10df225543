// Package history checks the sequence of a register's records against the rules of the
// protocol. Tests that inject faults record what the register held and pass it here, so that
// the code is held to the same rules as the model.
package history

import (
	"fmt"

	"dbsupervisor/internal/lease"
)

// Violation says which record breaks which rule.
type Violation struct {
	Version uint64
	Rule    string // a short constant name
	Detail  string
}

// String implements fmt.Stringer.
func (v Violation) String() string {
	return fmt.Sprintf("record %d: %s: %s", v.Version, v.Rule, v.Detail)
}

// Rules, as named in a Violation.
const (
	RuleVersion   = "version"   // rises by one, without gaps
	RuleIdentity  = "identity"  // format and cluster ID never change, nonces are fresh, the TTL is there
	RuleTerm      = "term"      // rises by one, at an acquisition by the new holder, and never otherwise
	RuleHolder    = "holder"    // one instance per term; another incarnation only by its own swap
	RuleTakeover  = "takeover"  // takes over head, catalog, gcseq and image as they are
	RuleHead      = "head"      // written by the holder, in its term, seq rising by one, names never reused
	RuleGC        = "gc"        // gcseq rises by one, with a new catalog, and no catalog without it
	RuleRelease   = "release"   // by the holder; a released term is never renewed
	RuleBystander = "bystander" // others than the holder change nothing but order and pause
	RuleOrder     = "order"     // ends with the term
	RuleFailovers = "failovers" // a takeover that nobody asked for is counted
)

// Check returns every violation in records, which must be consecutive and ascending, as a
// register's History returns them or a test has recorded them.
func Check(records []lease.Record) []Violation {
	c := checker{nonces: map[string]uint64{}, heads: map[string]uint64{}, catalogs: map[string]uint64{}}
	for i := range records {
		cur := &records[i]
		c.one(cur)
		if i > 0 {
			c.pair(&records[i-1], cur)
		}
		c.remember(cur)
	}
	return c.found
}

type checker struct {
	found    []Violation
	nonces   map[string]uint64
	heads    map[string]uint64 // last version that named it
	catalogs map[string]uint64
}

func (c *checker) add(r *lease.Record, rule, format string, args ...any) {
	c.found = append(c.found, Violation{Version: r.Version, Rule: rule, Detail: fmt.Sprintf(format, args...)})
}

func (c *checker) remember(r *lease.Record) {
	c.nonces[r.Nonce] = r.Version
	if r.Head != nil {
		c.heads[r.Head.ID] = r.Version
	}
	if r.Catalog != "" {
		c.catalogs[r.Catalog] = r.Version
	}
}

func (c *checker) one(r *lease.Record) {
	if r.TTL <= 0 {
		c.add(r, RuleIdentity, "ttl is %d", r.TTL)
	}
	if v, used := c.nonces[r.Nonce]; r.Nonce == "" || used {
		c.add(r, RuleIdentity, "nonce %q is not fresh (record %d)", r.Nonce, v)
	}
	if h := r.Head; h != nil && (h.ID == "" || h.Manifest == "" || h.Hash == "" || h.Term > r.Term) {
		c.add(r, RuleHead, "%+v in term %d", *h, r.Term)
	}
	if r.Order != nil && r.Released {
		c.add(r, RuleOrder, "order %s is left in a released term", r.Order.ID)
	}
	if r.Version != 1 {
		return
	}
	// A rescued register begins with a term that has ended, so that nobody is waited for.
	if r.Term > 0 && !r.Released {
		c.add(r, RuleTerm, "a register begins with a running term %d", r.Term)
	}
}

func (c *checker) pair(prev, cur *lease.Record) {
	if cur.Version != prev.Version+1 {
		c.add(cur, RuleVersion, "follows %d", prev.Version)
	}
	if cur.ClusterID != prev.ClusterID || cur.Format < prev.Format {
		c.add(cur, RuleIdentity, "cluster %s format %d follows cluster %s format %d", cur.ClusterID, cur.Format, prev.ClusterID, prev.Format)
	}
	switch {
	case cur.Term == prev.Term:
		c.sameTerm(prev, cur)
	case cur.Term == prev.Term+1:
		c.takeover(prev, cur)
	default:
		c.add(cur, RuleTerm, "%d follows %d", cur.Term, prev.Term)
	}
}

func (c *checker) takeover(prev, cur *lease.Record) {
	if cur.By != cur.Holder.Incarnation || cur.By == "" || cur.Holder.Instance == "" {
		c.add(cur, RuleTerm, "raised by %q for %s/%s", cur.By, cur.Holder.Instance, cur.Holder.Incarnation)
	}
	if !cur.SameData(*prev) || cur.ImageDigest != prev.ImageDigest {
		c.add(cur, RuleTakeover, "head, catalog, gcseq or image changed")
	}
	if cur.Released || cur.Successor != "" {
		c.add(cur, RuleRelease, "a term begins released")
	}
	if cur.Order != nil {
		c.add(cur, RuleOrder, "order %s survived the takeover", cur.Order.ID)
	}
	unasked := prev.Term > 0 && !prev.Released && !prev.Asked(cur.Holder.Instance) && !prev.Continues(cur.Holder.Instance, cur.Holder.VolumeID)
	if n := len(cur.Failovers); unasked && (n == 0 || cur.Failovers[n-1] != 0) {
		c.add(cur, RuleFailovers, "not counted: %v follows %v", cur.Failovers, prev.Failovers)
	}
}

func (c *checker) sameTerm(prev, cur *lease.Record) {
	if cur.Holder.Instance != prev.Holder.Instance {
		c.add(cur, RuleHolder, "term %d has holders %s and %s", cur.Term, prev.Holder.Instance, cur.Holder.Instance)
	}
	resumed := cur.Holder.Incarnation != prev.Holder.Incarnation
	if resumed && (cur.By != cur.Holder.Incarnation || prev.Released) {
		c.add(cur, RuleHolder, "incarnation %s was put in by %s", cur.Holder.Incarnation, cur.By)
	}
	byHolder := cur.By == cur.Holder.Incarnation && cur.By != ""
	if prev.Released {
		if !cur.Released || cur.Successor != prev.Successor {
			c.add(cur, RuleRelease, "the release was taken back")
		}
		if byHolder && cur.Paused == prev.Paused && len(cur.Failovers) >= len(prev.Failovers) {
			c.add(cur, RuleRelease, "renewed after its release")
		}
	} else if cur.Released && !byHolder {
		c.add(cur, RuleRelease, "released by %q", cur.By)
	}
	if !byHolder || prev.Released {
		same := cur.SameData(*prev) && cur.Holder == prev.Holder && cur.ImageDigest == prev.ImageDigest &&
			cur.CleanSeq == prev.CleanSeq && cur.TTL == prev.TTL
		if !same {
			c.add(cur, RuleBystander, "%q changed what only the running holder may", cur.By)
		}
	}
	c.head(prev, cur)
	c.gc(prev, cur)
}

func (c *checker) head(prev, cur *lease.Record) {
	if cur.SameHead(*prev) {
		return
	}
	if cur.Head == nil {
		c.add(cur, RuleHead, "%s was lost", prev.Head.ID)
		return
	}
	if v, used := c.heads[cur.Head.ID]; used {
		c.add(cur, RuleHead, "%s was head in record %d before", cur.Head.ID, v)
	}
	if cur.Head.Term != cur.Term {
		c.add(cur, RuleHead, "%s of term %d was committed in term %d", cur.Head.ID, cur.Head.Term, cur.Term)
	}
	if prev.Head != nil && cur.Head.Seq != prev.Head.Seq+1 {
		c.add(cur, RuleHead, "seq %d follows %d", cur.Head.Seq, prev.Head.Seq)
	}
}

func (c *checker) gc(prev, cur *lease.Record) {
	changed := cur.Catalog != prev.Catalog || cur.CatalogHash != prev.CatalogHash
	switch {
	case cur.GCSeq == prev.GCSeq && changed:
		c.add(cur, RuleGC, "catalog %s without a new gcseq", cur.Catalog)
	case cur.GCSeq == prev.GCSeq:
	case cur.GCSeq != prev.GCSeq+1:
		c.add(cur, RuleGC, "gcseq %d follows %d", cur.GCSeq, prev.GCSeq)
	case !changed:
		c.add(cur, RuleGC, "gcseq %d without a new catalog", cur.GCSeq)
	}
	if v, used := c.catalogs[cur.Catalog]; changed && used {
		c.add(cur, RuleGC, "catalog %s was named in record %d before", cur.Catalog, v)
	}
}
