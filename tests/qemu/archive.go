package qemu

import (
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// archive is an initramfs under construction.
type archive struct {
	w    *cpio.Writer
	have map[string]bool // paths, without the leading slash
}

func newArchive(w io.Writer) *archive {
	return &archive{w: cpio.NewWriter(w), have: map[string]bool{"": true, ".": true}}
}

func (a *archive) close() error { return a.w.Close() }

// dir makes a directory and its parents.
func (a *archive) dir(name string) error {
	name = strings.Trim(path.Clean(name), "/")
	if a.have[name] {
		return nil
	}
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	a.have[name] = true
	return a.w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeDir | 0o755, Links: 2})
}

// data makes a file.
func (a *archive) data(name string, mode fs.FileMode, content []byte) error {
	name = strings.Trim(path.Clean(name), "/")
	if a.have[name] {
		return nil
	}
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	a.have[name] = true
	h := &cpio.Header{Name: name, Mode: cpio.TypeReg | cpio.FileMode(mode.Perm()), Size: int64(len(content)), Links: 1}
	if err := a.w.WriteHeader(h); err != nil {
		return err
	}
	_, err := a.w.Write(content)
	return err
}

// copy makes a file, or all files of a directory, of the host's.
func (a *archive) copy(name, from string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := path.Join(name, filepath.ToSlash(strings.TrimPrefix(p, from)))
		if d.IsDir() {
			return a.dir(to)
		}
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return a.data(to, st.Mode(), content)
	})
}

// program copies a program of the host's into a directory, with the libraries that it needs.
func (a *archive) program(dir, name string) error {
	file, err := exec.LookPath(name)
	if err != nil {
		return fmt.Errorf("find program: %w", err)
	}
	if err := a.copy(path.Join(dir, filepath.Base(name)), file); err != nil {
		return err
	}
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("open program: %w", err)
	}
	libs, err := f.ImportedLibraries()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("read program %s: %w", file, err)
	}
	if len(libs) == 0 {
		return nil // static
	}
	// "libc.so.6 => /lib/.../libc.so.6 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)"
	out, err := exec.Command("ldd", file).Output()
	if err != nil {
		return fmt.Errorf("list libraries of %s: %w", file, err)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") {
			if err := a.copy(word, word); err != nil {
				return err
			}
		}
	}
	return nil
}
