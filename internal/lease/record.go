// Package lease keeps the cluster's one register and, above it, the single-writer lease.
//
// The register is one small record that is only ever changed by compare-and-swap. It
// decides who may write (the holder of the current term) and what the newest data is (the
// head). Nothing else decides either. See docs/ARCHITECTURE.md for the rules.
package lease

import (
	"slices"
	"time"
)

// RecordFormat is the version of Record's encoding that this program writes and the newest
// that it reads. A record of a newer format is refused.
const RecordFormat = 2

// Record is what the register holds: everything that must change atomically.
type Record struct {
	Format    int    `json:"format"`
	ClusterID string `json:"cluster_id"`
	// Version is the number of this record, raised by one with every compare-and-swap.
	Version uint64 `json:"version"`
	// Nonce is fresh for every attempt to write a record; by it an attempt recognises itself.
	Nonce string `json:"nonce"`
	// Term is the fencing token: raised by one at every acquisition, never otherwise.
	// 0 means that nobody has held the lease yet.
	Term   uint64 `json:"term"`
	Holder Holder `json:"holder"`
	// TTL is how long a challenger must see this very version unchanged before it may
	// acquire, on the challenger's own clock.
	TTL Duration `json:"ttl"`
	// Head is the newest committed snapshot; nil before the first.
	Head *Head `json:"head,omitempty"`
	// GCSeq is raised by one with every condemnation.
	GCSeq uint64 `json:"gcseq"`
	// Catalog names the immutable file on the share that lists the retained snapshots up
	// to some moment and the condemned names; "" before the first.
	Catalog     string `json:"catalog,omitempty"`
	CatalogHash string `json:"catalog_hash,omitempty"`
	// ImageDigest identifies the database image that last wrote the volume.
	ImageDigest string `json:"image_digest,omitempty"`
	// Released says that the holder gave the term up in a planned handoff. Successor, if
	// set, is the instance that may acquire at once; everybody else waits for the TTL.
	Released  bool   `json:"released,omitempty"`
	Successor string `json:"successor,omitempty"`
	// Complete says of a released record that the head holds everything that was ever
	// acknowledged in its term: a planned handoff, not a forced one.
	Complete bool `json:"complete,omitempty"`
	// Inherited says that this term began from a complete release: nothing was lost on the
	// way into it.
	Inherited bool `json:"inherited,omitempty"`
	// Paused forbids automatic failover (an operator's maintenance mode).
	Paused bool `json:"paused,omitempty"`
	// Order asks the holder of Order.Term for something; it is ignored in any other term
	// and vanishes with the release or the next acquisition.
	Order *Order `json:"order,omitempty"`
	// Answer is what became of the last order that did not end in another term.
	Answer *Answer `json:"answer,omitempty"`
	// Failovers is how long ago, at the least, each of the last hour's failovers happened that
	// no person had asked for; oldest first, as of this record's writing.
	Failovers []Duration `json:"failovers,omitempty"`
	// CleanSeq counts renewals that found the volume unchanged since the head's freeze:
	// a replica may then reset the age of its data although head did not move.
	CleanSeq uint64 `json:"clean_seq,omitempty"`
	// HeadAge is how long before this record was made the head was known to hold everything
	// that had been written: since the freeze of head, or since a later look that found the
	// volume unchanged. Measured by the holder, on its clock; 0 means that it does not know, or
	// that somebody else wrote the record.
	HeadAge Duration `json:"head_age,omitempty"`
	// By is the incarnation that wrote this record. It differs from Holder.Incarnation only
	// where another instance left an order or paused the cluster.
	By string `json:"by,omitempty"`
	// Wall is the writer's time of day, for people. It decides nothing.
	Wall time.Time `json:"wall"`
}

// Clone returns a copy that shares nothing with r, to be edited.
func (r Record) Clone() Record {
	if r.Head != nil {
		h := *r.Head
		r.Head = &h
	}
	if r.Order != nil {
		o := *r.Order
		r.Order = &o
	}
	if r.Answer != nil {
		a := *r.Answer
		r.Answer = &a
	}
	r.Failovers = slices.Clone(r.Failovers)
	return r
}

// SameHead says whether both records name the same snapshot (or none).
func (r Record) SameHead(o Record) bool {
	if r.Head == nil || o.Head == nil {
		return r.Head == o.Head
	}
	a, b := r.Head, o.Head
	return a.ID == b.ID && a.Manifest == b.Manifest && a.Hash == b.Hash && a.Term == b.Term && a.Seq == b.Seq
}

// SameData says whether both records name the same head, the same catalog and the same
// condemnation: everything that a commit or a condemnation is computed from.
func (r Record) SameData(o Record) bool {
	return r.SameHead(o) && r.GCSeq == o.GCSeq && r.Catalog == o.Catalog && r.CatalogHash == o.CatalogHash
}

// Holder describes the one who holds (or, if Released, last held) the term.
type Holder struct {
	Instance    string `json:"instance"`
	Incarnation string `json:"incarnation"`       // one start of an agent
	VolumeID    string `json:"volume_id"`         // the local volume that descends from head
	Address     string `json:"address,omitempty"` // host:port of the database for writers
	HTTP        string `json:"http,omitempty"`    // host:port of the agent's health endpoints
	Zone        string `json:"zone,omitempty"`
}

// OrderKind says what an operator asked of the holder.
type OrderKind string

// The orders an operator can leave in the register, so that they work from any instance.
const (
	// OrderSwitchover asks for a planned handoff: nothing acknowledged is lost.
	OrderSwitchover OrderKind = "switchover"
	// OrderFailover asks the holder to fence itself at once, without a last snapshot.
	OrderFailover OrderKind = "failover"
	// OrderRollback asks for a new head with the content of an older snapshot.
	OrderRollback OrderKind = "rollback"
)

// Order is an operator's wish, addressed to the holder of one term.
type Order struct {
	ID       string    `json:"id"`
	Kind     OrderKind `json:"kind"`
	Term     uint64    `json:"term"`
	To       string    `json:"to,omitempty"`       // instance that shall take over; "" lets the holder choose
	Snapshot string    `json:"snapshot,omitempty"` // rollback: the snapshot's ID
	// Terminated, of a failover, is a person's word that the holder's machine is gone for good:
	// the instance in To need not wait for the TTL.
	Terminated bool `json:"terminated,omitempty"`
}

// Answer is the holder's reply to an order.
type Answer struct {
	Order string `json:"order"`           // the order's ID
	Error string `json:"error,omitempty"` // "" means that it was carried out
	Hint  string `json:"hint,omitempty"`
}

// Head names a committed snapshot.
type Head struct {
	ID       string `json:"id"`       // "<term>-<seq>-<random>", unique for ever
	Manifest string `json:"manifest"` // path below the shared directory
	Hash     string `json:"hash"`     // SHA-256 of the manifest file, hex
	Term     uint64 `json:"term"`
	Seq      uint64 `json:"seq"` // rises by one with every head
	// Frozen is the wall-clock moment of the freeze, for people and for `restore --at`;
	// snapshots are ordered by Term and Seq only.
	Frozen time.Time `json:"frozen"`
}

// Duration is a time.Duration that JSON shows as text ("10s").
type Duration time.Duration

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}
