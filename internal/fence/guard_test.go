package fence

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/cgroup/cgrouptest"
	"dbsupervisor/internal/dockertest"
	"dbsupervisor/internal/fsx"

	"github.com/hashicorp/go-hclog"
)

const soon = 10 * time.Second // limit for what happens at once on an idle machine

// rig is a guard inside of the test, on a clock that the test moves.
type rig struct {
	t     *testing.T
	cfg   GuardConfig
	clock *boottime.Fake
	*Guard
	stop func()
}

func newRig(t *testing.T, edit func(*GuardConfig)) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	clock := boottime.NewFake()
	r := &rig{t: t, clock: clock, cfg: GuardConfig{
		RunDir: t.TempDir(), BootID: "boot-1", Clock: clock,
		Log: hclog.New(&hclog.LoggerOptions{Output: testWriter{t}, Level: hclog.Debug}),
	}}
	if edit != nil {
		edit(&r.cfg)
	}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

// testWriter logs into the test's own output.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func (r *rig) start() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- RunGuard(ctx, r.cfg) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				r.t.Errorf("guard ended: %v", err)
			}
		})
	}
	dockertest.Until(r.t, soon, "the guard answers", func() bool {
		g, err := DialGuard(ctx, r.cfg.RunDir)
		r.Guard = g
		return err == nil
	})
}

// settle waits until the guard's loop waits for its next moment.
func (r *rig) settle() {
	r.t.Helper()
	dockertest.Until(r.t, soon, "the guard waits", func() bool { return r.clock.Waiters() > 0 })
}

func (r *rig) advance(d time.Duration) {
	r.t.Helper()
	r.settle()
	r.clock.Advance(d)
}

func (r *rig) status() GuardStatus {
	r.t.Helper()
	s, err := r.Status(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) in(d time.Duration) boottime.Instant { return r.clock.Now().Add(d) }

// database is a control group with a process in it that dies only of SIGKILL.
func database(t *testing.T, version int, probe string) (id string, g cgroup.Group) {
	t.Helper()
	id = cgrouptest.ID(t)
	g = cgrouptest.New(t, version, id)
	cgrouptest.Start(t, g, probe, "stubborn")
	return id, g
}

func alive(t *testing.T, g cgroup.Group) bool {
	t.Helper()
	empty, err := g.Empty()
	if err != nil {
		t.Fatal(err)
	}
	return !empty
}

func (r *rig) dies(g cgroup.Group) {
	r.t.Helper()
	dockertest.Until(r.t, soon, "the database is killed", func() bool { return !alive(r.t, g) })
}

// lives says so only after the guard's loop has looked at the clock as it is now.
func (r *rig) lives(g cgroup.Group) {
	r.t.Helper()
	r.settle()
	if r.status().Fired || !alive(r.t, g) {
		r.t.Fatal("the database was killed")
	}
}

func TestGuardKillsAtTheDeadlineOnly(t *testing.T) {
	probe := dockertest.Binary(t)
	for version := 1; version <= 2; version++ {
		t.Run("v"+strconv.Itoa(version), func(t *testing.T) {
			r := newRig(t, nil)
			id, g := database(t, version, probe)
			ctx := t.Context()
			if err := r.Arm(ctx, ArmRequest{Term: 3, Container: id, Group: g, Deadline: r.in(10 * time.Second)}); err != nil {
				t.Fatal(err)
			}
			r.advance(10*time.Second - 1)
			r.lives(g)
			if err := r.Extend(ctx, 3, r.in(10*time.Second)); err != nil {
				t.Fatal(err)
			}
			if err := r.Extend(ctx, 3, r.in(5*time.Second)); err != nil { // an older renewal that was overtaken
				t.Fatal(err)
			}
			if err := r.Extend(ctx, 2, r.in(time.Hour)); !errors.Is(err, ErrNotArmed) {
				t.Fatalf("extend of another term: %v", err)
			}
			r.advance(10*time.Second - 1)
			r.lives(g)
			r.advance(1)
			r.dies(g)
			if err := r.Extend(ctx, 3, r.in(time.Hour)); !errors.Is(err, ErrExpired) {
				t.Fatalf("extend after the deadline: %v", err)
			}
			if err := r.Arm(ctx, ArmRequest{Term: 3, Container: id, Group: g, Deadline: r.in(time.Hour)}); !errors.Is(err, ErrStaleTerm) {
				t.Fatalf("arm in a term that was killed: %v", err)
			}
			dockertest.Until(t, soon, "the status says so", func() bool { s := r.status(); return s.Fired && s.Killed })
		})
	}
}

func TestGuardKillsWhatIsFrozen(t *testing.T) {
	probe := dockertest.Binary(t)
	for version := 1; version <= 2; version++ {
		t.Run("v"+strconv.Itoa(version), func(t *testing.T) {
			r := newRig(t, nil)
			id, g := database(t, version, probe)
			if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(time.Second)}); err != nil {
				t.Fatal(err)
			}
			f := NewFreezer(FreezerConfig{Guard: r.Guard, Group: g, Budget: time.Minute})
			if err := f.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.advance(time.Second)
			r.dies(g)
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw of a dead database: %v", err)
			}
		})
	}
}

func TestGuardArm(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	ctx := t.Context()
	id, g := database(t, 2, probe)
	req := ArmRequest{Cluster: "c1", Term: 5, Container: id, Group: g, Deadline: r.in(time.Minute)}
	other := cgrouptest.ID(t)
	for _, c := range []struct {
		name string
		edit func(*ArmRequest)
		want error
	}{
		{"group of another container", func(a *ArmRequest) { a.Container = other }, ErrWrongGroup},
		{"deadline is over", func(a *ArmRequest) { a.Deadline = r.in(0) }, ErrExpired},
		{"good", func(*ArmRequest) {}, nil},
		{"again, later", func(a *ArmRequest) { a.Deadline = r.in(2 * time.Minute) }, nil},
		{"older term", func(a *ArmRequest) { a.Term = 4 }, ErrStaleTerm},
	} {
		a := req
		c.edit(&a)
		if err := r.Arm(ctx, a); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	for _, a := range []ArmRequest{{Term: 9, Deadline: r.in(time.Minute)}, {Term: 9, Container: id, Group: g}} {
		if err := r.Arm(ctx, a); err == nil {
			t.Errorf("incomplete request %+v was taken", a)
		}
	}
	if s := r.status(); !s.Armed || s.Term != 5 || s.Deadline != r.in(2*time.Minute) || s.Container != id {
		t.Fatalf("status %+v", s)
	}
	// Another container takes over: nothing of the first may live on beside it.
	id2, g2 := database(t, 1, probe)
	if err := r.Arm(ctx, ArmRequest{Cluster: "c1", Term: 6, Container: id2, Group: g2, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if alive(t, g) || !alive(t, g2) {
		t.Fatal("two writers, or none")
	}
	// Another cluster counts its terms anew.
	if err := r.Arm(ctx, ArmRequest{Cluster: "c2", Term: 1, Container: id2, Group: g2, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
}

func TestGuardDisarm(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	ctx := t.Context()
	if err := r.Disarm(ctx); err != nil {
		t.Fatalf("disarm of a new guard: %v", err)
	}
	if err := r.Extend(ctx, 1, r.in(time.Minute)); !errors.Is(err, ErrNotArmed) {
		t.Fatalf("extend of a new guard: %v", err)
	}
	if err := r.Guard.Kill(ctx); err != nil {
		t.Fatalf("kill by a new guard: %v", err)
	}
	id, g := database(t, 2, probe)
	if err := r.Arm(ctx, ArmRequest{Term: 1, Container: id, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if err := r.Disarm(ctx); !errors.Is(err, ErrStillRunning) {
		t.Fatalf("disarm of a running database: %v", err)
	}
	if err := g.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.Disarm(ctx); err != nil {
		t.Fatal(err)
	}
	if s := r.status(); s.Armed {
		t.Fatalf("status %+v", s)
	}
	cgrouptest.Start(t, g, probe, "stubborn")
	r.advance(time.Hour)
	r.lives(g)
}

func TestGuardKillNow(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	id, g := database(t, 2, probe)
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if err := r.Guard.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if alive(t, g) {
		t.Fatal("still alive")
	}
}

// The agent armed before it started the container, whose group is not known then; and Docker
// starts it only after the deadline.
func TestGuardFindsWhatStartsLate(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	id := cgrouptest.ID(t)
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	g1 := cgrouptest.New(t, 1, id)
	cgrouptest.Start(t, g1, probe, "stubborn")
	r.advance(time.Minute)
	r.dies(g1)
	g2 := cgrouptest.New(t, 2, id)
	cgrouptest.Start(t, g2, probe, "stubborn")
	dockertest.Until(t, soon, "the first kill is over", func() bool { return r.status().Killed })
	r.advance(sweepEvery)
	r.dies(g2)
}

func TestGuardRestart(t *testing.T) {
	probe := dockertest.Binary(t)
	for _, c := range []struct {
		name   string
		away   time.Duration // how long no guard runs
		before func(*testing.T, *rig)
		dies   bool // at once
		later  bool // at the deadline
	}{
		{name: "deadline passed meanwhile", away: 2 * time.Minute, dies: true},
		{name: "deadline is still to come", away: time.Second, later: true},
		{name: "another boot", away: 2 * time.Minute, before: func(_ *testing.T, r *rig) { r.cfg.BootID = "boot-2" }},
		{name: "state is damaged", away: 2 * time.Minute, before: func(t *testing.T, r *rig) {
			if err := os.WriteFile(filepath.Join(r.cfg.RunDir, "guard.json"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "state names a group of something else", away: 2 * time.Minute, before: func(t *testing.T, r *rig) {
			p := filepath.Join(r.cfg.RunDir, "guard.json")
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			var s guardState
			if err := json.Unmarshal(b, &s); err != nil {
				t.Fatal(err)
			}
			s.Container = strings.Repeat("0f", 32)
			if b, err = json.Marshal(s); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil)
			id, g := database(t, 2, probe)
			if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(30 * time.Second)}); err != nil {
				t.Fatal(err)
			}
			if err := r.Extend(t.Context(), 1, r.in(time.Minute)); err != nil {
				t.Fatal(err)
			}
			r.stop()
			if !alive(t, g) {
				t.Fatal("killed by the guard's end")
			}
			r.clock.Advance(c.away)
			if c.before != nil {
				c.before(t, r)
			}
			r.start()
			if c.dies {
				r.dies(g)
				return
			}
			r.settle()
			if !alive(t, g) {
				t.Fatal("killed")
			}
			if c.later {
				r.advance(time.Minute - c.away - 1)
				r.lives(g)
				r.advance(1)
				r.dies(g)
			}
		})
	}
}

// Guard and agent died in the middle of a freeze: nobody else would end it.
func TestNewGuardThaws(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	id, g := database(t, 1, probe)
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := g.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.start()
	if frozen, err := g.Frozen(); err != nil || frozen {
		t.Fatalf("frozen: %v, %v", frozen, err)
	}
	r.lives(g)
}

// A new guard must act on an old deadline before it does anything that could fail or hang.
func TestGuardKillsBeforeItListens(t *testing.T) {
	probe := dockertest.Binary(t)
	r := newRig(t, nil)
	id, g := database(t, 2, probe)
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.clock.Advance(time.Hour)
	if err := os.MkdirAll(filepath.Join(SocketPath(r.cfg.RunDir), "not empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := RunGuard(t.Context(), r.cfg); err == nil {
		t.Fatal("guard ran without its socket")
	}
	if alive(t, g) {
		t.Fatal("still alive")
	}
}

func TestGuardRefusesWhatItCanNotKeep(t *testing.T) {
	probe := dockertest.Binary(t)
	var mu sync.Mutex
	var broken error
	r := newRig(t, func(c *GuardConfig) {
		c.FS = &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, _ string) error {
			mu.Lock()
			defer mu.Unlock()
			if op == fsx.OpRename {
				return broken
			}
			return nil
		}}
	})
	id, g := database(t, 2, probe)
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: g, Deadline: r.in(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	broken = errors.New("no space left")
	mu.Unlock()
	if err := r.Extend(t.Context(), 1, r.in(time.Hour)); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Fatalf("extend: %v", err)
	}
	if s := r.status(); s.Deadline != r.in(time.Minute) {
		t.Fatalf("deadline moved: %+v", s)
	}
	r.advance(time.Minute)
	r.dies(g) // although that can't be saved either
}

func TestOneGuard(t *testing.T) {
	r := newRig(t, nil)
	if err := RunGuard(t.Context(), r.cfg); !errors.Is(err, ErrGuardRunning) {
		t.Fatalf("second guard: %v", err)
	}
	r.status() // the first one still answers
}

func TestNoGuard(t *testing.T) {
	if _, err := DialGuard(t.Context(), t.TempDir()); !errors.Is(err, ErrNoGuard) {
		t.Fatalf("no socket: %v", err)
	}
	r := newRig(t, nil)
	r.stop()
	if err := r.Extend(t.Context(), 1, r.in(time.Minute)); !errors.Is(err, ErrNoGuard) {
		t.Fatalf("guard has ended: %v", err)
	}
}

func TestFreezeWatch(t *testing.T) {
	probe := dockertest.Binary(t)
	for version := 1; version <= 2; version++ {
		t.Run("v"+strconv.Itoa(version), func(t *testing.T) {
			r := newRig(t, nil)
			_, g := database(t, version, probe)
			ctx := t.Context()
			frozen := func() bool { f, err := g.Frozen(); return err == nil && f }
			thawed := func() bool { return !frozen() }
			freezer := func() *Freezer {
				return NewFreezer(FreezerConfig{Guard: r.Guard, Group: g, Budget: time.Second})
			}

			// As it should be, twice.
			f := freezer()
			for range 2 {
				if err := f.Freeze(ctx); err != nil {
					t.Fatal(err)
				}
				if !frozen() || !r.status().Freezing {
					t.Fatal("not frozen")
				}
				r.advance(time.Second - 1)
				if err := f.Thaw(); err != nil {
					t.Fatal(err)
				}
				if frozen() {
					t.Fatal("still frozen")
				}
			}
			dockertest.Until(t, soon, "the guard has forgotten it", func() bool { return !r.status().Freezing })
			r.advance(time.Hour)

			// Over its budget: thawed, and again when it is frozen late.
			if err := f.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			r.freezeTimers()
			r.clock.Advance(time.Second)
			dockertest.Until(t, soon, "thawed after the budget", thawed)
			if err := g.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			dockertest.Until(t, soon, "thawed once more", func() bool { r.clock.Advance(rethawEvery); return thawed() })
			if err := g.Freeze(ctx); err != nil { // even if it looks frozen at the end
				t.Fatal(err)
			}
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw after the budget: %v", err)
			}
			if frozen() {
				t.Fatal("still frozen")
			}

			// The agent dies.
			if err := f.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			r.Guard.mu.Lock()
			r.freeze.close()
			r.Guard.mu.Unlock()
			dockertest.Until(t, soon, "thawed after the agent's death", thawed)
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw after the connection was lost: %v", err)
			}

			// Somebody else thaws it behind our back.
			if err := f.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			if err := g.Thaw(); err != nil {
				t.Fatal(err)
			}
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw of what was thawed: %v", err)
			}

			// A new agent begins while an old one, stopped, has not ended.
			if err := f.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			young := &Guard{socket: r.socket}
			f2 := NewFreezer(FreezerConfig{Guard: young, Group: g, Budget: time.Second})
			if err := f2.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw of the old one: %v", err)
			}
			if err := f2.Thaw(); !errors.Is(err, ErrFreezeBroken) { // the old one's thaw hit it
				t.Fatalf("thaw of the new one: %v", err)
			}

			// The guard ends: nobody would thaw any more, so it does.
			if err := f.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			r.stop()
			if frozen() {
				t.Fatal("left frozen by the guard's end")
			}
			if err := f.Thaw(); !errors.Is(err, ErrFreezeBroken) {
				t.Fatalf("thaw without a guard: %v", err)
			}
			if err := f.Freeze(ctx); !errors.Is(err, ErrNoGuard) || frozen() {
				t.Fatalf("freeze without a guard: %v, frozen %v", err, frozen())
			}
		})
	}
}

// freezeTimers waits until both the loop and a freeze wait on the clock.
func (r *rig) freezeTimers() {
	r.t.Helper()
	dockertest.Until(r.t, soon, "the guard waits for the budget", func() bool { return r.clock.Waiters() > 1 })
}

func TestFreezeBudgetIsChecked(t *testing.T) {
	r := newRig(t, nil)
	id := cgrouptest.ID(t)
	g := cgrouptest.New(t, 2, id)
	for _, budget := range []time.Duration{0, -1, time.Hour} {
		if err := r.FreezeBegin(t.Context(), g, budget); err == nil {
			t.Errorf("budget %s was taken", budget)
		}
	}
	if err := r.FreezeBegin(t.Context(), cgroup.Group{}, time.Second); err == nil {
		t.Error("a freeze of nothing was taken")
	}
	if broken, err := r.FreezeEnd(t.Context()); !broken || err == nil {
		t.Errorf("end of nothing: %v, %v", broken, err)
	}
	if err := r.FreezeBegin(t.Context(), g, time.Second); err != nil {
		t.Fatal(err)
	}
	if err := r.FreezeBegin(t.Context(), g, time.Second); err == nil {
		t.Error("two at a time")
	}
	if broken, err := r.FreezeEnd(t.Context()); broken || err != nil {
		t.Errorf("end: %v, %v", broken, err)
	}
}

// A freeze of a group that is not there fails, and is over.
func TestFreezerWithoutGroup(t *testing.T) {
	r := newRig(t, nil)
	missing := cgroup.Group{Version: 2, FreezerPath: filepath.Join(t.TempDir(), "none")}
	f := NewFreezer(FreezerConfig{Guard: r.Guard, Group: missing, Budget: time.Second})
	if err := f.Freeze(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if r.Guard.freeze != nil {
		t.Fatal("a freeze that failed was not ended")
	}
}

func TestWatchdogs(t *testing.T) {
	dev := filepath.Join(t.TempDir(), "watchdog")
	if err := os.WriteFile(dev, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	told := map[string]int{}
	r := newRig(t, func(c *GuardConfig) {
		c.Watchdog = WatchdogConfig{
			Device: dev, Interval: time.Second, SystemdInterval: 2 * time.Second, Grace: 3 * time.Second,
			Notify: func(s string) error { mu.Lock(); defer mu.Unlock(); told[s]++; return nil },
		}
	})
	pings := func() int {
		st, err := os.Stat(dev)
		if err != nil {
			t.Fatal(err)
		}
		return int(st.Size())
	}
	for range 5 {
		n := pings()
		r.advance(time.Second)
		dockertest.Until(t, soon, "a ping", func() bool { return pings() > n })
	}
	mu.Lock()
	if told["READY=1"] != 1 || told["WATCHDOG=1"] < 5 {
		t.Errorf("told systemd %v", told)
	}
	mu.Unlock()

	// A group that can't be killed: made of plain files, with a process that does not exist.
	id := cgrouptest.ID(t)
	dir := filepath.Join(t.TempDir(), id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"cgroup.procs": "2147483646\n", "freezer.state": "THAWED"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Arm(t.Context(), ArmRequest{Term: 1, Container: id, Group: cgroup.Group{Version: 1, FreezerPath: dir}, Deadline: r.in(time.Second)}); err != nil {
		t.Fatal(err)
	}
	r.advance(time.Second)
	dockertest.Until(t, soon, "the kill fails", func() bool { return r.status().KillError != "" })
	r.advance(3*time.Second + 1)
	// From its grace on the device is left alone, while the guard goes on trying.
	mu.Lock()
	before := told["WATCHDOG=1"]
	mu.Unlock()
	turns := func(n int) {
		t.Helper()
		dockertest.Until(t, soon, "the loop turns", func() bool {
			r.clock.Advance(retryEvery)
			mu.Lock()
			defer mu.Unlock()
			return told["WATCHDOG=1"] >= before+n
		})
	}
	turns(1)
	n := pings()
	turns(3)
	if pings() != n {
		t.Fatal("the device was pinged although a kill is overdue")
	}
	// The process goes away after all.
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dockertest.Until(t, soon, "pings go on", func() bool { r.clock.Advance(retryEvery); return pings() > n })
	r.stop()
	b, err := os.ReadFile(dev)
	if err != nil || b[len(b)-1] != 'V' {
		t.Fatalf("the device was not told of the orderly end: %q, %v", b[len(b)-1], err)
	}
}

// BenchmarkGuardKill measures from the deadline to the death of a family of seven processes:
// timer, wake-up and kill. Its metric late-ns is the mean, worst-ns the longest.
func BenchmarkGuardKill(b *testing.B) {
	probe := dockertest.Binary(b)
	var err error
	dir := b.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "FENCE_TEST_ROLE=guard", "FENCE_TEST_DIR="+dir)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var g *Guard
	dockertest.Until(b, soon, "guard", func() bool { g, err = DialGuard(context.Background(), dir); return err == nil })
	for version := 1; version <= 2; version++ {
		b.Run("v"+strconv.Itoa(version), func(b *testing.B) {
			var sum, worst time.Duration
			for range b.N {
				id := cgrouptest.ID(b)
				grp := cgrouptest.New(b, version, id)
				cgrouptest.Start(b, grp, probe, "family", "2")
				dockertest.Until(b, soon, "family", func() bool { p, err := grp.Pids(); return err == nil && len(p) == 7 })
				req := ArmRequest{Cluster: id, Term: 1, Container: id, Group: grp, Deadline: boottime.Real{}.Now().Add(200 * time.Millisecond)}
				if err := g.Arm(context.Background(), req); err != nil {
					b.Fatal(err)
				}
				var s GuardStatus
				dockertest.Until(b, soon, "kill", func() bool { s, err = g.Status(context.Background()); return err == nil && s.Killed })
				sum += s.Latency
				worst = max(worst, s.Latency)
			}
			b.ReportMetric(float64(sum)/float64(b.N), "late-ns")
			b.ReportMetric(float64(worst), "worst-ns")
		})
	}
}
