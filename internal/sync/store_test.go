package sync

import (
	"context"
	"testing"
	"time"
)

func TestStoreRoundTrip(t *testing.T) {
	h := newStoreHistory(t, newTestStore(t, nil, t.TempDir()), 1)
	full := 0
	for i := range 30 {
		h.step(t, 12, time.Minute)
		got, err := h.s.LoadTree(context.Background(), h.head.Ref)
		if err != nil {
			t.Fatal(err)
		}
		if err := storeSameTrees(got, h.head); err != nil {
			t.Fatalf("step %d: what Write returned and what LoadTree returns differ: %v", i, err)
		}
		if err := h.model.same(h.s, got); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if got.meta.chain == 0 {
			full++
		}
	}
	if full < 2 || full > 25 {
		t.Errorf("%d of 30 manifests are full", full)
	}
	for id, m := range h.models {
		_ = id
		_ = m
	}
}
