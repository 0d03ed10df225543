package cgroup_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/cgroup/cgrouptest"
	"dbsupervisor/internal/dockertest"
)

// kinds are the groups that a container can have: both versions, with and without the kernel's
// help for killing.
func kinds(t *testing.T, f func(t *testing.T, g cgroup.Group)) {
	for _, k := range []struct {
		version int
		byPid   bool
	}{{1, true}, {2, false}, {2, true}} {
		t.Run(fmt.Sprintf("v%d byPid=%v", k.version, k.byPid), func(t *testing.T) {
			g := cgrouptest.New(t, k.version, cgrouptest.ID(t))
			if k.byPid {
				g.KillPath = ""
			} else if g.KillPath == "" {
				t.Skip("kernel has no cgroup.kill")
			}
			f(t, g)
		})
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

func TestFreezeStopsAndThawContinues(t *testing.T) {
	probe := dockertest.Binary(t)
	kinds(t, func(t *testing.T, g cgroup.Group) {
		file := filepath.Join(t.TempDir(), "count")
		cgrouptest.Start(t, g, probe, "count", file)
		grows := func() bool { n := size(t, file); return n > 0 && n != sizeAfter(t, file, n) }
		dockertest.Until(t, 10*time.Second, "it writes", grows)
		for range 10 {
			if err := g.Freeze(within(t, 10*time.Second)); err != nil {
				t.Fatal(err)
			}
			if f, err := g.Frozen(); err != nil || !f {
				t.Fatalf("frozen: %v, %v", f, err)
			}
			// Writes every 2 ms: had it not stopped, this would see it.
			if n := size(t, file); n != sizeAfter(t, file, n) {
				t.Fatal("a frozen process wrote")
			}
			if err := g.Thaw(); err != nil {
				t.Fatal(err)
			}
			if f, err := g.Frozen(); err != nil || f {
				t.Fatalf("frozen after thaw: %v, %v", f, err)
			}
			dockertest.Until(t, 10*time.Second, "it writes again", grows)
		}
	})
}

// sizeAfter returns the size once it differs from n, or after 30 ms.
func sizeAfter(t *testing.T, file string, n int64) int64 {
	for deadline := time.Now().Add(30 * time.Millisecond); time.Now().Before(deadline); {
		if m := size(t, file); m != n {
			return m
		}
		time.Sleep(time.Millisecond)
	}
	return n
}

func TestFreezeCatchesForkingProcesses(t *testing.T) {
	probe := dockertest.Binary(t)
	kinds(t, func(t *testing.T, g cgroup.Group) {
		cgrouptest.Start(t, g, probe, "churn")
		for range 10 {
			if err := g.Freeze(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			a, err := g.Pids()
			if err != nil {
				t.Fatal(err)
			}
			b, err := g.Pids()
			// One that was exiting already may still go; none may come.
			if err != nil || slices.ContainsFunc(b, func(pid int) bool { return !slices.Contains(a, pid) }) {
				t.Fatalf("processes came into a frozen group: %v, then %v, %v", a, b, err)
			}
			if err := g.Thaw(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestKill(t *testing.T) {
	probe := dockertest.Binary(t)
	for _, c := range []struct {
		name   string
		argv   []string
		frozen bool
	}{
		{"one process that ignores signals", []string{"stubborn"}, false},
		{"children and grandchildren", []string{"family", "3"}, false},
		{"frozen", []string{"family", "2"}, true},
		{"forks faster than it dies", []string{"churn"}, false},
		{"forks and frozen", []string{"churn"}, true},
		{"is another process at every look", []string{"hop"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			kinds(t, func(t *testing.T, g cgroup.Group) {
				cgrouptest.Start(t, g, append([]string{probe}, c.argv...)...)
				if c.argv[0] == "family" {
					n, _ := strconv.Atoi(c.argv[1])
					dockertest.Until(t, 10*time.Second, "the family is complete", func() bool {
						pids, err := g.Pids()
						return err == nil && len(pids) >= 1<<(n+1)-1
					})
				}
				if c.frozen {
					if err := g.Freeze(within(t, 20*time.Second)); err != nil {
						t.Fatal(err)
					}
				}
				if err := g.Kill(within(t, 20*time.Second)); err != nil {
					t.Fatal(err)
				}
				if pids, err := g.Pids(); err != nil || len(pids) != 0 {
					t.Fatalf("left alive: %v, %v", pids, err)
				}
				if f, err := g.Frozen(); g.Version == 1 && (err != nil || f) {
					t.Fatalf("group is left frozen: %v, %v", f, err)
				}
				if err := g.Kill(within(t, time.Second)); err != nil {
					t.Fatalf("second kill: %v", err)
				}
			})
		})
	}
}

func TestKillReachesNestedGroups(t *testing.T) {
	probe := dockertest.Binary(t)
	kinds(t, func(t *testing.T, g cgroup.Group) {
		sub := g
		sub.FreezerPath = filepath.Join(g.FreezerPath, "init")
		if err := os.Mkdir(sub.FreezerPath, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // before the parent's
			dockertest.Until(t, 5*time.Second, "nested group removed", func() bool {
				err := os.Remove(sub.FreezerPath)
				return err == nil || os.IsNotExist(err)
			})
		})
		cgrouptest.Start(t, sub, probe, "stubborn")
		if empty, err := g.Empty(); err != nil || empty {
			t.Fatalf("empty: %v, %v", empty, err)
		}
		if err := g.Freeze(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		if f, err := sub.Frozen(); err != nil || !f {
			t.Fatalf("nested group frozen: %v, %v", f, err)
		}
		if err := g.Kill(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		if empty, err := sub.Empty(); err != nil || !empty {
			t.Fatalf("empty after kill: %v, %v", empty, err)
		}
	})
}

func TestVanishedGroupIsDead(t *testing.T) {
	for version := 1; version <= 2; version++ {
		g := cgroup.Group{Version: version, FreezerPath: filepath.Join(t.TempDir(), "gone"), KillPath: "/nowhere/gone"}
		if err := g.Kill(within(t, time.Second)); err != nil {
			t.Errorf("kill: %v", err)
		}
		if err := g.Thaw(); err != nil {
			t.Errorf("thaw: %v", err)
		}
		if f, err := g.Frozen(); err != nil || f {
			t.Errorf("frozen: %v, %v", f, err)
		}
		if e, err := g.Empty(); err != nil || !e {
			t.Errorf("empty: %v, %v", e, err)
		}
		if err := g.Freeze(within(t, time.Second)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("freeze: %v", err)
		}
	}
	var zero cgroup.Group
	for _, err := range []error{zero.Kill(t.Context()), zero.Thaw(), zero.Freeze(t.Context())} {
		if !errors.Is(err, cgroup.ErrNoGroup) {
			t.Errorf("no group: %v", err)
		}
	}
}

func TestFreezeThatDoesNotSucceedThaws(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"cgroup.freeze": "0", "cgroup.events": "populated 1\nfrozen 0\n", "cgroup.procs": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g := cgroup.Group{Version: 2, FreezerPath: dir}
	if err := g.Freeze(within(t, 20*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("freeze: %v", err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.freeze"))
	if err != nil || string(b) != "0" {
		t.Fatalf("cgroup.freeze is %q, %v: left freezing", b, err)
	}
	// And a kill that can't succeed says how many are left.
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("2147483646\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.Kill(within(t, 20*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 processes left") {
		t.Fatalf("kill: %v", err)
	}
}

func TestOwnGroupIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		t.Fatal(err)
	}
	g := cgroup.Group{Version: 1, FreezerPath: dir}
	if err := g.Kill(t.Context()); !errors.Is(err, cgroup.ErrSelf) {
		t.Fatalf("kill: %v", err)
	}
	if err := g.Freeze(t.Context()); !errors.Is(err, cgroup.ErrSelf) {
		t.Fatalf("freeze: %v", err)
	}
}

func TestContainer(t *testing.T) {
	image := dockertest.Image(t)
	id := dockertest.Run(t, "cgroup", image, "family", "2")
	pid, err := strconv.Atoi(dockertest.Pid(t, id))
	if err != nil {
		t.Fatal(err)
	}
	g, err := cgroup.Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	if g, err = g.Within(id); err != nil {
		t.Fatal(err)
	}
	found, err := cgroup.Find(id)
	if err != nil || len(found) != 1 || found[0] != g {
		t.Fatalf("found %+v, %v; want %+v", found, err, g)
	}
	dockertest.Until(t, 10*time.Second, "the family is complete", func() bool {
		pids, err := g.Pids()
		return err == nil && len(pids) == 7
	})
	if err := g.Freeze(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := g.Kill(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	dockertest.Until(t, 20*time.Second, "Docker notices", func() bool {
		return dockertest.Docker(t, "inspect", "-f", "{{.State.Running}} {{.State.ExitCode}}", id) == "false 137"
	})
}

// BenchmarkKill measures from the decision to the death of the last of seven processes.
func BenchmarkKill(b *testing.B) {
	probe := dockertest.Binary(b)
	for version := 1; version <= 2; version++ {
		for _, frozen := range []bool{false, true} {
			b.Run(fmt.Sprintf("v%d frozen=%v", version, frozen), func(b *testing.B) {
				for range b.N {
					b.StopTimer()
					g := cgrouptest.New(b, version, cgrouptest.ID(b))
					cgrouptest.Start(b, g, probe, "family", "2")
					dockertest.Until(b, 10*time.Second, "family", func() bool { p, err := g.Pids(); return err == nil && len(p) == 7 })
					if frozen {
						if err := g.Freeze(context.Background()); err != nil {
							b.Fatal(err)
						}
					}
					b.StartTimer()
					if err := g.Kill(context.Background()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkFreeze measures a freeze and a thaw of seven processes.
func BenchmarkFreeze(b *testing.B) {
	probe := dockertest.Binary(b)
	for version := 1; version <= 2; version++ {
		b.Run(fmt.Sprintf("v%d", version), func(b *testing.B) {
			g := cgrouptest.New(b, version, cgrouptest.ID(b))
			cgrouptest.Start(b, g, probe, "family", "2")
			b.ResetTimer()
			for range b.N {
				if err := g.Freeze(context.Background()); err != nil {
					b.Fatal(err)
				}
				if err := g.Thaw(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
