// Package qemu boots a Debian kernel in an emulated machine (QEMU without hardware support)
// from an initramfs that is made on the spot, for tests that need another kernel or an NFS
// client. The guest is one busybox script; it reaches the host's loopback as Gateway.
package qemu

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Release string // as uname -r says
	image   string
	modules map[string]string // path by name, "-" as "_"
}

// FetchKernel unpacks Debian's cloud kernel into build/qemu, unless it is there.
func FetchKernel() (Kernel, error) {
	root, err := moduleRoot()
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch kernel: %w", err)
	}
	cmd := exec.Command(filepath.Join(root, "scripts", "fetch-kernel.sh"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch kernel: %w", err)
	}
	return openKernel(strings.TrimSpace(string(out)))
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not inside the source tree")
		}
		dir = filepath.Dir(dir)
	}
}

func openKernel(dir string) (Kernel, error) {
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	if err != nil {
		return Kernel{}, fmt.Errorf("open kernel: %w", err)
	}
	k := Kernel{
		Release: strings.TrimSpace(string(release)),
		image:   filepath.Join(dir, "vmlinuz"),
		modules: map[string]string{},
	}
	err = filepath.WalkDir(filepath.Join(dir, "modules"), func(path string, _ fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			k.modules[moduleName(name)] = path
		}
		return err
	})
	if err != nil {
		return Kernel{}, fmt.Errorf("open kernel: %w", err)
	}
	return k, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// loadOrder returns the files of the named modules and of all that they depend on, in the
// order in which they must be loaded. A name that the kernel has no module for is left out:
// what one kernel has as a module, another has built in.
func (k Kernel) loadOrder(names ...string) ([]string, error) {
	var out []string
	seen := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		path, ok := k.modules[name]
		if !ok || seen[name] {
			return nil
		}
		seen[name] = true
		deps, err := dependencies(path)
		if err != nil {
			return err
		}
		for _, d := range deps {
			if err := add(d); err != nil {
				return err
			}
		}
		out = append(out, path)
		return nil
	}
	for _, n := range names {
		if err := add(moduleName(n)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// dependencies reads what a module says of itself.
func dependencies(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open module: %w", err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("read module %s: it says nothing of itself", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	var out []string
	for _, entry := range bytes.Split(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		if key != "depends" && key != "softdep" || value == "" {
			continue
		}
		// softdep: "pre: a b post: c"; what is needed later is loaded before as well.
		for _, d := range strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' }) {
			if !strings.HasSuffix(d, ":") {
				out = append(out, moduleName(d))
			}
		}
	}
	return out, nil
}
