package sync

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// loopSystems are the file systems that volumes are kept on.
func loopSystems() []string { return []string{"ext4", "xfs", "btrfs"} }

// volLoop mounts a new file system of its own.
func volLoop(t testing.TB, system string) string {
	t.Helper()
	mnt, _ := volLoopImage(t, system)
	return mnt
}

// volLoopImage also says which file the file system is in.
func volLoopImage(t testing.TB, system string) (mnt, img string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may mount")
	}
	dir := volRAM(t) // durable as a disk to the file system, and quick
	img, mnt = filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	volOK(t, os.WriteFile(img, nil, 0o600))
	volOK(t, os.Truncate(img, 512<<20))
	volOK(t, os.Mkdir(mnt, 0o700))
	mkfs := []string{"mkfs." + system, "-q", img}
	if system == "ext4" {
		mkfs = []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", img}
	}
	volRun(t, mkfs...)
	volMount(t, img, mnt, "loop")
	return mnt, img
}

func volMount(t testing.TB, img, mnt, opts string) {
	t.Helper()
	volRun(t, "mount", "-o", opts, img, mnt)
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
}

func volRun(t testing.TB, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Skipf("%s is not installed (scripts/ensure-tools.sh integration)", args[0])
	}
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}

// volTemps makes new directories below one.
func volTemps(t testing.TB, root string) func() string {
	n := 0
	return func() string {
		n++
		d := filepath.Join(root, fmt.Sprint("d", n))
		volOK(t, os.Mkdir(d, 0o700))
		return d
	}
}
