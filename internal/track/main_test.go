package track

import (
	"os"
	"testing"
)

// The test binary is also the program that writes: what the process of the Tracker writes
// itself is not recorded.
func TestMain(m *testing.M) {
	switch os.Getenv("TRACK_TEST_ROLE") {
	case "writer":
		os.Exit(writerMain())
	case "sparse":
		os.Exit(sparseMain())
	case "exchange":
		os.Exit(exchangeMain())
	case "agent":
		os.Exit(agentMain())
	}
	os.Exit(m.Run())
}
