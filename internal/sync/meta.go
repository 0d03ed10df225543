package sync

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// applyMeta corrects metadata wherever it is not as it should be; directories' times too,
// so it has to be the last change.
func (a *applier) applyMeta(ctx context.Context) error {
	now, err := scan(ctx, a.root, scanConfig{})
	if err != nil {
		return err
	}
	if len(now.names) != len(a.tree.Names) {
		return fmt.Errorf("%s has %d names instead of %d: something else writes it", a.root, len(now.names), len(a.tree.Names))
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(max(a.workers, 1))
	const batch = 64
	for nodes := range slices.Chunk(now.nodes, batch) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return a.metaOf(gctx, nodes) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

func (a *applier) metaOf(ctx context.Context, nodes []*node) error {
	for _, n := range nodes {
		if err := ctx.Err(); err != nil {
			return err
		}
		t := a.at(n.names[0])
		if t == nil || t.in.Type != n.typ || n.typ == TypeRegular && n.key.Size != t.in.Size {
			return fmt.Errorf("%s is not what was just written: something else writes it", a.abs(n.names[0]))
		}
		if sameMeta(metaOf(t.in), n.meta) {
			continue
		}
		p := a.abs(n.names[0])
		if err := a.step("apply-meta", p); err != nil {
			return err
		}
		if err := setMeta(p, n.meta, t.in); err != nil {
			return fmt.Errorf("set attributes of %s: %w", p, noRoom(err))
		}
	}
	return nil
}

// setMeta changes an inode's metadata from have to want.
func setMeta(p string, have, want *Inode) error {
	chowned := have.UID != want.UID || have.GID != want.GID
	if chowned {
		if err := unix.Lchown(p, int(want.UID), int(want.GID)); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	for name := range have.XAttrs {
		if _, ok := want.XAttrs[name]; ok {
			continue
		}
		if err := unix.Lremovexattr(p, name); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove xattr %s: %w", name, err)
		}
	}
	// chown clears setuid, setgid and file capabilities.
	if want.Type != TypeSymlink && (chowned || have.Mode != want.Mode) {
		if err := unix.Chmod(p, want.Mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	// Access control lists go behind chmod, which would change them.
	for name, val := range want.XAttrs {
		if old, ok := have.XAttrs[name]; ok && !chowned && have.Mode == want.Mode && string(old) == string(val) {
			continue
		}
		if err := unix.Lsetxattr(p, name, val, 0); err != nil {
			return fmt.Errorf("set xattr %s: %w", name, err)
		}
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(want.MTime)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}
