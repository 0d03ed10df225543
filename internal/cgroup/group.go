// Package cgroup freezes, thaws and kills all processes of a container at once through its
// control group, versions 1 and 2, without asking the container runtime. That makes it fast
// (a millisecond) and independent of a daemon that may hang.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrSelf is returned by Freeze and Kill for a group that the calling process is in.
var ErrSelf = errors.New("control group contains this very process")

// Polling intervals: a group freezes in about a millisecond, and a killed database is gone
// after a few.
const (
	pollFirst = 100 * time.Microsecond
	pollMax   = 5 * time.Millisecond
)

// Group is the control group of one container. It is plain data, so that it can be handed to
// another process. A group that has vanished counts as empty, thawed and killed.
type Group struct {
	// Version is the hierarchy that freezes: 1 or 2; 0 means no group.
	Version int `json:"version"`
	// FreezerPath is the group's directory there.
	FreezerPath string `json:"freezer_path"`
	// KillPath is the group's directory in version 2 if the kernel can kill it as one; ""
	// means that the processes are killed one by one.
	KillPath string `json:"kill_path,omitempty"`
}

// IsZero reports whether there is no group.
func (g Group) IsZero() bool { return g.FreezerPath == "" }

// Within returns the part of g that belongs to the container with this full ID: the outermost
// group whose name contains it. (A container's init may have put itself into a group below.)
// ErrNoGroup means that g is not that container's.
func (g Group) Within(id string) (Group, error) {
	if len(id) < minID {
		return Group{}, fmt.Errorf("container id %q is too short: %w", id, ErrNoGroup)
	}
	out := Group{Version: g.Version, FreezerPath: climb(g.FreezerPath, id), KillPath: climb(g.KillPath, id)}
	if out.FreezerPath == "" {
		return Group{}, fmt.Errorf("control group %q is not of container %.12s: %w", g.FreezerPath, id, ErrNoGroup)
	}
	return out, nil
}

// climb cuts path after its first component that contains id; "" without one.
func climb(path, id string) string {
	parts := strings.Split(path, "/")
	for i, p := range parts {
		if strings.Contains(p, id) {
			return strings.Join(parts[:i+1], "/")
		}
	}
	return ""
}

// Freeze stops every process of the group and of the groups below and returns when all of
// them stand still. If it fails, or ctx ends first, everything is thawed again.
func (g Group) Freeze(ctx context.Context) error {
	if g.IsZero() {
		return fmt.Errorf("freeze: %w", ErrNoGroup)
	}
	if err := g.notSelf(); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	err := g.freeze(ctx)
	if err != nil {
		if terr := g.Thaw(); terr != nil {
			err = errors.Join(err, terr)
		}
	}
	return err
}

func (g Group) freeze(ctx context.Context) error {
	wait := newPoll()
	for try := 1; ; try++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("freeze control group: %w", err)
		}
		if g.Version == 1 && try%50 == 0 {
			// The old freezer can stay in FREEZING for ever when processes fork meanwhile;
			// a short thaw lets it start over.
			if err := g.writeFreezer(false); err != nil {
				return fmt.Errorf("freeze control group: %w", err)
			}
		}
		if err := g.writeFreezer(true); err != nil { // also how a group that vanished is noticed
			return fmt.Errorf("freeze control group: %w", err)
		}
		frozen, err := g.Frozen()
		if err != nil {
			return fmt.Errorf("freeze control group: %w", err)
		}
		if frozen {
			return nil
		}
		if err := wait.sleep(ctx); err != nil {
			return fmt.Errorf("freeze control group: %w", err)
		}
	}
}

// Thaw lets the processes continue. It is idempotent.
func (g Group) Thaw() error {
	if g.IsZero() {
		return fmt.Errorf("thaw: %w", ErrNoGroup)
	}
	if err := g.writeFreezer(false); err != nil && !gone(err) {
		return fmt.Errorf("thaw control group: %w", err)
	}
	return nil
}

func (g Group) writeFreezer(frozen bool) error {
	name, val := "cgroup.freeze", "0"
	if frozen {
		val = "1"
	}
	if g.Version == 1 {
		name, val = "freezer.state", "THAWED"
		if frozen {
			val = "FROZEN"
		}
	}
	return write(filepath.Join(g.FreezerPath, name), val)
}

// Frozen reports whether every process stands still right now.
func (g Group) Frozen() (bool, error) {
	if g.Version == 1 {
		b, err := os.ReadFile(filepath.Join(g.FreezerPath, "freezer.state"))
		if err != nil {
			return false, ignoreGone(err, "read freezer state")
		}
		return strings.TrimSpace(string(b)) == "FROZEN", nil
	}
	v, err := event(g.FreezerPath, "frozen")
	return v, ignoreGone(err, "read freezer state")
}

// Kill sends SIGKILL to every process of the group and of the groups below, thaws them (a
// frozen process of a version 1 group keeps a kill pending), and repeats that until the group
// is empty. An error means that it is not: ctx has ended, or the group can't be read.
func (g Group) Kill(ctx context.Context) error {
	if g.IsZero() {
		return fmt.Errorf("kill: %w", ErrNoGroup)
	}
	if err := g.notSelf(); err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	wait := newPoll()
	var last error
	for try := 1; ; try++ {
		last = g.killOnce(ctx, try)
		empty, err := g.Empty()
		if err == nil && empty {
			return nil
		}
		if last == nil {
			last = err
		}
		if err := wait.sleep(ctx); err != nil {
			n := "some"
			if pids, perr := g.Pids(); perr == nil {
				n = strconv.Itoa(len(pids))
			}
			return fmt.Errorf("kill control group: %s processes left: %w", n, errors.Join(err, last))
		}
	}
}

// killOnce signals everybody and thaws. Whatever fails, the rest is still tried.
func (g Group) killOnce(ctx context.Context, try int) error {
	var errs []error
	killed := false
	if g.KillPath != "" {
		err := write(filepath.Join(g.KillPath, "cgroup.kill"), "1")
		switch {
		case err == nil:
			killed = true
		case !gone(err):
			errs = append(errs, fmt.Errorf("write cgroup.kill: %w", err))
		}
	}
	// One by one as well where the kernel did not do it for the very group that freezes.
	if !killed || g.KillPath != g.FreezerPath {
		if try > 3 {
			// It forks faster than it dies: stop it first. The freeze need not be complete, a
			// process in disk sleep would hold it up.
			if err := g.writeFreezer(true); err != nil && !gone(err) {
				errs = append(errs, err)
			}
		}
		if err := g.signalAll(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := g.Thaw(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// signalAll kills by process descriptors that were opened before the processes were listed a
// second time: a number that was reused in between can't hit a stranger.
func (g Group) signalAll() error {
	pids, err := g.Pids()
	if err != nil {
		return err
	}
	fds := make(map[int]int, len(pids))
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds[pid] = fd
		}
	}
	if pids, err = g.Pids(); err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		fd, ok := fds[pid]
		if !ok {
			continue // new: the next round takes it
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// Pids lists the processes of the group and of the groups below, as this process's PID
// namespace numbers them.
func (g Group) Pids() ([]int, error) {
	if g.IsZero() {
		return nil, fmt.Errorf("list processes: %w", ErrNoGroup)
	}
	var out []int
	err := filepath.WalkDir(g.FreezerPath, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			return nil
		}
		var b []byte
		if err == nil {
			b, err = os.ReadFile(filepath.Join(p, "cgroup.procs"))
		}
		if err != nil {
			if gone(err) {
				return fs.SkipDir
			}
			return err
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return fmt.Errorf("parse cgroup.procs: %w", err)
			}
			if pid > 0 { // 0: in another PID namespace
				out = append(out, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list processes of control group: %w", err)
	}
	return out, nil
}

// Empty reports whether no process is left in the group and in the groups below.
func (g Group) Empty() (bool, error) {
	if g.Version == 2 && !g.IsZero() {
		populated, err := event(g.FreezerPath, "populated")
		return err == nil && !populated || gone(err), ignoreGone(err, "read control group")
	}
	pids, err := g.Pids()
	return err == nil && len(pids) == 0, err
}

// notSelf refuses what would stop or kill the caller, who could then not undo it.
func (g Group) notSelf() error {
	pids, err := g.Pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if pid == os.Getpid() {
			return fmt.Errorf("%s: %w", g.FreezerPath, ErrSelf)
		}
	}
	return nil
}

// event reads one line of a version 2 group's cgroup.events.
func event(dir, key string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if err != nil {
		return false, err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, _ := strings.Cut(line, " "); k == key {
			return v == "1", nil
		}
	}
	return false, fmt.Errorf("cgroup.events has no %q", key)
}

// gone says that the group was removed, which happens only to an empty one.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func ignoreGone(err error, what string) error {
	if err == nil || gone(err) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// write writes a control file in one call, never creating it.
func write(path, val string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(val)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// poll waits a little longer each time.
type poll struct{ d time.Duration }

func newPoll() *poll { return &poll{d: pollFirst} }

func (p *poll) sleep(ctx context.Context) error {
	t := time.NewTimer(p.d)
	defer t.Stop()
	if p.d = p.d * 3 / 2; p.d > pollMax {
		p.d = pollMax
	}
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
