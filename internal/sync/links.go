package sync

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// view is a root directory from which symbolic links of the volume are looked at: the
// machine's own, and that of the database's container, where other things are mounted.
type view struct {
	root string // "/" or "/proc/<pid>/root"
	data string // where the volume is in it; "" if it couldn't be found
}

// viewsOf returns the machine's view and one for each mount namespace of the processes.
func viewsOf(volume string, pids []int) []view {
	out := []view{{root: "/", data: volume}}
	seen := map[string]bool{}
	if own, err := os.Readlink("/proc/self/ns/mnt"); err == nil {
		seen[own] = true
	}
	var top unix.Stat_t
	if err := unix.Stat(volume, &top); err != nil {
		return out
	}
	for _, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		ns, err := os.Readlink(proc + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		v := view{root: proc + "/root"}
		if b, err := os.ReadFile(proc + "/mountinfo"); err == nil {
			v.data = mountPointOf(b, v.root, &top)
		}
		out = append(out, v)
	}
	return out
}

// mountPointOf finds where a directory is mounted, given a mountinfo file.
func mountPointOf(mountinfo []byte, root string, top *unix.Stat_t) string {
	sc := bufio.NewScanner(bytes.NewReader(mountinfo))
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 5 {
			continue
		}
		mp := unescapeMount(fields[4])
		var st unix.Stat_t
		if unix.Stat(root+mp, &st) == nil && st.Dev == top.Dev && st.Ino == top.Ino {
			return mp
		}
	}
	return ""
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// checkLink returns ErrEscapes if a symbolic link of the volume leads to an existing file
// or directory outside of it, as PostgreSQL's tablespaces do. Links that lead nowhere, to
// devices or into /proc hold no data and are kept as they are.
func checkLink(volume, rel string, target []byte, views []view) error {
	t := string(target)
	if !path.IsAbs(t) {
		// Only a target that climbs out can leave; the links that it goes through are
		// checked themselves.
		p := path.Clean(path.Join(path.Dir(rel), t))
		if p != ".." && !strings.HasPrefix(p, "../") {
			return nil
		}
	}
	for _, v := range views {
		p := t
		if !path.IsAbs(p) {
			if v.data == "" {
				continue
			}
			p = path.Join(v.data, path.Dir(rel)) + "/" + t
		}
		outside, err := v.leadsOutside(volume, p)
		if err != nil {
			return fmt.Errorf("follow %s: %w", path.Join(volume, rel), err)
		}
		if outside {
			return fmt.Errorf("%w: %s is a symbolic link to %s, which no snapshot would contain: keep those files below the data directory (a tablespace in a directory of its own there, for instance), or remove the link",
				ErrEscapes, path.Join(volume, rel), t)
		}
	}
	return nil
}

// leadsOutside resolves an absolute path inside the view. What does not exist is not
// outside.
func (v view) leadsOutside(volume, p string) (bool, error) {
	root, err := unix.Open(v.root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			return false, nil // the process has ended
		}
		return false, err
	}
	defer unix.Close(root)
	for range 40 {
		dirPart, base := splitLast(p)
		whole := base == "" || base == "." || base == ".."
		if whole {
			dirPart = p
		}
		dir, err := unix.Openat2(root, dirPart, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if err != nil {
			return false, nil // dangling
		}
		if whole {
			return climbsOut(dir, volume)
		}
		var st unix.Stat_t
		if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			_ = unix.Close(dir)
			return false, nil
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			sub, err := unix.Openat(dir, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			_ = unix.Close(dir)
			if err != nil {
				return false, nil
			}
			return climbsOut(sub, volume)
		case unix.S_IFREG:
			return climbsOut(dir, volume)
		case unix.S_IFLNK:
			next, err := readLink("/proc/self/fd/" + strconv.Itoa(dir) + "/" + base)
			_ = unix.Close(dir)
			if err != nil {
				return false, nil
			}
			if path.IsAbs(string(next)) {
				p = string(next)
			} else {
				p = dirPart + "/" + string(next)
			}
		default:
			_ = unix.Close(dir)
			return false, nil
		}
	}
	return false, nil // a loop
}

// splitLast cuts a path before its last name without cleaning it: "a/.." must not vanish
// where a is a link.
func splitLast(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	return p[:i+1], p[i+1:]
}

// climbsOut says whether the volume's root is not among a directory's ancestors. It closes
// fd. Directories of pseudo file systems count as inside: they hold no data.
func climbsOut(fd int, volume string) (bool, error) {
	defer func() { _ = unix.Close(fd) }()
	var fsinfo unix.Statfs_t
	if err := unix.Fstatfs(fd, &fsinfo); err == nil && isPseudo(fsinfo.Type) {
		return false, nil
	}
	var top, last unix.Stat_t
	if err := unix.Stat(volume, &top); err != nil {
		return false, err
	}
	for {
		var cur unix.Stat_t
		if err := unix.Fstat(fd, &cur); err != nil {
			return false, err
		}
		if cur.Dev == top.Dev && cur.Ino == top.Ino {
			return false, nil
		}
		if cur.Dev == last.Dev && cur.Ino == last.Ino {
			return true, nil
		}
		last = cur
		up, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false, err
		}
		_ = unix.Close(fd)
		fd = up
	}
}

func isPseudo(magic int64) bool {
	switch magic {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC,
		unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC:
		return true
	}
	return false
}
