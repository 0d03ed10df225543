// Package kernel_test runs the tests of what depends on the kernel on another one than this
// machine's: Debian's cloud kernel, in an emulated machine. `make test-kernel` runs it.
package kernel_test

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dbsupervisor/tests/qemu"
)

// limit is the whole time of a guest; the tests in it have a little less.
const limit = 10 * time.Minute

func kernel(t *testing.T) qemu.Kernel {
	t.Helper()
	if os.Getenv("DBSUPERVISOR_QEMU") == "" {
		t.Skip("needs an emulated machine: make test-kernel")
	}
	k, err := qemu.FetchKernel()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s", k.Release)
	if !strings.HasPrefix(k.Release, "6.1.") {
		t.Logf("THIS IS NOT 6.1: that comes with Debian 12")
	}
	return k
}

// binary builds a package's tests as one static program.
func binary(t *testing.T, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "test")
	cmd := exec.Command("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}

// inGuest runs a package's tests in a guest, with real file systems on loop devices, and returns what they
// said. Tests that need tracking must not be left out there.
func inGuest(t *testing.T, k qemu.Kernel, name, pkg, script string) string {
	t.Helper()
	var mu sync.Mutex
	var lines []string
	status, err := qemu.Run(t.Context(), qemu.Config{
		Name: name, Kernel: k, Dir: t.TempDir(), Memory: 3072,
		Modules:  []string{"ext4", "xfs", "loop"},
		Programs: []string{"mkfs.ext4", "mkfs.xfs", "xfs_db", "xfs_io"},
		Files:    map[string]string{"/test/test": binary(t, pkg)},
		// A temporary directory of its own: half of the memory is the usual limit.
		Script: "mount -o remount,size=80% /tmp\nexport DBSUPERVISOR_REQUIRE_TRACKING=1\n" +
			"test -e /sys/kernel/btf/vmlinux && test -e /sys/kernel/btf/xfs || exit 90\n" + script,
		Log: func(line string) {
			mu.Lock()
			defer mu.Unlock()
			lines = append(lines, line)
			t.Log(line)
		},
	}, limit)
	switch {
	case err != nil:
		t.Error(err)
	case status == 90:
		t.Errorf("the kernel has no BTF of its own or of its module xfs")
	case status != 0:
		t.Errorf("exit status %d", status)
	}
	mu.Lock()
	defer mu.Unlock()
	return strings.Join(lines, "\n")
}

// ran fails if what a guest said does not show that tests passed, and that none was left out but
// those named.
func ran(t *testing.T, out string, skipped ...string) {
	t.Helper()
	if !strings.Contains(out, "--- PASS: Test") || strings.Contains(out, "no tests to run") {
		t.Error("no test ran")
	}
	for line := range strings.Lines(out) {
		_, what, skip := strings.Cut(line, "--- SKIP: ")
		if skip && !slices.ContainsFunc(skipped, func(s string) bool { return strings.HasPrefix(what, s+" ") }) {
			t.Errorf("left out: %s", what)
		}
	}
}

// TestTrack: internal/track's tests, with real programs in the kernel. TRACK_ROUNDS says how
// many random windows there are of each kind.
func TestTrack(t *testing.T) {
	out := inGuest(t, kernel(t), "track", "dbsupervisor/internal/track",
		"TRACK_ROUNDS="+cmp.Or(os.Getenv("TRACK_ROUNDS"), "3")+" /test/test -test.v -test.timeout=9m")
	// One looks at the source, the other needs Linux 6.10.
	ran(t, out, "TestObjectIsOfTheSource", "TestExchangedExtents/exchange_range")
}

// TestVolume: the contract of a volume, with what this kernel reports and without.
func TestVolume(t *testing.T) {
	out := inGuest(t, kernel(t), "volume", "dbsupervisor/internal/sync",
		"/test/test -test.v -test.timeout=9m -test.run='^TestVolumeRandom(Kernel|Hashed)$'")
	ran(t, out)
}
