package opscript_test

import (
	"testing"

	"dbsupervisor/tests/efssim/opscript"
)

func TestScript(t *testing.T) {
	s := opscript.New(t.TempDir(), t.TempDir())
	for _, step := range s.Steps() {
		if err := step.Run(t.Context()); err != nil {
			t.Fatalf("%s: %v", step.Name, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
