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

// statKey is what must be equal for an inode to be believed unchanged. ctime can't be set
// by a program, so a restored mtime doesn't hide a change; birth tells a reused inode
// number from the file that had it before.
type statKey struct {
	Ino   uint64
	Birth int64 // nanoseconds; 0 where the file system doesn't keep it
	Size  int64
	MTime int64
	CTime int64
}

// node is one inode that a scan found.
type node struct {
	key   statKey
	typ   FileType
	alloc int64 // bytes allocated on disk
	// mapped is alloc when its holes were last looked at; -1: they have not been.
	mapped int64
	meta   *Inode // its extents mean nothing; must not be changed
	names  []string
	id     FileID
}

// scanned is what is under a directory. The root itself has the name "".
type scanned struct {
	nodes   []*node // in the order of their first names
	names   map[string]*node
	skipped []string // sockets, fifos, devices
}

type scanConfig struct {
	// known returns an inode's metadata if it is certain not to have changed since it was
	// read, which saves reading it; may be nil.
	known func(key statKey, typ FileType) *Inode
	// tolerant accepts that names vanish during the scan: a database is running.
	tolerant bool
}

// scan lists everything under root with its metadata. It never follows symbolic links and
// refuses mount points (ErrEscapes).
func scan(ctx context.Context, root string, cfg scanConfig) (*scanned, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	dir := os.NewFile(uintptr(fd), root)
	s := &scanner{scanConfig: cfg, ctx: ctx, root: root, byIno: map[uint64]*node{}, out: &scanned{names: map[string]*node{}}}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, &st); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("stat %s: %w", root, err)
	}
	s.dev = unix.Mkdev(st.Dev_major, st.Dev_minor)
	if err := s.add("", &st, TypeDir, "/proc/self/fd/"+strconv.Itoa(fd)+"/."); err != nil {
		_ = dir.Close()
		return nil, err
	}
	if err := s.walk(dir, ""); err != nil {
		return nil, err
	}
	return s.out, nil
}

const statMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME

type scanner struct {
	scanConfig
	ctx   context.Context
	root  string
	dev   uint64
	byIno map[uint64]*node
	out   *scanned
	seen  int
	// shallow: directories are not looked into.
	shallow bool
}

// walk closes dir.
func (s *scanner) walk(dir *os.File, rel string) error {
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		if s.tolerant && errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("list %s: %w", s.show(rel), err)
	}
	sort.Strings(names)
	fd := int(dir.Fd())
	proc := "/proc/self/fd/" + strconv.Itoa(fd) + "/"
	for _, name := range names {
		if s.seen++; s.seen%64 == 0 && s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		p := path.Join(rel, name)
		if err := s.entry(fd, name, p, proc+name); err != nil {
			if s.tolerant && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)) {
				continue
			}
			return err
		}
	}
	return nil
}

func (s *scanner) entry(dirfd int, name, rel, proc string) error {
	var st unix.Statx_t
	if err := unix.Statx(dirfd, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, statMask, &st); err != nil {
		return fmt.Errorf("stat %s: %w", s.show(rel), err)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return fmt.Errorf("%w: %s is a mount point; keep all of the database's files in one file system below the data directory", ErrEscapes, s.show(rel))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return s.add(rel, &st, TypeRegular, proc)
	case unix.S_IFLNK:
		return s.add(rel, &st, TypeSymlink, proc)
	case unix.S_IFDIR:
		if unix.Mkdev(st.Dev_major, st.Dev_minor) != s.dev {
			return fmt.Errorf("%w: %s is on another file system or a subvolume of its own", ErrEscapes, s.show(rel))
		}
		if err := s.add(rel, &st, TypeDir, proc); err != nil {
			return err
		}
		if s.shallow {
			return nil
		}
		fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", s.show(rel), err)
		}
		return s.walk(os.NewFile(uintptr(fd), rel), rel)
	default:
		s.out.skipped = append(s.out.skipped, rel)
		return nil
	}
}

// add notes a name. proc is a path to it that no rename of a parent can redirect.
func (s *scanner) add(rel string, st *unix.Statx_t, typ FileType, proc string) error {
	n := s.byIno[st.Ino]
	if n == nil || n.typ != typ {
		n = &node{typ: typ, alloc: int64(st.Blocks) * 512, mapped: -1, key: keyOf(st)}
		if s.known != nil {
			n.meta = s.known(n.key, typ)
		}
		if n.meta == nil {
			m, err := readMeta(st, typ, proc)
			if err != nil {
				return fmt.Errorf("read attributes of %s: %w", s.show(rel), err)
			}
			n.meta = m
		}
		s.byIno[st.Ino] = n
		s.out.nodes = append(s.out.nodes, n)
	}
	n.names = append(n.names, rel)
	s.out.names[rel] = n
	return nil
}

func keyOf(st *unix.Statx_t) statKey {
	k := statKey{Ino: st.Ino, MTime: statxNano(st.Mtime), CTime: statxNano(st.Ctime), Size: int64(st.Size)}
	if st.Mask&unix.STATX_BTIME != 0 {
		k.Birth = statxNano(st.Btime)
	}
	return k
}

func (s *scanner) show(rel string) string { return path.Join(s.root, rel) }

func statxNano(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }

// readMeta reads what stat doesn't tell.
func readMeta(st *unix.Statx_t, typ FileType, proc string) (*Inode, error) {
	m := &Inode{Type: typ, Mode: uint32(st.Mode) & 0o7777, UID: st.Uid, GID: st.Gid, MTime: statxNano(st.Mtime)}
	switch typ {
	case TypeRegular:
		m.Size = int64(st.Size)
	case TypeSymlink:
		t, err := readLink(proc)
		if err != nil {
			return nil, err
		}
		m.Target = t
	}
	var err error
	m.XAttrs, err = readXAttrs(proc)
	return m, err
}

func readLink(p string) ([]byte, error) {
	for n := 256; ; n *= 2 {
		b := make([]byte, n)
		k, err := unix.Readlink(p, b)
		if err != nil {
			return nil, fmt.Errorf("readlink: %w", err)
		}
		if k < n {
			return b[:k:k], nil
		}
	}
}

// readXAttrs returns nil where there are none.
func readXAttrs(p string) (map[string][]byte, error) {
	buf := make([]byte, 512)
	n, err := unix.Llistxattr(p, buf)
	for errors.Is(err, unix.ERANGE) {
		if n, err = unix.Llistxattr(p, nil); err != nil {
			break
		}
		buf = make([]byte, n+256)
		n, err = unix.Llistxattr(p, buf)
	}
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	out := map[string][]byte{}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.SGI_ACL_") {
			continue // how XFS shows an access control list a second time
		}
		val, err := getXAttr(p, name)
		if errors.Is(err, unix.ENODATA) {
			continue // removed just now
		}
		if err != nil {
			return nil, fmt.Errorf("read xattr %s: %w", name, err)
		}
		out[name] = val
	}
	return out, nil
}

func getXAttr(p, name string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := unix.Lgetxattr(p, name, buf)
		if err == nil {
			return buf[:n:n], nil
		}
		if !errors.Is(err, unix.ERANGE) {
			return nil, err
		}
		if n, err = unix.Lgetxattr(p, name, nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n+64)
	}
}

// openBelow opens a regular file of the volume for reading, never through a symbolic link
// that the database may have put into the path.
func openBelow(rootfd int, rel string) (*os.File, error) {
	fd, err := openBelowFD(rootfd, rel)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: rel, Err: err}
	}
	return os.NewFile(uintptr(fd), rel), nil
}

func openBelowFD(rootfd int, rel string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC | unix.O_NOATIME,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(rootfd, rel, &how)
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EPERM) && how.Flags&unix.O_NOATIME != 0:
			how.Flags &^= unix.O_NOATIME
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			// EAGAIN: a rename ran at the same time.
		default:
			return -1, err
		}
	}
}

// sameMeta compares everything but names and extents.
func sameMeta(a, b *Inode) bool {
	if a.Type != b.Type || a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID || a.MTime != b.MTime ||
		a.Size != b.Size || string(a.Target) != string(b.Target) || len(a.XAttrs) != len(b.XAttrs) {
		return false
	}
	for k, v := range a.XAttrs {
		w, ok := b.XAttrs[k]
		if !ok || string(v) != string(w) {
			return false
		}
	}
	return true
}

// metaOf is an inode without its extents.
func metaOf(in *Inode) *Inode {
	m := *in
	m.Extents = nil
	return &m
}
