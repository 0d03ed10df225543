package sync

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// TestVolumeManyFiles: a volume of many files (a million in the long form) is captured,
// restored and followed in a number of operations on the share and of bytes in memory that
// has a bound for each file; a change of one file costs the share as much as in a small one.
func TestVolumeManyFiles(t *testing.T) {
	files, root := 50_000, volRAM(t)
	if testing.Short() {
		files = 5000
	}
	if volLong() {
		files = 1_000_000
		volOK(t, unix.Mount("tmpfs", root, "tmpfs", 0, "nr_inodes=0,size=12g"))
		t.Cleanup(func() { volOK(t, unix.Unmount(root, unix.MNT_DETACH)) })
	}
	ctx := t.Context()
	c := &readCounter{FS: fsx.OS{}}
	s, err := OpenStore(StoreConfig{FS: c, Dir: volRAM(t), Workers: 2})
	volOK(t, err)
	volOK(t, s.Init(ctx))
	rig := &volRig{t: t, store: s, temp: func() string { return volRAM(t) }}
	v := rig.open(filepath.Join(root, "v"), nil)
	volOK(t, v.MarkLive(ctx, 1))
	volOK(t, v.Baseline(ctx, s, SnapshotRef{}))
	const inDir = 1000
	name := func(i int) string { return fmt.Sprintf("d%d/f%d", i/inDir, i) }
	for i := range files {
		p := filepath.Join(v.Path(), name(i))
		if i%inDir == 0 {
			volOK(t, os.Mkdir(filepath.Dir(p), 0o700))
		}
		var content []byte
		if i%10 == 0 {
			content = []byte(p)
		}
		volOK(t, os.WriteFile(p, content, 0o600))
	}
	_, one := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	manyMemory(t, "captured", files, v)

	f := rig.open(filepath.Join(root, "f"), nil)
	c.reset()
	_, err = f.Hydrate(ctx, s, one, nil)
	volOK(t, err)
	// The manifest and a few packs, none of them twice.
	if opens := c.opens.Load(); opens > 10+int64(files)/inDir {
		t.Fatalf("%d files of the share were opened for %d files", opens, files)
	}
	if n := c.bytes.Load(); n > int64(files)*200 {
		t.Fatalf("%d bytes of the share were read for %d files", n, files)
	}
	manySame(t, v.Path(), f.Path(), files, name)
	manyMemory(t, "hydrated", files, f)

	volWrite(t, filepath.Join(v.Path(), name(7)), 0, []byte("changed"))
	volOK(t, os.Remove(filepath.Join(v.Path(), name(8))))
	_, two := rig.snapshot(v, CaptureRequest{NoFreeze: true})
	c.reset()
	_, err = f.Hydrate(ctx, s, two, nil)
	volOK(t, err)
	if opens, n := c.opens.Load(), c.bytes.Load(); opens > 8 || n > 200<<10 {
		t.Fatalf("a small change took %d opened files and %d bytes", opens, n)
	}
	if b, err := os.ReadFile(filepath.Join(f.Path(), name(7))); err != nil || string(b) != "changed" {
		t.Fatalf("%q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(f.Path(), name(8))); !os.IsNotExist(err) {
		t.Fatal("a removed file is there: ", err)
	}

	dir := filepath.Join(root, "r")
	c.reset()
	volOK(t, Restore(ctx, s, one, dir, RestoreOptions{Workers: 2}))
	if opens := c.opens.Load(); opens > 10+int64(files)/inDir {
		t.Fatalf("%d files of the share were opened for %d files", opens, files)
	}
}

// manySame looks at every thousandth file, and at the number of all.
func manySame(t *testing.T, a, b string, files int, name func(int) string) {
	t.Helper()
	for i := 0; i < files; i += 1000 {
		var x, y unix.Stat_t
		volOK(t, unix.Stat(filepath.Join(a, name(i)), &x))
		volOK(t, unix.Stat(filepath.Join(b, name(i)), &y))
		if x.Size != y.Size || x.Mode != y.Mode || x.Mtim != y.Mtim {
			t.Fatalf("%s differs", name(i))
		}
	}
}

// manyMemory bounds what a volume keeps in memory.
func manyMemory(t *testing.T, what string, files int, v *Volume) {
	t.Helper()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("%s: %d bytes in use for each of %d files", what, int64(m.HeapAlloc)/int64(files), files)
	if m.HeapAlloc > uint64(files)*2048+64<<20 {
		t.Fatalf("%s: %d bytes are in use for %d files", what, m.HeapAlloc, files)
	}
	runtime.KeepAlive(v)
}
