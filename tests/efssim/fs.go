package efssim

import (
	"encoding/binary"
	gopath "path"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// faulty stands before a file system and lets the faults decide about every operation, and
// the model of an NFS client about what it costs. Forgetting is not in it: nobody waits.
type faulty struct {
	fuse.RawFileSystem
	f *faults
	c *client

	mu    sync.Mutex
	paths map[uint64]string // node to where it was seen last, relative to the root
}

func newFaulty(inner fuse.RawFileSystem, f *faults, c *client) *faulty {
	c.stat = func(node uint64) (fuse.Attr, bool) {
		var out fuse.AttrOut
		st := inner.GetAttr(nil, &fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: node}}, &out)
		return out.Attr, st.Ok()
	}
	return &faulty{RawFileSystem: inner, f: f, c: c, paths: map[uint64]string{fuse.FUSE_ROOT_ID: ""}}
}

// tell lets the client count, and waits for as long as that takes.
func (t *faulty) tell(count func(c *client) wait) {
	t.c.mu.Lock()
	w := count(t.c)
	t.c.mu.Unlock()
	t.f.pause(time.Duration(w))
}

// after counts when the effect took place.
func (t *faulty) after(st fuse.Status, count func(c *client) wait) fuse.Status {
	if st.Ok() {
		t.tell(count)
	}
	return st
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
	return t.in(OpLookup, h, name, out, func() fuse.Status {
		var st fuse.Status
		// One look-up at a time, as in a kernel that knows the name is being looked up.
		t.tell(func(c *client) wait {
			e, hit, w := c.before(h.Pid, h.NodeId, name)
			if hit && !e.primed && e.node == 0 && c.caches() {
				st = fuse.ENOENT
				return w
			}
			st = t.RawFileSystem.Lookup(cancel, h, name, out)
			switch st {
			case fuse.OK:
				c.found(h.Pid, h.NodeId, name, e, hit, out.NodeId, &out.Attr)
				out.SetAttrTimeout(c.tell(out.NodeId, &out.Attr))
			case fuse.ENOENT:
				c.found(h.Pid, h.NodeId, name, e, hit, 0, nil)
			}
			return w
		})
		return st
	})
}

func (t *faulty) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return t.on(OpGetattr, &in.InHeader, func() fuse.Status {
		t.tell(func(c *client) wait { return c.show(in.Pid, in.NodeId) })
		return t.after(t.RawFileSystem.GetAttr(cancel, in, out), func(c *client) wait {
			out.SetTimeout(c.tell(in.NodeId, &out.Attr))
			return 0
		})
	})
}

// Statx is refused so that everything comes to GetAttr.
func (t *faulty) Statx(<-chan struct{}, *fuse.StatxIn, *fuse.StatxOut) fuse.Status {
	return fuse.ENOSYS // the kernel asks for the attributes then
}

func (t *faulty) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return t.on(OpSetattr, &in.InHeader, func() fuse.Status {
		return t.after(t.RawFileSystem.SetAttr(cancel, in, out), func(c *client) wait {
			return c.setattr(in.Pid, in.NodeId, in.Valid&fuse.FATTR_SIZE != 0, &out.Attr)
		})
	})
}

func (t *faulty) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	return t.on(OpAccess, &in.InHeader, func() fuse.Status {
		t.tell(func(c *client) wait { return c.settle(in.Pid) + c.search(in.NodeId) })
		return t.RawFileSystem.Access(cancel, in)
	})
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
	return t.in(OpMknod, &in.InHeader, name, out, func() fuse.Status {
		return t.after(t.RawFileSystem.Mknod(cancel, in, name, out), func(c *client) wait { return c.made(in.Pid, ProcMkdir, in.NodeId, name, out) })
	})
}

func (t *faulty) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpMkdir, &in.InHeader, name, out, func() fuse.Status {
		return t.after(t.RawFileSystem.Mkdir(cancel, in, name, out), func(c *client) wait { return c.made(in.Pid, ProcMkdir, in.NodeId, name, out) })
	})
}

func (t *faulty) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return t.in(OpUnlink, h, name, nil, func() fuse.Status {
		return t.after(t.RawFileSystem.Unlink(cancel, h, name), func(c *client) wait { return c.remove(h.Pid, h.NodeId, name) })
	})
}

func (t *faulty) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return t.in(OpRmdir, h, name, nil, func() fuse.Status {
		return t.after(t.RawFileSystem.Rmdir(cancel, h, name), func(c *client) wait { return c.remove(h.Pid, h.NodeId, name) })
	})
}

func (t *faulty) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	// Named by its target: that is what a test would point at.
	p := t.path(in.Newdir, newName)
	return t.f.run(OpRename, p, 0, in.Pid, func() fuse.Status {
		return t.after(t.RawFileSystem.Rename(cancel, in, oldName, newName), func(c *client) wait {
			return c.rename(in.Pid, in.NodeId, oldName, in.Newdir, newName)
		})
	})
}

func (t *faulty) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpLink, &in.InHeader, name, out, func() fuse.Status {
		return t.after(t.RawFileSystem.Link(cancel, in, name, out), func(c *client) wait { return c.made(in.Pid, ProcLink, in.NodeId, name, out) })
	})
}

func (t *faulty) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return t.in(OpSymlink, h, name, out, func() fuse.Status {
		return t.after(t.RawFileSystem.Symlink(cancel, h, target, name, out), func(c *client) wait { return c.made(h.Pid, ProcSymlink, h.NodeId, name, out) })
	})
}

func (t *faulty) Readlink(cancel <-chan struct{}, h *fuse.InHeader) (target []byte, st fuse.Status) {
	st = t.on(OpReadlink, h, func() (st fuse.Status) {
		t.tell(func(c *client) wait { return c.readlink(h.Pid, h.NodeId) })
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
			out.OpenFlags |= fuse.FOPEN_DIRECT_IO
			t.tell(func(c *client) wait {
				return c.created(in.Pid, in.NodeId, name, out.Fh, out.NodeId, in.Flags&syscall.O_EXCL != 0, &out.Attr)
			})
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
		if done = st.Ok(); done {
			// The page cache is the client's; the kernel's would hide reads from it.
			out.OpenFlags |= fuse.FOPEN_DIRECT_IO
			t.tell(func(c *client) wait {
				return c.opened(in.Pid, out.Fh, in.NodeId, opened(in.Flags) == OpOpenWrite)
			})
		}
		return st
	})
	if done && !st.Ok() {
		t.Release(cancel, &fuse.ReleaseIn{InHeader: in.InHeader, Fh: out.Fh})
	}
	return st
}

func (t *faulty) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (res fuse.ReadResult, st fuse.Status) {
	st = t.f.run(OpRead, t.path(in.NodeId, ""), int(in.Size), in.Pid, func() (st fuse.Status) {
		t.tell(func(c *client) wait { return c.reads(in.Pid, in.Fh, in.NodeId, int64(in.Offset), int64(in.Size)) }) //nolint:gosec // no file is that long
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
		return t.after(st, func(c *client) wait {
			return c.settle(in.Pid) + c.write(in.NodeId, int64(in.Offset), int64(n)) //nolint:gosec // no file is that long
		})
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

// Fallocate is refused: NFSv4.1 does not have it.
func (t *faulty) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return t.on(OpFallocate, &in.InHeader, func() fuse.Status { return fuse.Status(syscall.EOPNOTSUPP) })
}

func (t *faulty) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return t.on(OpFlush, &in.InHeader, func() fuse.Status {
		t.tell(func(c *client) wait { return c.closed(in.Pid, in.Fh) })
		return t.RawFileSystem.Flush(cancel, in)
	})
}

func (t *faulty) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return t.on(OpFsync, &in.InHeader, func() fuse.Status {
		t.tell(func(c *client) wait { return c.settle(in.Pid) + c.flush(c.node(in.NodeId), true) })
		if t.c.opt.Volatile {
			return fuse.OK
		}
		return t.RawFileSystem.Fsync(cancel, in)
	})
}

func (t *faulty) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	done := false
	st := t.on(OpOpendir, &in.InHeader, func() fuse.Status {
		st := t.RawFileSystem.OpenDir(cancel, in, out)
		if done = st.Ok(); done {
			frozen := t.f.listing(t.path(in.NodeId, ""))
			t.tell(func(c *client) wait {
				w := c.opendir(in.Pid, out.Fh, in.NodeId)
				c.dirs[out.Fh].frozen = frozen
				return w
			})
		}
		return st
	})
	if done && !st.Ok() {
		t.ReleaseDir(&fuse.ReleaseIn{InHeader: in.InHeader, Fh: out.Fh})
	}
	return st
}

func (t *faulty) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return t.on(OpReaddir, &in.InHeader, func() fuse.Status {
		frozen := t.frozen(in.Fh)
		var st fuse.Status
		if frozen == nil {
			st = t.RawFileSystem.ReadDir(cancel, in, out)
		} else {
			for k := in.Offset; k < uint64(len(frozen)) && out.AddDirEntry(frozen[k]); k++ {
			}
		}
		names := namesIn(out.Bytes())
		return t.after(st, func(c *client) wait { return c.list(in.Fh, in.Offset == 0, names) })
	})
}

// ReadDirPlus is not offered: attributes that came with a listing would be used unasked.
func (t *faulty) ReadDirPlus(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.ENOSYS
}

func (t *faulty) FsyncDir(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return t.on(OpFsyncdir, &in.InHeader, func() fuse.Status {
		if t.c.opt.Volatile {
			return fuse.OK
		}
		return t.RawFileSystem.FsyncDir(cancel, in) // asks an NFS server nothing
	})
}

func (t *faulty) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return t.on(OpStatfs, h, func() fuse.Status {
		t.tell(func(c *client) wait { return c.settle(h.Pid) + c.rpc(ProcStatfs, 1) })
		return t.RawFileSystem.StatFs(cancel, h, out)
	})
}

// Release counts the CLOSE. The number of the handle is free afterwards.
func (t *faulty) Release(cancel <-chan struct{}, in *fuse.ReleaseIn) {
	t.tell(func(c *client) wait { c.released(in.Fh); return 0 })
	t.RawFileSystem.Release(cancel, in)
}

// ReleaseDir forgets the handle of a directory.
func (t *faulty) ReleaseDir(in *fuse.ReleaseIn) {
	t.tell(func(c *client) wait { delete(c.dirs, in.Fh); return 0 })
	t.RawFileSystem.ReleaseDir(in)
}

func (t *faulty) frozen(fh uint64) []fuse.DirEntry {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	if o := t.c.dirs[fh]; o != nil {
		return o.frozen
	}
	return nil
}

// namesIn are the names in an answer to a listing: records of 24 bytes and the name, padded
// to a multiple of 8.
func namesIn(answer []byte) []string {
	var out []string
	for len(answer) >= 24 {
		n := int(binary.NativeEndian.Uint32(answer[16:]))
		end := 24 + (n+7)/8*8
		if n == 0 || end > len(answer) {
			break
		}
		out = append(out, string(answer[24:24+n]))
		answer = answer[end:]
	}
	return out
}
