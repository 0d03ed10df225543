package main

import (
	stdbytes "bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/track"
)

// volumeRun runs a volume command and returns its exit code and what it said.
func volumeRun(t *testing.T, args ...string) (int, string) {
	t.Helper()
	var out stdbytes.Buffer
	code := run(t.Context(), append([]string{"volume"}, args...), stdio{in: strings.NewReader(""), out: &out, err: &out})
	return code, out.String()
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount")
	}
}

// unmount is the end of a test that mounts; the directory below is immutable.
func unmountAtEnd(t *testing.T, dir string) {
	t.Cleanup(func() {
		_ = unix.Unmount(dir, 0) // perhaps it was never mounted
		_ = exec.Command("chattr", "-i", dir).Run()
	})
}

// loopDevice is a block device of its own, empty.
func loopDevice(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, 400<<20))
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return dev
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestVolumeCreate(t *testing.T) {
	needRoot(t)
	for _, fsType := range []string{"xfs", "ext4"} {
		for _, kind := range []string{"file", "device"} {
			t.Run(fsType+" "+kind, func(t *testing.T) {
				dir := t.TempDir()
				at, fstab := filepath.Join(dir, "mnt"), filepath.Join(dir, "fstab")
				args := []string{"create", "--fs", fsType, "--mount", at, "--fstab", fstab}
				if kind == "device" {
					args = append(args, "--device", loopDevice(t))
				} else {
					args = append(args, "--file", filepath.Join(dir, "volume.img"), "--size", "330MiB")
				}
				unmountAtEnd(t, at)
				if code, out := volumeRun(t, args...); code != 0 {
					t.Fatalf("code %d: %s", code, out)
				}
				m, err := mountOf(at)
				must(t, err)
				if m.point != at || m.fsType != fsType {
					t.Fatalf("mounted: %+v", m)
				}
				must(t, os.WriteFile(filepath.Join(at, "data"), []byte("kept"), 0o600))
				before, err := os.ReadFile(fstab)
				must(t, err)

				// Once more changes nothing.
				if code, out := volumeRun(t, args...); code != 0 {
					t.Fatalf("again: code %d: %s", code, out)
				}
				// Nothing can be written where nothing is mounted.
				must(t, unix.Unmount(at, 0))
				if err := os.WriteFile(filepath.Join(at, "stray"), nil, 0o600); err == nil {
					t.Error("the directory below can be written")
				}
				// It comes back as at a boot: from the mount table alone.
				if out, err := exec.Command("mount", "--fstab", fstab, at).CombinedOutput(); err != nil {
					t.Fatalf("mount: %v: %s", err, out)
				}
				must(t, unix.Unmount(at, 0))
				if code, out := volumeRun(t, args...); code != 0 {
					t.Fatalf("unmounted: code %d: %s", code, out)
				}
				if b, err := os.ReadFile(filepath.Join(at, "data")); err != nil || string(b) != "kept" {
					t.Errorf("data after all that: %q, %v", b, err)
				}
				after, err := os.ReadFile(fstab)
				must(t, err)
				if string(after) != string(before) || strings.Count(string(after), "\n") != 1 {
					t.Errorf("mount table:\n%s", after)
				}
				code, out := volumeRun(t, "check", at, "--sample", "0s")
				want := "no reflinks"
				if fsType == "xfs" {
					want = "reflink clone"
				}
				if code != 0 && !strings.Contains(out, "no snapshot can be taken") || !strings.Contains(out, want) || !strings.Contains(out, fsType+" on ") {
					t.Errorf("check: code %d\n%s", code, out)
				}
			})
		}
	}
}

// TestVolumeCreateRefuses: nothing that holds anything is ever formatted.
func TestVolumeCreateRefuses(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	fstab := filepath.Join(dir, "fstab")
	at := filepath.Join(dir, "mnt")
	unmountAtEnd(t, at)
	refused := func(what, want string, args ...string) {
		t.Helper()
		code, out := volumeRun(t, append([]string{"create", "--mount", at, "--fstab", fstab}, args...)...)
		if code == 0 || !strings.Contains(out, want) {
			t.Errorf("%s: code %d: %s", what, code, out)
		}
		if exists(fstab) {
			t.Errorf("%s: the mount table was written", what)
		}
	}
	dev := loopDevice(t)
	must(t, exec.Command("mkfs.ext4", "-q", "-L", "mine", dev).Run())
	refused("a foreign file system", "it holds ext4 (label mine)", "--device", dev)
	if out, err := exec.Command("blkid", "-p", "-s", "LABEL", "-o", "value", dev).Output(); err != nil || strings.TrimSpace(string(out)) != "mine" {
		t.Errorf("the file system has gone: %s, %v", out, err)
	}
	must(t, exec.Command("wipefs", "-q", "--all", dev).Run())
	must(t, exec.Command("mkswap", "-q", dev).Run())
	refused("swap", "it holds swap", "--device", dev)
	must(t, exec.Command("wipefs", "-q", "--all", dev).Run())
	disk, err := os.OpenFile(dev, os.O_WRONLY|unix.O_SYNC, 0)
	must(t, err)
	table := make([]byte, 512) // one partition of type 83, from sector 2048 on
	table[450], table[455], table[459], table[510], table[511] = 0x83, 0x08, 0x80, 0x55, 0xaa
	_, err = disk.Write(table)
	must(t, errors.Join(err, disk.Close()))
	refused("a partition table", "partition table (dos)", "--device", dev)

	other := filepath.Join(dir, "other")
	must(t, os.WriteFile(other, []byte("somebody's notes"), 0o600))
	refused("a file that exists", "exists", "--file", other, "--size", "330MiB")
	refused("too large", "free, less than", "--file", filepath.Join(dir, "new"), "--size", "900TiB")
	refused("no device", "not a block device", "--device", other)
	refused("a character device", "not a block device", "--device", "/dev/null")
	refused("both", "name one of", "--device", dev, "--file", other)
	refused("too small", "at least", "--file", filepath.Join(dir, "new"), "--size", "1MiB")
	if exists(filepath.Join(dir, "new")) {
		t.Error("a file was left behind")
	}
	must(t, os.MkdirAll(filepath.Join(at, "files of somebody"), 0o700))
	code, out := volumeRun(t, "create", "--mount", at, "--fstab", fstab, "--file", filepath.Join(dir, "new"), "--size", "330MiB")
	if code == 0 || !strings.Contains(out, "would hide") {
		t.Errorf("a directory that is not empty: code %d: %s", code, out)
	}
}

func TestVolumeCheck(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "table"), make([]byte, 4<<20), 0o600))
	must(t, os.Mkdir(filepath.Join(dir, "base"), 0o700))
	must(t, os.Symlink("table", filepath.Join(dir, "inside")))
	check := func(sample time.Duration) (bool, string) {
		t.Helper()
		cfg := config.Default()
		cfg.Sync.MinFree = 0
		cfg.Sync.Tier = "hashed"
		var out stdbytes.Buffer
		bad, err := checkVolume(t.Context(), &out, cfg, dir, sample)
		must(t, err)
		return bad, out.String()
	}
	bad, out := check(10 * time.Millisecond)
	for _, want := range []string{"1 files in 2 directories, 4.0 MiB", "hashed: sync.tier is hashed", "Room ", "Reading ", "nothing in 10ms", "Freeze "} {
		if bad || !strings.Contains(out, want) {
			t.Errorf("bad %v, no %q in\n%s", bad, want, out)
		}
	}
	outside := t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(dir, "tablespace")))
	if bad, out = check(0); !bad || !strings.Contains(out, "tablespace is a symbolic link to "+outside) {
		t.Errorf("a symbolic link that leaves the volume: bad %v\n%s", bad, out)
	}
}

// TestVolumeCheckTracked: where the kernel tells what is written, the freeze is predicted from
// what a program writes.
func TestVolumeCheckTracked(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	at := filepath.Join(dir, "mnt")
	unmountAtEnd(t, at)
	if code, out := volumeRun(t, "create", "--fs", "ext4", "--mount", at, "--fstab", filepath.Join(dir, "fstab"),
		"--file", filepath.Join(dir, "volume.img"), "--size", "330MiB"); code != 0 {
		t.Fatalf("code %d: %s", code, out)
	}
	if err := track.Supported(at); err != nil {
		t.Skip(err)
	}
	cfg := config.Default()
	cfg.Sync.MinFree = 0
	check := func() string {
		t.Helper()
		var out stdbytes.Buffer
		bad, err := checkVolume(t.Context(), &out, cfg, at, 500*time.Millisecond)
		must(t, err)
		if bad || !strings.Contains(out.String(), "Freeze        about ") {
			t.Errorf("bad %v\n%s", bad, out.String())
		}
		return out.String()
	}
	if out := check(); !strings.Contains(out, "nothing in 500ms") || !strings.Contains(out, "nothing was written") {
		t.Errorf("an idle directory:\n%s", out)
	}
	// Writes of this process would not be told.
	writer := exec.Command("sh", "-c", `while dd if=/dev/zero bs=8k count=64 conv=notrunc status=none of="$0"; do :; done`, filepath.Join(at, "table"))
	must(t, writer.Start())
	defer func() {
		_ = writer.Process.Kill()
		_ = writer.Wait()
	}()
	var out string
	for end := time.Now().Add(time.Minute); ; {
		out = check()
		// The same 64 blocks again and again: each is read once.
		if strings.Contains(out, "512 KiB in 1 files") && strings.Contains(out, "64 blocks of 1 files were written") || time.Now().After(end) {
			break
		}
	}
	if !strings.Contains(out, "64 blocks of 1 files were written") {
		t.Errorf("a directory that is written:\n%s", out)
	}
	cfg.Sync.MaxFreeze = time.Microsecond
	if out := check(); !strings.Contains(out, "LONGER than sync.max_freeze") {
		t.Errorf("a budget that is too small:\n%s", out)
	}
}
