package sync

import (
	"fmt"
	"iter"
	"path"
	"sort"
)

// census is what is in the volume: every name and every inode. The tier "tracked" keeps it
// from one capture to the next and looks again only at what was touched.
type census struct {
	names map[string]*node
	byID  map[FileID]*node
	byIno map[uint64]*node
	// within are the base names of what is directly inside of a directory, or of a name that is
	// none: while names change places a look may meet what is inside of a directory that it
	// does not meet itself. Whatever has a name can be reached from the root by within.
	within  map[string]map[string]bool
	links   map[string]*node // symbolic links
	skipped map[string]bool  // sockets, fifos, devices

	files, dirs int

	// What may differ from the baseline.
	all     bool
	ids     map[FileID]bool
	renamed map[string]bool
}

// newCensus arranges what a scan found. Everything in it may differ from the baseline.
func newCensus(found *scanned) (*census, error) {
	c := &census{
		names: make(map[string]*node, len(found.names)), byID: make(map[FileID]*node, len(found.nodes)),
		byIno: make(map[uint64]*node, len(found.nodes)), within: map[string]map[string]bool{},
		links: map[string]*node{}, skipped: map[string]bool{},
	}
	c.clear()
	c.all = true
	for _, n := range found.nodes {
		if o := c.byID[n.id]; o != nil {
			return nil, fmt.Errorf("%q and %q were taken for one file", o.names[0], n.names[0])
		}
		names := n.names
		n.names = nil
		for _, name := range names {
			c.add(n, name)
		}
	}
	for _, name := range found.skipped {
		c.skipped[name] = true
	}
	return c, nil
}

// clear says that everything is as the baseline has it.
func (c *census) clear() {
	c.all, c.ids, c.renamed = false, map[FileID]bool{}, map[string]bool{}
}

// add gives an inode a name that nothing else has.
func (c *census) add(n *node, name string) {
	if len(n.names) == 0 {
		c.byID[n.id], c.byIno[n.key.Ino] = n, n
		switch n.typ {
		case TypeRegular:
			c.files++
		case TypeDir:
			c.dirs++
			if c.within[name] == nil {
				c.within[name] = map[string]bool{}
			}
		}
	}
	if n.typ == TypeSymlink {
		c.links[name] = n
	}
	n.names = append(n.names, name)
	c.names[name] = n
	c.reach(name)
	c.mark(n, name)
}

// reach makes a name known to what it is within, up to what is known already.
func (c *census) reach(name string) {
	for name != "" {
		dir, base := splitName(name)
		if c.within[dir][base] {
			return
		}
		if c.within[dir] == nil {
			c.within[dir] = map[string]bool{}
		}
		c.within[dir][base], name = true, dir
	}
}

func (c *census) mark(n *node, name string) {
	c.ids[n.id] = true
	c.renamed[name] = true
}

// empty removes what is below a name, also if the name is no directory's.
func (c *census) empty(name string) {
	for base := range c.within[name] {
		c.remove(path.Join(name, base))
	}
	delete(c.within, name)
}

// remove takes a name away, and everything below it.
func (c *census) remove(name string) {
	delete(c.skipped, name)
	c.empty(name)
	if name != "" {
		dir, base := splitName(name)
		delete(c.within[dir], base)
	}
	n := c.names[name]
	if n == nil {
		return
	}
	c.mark(n, name)
	delete(c.names, name)
	delete(c.links, name)
	for i, s := range n.names {
		if s == name {
			n.names = append(n.names[:i:i], n.names[i+1:]...)
			break
		}
	}
	if len(n.names) > 0 {
		return
	}
	if c.byIno[n.key.Ino] == n {
		delete(c.byIno, n.key.Ino)
	}
	if c.byID[n.id] == n {
		delete(c.byID, n.id)
	}
	switch n.typ {
	case TypeRegular:
		c.files--
	case TypeDir:
		c.dirs--
	}
}

// changes lists the inodes and names that may differ from the baseline, in order.
func (c *census) changes(p *pending) ([]FileID, []string) {
	var ids []FileID
	var names []string
	if !c.all {
		for id := range c.ids {
			ids = append(ids, id)
		}
		// Content changes without a stat: through a mapping, by what was written directly and
		// had not arrived, within one tick of the clock.
		for id := range p.work {
			if !c.ids[id] {
				ids = append(ids, id)
			}
		}
		for name := range c.renamed {
			names = append(names, name)
		}
	} else {
		for id := range c.byID {
			ids = append(ids, id)
		}
		for id := range p.base.Inodes {
			if c.byID[id] == nil {
				ids = append(ids, id)
			}
		}
		for name := range c.names {
			names = append(names, name)
		}
		for name := range p.base.Names {
			if c.names[name] == nil {
				names = append(names, name)
			}
		}
	}
	sort.Strings(names)
	return inOrder(ids), names
}

// others lists what no snapshot keeps.
func (c *census) others() []string {
	var out []string
	for name := range c.skipped {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

// shareMost bounds the extents of an inode that a node may keep alive when its file has
// moved in the store.
const shareMost = 2

// share makes nodes that are as the tree has them refer to its inodes instead of having the
// same once more.
func (c *census) share(t *Tree, ids iter.Seq[FileID]) {
	for id := range ids {
		n, in := c.byID[id], t.Inodes[id]
		if n != nil && in != nil && len(in.Extents) <= shareMost && sameMeta(n.meta, in) {
			n.meta = in
		}
	}
}

// splitName cuts a path into its directory and its last name.
func splitName(p string) (dir, base string) {
	d, b := path.Split(p)
	if d != "" {
		d = d[:len(d)-1]
	}
	return d, b
}

// symlinks counts them, once each.
func (c *census) symlinks() int {
	n := 0
	for name, l := range c.links {
		if l.names[0] == name {
			n++
		}
	}
	return n
}
