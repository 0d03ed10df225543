package track

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	ext4 = "ext4"
	xfs  = "xfs"

	bpfMagic = 0xcafe4a11
	bpfRoot  = "/sys/fs/bpf"
)

// mountID identifies one mounting of a file system: after unmounting and mounting again it
// is another.
type mountID struct {
	fsType string
	dev    uint64
	// serial is the inode number of the directory that a mounted ext4 or XFS has in sysfs:
	// it is made anew, with a number never used before, each time.
	serial uint64
}

func identify(root string) (mountID, error) {
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return mountID{}, fmt.Errorf("look at the volume: %w", &os.PathError{Op: "stat", Path: root, Err: err})
	}
	id := mountID{dev: st.Dev}
	name, err := os.Readlink("/sys/dev/block/" + devString(st.Dev))
	if err != nil {
		return mountID{}, fmt.Errorf("%w: %s is not on a block device of its own (only ext4 and XFS can be tracked)", ErrUnsupported, root)
	}
	for _, fsType := range []string{ext4, xfs} {
		if err := unix.Stat(filepath.Join("/sys/fs", fsType, filepath.Base(name)), &st); err == nil {
			id.fsType, id.serial = fsType, st.Ino
			return id, nil
		}
	}
	return mountID{}, fmt.Errorf("%w: %s is not on ext4 or XFS", ErrUnsupported, root)
}

// mountBPF sees to it that dir is on a BPF file system.
func mountBPF(dir string) error {
	on := func() bool {
		for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
			var st unix.Statfs_t
			if err := unix.Statfs(d, &st); err == nil {
				return uint32(st.Type) == bpfMagic
			} else if !errors.Is(err, unix.ENOENT) || d == "/" {
				return false
			}
		}
	}
	if on() {
		return nil
	}
	if strings.HasPrefix(filepath.Clean(dir)+"/", bpfRoot+"/") {
		if err := unix.Mount("bpf", bpfRoot, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: mount a BPF file system on %s: %w", ErrUnsupported, bpfRoot, err)
		}
	}
	if !on() {
		return fmt.Errorf("%w: %s is not on a BPF file system; use a directory below %s", ErrUnsupported, dir, bpfRoot)
	}
	return nil
}

// devString is the form of /proc and /sys.
func devString(dev uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
}

func syncfs(root string) error {
	d, err := os.Open(root)
	if err != nil {
		return fmt.Errorf("sync the volume's file system: %w", err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync the volume's file system: %w", err)
	}
	return nil
}
