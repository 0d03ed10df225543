package api

// Capture counts what finding and copying the changes of one snapshot took. Bytes are bytes
// of data that were read from the volume.
type Capture struct {
	Tier            string `json:"tier"`             // how change was found: "tracked" or "hashed"
	Rounds          int    `json:"rounds"`           // looks at the volume before the freeze
	Names           int    `json:"names"`            // names that were looked at, in all rounds
	FrozenNames     int    `json:"frozen_names"`     // of them in the freeze
	CandidateBlocks int64  `json:"candidate_blocks"` // blocks of 8 KiB that might have changed, in all rounds
	ReadBytes       int64  `json:"read_bytes"`       // read while the database ran
	FrozenBytes     int64  `json:"frozen_bytes"`     // read in the freeze
	CapturedBytes   int64  `json:"captured_bytes"`   // that had changed
	// PredictedFreezeMS is what the freeze was expected to take; 0 if there was no telling.
	PredictedFreezeMS float64 `json:"predicted_freeze_ms"`
	// Unexplained are files that were read as a whole because nothing had reported their change.
	Unexplained int `json:"unexplained"`
	// Lost is how often the kernel lost reports during this capture.
	Lost int `json:"lost"`
}

// Tracking sums up how change has been found since the agent started.
type Tracking struct {
	SourceBytes   int64 `json:"source_bytes"`   // read from the volume for snapshots, while the database ran
	FrozenBytes   int64 `json:"frozen_bytes"`   // and in freezes
	Lost          int64 `json:"lost"`           // how often the kernel lost reports
	TooLong       int64 `json:"too_long"`       // snapshots given up because the freeze took or would have taken too long
	RehashedBytes int64 `json:"rehashed_bytes"` // read to prove the tracker
	RehashChecked int64 `json:"rehash_checked"` // blocks that were proved unchanged
	RehashAlarms  int64 `json:"rehash_alarms"`  // changes that the tracker had not reported
	// Alarm says what was found to have changed unreported, and what was done; empty: nothing.
	Alarm string `json:"alarm,omitempty"`
}

// collectTracking turns it into metrics.
func collectTracking(s Status, gauge func(name, help string, v float64, labels ...string), counter func(name, help string, v float64)) {
	if l := s.LastCommit; l != nil {
		gauge("snapshot_last_read_bytes", "Bytes that the last snapshot read from the volume while the database ran.", float64(l.Capture.ReadBytes))
		gauge("snapshot_last_frozen_read_bytes", "Bytes that the last snapshot read from the volume in the freeze.", float64(l.Capture.FrozenBytes))
		gauge("snapshot_last_predicted_freeze_seconds", "How long the last snapshot's freeze was expected to be.", l.Capture.PredictedFreezeMS/1000)
	}
	t := s.Sync.Tracking
	counter("sync_source_read_bytes_total", "Bytes read from the volume for snapshots while the database ran.", float64(t.SourceBytes))
	counter("sync_source_frozen_read_bytes_total", "Bytes read from the volume for snapshots in freezes.", float64(t.FrozenBytes))
	counter("sync_tracker_lost_total", "How often the kernel lost reports of changes, and files were found by their stat instead.", float64(t.Lost))
	counter("snapshot_freeze_too_long_total", "Snapshots given up because the freeze took or would have taken too long.", float64(t.TooLong))
	counter("sync_rehash_bytes_total", "Bytes of the volume read to prove the tracker.", float64(t.RehashedBytes))
	counter("sync_rehash_blocks_total", "Blocks that were proved to be as the tracker says.", float64(t.RehashChecked))
	counter("sync_rehash_alarms_total", "Changes that the tracker had not reported.", float64(t.RehashAlarms))
}
