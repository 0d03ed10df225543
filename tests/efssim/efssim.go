// Package efssim is a shared directory as an instance has it over NFSv4.1 from EFS, but
// simulated: a FUSE file system that passes everything through to a directory. In between
//
//   - it counts what an NFSv4.1 client would have sent, by operation (docs/EFSSIM.md), from a
//     model of the client's caches: the same calls give the same counts, however noisy the
//     machine is;
//   - it takes as long as EFS does, and moves no more bytes a second (Options);
//   - it breaks on demand: hangs, fails, slows down, runs out of room, loses replies, shows
//     listings of yesterday (Fault).
//
// Several mounts of one directory are several clients of one server, each with its own
// faults and counts. Without Options it keeps nothing between close and open: no attributes,
// no names (missing ones neither), no listings. It has neither O_TMPFILE nor fallocate.
//
// Use Spawn in tests: the file system is then served by a process of its own, and a test
// that is killed while it waits for a hung operation can still end. Mount serves it in the
// caller's process.
package efssim

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Controls is what both a Share and a Remote offer.
type Controls struct {
	do func(request) (reply, error)
}

// Inject adds a fault.
func (c Controls) Inject(f Fault) error {
	_, err := c.do(request{Cmd: "inject", Fault: f})
	return err
}

// Heal removes all faults. What hangs goes on and takes effect.
func (c Controls) Heal() error {
	_, err := c.do(request{Cmd: "heal"})
	return err
}

// Hang holds operations (none named: all) until Heal or Resume.
func (c Controls) Hang(ops ...Op) error { return c.Inject(Fault{Hang: true, Ops: ops}) }

// Resume is Heal, named as the opposite of Hang.
func (c Controls) Resume() error { return c.Heal() }

// Fail fails operations (none named: all) with an error number.
func (c Controls) Fail(errno syscall.Errno, ops ...Op) error {
	return c.Inject(Fault{Errno: errno, Ops: ops})
}

// ReadOnly refuses all changes with EROFS.
func (c Controls) ReadOnly() error { return c.Fail(syscall.EROFS, Changes()...) }

// NoSpace refuses what needs room with ENOSPC once so many more bytes have been written.
func (c Controls) NoSpace(room int64) error {
	return c.Inject(Fault{Errno: syscall.ENOSPC, Ops: Grows(), Room: room})
}

// LoseReply lets the next n operations of these kinds take effect and then fails them, as a
// server does that was restarted before it answered.
func (c Controls) LoseReply(n int, errno syscall.Errno, ops ...Op) error {
	return c.Inject(Fault{Errno: errno, Ops: ops, After: true, Times: n})
}

// Slow gives every look-up or read one delay, every change another, and bounds the bytes a
// second (0: no bound).
func (c Controls) Slow(look, change time.Duration, rate int64) error {
	return errors.Join(
		c.Inject(Fault{Delay: look, Ops: []Op{
			OpLookup, OpGetattr, OpAccess, OpReadlink, OpOpen, OpOpendir, OpReaddir, OpRead, OpStatfs,
		}}),
		c.Inject(Fault{Delay: change, Ops: append(Changes(), OpFsync, OpFsyncdir)}),
		c.Inject(Fault{Rate: rate, Ops: Moves()}),
	)
}

// StaleListings shows the listings of the directories at and below a path as they are now.
func (c Controls) StaleListings(under string) error {
	return c.Inject(Fault{Under: under, Stale: true})
}

// SetPace makes the server faster or slower from now on.
func (c Controls) SetPace(p Pace) error {
	_, err := c.do(request{Cmd: "pace", Pace: p})
	return err
}

// Forget empties the client's caches.
func (c Controls) Forget() error {
	_, err := c.do(request{Cmd: "forget"})
	return err
}

// Stats counts operations since the mount.
func (c Controls) Stats() (Stats, error) {
	r, err := c.do(request{Cmd: "stats"})
	return r.Stats, err
}

// Unmount takes the file system away, also while operations hang or files are open: those
// fail. An empty directory stays in its place. Unmounting twice is no error.
func (c Controls) Unmount() error {
	_, err := c.do(request{Cmd: "unmount"})
	return err
}

// Share is a mounted file system that this process serves.
type Share struct {
	Controls
	mountpoint string
	conn       string // its directory below /sys/fs/fuse/connections, "" if unknown
	f          *faults
	c          *client
	served     chan struct{}
}

// Mount mounts the directory backing at mountpoint, which must be an empty directory. What
// a killed process left mounted there is taken away. The caller calls Unmount. Only root
// can mount.
func Mount(backing, mountpoint string, o Options) (*Share, error) {
	backing, err := filepath.Abs(backing)
	if err != nil {
		return nil, fmt.Errorf("mount share: %w", err)
	}
	if mountpoint, err = filepath.Abs(mountpoint); err != nil {
		return nil, fmt.Errorf("mount share: %w", err)
	}
	if _, dev, err := mounted(mountpoint); err != nil {
		return nil, fmt.Errorf("mount share: %w", err)
	} else if dev != 0 {
		if err := takeAway(mountpoint, connection(dev)); err != nil {
			return nil, fmt.Errorf("remove stale mount: %w", err)
		}
	}
	names, err := os.ReadDir(mountpoint)
	if err != nil {
		return nil, fmt.Errorf("mount share: %w", err)
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("mount share: %s is not empty", mountpoint)
	}
	root, err := fs.NewLoopbackRoot(backing)
	if err != nil {
		return nil, fmt.Errorf("open backing directory %s: %w", backing, err)
	}
	s := &Share{mountpoint: mountpoint, f: newFaults(backing), c: newClient(o), served: make(chan struct{})}
	s.Controls = Controls{do: s.handle}
	opts := fuse.MountOptions{
		FsName:            "dbsupervisor-test-share",
		Name:              "dbshare",
		DirectMountStrict: true,
		AllowOther:        true,
		MaxWrite:          1 << 20,
		MaxBackground:     64,
		// Names only: attributes that come with a listing would be used once without asking.
		DisableReadDirPlus: true,
		// Reads and writes of open files would go to the backing file past us.
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
		// It complains about answers that nobody waits for any more, which is our trade.
		Logger: log.New(io.Discard, "", 0),
	}
	// No time-outs given: the kernel asks every time.
	inner := fs.NewNodeFS(root, &fs.Options{MountOptions: opts})
	server, err := fuse.NewServer(newFaulty(inner, s.f, s.c), mountpoint, &opts)
	if err != nil {
		return nil, fmt.Errorf("mount share at %s: %w", mountpoint, err)
	}
	go func() {
		defer close(s.served)
		server.Serve()
	}()
	if err := server.WaitMount(); err != nil {
		return nil, errors.Join(fmt.Errorf("mount share at %s: %w", mountpoint, err), s.unmount())
	}
	_, dev, err := mounted(mountpoint)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("find own mount: %w", err), s.unmount())
	}
	s.conn = connection(dev)
	return s, nil
}

// Done is closed when the file system is gone, for whatever reason.
func (s *Share) Done() <-chan struct{} { return s.served }

func (s *Share) handle(r request) (reply, error) {
	switch r.Cmd {
	case "inject":
		return reply{}, s.f.inject(r.Fault)
	case "heal":
		s.f.heal()
	case "stats":
		st := s.f.snapshot()
		st.NFS = s.c.count()
		return reply{Stats: st}, nil
	case "pace":
		s.c.pace(r.Pace)
	case "forget":
		s.c.forget()
	case "unmount":
		return reply{}, s.unmount()
	default:
		return reply{}, fmt.Errorf("unknown command %q", r.Cmd)
	}
	return reply{}, nil
}

func (s *Share) unmount() error {
	select {
	case <-s.served: // before, or by somebody else
		return nil
	default:
	}
	s.f.shut()
	if err := takeAway(s.mountpoint, s.conn); err != nil {
		return fmt.Errorf("unmount %s: %w", s.mountpoint, err)
	}
	select {
	case <-s.served:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("unmount %s: still being served", s.mountpoint)
	}
}

// takeAway unmounts, if need be by aborting the connection: all operations under way and
// all later ones on open files fail then.
func takeAway(mountpoint, conn string) error {
	err := unix.Unmount(mountpoint, 0)
	if err == nil || errors.Is(err, unix.EINVAL) { // not a mount point any more
		return nil
	}
	// Files are open in it, or its server is gone.
	if conn != "" {
		// Best effort: MNT_FORCE aborts too, where the control file system is not mounted.
		_ = os.WriteFile(filepath.Join(conn, "abort"), []byte("1"), 0)
	}
	if err := unix.Unmount(mountpoint, unix.MNT_FORCE|unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// mounted finds the FUSE file system mounted last at path: its type and device, 0 if none.
// It never touches the file system itself, which may hang.
func mounted(path string) (fstype string, dev uint64, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", 0, err
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(data)) {
		// id parent major:minor root mountpoint options [tags] - type source options
		f := strings.Fields(line)
		if len(f) < 10 || unescape.Replace(f[4]) != path {
			continue
		}
		fstype, dev = "", 0
		for i := 6; i < len(f)-1; i++ {
			if f[i] == "-" {
				fstype = f[i+1]
				break
			}
		}
		if strings.HasPrefix(fstype, "fuse") {
			major, minor, _ := strings.Cut(f[2], ":")
			a, errA := strconv.ParseUint(major, 10, 32)
			b, errB := strconv.ParseUint(minor, 10, 32)
			if err := errors.Join(errA, errB); err != nil {
				return "", 0, fmt.Errorf("parse mountinfo: %w", err)
			}
			dev = unix.Mkdev(uint32(a), uint32(b))
		}
	}
	return fstype, dev, nil
}

// connection is where the kernel lets a FUSE connection be aborted.
func connection(dev uint64) string {
	dir := filepath.Join("/sys/fs/fuse/connections", strconv.FormatUint(uint64(unix.Minor(dev)), 10))
	if _, err := os.Stat(dir); err != nil {
		return ""
	}
	return dir
}
