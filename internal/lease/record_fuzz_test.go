package lease

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// FuzzRecord reads any bytes as a record. What is accepted must survive being written anew, as
// every compare-and-swap does: else nobody could ever commit again.
func FuzzRecord(f *testing.F) {
	at := time.Date(2026, 1, 31, 14, 5, 0, 123, time.UTC)
	full := Record{Format: RecordFormat, ClusterID: "c0ffee", Version: 812, Nonce: "n-1", Term: 7, TTL: Duration(10 * time.Second),
		Holder: Holder{Instance: "db-1", Incarnation: "i-1", VolumeID: "v-1", Address: "10.0.0.1:5432", HTTP: "10.0.0.1:8008", Zone: "a"},
		Head:   &Head{ID: "7-93-ab", Manifest: "manifests/7-93-ab.manifest", Hash: "00", Term: 7, Seq: 93, Frozen: at},
		GCSeq:  3, Catalog: "catalogs/7-93-cd.catalog", CatalogHash: "11", ImageDigest: "sha256:1", Released: true, Successor: "db-2",
		Complete: true, Inherited: true, Paused: true, Order: &Order{ID: "o", Kind: OrderRollback, Term: 7, To: "db-2", Snapshot: "7-90-ef"},
		Answer: &Answer{Order: "o", Error: "no", Hint: "do"}, CleanSeq: 4, By: "i-1", Wall: at}
	for _, r := range []Record{full, {Format: RecordFormat, ClusterID: "c", Version: 1, Nonce: "n", TTL: 1}} {
		b, err := encodeRecord(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b + "}")
	}
	full.Order.To = strings.Repeat("db-2.example.", 100)
	b, err := encodeRecord(full)
	if err != nil || !strings.HasPrefix(b, packedMark) {
		f.Fatalf("%s, %v", b, err)
	}
	f.Add(b)
	f.Add(`{"format": 3}`)
	f.Add(`{"format":2,"cluster_id":"c","version":1,"nonce":"n","ttl":"-1s"}`)
	f.Fuzz(func(t *testing.T, b string) {
		if len(b) > goodTarget { // room for what is escaped
			return
		}
		r, err := decodeRecord(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		once, err := encodeRecord(r.Clone())
		if err != nil {
			t.Fatalf("it was read and can't be written: %v", err)
		}
		again, err := decodeRecord(once)
		if err != nil {
			t.Fatalf("it was written and can't be read: %v", err)
		}
		if twice, err := encodeRecord(again); err != nil || once != twice {
			t.Fatalf("%s became %s, %v", once, twice, err)
		}
		if !r.SameData(again) {
			t.Fatal("it names something else")
		}
	})
}
