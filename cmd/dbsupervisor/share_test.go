package main

import (
	"time"

	volsync "dbsupervisor/internal/sync"
)

// testSnapshots is a list as the store gives it: newest first.
func testSnapshots(now time.Time) []volsync.SnapshotInfo {
	make := func(id string, ago time.Duration) volsync.SnapshotInfo {
		return volsync.SnapshotInfo{SnapshotRef: volsync.SnapshotRef{ID: id, Frozen: now.Add(-ago)}}
	}
	return []volsync.SnapshotInfo{make("2-3-c", time.Minute), make("1-2-b", 2*time.Minute), make("1-1-a", 3*time.Minute)}
}
