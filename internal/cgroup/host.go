package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
)

// ErrNoGroup is returned when a process, or a container, has no control group of its own
// that could be frozen and killed.
var ErrNoGroup = errors.New("no control group of its own")

// maxDepth bounds the search of Find below a hierarchy's mount point.
const maxDepth = 12

// minID is the shortest container ID that Find and Within accept: a shorter text could
// match the group of something else.
const minID = 12

// Host finds control groups by what a proc file system says. Its zero value is this machine;
// tests point Proc at a made-up directory.
type Host struct {
	Proc string // "" means /proc
}

// Of returns the group of a process on this machine, see Host.Of.
func Of(pid int) (Group, error) { return Host{}.Of(pid) }

// Find returns the groups of a container on this machine, see Host.Find.
func Find(id string) ([]Group, error) { return Host{}.Find(id) }

func (h Host) proc(elem ...string) string {
	p := h.Proc
	if p == "" {
		p = "/proc"
	}
	return filepath.Join(append([]string{p}, elem...)...)
}

// mount is one mounted hierarchy that can freeze: version 1's freezer or version 2.
type mount struct {
	version int
	root    string // the group that is visible at point, "/" as a rule
	point   string
}

// dir translates a group's path in the hierarchy into a directory, if it is visible here.
func (m mount) dir(path string) (string, bool) {
	if strings.Contains(path, "..") { // outside of our cgroup namespace
		return "", false
	}
	if m.root == "/" {
		return filepath.Join(m.point, path), true
	}
	if path != m.root && !strings.HasPrefix(path, m.root+"/") {
		return "", false
	}
	return filepath.Join(m.point, strings.TrimPrefix(path, m.root)), true
}

// mounts lists the hierarchies that can freeze, version 1 first.
func (h Host) mounts() ([]mount, error) {
	b, err := os.ReadFile(h.proc("self", "mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	var out []mount
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		left, right, ok := strings.Cut(s.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 {
			continue
		}
		m := mount{root: unescape(l[3]), point: unescape(l[4])}
		switch r[0] {
		case "cgroup2":
			m.version = 2
		case "cgroup":
			if !hasItem(r[2], "freezer") {
				continue
			}
			m.version = 1
		default:
			continue
		}
		out = append(out, m)
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].version < out[j].version })
	return out, nil
}

// Of returns the group of a process, as a rule a container's init (as the host numbers it).
// On a host with both versions the freezer of version 1 counts where the process has a group
// there. ErrNoGroup means that the process is in the root of every hierarchy: freezing or
// killing that would hit the whole machine.
func (h Host) Of(pid int) (Group, error) {
	b, err := os.ReadFile(h.proc(strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return Group{}, fmt.Errorf("read control group of process %d: %w", pid, err)
	}
	ms, err := h.mounts()
	if err != nil {
		return Group{}, err
	}
	paths := map[int]string{} // by version
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case f[0] == "0" && f[1] == "":
			paths[2] = f[2]
		case hasItem(f[1], "freezer"):
			paths[1] = f[2]
		}
	}
	dirs := map[int]string{}
	for _, m := range ms {
		p := paths[m.version]
		if _, done := dirs[m.version]; done || p == "" {
			continue
		}
		if d, ok := m.dir(p); ok && d != m.point && isDir(d) { // never the whole hierarchy
			dirs[m.version] = d
		}
	}
	g := join(dirs[1], paths[1], dirs[2], paths[2])
	if g.Version == 0 {
		return Group{}, fmt.Errorf("process %d: %w", pid, ErrNoGroup)
	}
	return g, nil
}

// join makes a group of what the two hierarchies have. On a mixed host a process's group of
// version 2 may be a much wider one (that of the Docker daemon's service, say), so it serves
// for killing only where both have the same path.
func join(dir1, path1, dir2, path2 string) Group {
	switch {
	case dir1 != "" && dir2 != "" && path1 == path2:
		return Group{Version: 1, FreezerPath: dir1, KillPath: killable(dir2)}
	case dir1 != "":
		return Group{Version: 1, FreezerPath: dir1}
	case dir2 != "":
		return Group{Version: 2, FreezerPath: dir2, KillPath: killable(dir2)}
	}
	return Group{}
}

// killable returns dir if the kernel (5.14 and later) can kill the group as one.
func killable(dir string) string {
	if _, err := os.Stat(filepath.Join(dir, "cgroup.kill")); err != nil {
		return ""
	}
	return dir
}

// Find searches the hierarchies for groups whose name contains a container's full ID,
// whatever driver made them. It needs neither the container runtime nor a living process.
// No match is an empty result, not an error.
func (h Host) Find(id string) ([]Group, error) {
	if len(id) < minID {
		return nil, fmt.Errorf("find control group: container id %q is too short", id)
	}
	ms, err := h.mounts()
	if err != nil {
		return nil, err
	}
	found := map[int]map[string]string{1: {}, 2: {}} // version -> path below the mount -> directory
	for _, m := range ms {
		err := filepath.WalkDir(m.point, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				if p == m.point {
					return err
				}
				return fs.SkipDir // a group that vanished meanwhile
			}
			if !d.IsDir() {
				return nil
			}
			rel, _ := filepath.Rel(m.point, p)
			if strings.Contains(d.Name(), id) {
				found[m.version][rel] = p
				return fs.SkipDir
			}
			if strings.Count(rel, "/") >= maxDepth {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("search control groups: %w", err)
		}
	}
	var out []Group
	for rel, dir := range found[1] {
		out = append(out, join(dir, rel, found[2][rel], rel))
		delete(found[2], rel)
	}
	for rel, dir := range found[2] {
		out = append(out, join("", "", dir, rel))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].FreezerPath < out[j].FreezerPath })
	return out, nil
}

func isDir(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.IsDir()
}

// hasItem reports whether a comma-separated list has an item.
func hasItem(list, item string) bool {
	for _, s := range strings.Split(list, ",") {
		if s == item {
			return true
		}
	}
	return false
}

// unescape undoes the octal escapes that mountinfo uses for blanks and the like.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
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
