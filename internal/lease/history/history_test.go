package history

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"dbsupervisor/internal/lease"
)

// good is a history with everything that may happen: two terms, commits, a condemnation, a
// bystander's order, a resumed term, a release and a pause after it.
func good() []lease.Record {
	var recs []lease.Record
	cur := lease.Record{Format: 1, ClusterID: "c", TTL: lease.Duration(time.Second)}
	add := func(by string, edit func(*lease.Record)) {
		cur = cur.Clone()
		edit(&cur)
		cur.Version++
		cur.Nonce, cur.By = fmt.Sprint("n", cur.Version), by
		recs = append(recs, cur)
	}
	head := func(r *lease.Record) {
		seq := uint64(1)
		if r.Head != nil {
			seq = r.Head.Seq + 1
		}
		id := fmt.Sprintf("%d-%d", r.Term, seq)
		r.Head = &lease.Head{ID: id, Manifest: "m" + id, Hash: "h", Term: r.Term, Seq: seq}
	}
	add("init", func(*lease.Record) {})                                                                        // 1
	add("a1", func(r *lease.Record) { r.Term, r.Holder = 1, lease.Holder{Instance: "a", Incarnation: "a1"} })  // 2
	add("a1", func(r *lease.Record) {})                                                                        // 3 renewal
	add("a1", head)                                                                                            // 4
	add("a2", func(r *lease.Record) { r.Holder.Incarnation = "a2" })                                           // 5 resumed
	add("a2", head)                                                                                            // 6
	add("a2", func(r *lease.Record) { r.GCSeq, r.Catalog, r.CatalogHash = 1, "k1", "h" })                      // 7
	add("b1", func(r *lease.Record) { r.Order = &lease.Order{ID: "o", Kind: lease.OrderSwitchover, Term: 1} }) // 8
	add("a2", func(r *lease.Record) {})                                                                        // 9 renewal
	add("a2", func(r *lease.Record) { r.Released, r.Successor, r.Order = true, "b", nil })                     // 10
	add("b1", func(r *lease.Record) { r.Paused = true })                                                       // 11
	add("b1", func(r *lease.Record) {
		r.Term, r.Holder, r.Released, r.Successor = 2, lease.Holder{Instance: "b", Incarnation: "b1"}, false, ""
	}) // 12
	add("b1", head)                                                   // 13
	add("b1", func(r *lease.Record) { r.GCSeq, r.Catalog = 2, "k2" }) // 14
	return recs
}

func TestGoodHistory(t *testing.T) {
	if v := Check(good()); len(v) > 0 {
		t.Errorf("violations in a good history: %v", v)
	}
	if v := Check(good()[5:]); len(v) > 0 {
		t.Errorf("violations in the end of a good history: %v", v)
	}
	if v := Check(nil); len(v) > 0 {
		t.Errorf("violations in nothing: %v", v)
	}
}

func TestEveryRuleIsChecked(t *testing.T) {
	for _, c := range []struct {
		name    string
		version uint64 // of the record to change; 0: no single one
		edit    func(*lease.Record)
		recs    func([]lease.Record) []lease.Record
		rule    string
	}{
		{name: "gap", rule: RuleVersion, recs: func(r []lease.Record) []lease.Record { return slices.Delete(r, 2, 3) }},
		{name: "same version twice", rule: RuleVersion, version: 3, edit: func(r *lease.Record) { r.Version = 2 }},
		{name: "nonce reused", rule: RuleIdentity, version: 9, edit: func(r *lease.Record) { r.Nonce = "n3" }},
		{name: "no nonce", rule: RuleIdentity, version: 9, edit: func(r *lease.Record) { r.Nonce = "" }},
		{name: "no ttl", rule: RuleIdentity, version: 9, edit: func(r *lease.Record) { r.TTL = 0 }},
		{name: "other cluster", rule: RuleIdentity, version: 9, edit: func(r *lease.Record) { r.ClusterID = "d" }},
		{name: "older format", rule: RuleIdentity, version: 9, edit: func(r *lease.Record) { r.Format = 0 }},
		{name: "term skipped", rule: RuleTerm, version: 12, edit: func(r *lease.Record) { r.Term = 3 }},
		{name: "term falls", rule: RuleTerm, version: 13, edit: func(r *lease.Record) { r.Term = 1 }},
		{name: "term raised by another", rule: RuleTerm, version: 12, edit: func(r *lease.Record) { r.By = "a2" }},
		{name: "born with a running term", rule: RuleTerm, version: 1, edit: func(r *lease.Record) { r.Term = 1 }},
		{name: "two holders of a term", rule: RuleHolder, version: 5, edit: func(r *lease.Record) { r.Holder.Instance = "b" }},
		{name: "incarnation put in by another", rule: RuleHolder, version: 5, edit: func(r *lease.Record) { r.By = "b1" }},
		{name: "head changed by takeover", rule: RuleTakeover, version: 12, edit: func(r *lease.Record) { r.Head.ID = "x" }},
		{name: "gcseq changed by takeover", rule: RuleTakeover, version: 12, edit: func(r *lease.Record) { r.GCSeq = 9 }},
		{name: "catalog changed by takeover", rule: RuleTakeover, version: 12, edit: func(r *lease.Record) { r.Catalog = "x" }},
		{name: "image changed by takeover", rule: RuleTakeover, version: 12, edit: func(r *lease.Record) { r.ImageDigest = "x" }},
		{name: "head of another term", rule: RuleHead, version: 13, edit: func(r *lease.Record) { r.Head.Term = 1 }},
		{name: "head of the future", rule: RuleHead, version: 13, edit: func(r *lease.Record) { r.Head.Term = 3 }},
		{name: "head skips a seq", rule: RuleHead, version: 6, edit: func(r *lease.Record) { r.Head.Seq = 5 }},
		{name: "head reused", rule: RuleHead, version: 13, edit: func(r *lease.Record) { r.Head.ID = "1-1" }},
		{name: "head lost", rule: RuleHead, version: 7, edit: func(r *lease.Record) { r.Head = nil }},
		{name: "head without hash", rule: RuleHead, version: 6, edit: func(r *lease.Record) { r.Head.Hash = "" }},
		{name: "gcseq skips", rule: RuleGC, version: 14, edit: func(r *lease.Record) { r.GCSeq = 5 }},
		{name: "gcseq without catalog", rule: RuleGC, version: 14, edit: func(r *lease.Record) { r.Catalog = "k1" }},
		{name: "catalog without gcseq", rule: RuleGC, version: 14, edit: func(r *lease.Record) { r.GCSeq = 1 }},
		{name: "released by another", rule: RuleRelease, version: 10, edit: func(r *lease.Record) { r.By = "b1" }},
		{name: "release taken back", rule: RuleRelease, version: 11, edit: func(r *lease.Record) { r.Released, r.Successor = false, "" }},
		{name: "successor changed", rule: RuleRelease, version: 11, edit: func(r *lease.Record) { r.Successor = "c" }},
		{name: "renewed after release", rule: RuleRelease, version: 11, edit: func(r *lease.Record) { r.By, r.Paused = "a2", false }},
		{name: "begins released", rule: RuleRelease, version: 12, edit: func(r *lease.Record) { r.Released = true }},
		{name: "bystander moves head", rule: RuleBystander, version: 6, edit: func(r *lease.Record) { r.By = "b1" }},
		{name: "bystander shortens ttl", rule: RuleBystander, version: 8, edit: func(r *lease.Record) { r.TTL-- }},
		{name: "head after release", rule: RuleBystander, version: 11, edit: func(r *lease.Record) {
			r.By, r.Head = "a2", &lease.Head{ID: "y", Manifest: "y", Hash: "y", Term: 1, Seq: 3}
		}},
		{name: "order survives takeover", rule: RuleOrder, version: 12, edit: func(r *lease.Record) { r.Order = &lease.Order{ID: "o"} }},
		{name: "order survives release", rule: RuleOrder, version: 10, edit: func(r *lease.Record) { r.Order = &lease.Order{ID: "o"} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			recs := good()
			for i := range recs {
				recs[i] = recs[i].Clone()
				if recs[i].Version == c.version {
					c.edit(&recs[i])
				}
			}
			if c.recs != nil {
				recs = c.recs(recs)
			}
			found := Check(recs)
			if !slices.ContainsFunc(found, func(v Violation) bool { return v.Rule == c.rule }) {
				t.Errorf("no violation of %q among %v", c.rule, found)
			}
		})
	}
}
