package efssim

import "syscall"

// Op is a kind of file system operation, as counted and as chosen for a fault.
type Op string

// The kinds. Statx counts as OpGetattr, the calls on extended attributes as OpXattr.
const (
	OpLookup    Op = "lookup"
	OpGetattr   Op = "getattr"
	OpSetattr   Op = "setattr"
	OpAccess    Op = "access"
	OpXattr     Op = "xattr"
	OpMknod     Op = "mknod"
	OpMkdir     Op = "mkdir"
	OpUnlink    Op = "unlink"
	OpRmdir     Op = "rmdir"
	OpRename    Op = "rename"
	OpLink      Op = "link"
	OpSymlink   Op = "symlink"
	OpReadlink  Op = "readlink"
	OpCreate    Op = "create"
	OpOpen      Op = "open"
	OpOpenWrite Op = "openwrite" // an existing file, opened for writing
	OpRead      Op = "read"
	OpWrite     Op = "write"
	OpLseek     Op = "lseek"
	OpFallocate Op = "fallocate"
	OpFlush     Op = "flush" // close(2): where a network file system reports late errors
	OpFsync     Op = "fsync"
	OpOpendir   Op = "opendir"
	OpReaddir   Op = "readdir"
	OpFsyncdir  Op = "fsyncdir"
	OpStatfs    Op = "statfs"
)

// Changes returns the kinds that a read-only file system refuses.
func Changes() []Op {
	return []Op{
		OpSetattr, OpMknod, OpMkdir, OpUnlink, OpRmdir, OpRename, OpLink, OpSymlink,
		OpCreate, OpOpenWrite, OpWrite, OpFallocate,
	}
}

// Grows returns the kinds that need room.
func Grows() []Op {
	return []Op{OpMknod, OpMkdir, OpSymlink, OpCreate, OpWrite, OpFallocate}
}

// Moves returns the kinds that move data.
func Moves() []Op { return []Op{OpRead, OpWrite} }

func opened(flags uint32) Op {
	if flags&(syscall.O_ACCMODE|syscall.O_TRUNC) != syscall.O_RDONLY {
		return OpOpenWrite
	}
	return OpOpen
}
