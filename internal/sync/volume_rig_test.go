package sync

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strings"
	stdsync "sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// volDesc is what a test wants to know of one name, found out without the code under test.
type volDesc struct {
	Type   string
	Mode   uint32
	UID    uint32
	GID    uint32
	MTime  int64
	Size   int64
	Target string
	Group  string // first name of the same inode
	XAttrs map[string]string
	Sum    [32]byte
	Blocks string // per block: d(ata), h(ole), z(ero)
}

// volDescribe looks at everything below a directory.
func volDescribe(t testing.TB, root string) map[string]volDesc {
	t.Helper()
	out := map[string]volDesc{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		d := volDesc{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, MTime: st.Mtim.Nano(), XAttrs: volXAttrs(t, p)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			d.Type, d.Size = "file", st.Size
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			d.Sum = sha256.Sum256(b)
			d.Blocks = volBlocks(t, p, st.Size, st.Blocks*512)
			if g, ok := first[st.Ino]; ok {
				d.Group = g
			} else {
				first[st.Ino], d.Group = rel, rel
			}
		case unix.S_IFDIR:
			d.Type = "dir"
		case unix.S_IFLNK:
			d.Type = "link"
			if d.Target, err = os.Readlink(p); err != nil {
				return err
			}
		default:
			return nil // no snapshot keeps it
		}
		out[rel] = d
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func volXAttrs(t testing.TB, p string) map[string]string {
	t.Helper()
	out := map[string]string{}
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return out
		}
		t.Fatal(err)
	}
	for _, name := range bytes.Split(bytes.TrimSuffix(buf[:n], []byte{0}), []byte{0}) {
		if len(name) == 0 || bytes.HasPrefix(name, []byte("trusted.SGI_ACL_")) {
			continue // XFS shows access control lists twice
		}
		val := make([]byte, 64<<10)
		k, err := unix.Lgetxattr(p, string(name), val)
		if err != nil {
			t.Fatal(err)
		}
		out[string(name)] = string(val[:k])
	}
	return out
}

func volBlocks(t testing.TB, p string, size, alloc int64) string {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b strings.Builder
	err = readBlocks(context.Background(), f, size, alloc, 0, blocksOf(size), func(_ uint64, codes []code, _ []byte) error {
		for _, c := range codes {
			b.WriteByte(" dhz"[c.kind()])
		}
		return nil
	})
	var fsinfo unix.Statfs_t
	volOK(t, unix.Fstatfs(int(f.Fd()), &fsinfo))
	// tmpfs doesn't tell preallocated ranges from holes, and XFS preallocates by itself.
	if fsinfo.Type == unix.TMPFS_MAGIC || fsinfo.Type == unix.XFS_SUPER_MAGIC {
		return strings.ReplaceAll(b.String(), "z", "h")
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// volSame fails unless two descriptions are equal in everything.
func volSame(t volFataler, what string, want, got map[string]volDesc) {
	t.Helper()
	var bad []string
	for p, w := range want {
		if g, ok := got[p]; !ok {
			bad = append(bad, fmt.Sprintf("%q is missing", p))
		} else if !reflect.DeepEqual(w, g) {
			bad = append(bad, fmt.Sprintf("%q:\n  want %+v\n  got  %+v", p, w, g))
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			bad = append(bad, fmt.Sprintf("%q should not be there", p))
		}
	}
	if len(bad) > 0 {
		sort.Strings(bad)
		t.Fatalf("%s:\n%s", what, strings.Join(bad, "\n"))
	}
}

type volFataler interface {
	Helper()
	Fatalf(string, ...any)
}

// volFreezer is a freezer that a test can look into. It never freezes a process.
type volFreezer struct {
	mu             stdsync.Mutex
	frozen         bool
	freezes, thaws int
	onFreeze       func()
	onThaw         func()
	thawErr        error
	freezeErr      error
}

func (f *volFreezer) Freeze(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.freezes++
	if f.freezeErr != nil {
		return f.freezeErr
	}
	f.frozen = true
	if f.onFreeze != nil {
		f.onFreeze()
	}
	return nil
}

func (f *volFreezer) Thaw() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.thaws++
	f.frozen = false
	if f.onThaw != nil {
		f.onThaw()
	}
	return f.thawErr
}

func (f *volFreezer) isFrozen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen
}

// volRig is a store and what its register would say.
type volRig struct {
	t     testing.TB
	store *Store
	head  *Tree
	seq   uint64
	temp  func() string // where it restores to
}

func newVolRig(t testing.TB) *volRig {
	t.Helper()
	s := newTestStore(t, nil, volRAM(t))
	if err := s.Init(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &volRig{t: t, store: s, temp: t.TempDir}
}

func (r *volRig) ref() SnapshotRef {
	if r.head == nil {
		return SnapshotRef{}
	}
	return r.head.Ref
}

// open opens a volume in dir; edit may be nil.
func (r *volRig) open(dir string, edit func(*VolumeConfig)) *Volume {
	r.t.Helper()
	cfg := VolumeConfig{Dir: dir, Rand: rand.Reader, BootID: "boot-1", Workers: 2, Tier: TierHashed}
	if testing.Verbose() {
		cfg.Log = hclog.New(&hclog.LoggerOptions{Level: hclog.Warn})
	}
	if edit != nil {
		edit(&cfg)
	}
	v, err := OpenVolume(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = v.Close() })
	return v
}

// live opens a volume on which a database runs, without a snapshot.
func (r *volRig) live(edit func(*VolumeConfig)) *Volume {
	r.t.Helper()
	v := r.open(r.t.TempDir(), edit)
	volOK(r.t, v.MarkLive(context.Background(), 1))
	volOK(r.t, v.Baseline(context.Background(), r.store, r.ref()))
	return v
}

// write ships a capture without committing it.
func (r *volRig) write(c *Capture) *Tree {
	r.t.Helper()
	r.seq++
	tree, _, err := r.store.Write(context.Background(), WriteRequest{Base: r.head, Delta: c.Delta, Blocks: c.Blocks,
		Term: 1, Seq: r.seq, Frozen: c.Frozen, Writer: "alpha"})
	volOK(r.t, err)
	return tree
}

// snapshot captures, ships and commits.
func (r *volRig) snapshot(v *Volume, req CaptureRequest) (*Capture, SnapshotRef) {
	r.t.Helper()
	if req.Freezer == nil && !req.NoFreeze {
		req.Freezer = &volFreezer{}
	}
	if req.MaxFreeze == 0 {
		req.MaxFreeze = time.Minute
	}
	c, err := v.Capture(context.Background(), req)
	volOK(r.t, err)
	tree := r.write(c)
	v.Shipped(c)
	volOK(r.t, v.Adopt(c, tree))
	r.head = tree
	return c, tree.Ref
}

// restored restores a snapshot and describes it.
func (r *volRig) restored(ref SnapshotRef) map[string]volDesc {
	r.t.Helper()
	dir := filepath.Join(r.temp(), "restored")
	volOK(r.t, Restore(context.Background(), r.store, ref, dir, RestoreOptions{Workers: 2}))
	return volDescribe(r.t, dir)
}

// volRAM makes a directory in memory, where syncing costs nothing, if there is such a file
// system and it keeps extended attributes.
func volRAM(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "volsync")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if unix.Setxattr(dir, "user.test", []byte("x"), 0) != nil || unix.Removexattr(dir, "user.test") != nil {
		return t.TempDir()
	}
	return dir
}

func volOK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func volIs(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

// volWrite writes (not replaces) a file at an offset, creating it.
func volWrite(t testing.TB, path string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	volOK(t, err)
	_, err = f.WriteAt(data, off)
	volOK(t, err)
	volOK(t, f.Close())
}

// volData makes incompressible-looking bytes.
func volData(seed byte, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed)*2654435761 + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x>>24) | 1
	}
	return b
}

// volOld waits until what has been written so far lies behind the racy window.
func volOld(t testing.TB, path string) {
	t.Helper()
	var st unix.Stat_t
	volOK(t, unix.Stat(path, &st))
	deadline := time.Now().Add(10 * time.Second)
	for {
		if now, _ := coarseNow(); now > st.Ctim.Nano()+int64(racyWindow)+int64(10*time.Millisecond) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the clock stands still")
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
}

// volHook is a file system whose hook can be set during a test. It is called by one
// goroutine at a time.
type volHook struct {
	mu stdsync.Mutex
	f  fsx.Hook
}

func (h *volHook) fs() fsx.FS {
	return &fsx.Hooked{FS: fsx.OS{}, Before: func(op fsx.Op, path string) error {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.f == nil {
			return nil
		}
		return h.f(op, path)
	}}
}

func (h *volHook) set(f fsx.Hook) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.f = f
}

func volPoint(label string, op fsx.Op, path string) bool {
	return op == fsx.OpPoint && strings.HasPrefix(path, label+" ")
}
