package main

import (
	stdbytes "bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
)

// volumeLabel is on every file system that volume create has made: what makes it safe to run
// the same command again.
const volumeLabel = "dbsupervisor"

// newVolume is what volume create was asked for.
type newVolume struct {
	size         config.Size
	file, device string
	fsType       string
	mount        string
	fstab        string
	say          func(format string, args ...any)
}

func (a *app) volumeCreateCmd() *cobra.Command {
	v := newVolume{fsType: "xfs", fstab: "/etc/fstab"}
	size := ""
	cmd := &cobra.Command{
		Use:   "create {--file PATH --size SIZE | --device DEV} --mount DIR",
		Short: "Make a file system for the volume, in a file or on a device, and mount it",
		Long: "Make a file system for the volume, in a new file or on an empty device, and mount it, now and\n" +
			"at every boot (an entry in /etc/fstab). A device or file that holds anything is refused.\n" +
			"Running the same command again changes nothing. Set `dir` in the configuration to DIR or to\n" +
			"a directory below it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := v.parse(size); err != nil {
				return &usageError{err: err, help: cmd.CommandPath()}
			}
			if os.Getuid() != 0 {
				return api.WithHint(errors.New("volume create: only root can make file systems"), "run as root")
			}
			v.say = func(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) }
			if err := v.create(cmd.Context()); err != nil {
				return fmt.Errorf("volume create: %w", err)
			}
			_, err := fmt.Fprintf(a.out, "%s is mounted, now and at every boot; look at it with: dbsupervisor volume check %s\n", v.mount, v.mount)
			return err
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "of the file, such as 20GiB")
	cmd.Flags().StringVar(&v.file, "file", "", "make it in this file, which must not exist")
	cmd.Flags().StringVar(&v.device, "device", "", "make it on this block device, which must be empty")
	cmd.Flags().StringVar(&v.fsType, "fs", v.fsType, "xfs (reflinks) or ext4")
	cmd.Flags().StringVar(&v.mount, "mount", "", "mount it at this directory")
	cmd.Flags().StringVar(&v.fstab, "fstab", v.fstab, "file for the entry that mounts it at boot")
	return cmd
}

func (v *newVolume) parse(size string) error {
	switch {
	case (v.file == "") == (v.device == ""):
		return errors.New("name one of --file and --device")
	case v.file != "" && size == "":
		return errors.New("--file needs --size")
	case v.device != "" && size != "":
		return errors.New("--size goes with --file; a device is used whole")
	case v.fsType != "xfs" && v.fsType != "ext4":
		return fmt.Errorf("--fs is %q, not xfs or ext4", v.fsType)
	case !filepath.IsAbs(v.mount) || filepath.Clean(v.mount) == "/":
		return errors.New("--mount must be an absolute path below /")
	}
	if size != "" {
		if err := v.size.UnmarshalText([]byte(size)); err != nil {
			return fmt.Errorf("--size: %w", err)
		}
		if v.size < 320<<20 {
			return errors.New("--size must be at least 320MiB")
		}
	}
	for _, p := range []*string{&v.file, &v.device, &v.mount} {
		if *p == "" {
			continue
		}
		if strings.ContainsAny(*p, " \t\n\\#") {
			return fmt.Errorf("%q: blanks, # and backslashes are not possible in a mount table", *p)
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	return nil
}

func (v *newVolume) create(ctx context.Context) error {
	for _, tool := range []string{"mkfs." + v.fsType, "blkid", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			pkg := map[string]string{"mkfs.xfs": "xfsprogs", "mkfs.ext4": "e2fsprogs"}[tool]
			if pkg == "" {
				pkg = "util-linux"
			}
			return api.WithHint(fmt.Errorf("%s is not installed", tool), "install the package "+pkg)
		}
	}
	source := v.device
	if v.file != "" {
		source = v.file
	}
	made, err := v.prepare(ctx, source)
	if err != nil {
		return err
	}
	if !made {
		if err := v.format(ctx, source); err != nil {
			if v.file != "" {
				err = errors.Join(err, os.Remove(v.file)) // ours, made a moment ago
			}
			return err
		}
	}
	entry, err := v.entry(ctx, source)
	if err != nil {
		return err
	}
	if err := v.keepMounted(ctx, entry); err != nil {
		return err
	}
	return v.mountNow(ctx, source)
}

// prepare makes the file or looks at the device. It returns true if there is a file system
// already that an earlier run has made, and an error if there is anything else.
func (v *newVolume) prepare(ctx context.Context, source string) (made bool, err error) {
	st, err := os.Stat(source)
	switch {
	case errors.Is(err, os.ErrNotExist) && v.file != "":
		return false, v.makeFile()
	case err != nil:
		return false, err
	case v.file != "" && !st.Mode().IsRegular():
		return false, api.WithHint(fmt.Errorf("%s is not a file", source), "use --device for a device")
	case v.device != "" && st.Mode()&os.ModeDevice == 0, v.device != "" && st.Mode()&os.ModeCharDevice != 0:
		return false, api.WithHint(fmt.Errorf("%s is not a block device", source), "see: lsblk; use --file to make one in a file")
	}
	found, err := signature(ctx, source)
	if err != nil {
		return false, err
	}
	switch {
	case found["LABEL"] == volumeLabel && found["TYPE"] == v.fsType:
		v.say("%s holds the file system that an earlier run has made", source)
		return true, nil
	case len(found) > 0:
		return false, api.WithHint(fmt.Errorf("%s is not empty: it holds %s", source, describe(found)),
			"choose another; or, if nothing on it is needed any more, erase it yourself: wipefs --all "+source)
	case v.file != "":
		return false, api.WithHint(fmt.Errorf("%s exists", source), "choose a name that does not exist, or remove it if it is not needed")
	}
	// A device that the kernel uses (mounted, in a RAID, swap) refuses to be opened alone.
	fd, err := unix.Open(source, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, api.WithHint(fmt.Errorf("%s is in use: %w", source, err), "see: lsblk "+source)
	}
	return false, unix.Close(fd)
}

// signature asks what is on a file or device; empty if nothing is.
func signature(ctx context.Context, source string) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, "blkid", "--probe", "--output", "export", "--", source)
	var stderr stdbytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 2 && stderr.Len() == 0 {
		return nil, nil // nothing found
	}
	if err != nil {
		// Also when several signatures were found: then nobody knows what it is.
		return nil, fmt.Errorf("ask what is on %s: %w: %s", source, err, strings.TrimSpace(stderr.String()))
	}
	found := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if k, val, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k != "DEVNAME" {
			found[k] = val
		}
	}
	return found, nil
}

func describe(found map[string]string) string {
	switch {
	case found["TYPE"] != "" && found["LABEL"] != "":
		return fmt.Sprintf("%s (label %s)", found["TYPE"], found["LABEL"])
	case found["TYPE"] != "":
		return found["TYPE"]
	case found["PTTYPE"] != "":
		return "a partition table (" + found["PTTYPE"] + ")"
	}
	return "something"
}

// makeFile takes the whole room at once: a database must not find the disk full because the
// file has holes.
func (v *newVolume) makeFile() (err error) {
	dir := filepath.Dir(v.file)
	m, err := mountOf(dir)
	if err != nil {
		return err
	}
	if need := uint64(v.size); need > m.free { //nolint:gosec // not negative
		return api.WithHint(fmt.Errorf("%s has %s free, less than %s", dir, bytes(int64(m.free)), v.size), "choose a smaller --size or another disk") //nolint:gosec // fits
	}
	f, err := os.OpenFile(v.file, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, int64(v.size))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return errors.Join(fmt.Errorf("make a file of %s: %w", v.size, err), os.Remove(v.file))
	}
	v.say("made %s of %s", v.file, v.size)
	return nil
}

func (v *newVolume) format(ctx context.Context, source string) error {
	// mkfs refuses by itself what looks like data, too.
	args := []string{"-q", "-L", volumeLabel, "-m", "crc=1,reflink=1", source}
	if v.fsType == "ext4" {
		args = []string{"-q", "-L", volumeLabel, "-m", "0", "-O", "metadata_csum", source}
	}
	if err := command(ctx, "mkfs."+v.fsType, args...); err != nil {
		return err
	}
	v.say("made %s on %s", v.fsType, source)
	return nil
}

// entry is the line of the mount table. nofail: a machine whose volume is broken must boot. The
// directory below can't be written (see protect), so that the agent does not use it instead.
func (v *newVolume) entry(ctx context.Context, source string) (string, error) {
	if v.file != "" {
		return fmt.Sprintf("%s %s %s loop,noatime,nofail 0 0", v.file, v.mount, v.fsType), nil
	}
	found, err := signature(ctx, source)
	if err != nil {
		return "", err
	}
	if found["UUID"] == "" {
		return "", fmt.Errorf("the file system on %s has no UUID", source)
	}
	return fmt.Sprintf("UUID=%s %s %s noatime,nofail 0 0", found["UUID"], v.mount, v.fsType), nil
}

// keepMounted puts the entry into the mount table unless it is there.
func (v *newVolume) keepMounted(ctx context.Context, entry string) error {
	table, err := os.ReadFile(v.fstab)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(table)) {
		line = strings.TrimSpace(line)
		if line == entry {
			return nil
		}
		if f := strings.Fields(line); len(f) >= 2 && !strings.HasPrefix(line, "#") && f[1] == v.mount {
			return api.WithHint(fmt.Errorf("%s has another entry for %s: %s", v.fstab, v.mount, line), "choose another --mount, or remove that line")
		}
	}
	if len(table) > 0 && table[len(table)-1] != '\n' {
		table = append(table, '\n')
	}
	table = append(table, entry+"\n"...)
	// Replaced in one step: half a mount table keeps a machine from booting.
	tmp := v.fstab + ".dbsupervisor"
	if err := os.WriteFile(tmp, table, 0o644); err != nil { //nolint:gosec // everybody may read it
		return err
	}
	if err := os.Rename(tmp, v.fstab); err != nil {
		return err
	}
	v.say("added to %s: %s", v.fstab, entry)
	if v.fstab == "/etc/fstab" && exists("/run/systemd/system") {
		return command(ctx, "systemctl", "daemon-reload")
	}
	return nil
}

func (v *newVolume) mountNow(ctx context.Context, source string) error {
	if err := os.MkdirAll(v.mount, 0o700); err != nil {
		return err
	}
	m, err := mountOf(v.mount)
	if err != nil {
		return err
	}
	if m.point == v.mount {
		found, err := signature(ctx, source)
		if err != nil {
			return err
		}
		mounted, err := signature(ctx, m.source)
		if err != nil {
			return err
		}
		if found["UUID"] == "" || found["UUID"] != mounted["UUID"] {
			return api.WithHint(fmt.Errorf("%s is mounted at %s already", m.source, v.mount), "choose another --mount, or unmount it")
		}
		return nil
	}
	if left, err := os.ReadDir(v.mount); err != nil {
		return err
	} else if len(left) > 0 {
		return api.WithHint(fmt.Errorf("%s is not empty: mounting would hide %s", v.mount, left[0].Name()), "choose another --mount, or move its files away")
	}
	if err := protect(v.mount); err != nil {
		v.say("%s could not be made immutable (%v): take care that nothing writes there while it is not mounted", v.mount, err)
	}
	if err := command(ctx, "mount", "--fstab", v.fstab, v.mount); err != nil {
		return err
	}
	return os.Chmod(v.mount, 0o700) //nolint:gosec // a directory
}

// protect makes the directory below a mount immutable: while nothing is mounted there, nothing
// can be written there by mistake. Undone with: chattr -i.
func protect(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const immutable = 0x10 // FS_IMMUTABLE_FL
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|immutable))
}

// command runs a program and makes its last words part of the error.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}
