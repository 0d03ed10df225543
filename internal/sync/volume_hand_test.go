package sync

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// volOp is one thing that a program does to files.
type volOp struct {
	Do       string
	Path, To string
	Off, N   int64
	Data     []byte
	Mode     uint32
	Name     string
}

// volHand does it: in this process, or in another, whose writes a tracker reports.
type volHand interface{ do(op volOp) error }

// volDoer keeps files mapped between operations.
type volDoer struct{ maps map[string][]byte }

func (d *volDoer) do(op volOp) error {
	open := func(flags int, edit func(f *os.File) error) error {
		f, err := os.OpenFile(op.Path, flags, 0o640)
		if err != nil {
			return err
		}
		return errors.Join(edit(f), f.Close())
	}
	switch op.Do {
	case "write":
		return open(os.O_RDWR|os.O_CREATE, func(f *os.File) error { _, err := f.WriteAt(op.Data, op.Off); return err })
	case "same": // writes what is there
		return open(os.O_RDWR, func(f *os.File) error {
			b := make([]byte, op.N)
			n, _ := f.ReadAt(b, op.Off)
			_, err := f.WriteAt(b[:n], op.Off)
			return err
		})
	case "direct":
		return open(os.O_RDWR|os.O_CREATE|unix.O_DIRECT, func(f *os.File) error {
			n := (len(op.Data) + 4095) &^ 4095
			raw := make([]byte, n+4096)
			b := raw[4096-int(uintptr(unsafe.Pointer(&raw[0]))&4095):][:n]
			copy(b, op.Data)
			_, err := f.WriteAt(b, op.Off&^4095)
			return err
		})
	case "store": // through a mapping that stays
		m := d.maps[op.Path]
		if m == nil {
			err := open(os.O_RDWR, func(f *os.File) error {
				st, err := f.Stat()
				if err != nil || st.Size() == 0 {
					return err
				}
				m, err = unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				return err
			})
			if err != nil || m == nil {
				return err
			}
			d.maps[op.Path] = m
		}
		if op.Off < int64(len(m)) {
			copy(m[op.Off:], op.Data)
		}
		return nil
	case "unmap":
		for p, m := range d.maps {
			delete(d.maps, p)
			if err := unix.Munmap(m); err != nil {
				return err
			}
		}
		return nil
	case "fallocate":
		return open(os.O_RDWR, func(f *os.File) error { return unix.Fallocate(int(f.Fd()), op.Mode, op.Off, op.N) })
	case "clone":
		src, err := os.Open(op.To)
		if err != nil {
			return err
		}
		defer src.Close()
		return open(os.O_RDWR|os.O_CREATE, func(f *os.File) error { return unix.IoctlFileClone(int(f.Fd()), int(src.Fd())) })
	case "copyrange":
		src, err := os.Open(op.To)
		if err != nil {
			return err
		}
		defer src.Close()
		return open(os.O_RDWR|os.O_CREATE, func(f *os.File) error {
			in, out := int64(0), op.Off
			_, err := unix.CopyFileRange(int(src.Fd()), &in, int(f.Fd()), &out, int(op.N), 0)
			return err
		})
	case "truncate":
		return os.Truncate(op.Path, op.N)
	case "regrow":
		st, err := os.Stat(op.Path)
		if err != nil {
			return err
		}
		return errors.Join(os.Truncate(op.Path, st.Size()/2), os.Truncate(op.Path, st.Size()))
	case "mkdir":
		return os.Mkdir(op.Path, os.FileMode(op.Mode))
	case "symlink":
		return os.Symlink(op.To, op.Path)
	case "rename":
		return os.Rename(op.Path, op.To)
	case "link":
		return os.Link(op.Path, op.To)
	case "remove":
		return os.Remove(op.Path)
	case "removeall":
		return os.RemoveAll(op.Path)
	case "chmod":
		return unix.Chmod(op.Path, op.Mode)
	case "chown":
		return os.Lchown(op.Path, int(op.Off), int(op.N))
	case "utimes":
		ts := unix.NsecToTimespec(op.Off)
		return unix.UtimesNanoAt(unix.AT_FDCWD, op.Path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	case "setxattr":
		return unix.Setxattr(op.Path, op.Name, op.Data, 0)
	case "removexattr":
		return unix.Removexattr(op.Path, op.Name)
	case "mknod":
		return unix.Mknod(op.Path, op.Mode, 0)
	default:
		return fmt.Errorf("no such operation: %q", op.Do)
	}
}

// volOther is another process that does what it is told.
type volOther struct {
	enc *gob.Encoder
	dec *gob.Decoder
	pid int
}

type volReply struct {
	Text  string
	Errno unix.Errno
}

const volOtherEnv = "DBSUPERVISOR_TEST_HAND"

// TestMain also serves as the other process.
func TestMain(m *testing.M) {
	if os.Getenv(volOtherEnv) == "" {
		os.Exit(m.Run())
	}
	d := &volStormer{volDoer: volDoer{maps: map[string][]byte{}}}
	dec, enc := gob.NewDecoder(os.Stdin), gob.NewEncoder(os.Stdout)
	for {
		var op volOp
		if err := dec.Decode(&op); err != nil {
			if errors.Is(err, io.EOF) {
				os.Exit(0)
			}
			os.Exit(1)
		}
		var r volReply
		if err := d.do(op); err != nil {
			r.Text = err.Error()
			errors.As(err, &r.Errno)
		}
		if err := enc.Encode(r); err != nil {
			os.Exit(1)
		}
	}
}

func newVolOther(t testing.TB) *volOther {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), volOtherEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	volOK(t, err)
	out, err := cmd.StdoutPipe()
	volOK(t, err)
	volOK(t, cmd.Start())
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	return &volOther{gob.NewEncoder(in), gob.NewDecoder(out), cmd.Process.Pid}
}

func (o *volOther) do(op volOp) error {
	if err := o.enc.Encode(op); err != nil {
		return err
	}
	var r volReply
	if err := o.dec.Decode(&r); err != nil {
		return err
	}
	if r.Errno != 0 {
		return &os.PathError{Op: op.Do, Path: op.Path, Err: r.Errno}
	}
	if r.Text != "" {
		return errors.New(r.Text)
	}
	return nil
}
