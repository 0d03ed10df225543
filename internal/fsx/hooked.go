package fsx

import "io/fs"

// Hook is asked before every operation. A non-nil error is returned in the operation's
// place and the operation does not happen. It may block, to simulate a share that hangs.
type Hook func(op Op, path string) error

// After is told the outcome of every operation that happened and may replace its error,
// to simulate a reply that was lost after the operation took effect.
type After func(op Op, path string, err error) error

// Hooked wraps a file system with a test's hooks; either may be nil.
type Hooked struct {
	FS     FS
	Before Hook
	After  After
}

var _ FS = (*Hooked)(nil)

func (h *Hooked) do(op Op, path string, f func() error) error {
	if h.Before != nil {
		if err := h.Before(op, path); err != nil {
			return err
		}
	}
	err := f()
	if h.After != nil {
		err = h.After(op, path, err)
	}
	return err
}

// Open implements FS.
func (h *Hooked) Open(path string) (f File, err error) {
	err = h.do(OpOpen, path, func() (e error) { f, e = h.FS.Open(path); return })
	return h.wrap(f, err)
}

// Create implements FS.
func (h *Hooked) Create(path string) (f File, err error) {
	err = h.do(OpCreate, path, func() (e error) { f, e = h.FS.Create(path); return })
	return h.wrap(f, err)
}

func (h *Hooked) wrap(f File, err error) (File, error) {
	if err != nil {
		if f != nil {
			_ = f.Close() // the outcome was replaced by a hook
		}
		return nil, err
	}
	return &hookedFile{File: f, h: h}, nil
}

// Mkdir implements FS.
func (h *Hooked) Mkdir(p string) error {
	return h.do(OpMkdir, p, func() error { return h.FS.Mkdir(p) })
}

// MkdirAll implements FS.
func (h *Hooked) MkdirAll(p string) error {
	return h.do(OpMkdir, p, func() error { return h.FS.MkdirAll(p) })
}

// Link implements FS; hooks see the new name.
func (h *Hooked) Link(o, n string) error {
	return h.do(OpLink, n, func() error { return h.FS.Link(o, n) })
}

// Symlink implements FS; hooks see the new name.
func (h *Hooked) Symlink(target, p string) error {
	return h.do(OpSymlink, p, func() error { return h.FS.Symlink(target, p) })
}

// Readlink implements FS.
func (h *Hooked) Readlink(p string) (target string, err error) {
	err = h.do(OpFollow, p, func() (e error) { target, e = h.FS.Readlink(p); return })
	return target, err
}

// Rename implements FS; hooks see the new name.
func (h *Hooked) Rename(o, n string) error {
	return h.do(OpRename, n, func() error { return h.FS.Rename(o, n) })
}

// Remove implements FS.
func (h *Hooked) Remove(p string) error {
	return h.do(OpRemove, p, func() error { return h.FS.Remove(p) })
}

// ReadDir implements FS.
func (h *Hooked) ReadDir(p string) (e []fs.DirEntry, err error) {
	err = h.do(OpReadDir, p, func() (er error) { e, er = h.FS.ReadDir(p); return })
	return e, err
}

// Stat implements FS.
func (h *Hooked) Stat(p string) (i fs.FileInfo, err error) {
	err = h.do(OpStat, p, func() (er error) { i, er = h.FS.Stat(p); return })
	return i, err
}

// Identify implements FS.
func (h *Hooked) Identify(p string) (id Identity, err error) {
	err = h.do(OpStat, p, func() (e error) { id, e = h.FS.Identify(p); return })
	return id, err
}

// Glance implements FS.
func (h *Hooked) Glance(p string) (id Identity, err error) {
	err = h.do(OpStat, p, func() (e error) { id, e = h.FS.Glance(p); return })
	return id, err
}

// SyncDir implements FS.
func (h *Hooked) SyncDir(p string) error {
	return h.do(OpSyncDir, p, func() error { return h.FS.SyncDir(p) })
}

// At implements FS; hooks see OpPoint and "label path".
func (h *Hooked) At(label, p string) error {
	return h.do(OpPoint, label+" "+p, func() error { return h.FS.At(label, p) })
}

type hookedFile struct {
	File
	h *Hooked
}

func (f *hookedFile) Read(b []byte) (n int, err error) {
	err = f.h.do(OpRead, f.Name(), func() (e error) { n, e = f.File.Read(b); return })
	return n, err
}

func (f *hookedFile) ReadAt(b []byte, off int64) (n int, err error) {
	err = f.h.do(OpRead, f.Name(), func() (e error) { n, e = f.File.ReadAt(b, off); return })
	return n, err
}

func (f *hookedFile) Write(b []byte) (n int, err error) {
	err = f.h.do(OpWrite, f.Name(), func() (e error) { n, e = f.File.Write(b); return })
	return n, err
}

func (f *hookedFile) WriteAt(b []byte, off int64) (n int, err error) {
	err = f.h.do(OpWrite, f.Name(), func() (e error) { n, e = f.File.WriteAt(b, off); return })
	return n, err
}

func (f *hookedFile) Sync() error { return f.h.do(OpSync, f.Name(), f.File.Sync) }

func (f *hookedFile) Close() error { return f.h.do(OpClose, f.Name(), f.File.Close) }
