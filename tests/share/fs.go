package share

import (
	gopath "path"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// faulty stands before a file system and lets the faults decide about every operation.
// Forgetting and releasing are not in it: nobody waits for those.
type faulty struct {
	fuse.RawFileSystem
	f *faults

	mu    sync.Mutex
	paths map[uint64]string // node to where it was seen last, relative to the root
}

func newFaulty(inner fuse.RawFileSystem, f *faults) *faulty {
	return &faulty{RawFileSystem: inner, f: f, paths: map[uint64]string{fuse.FUSE_ROOT_ID: ""}}
}

func (t *faulty) path(node uint64, name string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return gopath.Join(t.paths[node], name)
}

func (t *faulty) saw(node uint64, path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.paths[node] = path
}

// on runs an operation on a node.
func (t *faulty) on(op Op, h *fuse.InHeader, effect func() fuse.Status) fuse.Status {
	return t.f.run(op, t.path(h.NodeId, ""), 0, h.Pid, effect)
}

// in runs an operation on a name in a directory that has an entry as its result. When the
// reply is lost after it took effect the kernel never learns of the entry's node.
func (t *faulty) in(op Op, h *fuse.InHeader, name string, out *fuse.EntryOut, effect func() fuse.Status) fuse.Status {
	p := t.path(h.NodeId, name)
	done := false
	st := t.f.run(op, p, 0, h.Pid, func() fuse.Status {
		st := effect()
		if done = st.Ok(); done && out != nil {
			t.saw(out.NodeId, p)
		}
		return st
	})
	if done && !st.Ok() && out != nil {
		t.Forget(out.NodeId, 1)
	}
	return st
}

func (t *faulty) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpLookup, h, name, out, func() fuse.Status { return t.RawFileSystem.Lookup(cancel, h, name, out) })
}

func (t *faulty) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return t.on(OpGetattr, &in.InHeader, func() fuse.Status { return t.RawFileSystem.GetAttr(cancel, in, out) })
}

func (t *faulty) Statx(cancel <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	return t.on(OpGetattr, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Statx(cancel, in, out) })
}

func (t *faulty) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return t.on(OpSetattr, &in.InHeader, func() fuse.Status { return t.RawFileSystem.SetAttr(cancel, in, out) })
}

func (t *faulty) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	return t.on(OpAccess, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Access(cancel, in) })
}

func (t *faulty) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, attr string, dest []byte) (n uint32, st fuse.Status) {
	st = t.on(OpXattr, h, func() (st fuse.Status) {
		n, st = t.RawFileSystem.GetXAttr(cancel, h, attr, dest)
		return st
	})
	return n, st
}

func (t *faulty) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (n uint32, st fuse.Status) {
	st = t.on(OpXattr, h, func() (st fuse.Status) {
		n, st = t.RawFileSystem.ListXAttr(cancel, h, dest)
		return st
	})
	return n, st
}

func (t *faulty) SetXAttr(cancel <-chan struct{}, in *fuse.SetXAttrIn, attr string, data []byte) fuse.Status {
	return t.on(OpXattr, &in.InHeader, func() fuse.Status { return t.RawFileSystem.SetXAttr(cancel, in, attr, data) })
}

func (t *faulty) RemoveXAttr(cancel <-chan struct{}, h *fuse.InHeader, attr string) fuse.Status {
	return t.on(OpXattr, h, func() fuse.Status { return t.RawFileSystem.RemoveXAttr(cancel, h, attr) })
}

func (t *faulty) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpMknod, &in.InHeader, name, out, func() fuse.Status { return t.RawFileSystem.Mknod(cancel, in, name, out) })
}

func (t *faulty) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpMkdir, &in.InHeader, name, out, func() fuse.Status { return t.RawFileSystem.Mkdir(cancel, in, name, out) })
}

func (t *faulty) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return t.in(OpUnlink, h, name, nil, func() fuse.Status { return t.RawFileSystem.Unlink(cancel, h, name) })
}

func (t *faulty) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return t.in(OpRmdir, h, name, nil, func() fuse.Status { return t.RawFileSystem.Rmdir(cancel, h, name) })
}

func (t *faulty) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	// Named by its target: that is what a test would point at.
	p := t.path(in.Newdir, newName)
	return t.f.run(OpRename, p, 0, in.Pid, func() fuse.Status {
		return t.RawFileSystem.Rename(cancel, in, oldName, newName)
	})
}

func (t *faulty) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpLink, &in.InHeader, name, out, func() fuse.Status { return t.RawFileSystem.Link(cancel, in, name, out) })
}

func (t *faulty) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpSymlink, h, name, out, func() fuse.Status { return t.RawFileSystem.Symlink(cancel, h, target, name, out) })
}

func (t *faulty) Readlink(cancel <-chan struct{}, h *fuse.InHeader) (target []byte, st fuse.Status) {
	st = t.on(OpReadlink, h, func() (st fuse.Status) {
		target, st = t.RawFileSystem.Readlink(cancel, h)
		return st
	})
	return target, st
}

func (t *faulty) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	p := t.path(in.NodeId, name)
	done := false
	st := t.f.run(OpCreate, p, 0, in.Pid, func() fuse.Status {
		st := t.RawFileSystem.Create(cancel, in, name, out)
		if done = st.Ok(); done {
			t.saw(out.NodeId, p)
		}
		return st
	})
	if done && !st.Ok() {
		t.Release(cancel, &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: out.NodeId}, Fh: out.Fh})
		t.Forget(out.NodeId, 1)
	}
	return st
}

// Tmpfile is refused, as NFS does.
func (t *faulty) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status {
	return fuse.Status(syscall.EOPNOTSUPP)
}

func (t *faulty) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	done := false
	st := t.on(opened(in.Flags), &in.InHeader, func() fuse.Status {
		st := t.RawFileSystem.Open(cancel, in, out)
		done = st.Ok()
		return st
	})
	if done && !st.Ok() {
		t.Release(cancel, &fuse.ReleaseIn{InHeader: in.InHeader, Fh: out.Fh})
	}
	return st
}

func (t *faulty) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (res fuse.ReadResult, st fuse.Status) {
	st = t.f.run(OpRead, t.path(in.NodeId, ""), int(in.Size), in.Pid, func() (st fuse.Status) {
		res, st = t.RawFileSystem.Read(cancel, in, buf)
		return st
	})
	if !st.Ok() && res != nil {
		res.Done()
		res = nil
	}
	return res, st
}

func (t *faulty) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (n uint32, st fuse.Status) {
	st = t.f.run(OpWrite, t.path(in.NodeId, ""), len(data), in.Pid, func() (st fuse.Status) {
		n, st = t.RawFileSystem.Write(cancel, in, data)
		return st
	})
	return n, st
}

// Writev is refused so that everything comes to Write.
func (t *faulty) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

// CopyFileRange is refused so that the bytes come to Read and Write.
func (t *faulty) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}

func (t *faulty) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	return t.on(OpLseek, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Lseek(cancel, in, out) })
}

func (t *faulty) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return t.on(OpFallocate, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Fallocate(cancel, in) })
}

func (t *faulty) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return t.on(OpFlush, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Flush(cancel, in) })
}

func (t *faulty) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return t.on(OpFsync, &in.InHeader, func() fuse.Status { return t.RawFileSystem.Fsync(cancel, in) })
}

func (t *faulty) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	done := false
	st := t.on(OpOpendir, &in.InHeader, func() fuse.Status {
		st := t.RawFileSystem.OpenDir(cancel, in, out)
		done = st.Ok()
		return st
	})
	if done && !st.Ok() {
		t.ReleaseDir(&fuse.ReleaseIn{InHeader: in.InHeader, Fh: out.Fh})
	}
	return st
}

func (t *faulty) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return t.on(OpReaddir, &in.InHeader, func() fuse.Status { return t.RawFileSystem.ReadDir(cancel, in, out) })
}

func (t *faulty) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return t.on(OpReaddir, &in.InHeader, func() fuse.Status { return t.RawFileSystem.ReadDirPlus(cancel, in, out) })
}

func (t *faulty) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return t.on(OpFsyncdir, &in.InHeader, func() fuse.Status { return t.RawFileSystem.FsyncDir(cancel, in) })
}

func (t *faulty) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return t.on(OpStatfs, h, func() fuse.Status { return t.RawFileSystem.StatFs(cancel, h, out) })
}
