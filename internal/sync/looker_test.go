package sync

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLookerOrphans: while names change places, something may have been met inside of what was
// met as a file, or not at all, however far above. The next look puts that right.
func TestLookerOrphans(t *testing.T) {
	root := t.TempDir()
	volOK(t, os.WriteFile(filepath.Join(root, "file"), nil, 0o600))
	volOK(t, os.Mkdir(filepath.Join(root, "dir"), 0o700))
	found, err := scan(t.Context(), root, scanConfig{})
	volOK(t, err)
	for i, n := range found.nodes {
		n.id = FileID(i + 1)
	}
	c, err := newCensus(found)
	volOK(t, err)
	for i, name := range []string{"file/in", "gone/in", "gone/far/away/in", "dir/far/away/in"} {
		ino := uint64(1000 + i)
		c.add(&node{id: FileID(100 + i), typ: TypeRegular, key: statKey{Ino: ino}, meta: &Inode{Type: TypeRegular}}, name)
	}
	l := &looker{c: c, root: root, identify: func(*node) FileID { t.Fatal("nothing is new"); return 0 }}
	_, err = l.look(t.Context(), []string{"file", "gone", "dir"})
	volOK(t, err)
	for name := range c.names {
		if name != "" && name != "file" && name != "dir" {
			t.Errorf("%q has stayed", name)
		}
	}
	if c.files != 1 || c.dirs != 2 || len(c.byIno) != 3 {
		t.Errorf("%d files, %d directories, %d inodes", c.files, c.dirs, len(c.byIno))
	}
}
