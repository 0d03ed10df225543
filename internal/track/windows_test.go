package track

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

func rounds(t testing.TB) int {
	n := 10
	if testing.Short() {
		n = 2
	}
	if s := os.Getenv("TRACK_ROUNDS"); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		must(t, err)
	}
	return n
}

// TestWindows changes files at random, in each way there is, and keeps a copy that is
// brought up to date by what the Tracker says alone: once in the middle, while the writer
// runs, and once at the end, while it rests as if frozen. Then all must be equal.
func TestWindows(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TRACK_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	t.Logf("TRACK_SEED=%d", seed)
	eachFS(t, func(t *testing.T, v *volume) {
		for k, kind := range kinds() {
			t.Run(kind, func(t *testing.T) {
				w := startWriter(t, v)
				m := newMirror(t, v, v.open(t))
				m.sum = tally{}
				for n := range rounds(t) {
					windowOf(m, w, kind, seed+uint64(k*1000+n))
					if wrong := m.frozen(); len(wrong) > 0 {
						t.Fatalf("window %d: %d blocks or names missed: %.20q", n, len(wrong), wrong)
					}
				}
				must(t, m.tr.Settle())
				t.Log(m.sum)
				if s := m.sum; kind == "aligned" && s.written > s.changed*3/2 {
					t.Errorf("more than 1.5 times as many blocks reported as changed: %v", s)
				}
			})
		}
	})
}

func windowOf(m *mirror, w *writer, kind string, seed uint64) {
	w.begin(kind, seed, 120)
	w.expect("half")
	m.running()
	w.expect("done")
}

func (s tally) String() string {
	ratio := func(n int) float64 { return float64(n) / float64(max(s.changed, 1)) }
	return fmt.Sprintf("%d blocks changed; reported as written %.2f times that, as dirtied %.2f, copied %.2f", s.changed, ratio(s.written), ratio(s.dirtied), ratio(s.asked))
}
