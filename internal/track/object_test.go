package track

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"strings"
	"testing"
)

// The object that is committed was made from the sources that are committed.
func TestObjectIsOfTheSource(t *testing.T) {
	h := sha256.New()
	for _, name := range []string{"bpf/track.c", "bpf/kernel.h"} {
		b, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			t.Skip("runs in the source tree only")
		}
		must(t, err)
		h.Write(b)
	}
	noted, err := os.ReadFile("bpf/track.o.source")
	must(t, err)
	if got := hex.EncodeToString(h.Sum(nil)); got != strings.TrimSpace(string(noted)) {
		t.Errorf("bpf/track.o was made from other sources; run make bpf")
	}
}

// Every program of the object is used, and every hook has its program.
func TestHooksMatchTheObject(t *testing.T) {
	spec, err := loadObject()
	must(t, err)
	for _, name := range programNames(hooks()) {
		if spec.Programs[name] == nil {
			t.Errorf("no program %s", name)
		}
		delete(spec.Programs, name)
	}
	for name := range spec.Programs {
		t.Errorf("program %s is never attached", name)
	}
}
