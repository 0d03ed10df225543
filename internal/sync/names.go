package sync

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"

	"golang.org/x/sys/unix"
)

// applyNames makes every name of the tree, and no other, refer to its inode.
func (a *applier) applyNames(ctx context.Context) error {
	if err := a.takeAway(ctx); err != nil {
		return err
	}
	// Parents sort before what is in them.
	names := make([]string, 0, len(a.tree.Names))
	for name := range a.tree.Names {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		t, p := a.at(name), a.abs(name)
		if n := a.found.names[name]; n != nil && a.keep[n.key.Ino] == t {
			continue // it was there and has stayed
		}
		if err := a.bring(t, name, p); err != nil {
			return err
		}
	}
	return nil
}

// takeAway removes all names that must not be, keeping inodes that get another name.
func (a *applier) takeAway(ctx context.Context) error {
	for _, rel := range a.found.skipped {
		if err := a.unlink(rel); err != nil {
			return err
		}
	}
	staging := false
	var dirs []string
	for _, n := range a.found.nodes {
		if err := ctx.Err(); err != nil {
			return err
		}
		t := a.keep[n.key.Ino]
		if n.typ == TypeDir {
			if t == nil {
				dirs = append(dirs, n.names[0])
			}
			continue
		}
		stays := false
		for _, name := range n.names {
			stays = stays || t != nil && a.at(name) == t
		}
		if t != nil && !stays && !t.staged {
			if !staging {
				if err := os.MkdirAll(a.stage, 0o700); err != nil {
					return err
				}
				staging = true
			}
			p := filepath.Join(a.stage, strconv.FormatUint(uint64(t.id), 10))
			if err := a.step("apply-stage", p); err != nil {
				return err
			}
			// Left over from an interrupted run, and not taken up.
			if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err := os.Link(t.handle, p); err != nil {
				return err
			}
			t.handle, t.staged = p, true
		}
		for _, name := range n.names {
			if t != nil && a.at(name) == t {
				continue
			}
			if err := a.unlink(name); err != nil {
				return err
			}
		}
	}
	// What is inside sorts behind its directory.
	sort.Sort(sort.Reverse(sort.StringSlice(dirs)))
	for _, d := range dirs {
		if err := a.step("apply-rmdir", a.abs(d)); err != nil {
			return err
		}
		if err := unix.Rmdir(a.abs(d)); err != nil {
			return fmt.Errorf("remove directory %s: %w", a.abs(d), err)
		}
	}
	return nil
}

func (a *applier) unlink(rel string) error {
	if err := a.step("apply-unlink", a.abs(rel)); err != nil {
		return err
	}
	if err := unix.Unlink(a.abs(rel)); err != nil {
		return fmt.Errorf("unlink %s: %w", a.abs(rel), err)
	}
	return nil
}

// link gives the files that were created their further names.
func (a *applier) link(ctx context.Context) error {
	for _, l := range a.links {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := a.bring(l.t, l.name, a.abs(l.name)); err != nil {
			return err
		}
	}
	a.links = nil
	return nil
}

// bring gives an inode a name that is free.
func (a *applier) bring(t *target, name, p string) (err error) {
	switch {
	case t.in.Type == TypeDir:
		if err := a.step("apply-mkdir", p); err != nil {
			return err
		}
		err = os.Mkdir(p, 0o700)
		t.handle = p
	case t.staged:
		if err := a.step("apply-rename", p); err != nil {
			return err
		}
		err = os.Rename(t.handle, p)
		t.handle, t.staged = p, false
	case t.handle != "":
		if err := a.step("apply-link", p); err != nil {
			return err
		}
		err = os.Link(t.handle, p)
	case t.in.Type == TypeSymlink:
		if err := a.step("apply-symlink", p); err != nil {
			return err
		}
		err = os.Symlink(string(t.in.Target), p)
		t.handle = p
	default:
		// A new file is created when its content is written; its further names come after.
		if name != t.names[0] {
			a.links = append(a.links, link{t, name})
		}
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", p, noRoom(err))
	}
	return nil
}
