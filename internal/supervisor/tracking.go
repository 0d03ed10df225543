package supervisor

import (
	"dbsupervisor/internal/api"
	volsync "dbsupervisor/internal/sync"
)

func captureOf(c volsync.CaptureStats) api.Capture {
	return api.Capture{Tier: c.Tier, Rounds: c.Rounds, Names: c.Names, FrozenNames: c.FrozenNames,
		CandidateBlocks: c.Candidates, ReadBytes: c.ReadBytes, FrozenBytes: c.FrozenBytes, CapturedBytes: c.ChangedBytes,
		PredictedFreezeMS: ms(c.Predicted), Unexplained: c.Unexplained, Lost: c.Lost}
}

// predicted is how long the last freeze was expected to take, in milliseconds; nil if there
// was no telling.
func (s *Supervisor) predicted() *float64 {
	if p := s.volume.Tracking().Predicted; p > 0 {
		v := ms(p)
		return &v
	}
	return nil
}

// tracking sums up how change has been found.
func (s *Supervisor) tracking() api.Tracking {
	t := s.volume.Tracking()
	return api.Tracking{SourceBytes: t.ReadBytes, FrozenBytes: t.FrozenBytes, Lost: t.Lost, TooLong: t.TooLong,
		RehashedBytes: t.RehashedBytes, RehashChecked: t.RehashChecked, RehashAlarms: t.Alarms, Alarm: t.Alarm}
}
