// Package cgrouptest makes real control groups for tests.
package cgrouptest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"dbsupervisor/internal/cgroup"
)

// ID returns a new text that looks like a container's full ID.
func ID(t testing.TB) string {
	t.Helper()
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

// New makes a control group of a version whose name contains id, and kills and removes it when
// the test ends. The test is skipped where there is no such hierarchy, or not as root.
func New(t testing.TB, version int, id string) cgroup.Group {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	points, file := []string{"/sys/fs/cgroup/freezer"}, "cgroup.procs"
	if version == 2 {
		points, file = []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"}, "cgroup.controllers"
	}
	for _, p := range points {
		if _, err := os.Stat(filepath.Join(p, file)); err != nil {
			continue
		}
		dir := filepath.Join(p, "dbsupervisor-test-"+id)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("can't make a control group: %v", err)
		}
		g := cgroup.Group{Version: version, FreezerPath: dir}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.kill")); err == nil {
			g.KillPath = dir
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := g.Kill(ctx); err != nil {
				t.Errorf("clean up control group: %v", err)
			}
			// Dead processes leave the group a moment later.
			var err error
			for range 500 {
				if err = os.Remove(dir); err == nil || os.IsNotExist(err) {
					return
				}
				time.Sleep(2 * time.Millisecond)
			}
			t.Errorf("remove control group: %v", err)
		})
		return g
	}
	t.Skipf("no control group hierarchy of version %d that can freeze", version)
	return cgroup.Group{}
}

// Start runs a command inside of a group from its first instruction on. It is reaped when it
// dies; the group's clean-up kills it.
func Start(t testing.TB, g cgroup.Group, argv ...string) *exec.Cmd {
	t.Helper()
	script := `echo $$ > "$0" && exec "$@"`
	args := append([]string{"-c", script, filepath.Join(g.FreezerPath, "cgroup.procs")}, argv...)
	cmd := exec.Command("/bin/sh", args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if empty, err := g.Empty(); err == nil && !empty {
			return cmd
		}
		if time.Now().After(deadline) {
			t.Fatal("process did not enter its control group")
		}
		time.Sleep(time.Millisecond)
	}
}
