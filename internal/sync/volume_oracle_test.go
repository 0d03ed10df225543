package sync

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/track"
)

// volOracle is a tracker that finds out by comparing everything with a copy of its own. It
// needs no privileges, and a test can make it lie.
type volOracle struct {
	t    testing.TB
	root string
	data map[uint64][]byte
	kind map[uint64]string
	stat map[string]string
	// lie may change what is told.
	lie    func(ch *track.Changes)
	drains int

	unsettled []*track.Changes
	again     bool
}

func (o *volOracle) Drain(ctx context.Context) (*track.Changes, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ch := &track.Changes{Inodes: map[uint64]*track.Inode{}}
	if o.data == nil {
		ch.Lost, ch.NamesLost = "just begun", "just begun"
	}
	data, kind, stat := map[uint64][]byte{}, map[uint64]string{}, map[string]string{}
	err := filepath.WalkDir(o.root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(p, o.root), "/")
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		stat[rel] = fmt.Sprintf("%d %o %d %d %d %d %v", st.Ino, st.Mode, st.Uid, st.Gid, st.Mtim.Nano(), st.Ctim.Nano(), st.Nlink)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR { // directories are named when they appear or their attributes change
			stat[rel] = fmt.Sprintf("%d %o %d %d %v", st.Ino, st.Mode, st.Uid, st.Gid, volXAttrs(o.t, p))
			// Names that came and went.
			stat[filepath.Join(rel, ".was")] = fmt.Sprint(st.Mtim.Nano())
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG || data[st.Ino] != nil {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		data[st.Ino], kind[st.Ino] = append(b, 0), volBlocks(o.t, p, st.Size, st.Blocks*512)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for ino, b := range data {
		old, ok := o.data[ino]
		if !ok || bytes.Equal(old, b) && o.kind[ino] == kind[ino] {
			continue
		}
		in := &track.Inode{}
		b, old = b[:len(b)-1], old[:len(old)-1]
		const step = 4096
		for at := 0; at < len(b); at += step {
			to := min(at+step, len(b))
			if to > len(old) || !bytes.Equal(b[at:to], old[at:to]) {
				in.Written = append(in.Written, track.Range{From: int64(at), To: int64(to)})
			}
		}
		n := min(len(kind[ino]), len(o.kind[ino]))
		in.Ranged = len(b) < len(old) || kind[ino][:n] != o.kind[ino][:n]
		ch.Inodes[ino] = in
	}
	for name, s := range stat {
		if o.stat[name] != s {
			ch.Names = append(ch.Names, name)
		}
	}
	for name := range o.stat {
		if _, ok := stat[name]; !ok {
			ch.Names = append(ch.Names, name)
		}
	}
	o.data, o.kind, o.stat = data, kind, stat
	o.drains++
	if o.lie != nil {
		o.lie(ch)
	}
	told := ch
	if o.again {
		told = &track.Changes{Inodes: map[uint64]*track.Inode{}, NamesLost: "restarted"}
		for _, u := range append(o.unsettled, ch) {
			for ino, in := range u.Inodes {
				e := told.Inodes[ino]
				if e == nil {
					e = &track.Inode{}
					told.Inodes[ino] = e
				}
				e.Written, e.Ranged = append(e.Written, in.Written...), e.Ranged || in.Ranged
			}
			if u.Lost != "" {
				told.Lost = u.Lost
			}
		}
		o.again = false
	}
	o.unsettled = append(o.unsettled, ch)
	return told, nil
}

func (o *volOracle) Settle() error { o.unsettled = nil; return nil }

// Close forgets nothing: what has not been settled is told again.
func (o *volOracle) Close() error { o.again = true; return nil }

func (o *volOracle) Remove() error { return nil }

// volTracked makes a volume follow an oracle, which outlives the agent as the kernel does.
func volTracked(t testing.TB, o *volOracle) func(*VolumeConfig) {
	return func(c *VolumeConfig) {
		c.Tier = TierTracked
		c.track = func() (tracker, error) {
			if root := filepath.Join(c.Dir, "volume"); o.root != root {
				*o = volOracle{t: t, root: root, lie: o.lie}
			}
			return o, nil
		}
	}
}
