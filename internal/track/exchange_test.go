package track

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// exchangeMain exchanges the contents of the files a and b: XFS_IOC_EXCHANGE_RANGE.
func exchangeMain() int {
	dir := os.Getenv("TRACK_TEST_DIR")
	a, err := os.OpenFile(filepath.Join(dir, "a"), os.O_RDWR, 0)
	if err != nil {
		return 1
	}
	b, err := os.OpenFile(filepath.Join(dir, "b"), os.O_RDWR, 0)
	if err != nil {
		return 1
	}
	arg := struct {
		fd, pad                  int32
		from, to, length, option uint64
	}{fd: int32(a.Fd()), length: 256 << 10}
	const exchangeRange = 1<<30 | 40<<16 | 'X'<<8 | 129
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, b.Fd(), exchangeRange, uintptr(unsafe.Pointer(&arg)))
	switch {
	case errno == 0:
		return 0
	case errors.Is(errno, unix.ENOTTY), errors.Is(errno, unix.EOPNOTSUPP):
		return 3
	}
	fmt.Println(errno)
	return 2
}

// Two files of XFS get each other's extents, in both ways that there are, without a byte being
// written. (ext4's way is one of the kinds of windows.)
func TestExchangedExtents(t *testing.T) {
	v := newVolume(t, xfs, 400)
	for _, tool := range []string{"xfs_db", "xfs_io"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip(t, "%v", err)
		}
	}
	// mkfs may be older than the feature, which changes nothing on the disk but this bit.
	// A kernel that doesn't know the bit would refuse the file system.
	v.remount(t, func(image string) {
		if !kernelKnowsExchange(t) {
			return
		}
		byOther(t, `
			has=$(xfs_db -c "sb 0" -c "p features_incompat" "$1" | sed -n "s/.*= //p")
			xfs_db -x -c "sb 0" -c "write -d features_incompat $(printf 0x%x $((has | 0x40)))" "$1"`, image)
	})
	tr := v.opened(t)
	for name, exchange := range map[string]func(t *testing.T){
		"swapext": func(t *testing.T) {
			byOther(t, `xfs_io -c "swapext $2" "$1"`, v.path("a"), v.path("b"))
		},
		"exchange range": func(t *testing.T) {
			exe, err := os.Executable()
			must(t, err)
			cmd := exec.CommandContext(t.Context(), exe)
			cmd.Env = append(os.Environ(), "TRACK_TEST_ROLE=exchange", "TRACK_TEST_DIR="+v.root)
			out, err := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() == 3 {
				t.Skip("this kernel has no exchange-range (Linux 6.10)")
			}
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			byOther(t, `for f in a b; do dd if=/dev/urandom of="$1/$f" bs=64k count=4 2>/dev/null; done; sync -f "$1"`, v.root)
			drain(t, tr)
			before, err := os.ReadFile(v.path("a"))
			must(t, err)
			exchange(t)
			c := whole(t, drain(t, tr))
			after, err := os.ReadFile(v.path("b"))
			must(t, err)
			if string(before) != string(after) {
				t.Fatal("nothing was exchanged")
			}
			for _, f := range []string{"a", "b"} {
				if n := c.Inodes[v.ino(t, f)]; n == nil || !n.Ranged {
					t.Errorf("%s: %+v", f, n)
				}
			}
		})
	}
}

// kernelKnowsExchange says whether this is Linux 6.10 or later.
func kernelKnowsExchange(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	must(t, unix.Uname(&u))
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 10
}
