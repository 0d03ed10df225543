package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// looker brings a census up to date where names were touched.
type looker struct {
	c        *census
	root     string
	tolerant bool // the database is running: names may come and go
	identify func(n *node) FileID

	s    *scanner
	dirs map[string]int // open directories
	deep map[string]bool
	gone []string
}

// look looks at the names again, at the directories that they are in, and at everything
// below those that are directories. It returns the inodes that it has seen.
func (l *looker) look(ctx context.Context, names []string) ([]*node, error) {
	if len(names) == 0 {
		return nil, nil
	}
	fd, err := unix.Open(l.root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", l.root, err)
	}
	l.dirs = map[string]int{"": fd}
	defer func() {
		for _, fd := range l.dirs {
			_ = unix.Close(fd)
		}
	}()
	l.s = &scanner{scanConfig: scanConfig{tolerant: l.tolerant}, ctx: ctx, root: l.root,
		byIno: map[uint64]*node{}, out: &scanned{names: map[string]*node{}}}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", l.root, err)
	}
	l.s.dev = unix.Mkdev(st.Dev_major, st.Dev_minor)
	for _, name := range l.order(names) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := l.one(fd, name, &st); err != nil {
			return nil, err
		}
	}
	return l.merge(), nil
}

// order adds the directories that the names are in, of which only the attributes count
// unless nothing is known of them, and sorts: parents first.
func (l *looker) order(names []string) []string {
	l.deep = map[string]bool{}
	for _, name := range names {
		if name = strings.Trim(path.Clean("/"+name), "/"); name == "." {
			name = ""
		}
		l.deep[name] = true
		for name != "" {
			dir, _ := splitName(name)
			known := l.c.names[dir]
			if known != nil && known.typ == TypeDir {
				if !l.deep[dir] {
					l.deep[dir] = false // looked at, but not into
				}
				break
			}
			l.deep[dir], name = true, dir
		}
	}
	out := make([]string, 0, len(l.deep))
	for name := range l.deep {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

// one looks at one name.
func (l *looker) one(rootfd int, name string, root *unix.Statx_t) error {
	if l.s.out.names[name] != nil {
		return nil // inside of one that was looked into
	}
	if name == "" {
		if err := l.s.add("", root, TypeDir, "/proc/self/fd/"+strconv.Itoa(rootfd)+"/."); err != nil {
			return err
		}
		if !l.deep[""] {
			return nil
		}
		top, err := unix.Openat(rootfd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", l.root, err)
		}
		return l.s.walk(os.NewFile(uintptr(top), l.root), "")
	}
	dir, base := splitName(name)
	fd, err := l.dir(rootfd, dir)
	if err == nil {
		l.s.shallow = !l.deep[name]
		err = l.s.entry(fd, base, name, "/proc/self/fd/"+strconv.Itoa(fd)+"/"+base)
		l.s.shallow = false
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		l.gone = append(l.gone, name)
		return nil
	}
	return err
}

func (l *looker) dir(rootfd int, dir string) (int, error) {
	if fd, ok := l.dirs[dir]; ok {
		return fd, nil
	}
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(rootfd, dir, &how)
		switch {
		case err == nil:
			l.dirs[dir] = fd
			return fd, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		default:
			return -1, fmt.Errorf("open %s: %w", l.s.show(dir), err)
		}
	}
}

// merge puts what was seen into the census.
func (l *looker) merge() []*node {
	seen := l.s.out
	skipped := map[string]bool{}
	for _, name := range seen.skipped {
		skipped[name] = true
	}
	// First what is gone, so that no name has two inodes and no inode is lost on the way
	// from one name to another.
	for _, name := range l.gone {
		l.c.remove(name)
	}
	for name := range l.deep {
		l.removeUnseen(name, seen.names, skipped)
	}
	for name := range skipped {
		l.c.remove(name)
	}
	for name, n := range seen.names {
		if old := l.c.names[name]; old != nil && !sameNode(old, n) {
			l.c.remove(name)
		} else if n.typ != TypeDir {
			l.c.empty(name)
		}
	}
	for name := range skipped {
		l.c.skipped[name] = true
	}
	out := make([]*node, 0, len(seen.nodes))
	for _, n := range seen.nodes {
		old := l.c.byIno[n.key.Ino]
		if old != nil && !sameNode(old, n) {
			// The number is another inode's by now: what had it has no name any more.
			for len(old.names) > 0 {
				l.c.remove(old.names[0])
			}
			old = nil
		}
		names := n.names
		if old == nil {
			n.names = nil
			n.id = l.identify(&node{key: n.key, typ: n.typ, names: names})
			old = n
		} else if old.key != n.key || !sameMeta(old.meta, n.meta) {
			old.key, old.meta = n.key, n.meta
			l.c.ids[old.id] = true
		}
		old.alloc = n.alloc // which a time need not show
		for _, name := range names {
			if l.c.names[name] == old {
				continue
			}
			if old.typ == TypeDir {
				for len(old.names) > 0 { // it was moved
					l.c.remove(old.names[0])
				}
			}
			l.c.add(old, name)
		}
		out = append(out, old)
	}
	return out
}

// removeUnseen removes what was below a directory that was looked into and isn't any more.
func (l *looker) removeUnseen(dir string, seen map[string]*node, skipped map[string]bool) {
	if !l.deep[dir] || seen[dir] == nil || seen[dir].typ != TypeDir {
		return
	}
	for base := range l.c.within[dir] {
		name := path.Join(dir, base)
		if seen[name] == nil {
			l.c.remove(name)
		} else if !l.deep[name] {
			l.deep[name] = true
			l.removeUnseen(name, seen, skipped)
		}
	}
	for name := range l.c.skipped {
		if d, _ := splitName(name); d == dir && !skipped[name] {
			delete(l.c.skipped, name)
		}
	}
}

func sameNode(a, b *node) bool {
	return a.key.Ino == b.key.Ino && a.key.Birth == b.key.Birth && a.typ == b.typ
}
