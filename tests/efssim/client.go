package efssim

import (
	"maps"
	"math"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Proc is an NFSv4.1 operation, named as in a client's /proc/self/mountstats: that of the
// compound's main operation. docs/EFSSIM.md says what leads to which and why.
type Proc string

// The operations that are counted.
const (
	ProcOpen     Proc = "OPEN" // with or without creation
	ProcClose    Proc = "CLOSE"
	ProcLookup   Proc = "LOOKUP"
	ProcGetattr  Proc = "GETATTR"
	ProcSetattr  Proc = "SETATTR"
	ProcAccess   Proc = "ACCESS"
	ProcRead     Proc = "READ"
	ProcWrite    Proc = "WRITE"
	ProcCommit   Proc = "COMMIT"
	ProcRemove   Proc = "REMOVE" // files and directories
	ProcRename   Proc = "RENAME"
	ProcLink     Proc = "LINK"
	ProcMkdir    Proc = "CREATE" // directories
	ProcSymlink  Proc = "SYMLINK"
	ProcReadlink Proc = "READLINK"
	ProcReaddir  Proc = "READDIR"
	ProcStatfs   Proc = "STATFS"
)

// changing says whether a server must make the operation's effect durable before it answers.
func (p Proc) changing() bool {
	switch p {
	case ProcSetattr, ProcWrite, ProcCommit, ProcRemove, ProcRename, ProcLink, ProcMkdir, ProcSymlink:
		return true
	}
	return false
}

// Options are what the simulated NFS client and its server are like. The zero value is a
// client that caches nothing and a server that answers at once.
type Options struct {
	// AttrMin and AttrMax are how long attributes of files are believed (acregmin,
	// acregmax), DirMin and DirMax those of directories. Whoever opens asks always.
	AttrMin time.Duration `json:"attr_min,omitempty"`
	AttrMax time.Duration `json:"attr_max,omitempty"`
	DirMin  time.Duration `json:"dir_min,omitempty"`
	DirMax  time.Duration `json:"dir_max,omitempty"`
	// Volatile leaves the backing directory's fsync out: for measurements of anything but
	// this machine's disk.
	Volatile bool `json:"volatile,omitempty"`
	Pace     Pace `json:"pace,omitzero"`
}

// Pace is how fast the simulated server is.
type Pace struct {
	Look   time.Duration `json:"look,omitempty"`   // an operation that changes nothing
	Change time.Duration `json:"change,omitempty"` // one that does
	Rate   int64         `json:"rate,omitempty"`   // bytes a second, reads and writes together; 0: no bound
}

// EFSPace is what is published of EFS in one zone, and the throughput that one client of it
// gets without paying for more.
func EFSPace() Pace {
	return Pace{Look: time.Millisecond, Change: 2700 * time.Microsecond, Rate: 300 << 20}
}

// EFS is a share as an instance has it: the Linux client's defaults, EFSPace.
func EFS() Options {
	return Options{
		AttrMin: 3 * time.Second, AttrMax: time.Minute, DirMin: 30 * time.Second, DirMax: time.Minute, Pace: EFSPace(),
	}
}

const (
	ioSize = 1 << 20 // rsize and wsize
	// backlog is how much written data may wait for the link before the writer has to.
	backlog = 256 << 20
	// A listing is asked for in growing pieces; an entry with its attributes and handle
	// takes about so much.
	listMin, listMax, listEntry = 4 << 10, 1 << 20, 250
	pageSize                    = 4 << 10
	smallRead                   = 128 << 10
	maxStreams                  = 64 // told apart in one handle
)

// cached is what the client knows of one file or directory.
type cached struct {
	attr    fuse.Attr
	known   bool          // attr is as the server said last
	stale   bool          // attr is not to be shown any more, its change attribute still holds
	told    bool          // the answer to a WRITE has brought attributes since attr
	checked time.Duration // when
	timeout time.Duration // how long it is believed
	// kernel is until when the kernel believes what it was told. A stat that comes before
	// was demanded past all caches (AT_STATX_FORCE_SYNC).
	kernel time.Duration

	// Directories: names looked up, believed while version is the same.
	version uint64
	names   map[string]entry
	access  bool // an ACCESS has been answered since the last change
	listed  bool // the listing is in the cache

	// Files: handles that are open, and bytes in the page cache.
	readers, writers int
	pages, dirty     spans
	removed          bool // unlinked while open: a .nfs file until the last close

	target bool // a symbolic link's target is in the page cache
}

type entry struct {
	version uint64
	node    uint64 // 0: there is no such name
	primed  bool   // from a listing; node is not known
}

// lookup is a LOOKUP that is counted only when it is clear that nothing else did its work:
// Linux sends none before an open, nor for a name that is to be made.
type lookup struct {
	dir  uint64
	name string
	node uint64 // 0: nothing there
}

// open is a file or directory handle.
type open struct {
	node    uint64
	write   bool
	closing bool             // close(2) was called, the kernel's release is to come
	streams map[int64]stream // by the end of reads that may go on there
	// Listings: bytes shown, bytes fetched, size of the next request.
	shown, fetched, piece int64
	cached                bool
	frozen                []fuse.DirEntry // a stale listing, nil without one
}

// stream is somebody who reads on.
type stream struct {
	large    bool   // asks for much at once
	bytes    int64  // fetched, and the requests for them
	requests uint64 //
}

// client is the model of an NFSv4.1 client: of what the file system is asked it says what
// would go over the wire. It knows what time it is only through now.
type client struct {
	opt  Options
	now  func() time.Duration
	stat func(node uint64) (fuse.Attr, bool) // asks the server, uncounted

	mu      sync.Mutex
	nodes   map[uint64]*cached
	files   map[uint64]*open // by handle
	dirs    map[uint64]*open
	pending map[uint32]lookup // by thread
	procs   map[Proc]uint64
	read    int64
	written int64
	closing int
	quiet   chan struct{} // closed when closing is 0
	free    time.Duration // when the link has moved all that was given to it
}

func newClient(o Options) *client {
	began := time.Now()
	c := &client{opt: o, now: func() time.Duration { return time.Since(began) }, quiet: make(chan struct{})}
	c.nodes, c.files, c.dirs = map[uint64]*cached{}, map[uint64]*open{}, map[uint64]*open{}
	c.pending, c.procs = map[uint32]lookup{}, map[Proc]uint64{}
	close(c.quiet)
	return c
}

// wait is what an operation takes. The caller sleeps when it holds nothing.
type wait time.Duration

// tell is what a kernel that asks is to be told: attributes, and for how long it may believe
// them. It answers a stat by itself then, as from an NFS client's cache.
func (c *client) tell(id uint64, a *fuse.Attr) (believe time.Duration) {
	n := c.node(id)
	n.kernel = 0
	if !c.caches() || n.stale || n.ours() || !c.fresh(n) {
		return 0
	}
	*a = n.attr
	believe = n.timeout - (c.now() - n.checked)
	n.kernel = c.now() + believe
	return believe
}

func (c *client) caches() bool { return c.opt.AttrMin > 0 || c.opt.DirMin > 0 }

// rpc counts an operation.
func (c *client) rpc(p Proc, n uint64) wait {
	if n == 0 {
		return 0
	}
	c.procs[p] += n
	if p.changing() {
		return wait(c.opt.Pace.Change)
	}
	return wait(c.opt.Pace.Look)
}

// settle counts a look-up of this thread that nothing has made unnecessary.
func (c *client) settle(thread uint32) wait {
	if _, ok := c.pending[thread]; !ok {
		return 0
	}
	delete(c.pending, thread)
	return c.rpc(ProcLookup, 1)
}

// absorb drops the look-up of a name that the next operation makes anyhow; others count.
func (c *client) absorb(thread uint32, dir uint64, name string) wait {
	if p, ok := c.pending[thread]; ok && p.dir == dir && p.name == name {
		delete(c.pending, thread)
		return 0
	}
	return c.settle(thread)
}

func (c *client) node(id uint64) *cached {
	n := c.nodes[id]
	if n == nil {
		n = &cached{names: map[string]entry{}}
		c.nodes[id] = n
	}
	return n
}

func same(a, b *fuse.Attr) bool {
	return a.Ctime == b.Ctime && a.Ctimensec == b.Ctimensec && a.Mtime == b.Mtime && a.Mtimensec == b.Mtimensec && a.Size == b.Size
}

func (c *client) bounds(a *fuse.Attr) (low, high time.Duration) {
	if a.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		return c.opt.DirMin, c.opt.DirMax
	}
	return c.opt.AttrMin, c.opt.AttrMax
}

// learn takes attributes that came in an answer. What somebody else has changed makes all
// that is cached of it worthless.
func (c *client) learn(id uint64, a *fuse.Attr) {
	n := c.node(id)
	low, high := c.bounds(a)
	now := c.now()
	switch {
	case !n.known || !same(&n.attr, a) && !n.ours():
		n.version++
		n.access, n.listed, n.pages, n.target = false, false, nil, false
		n.timeout = low
	case now-n.checked >= n.timeout:
		n.timeout = min(2*n.timeout, high)
	}
	n.attr, n.known, n.stale, n.checked = *a, true, false, now
}

// ours says that changes are most likely this client's own.
func (n *cached) ours() bool { return n.writers > 0 || len(n.dirty) > 0 }

// changed follows an operation of this client that changed a directory. Its server does not
// vouch that nobody else's change came in between (cinfo.atomic), so the client has to look
// everything up again; the answer brings the new change attribute along.
func (c *client) changed(dir uint64) {
	n := c.node(dir)
	if a, ok := c.stat(dir); ok {
		n.attr, n.known = a, true
	}
	n.version++
	n.access, n.listed, n.stale, n.kernel = false, false, true, 0
	n.checked = c.now()
	n.timeout, _ = c.bounds(&n.attr)
}

func (c *client) fresh(n *cached) bool { return n.known && c.now()-n.checked < n.timeout }

// getattr asks for attributes.
func (c *client) getattr(id uint64) wait {
	if a, ok := c.stat(id); ok {
		c.learn(id, &a)
	}
	return c.rpc(ProcGetattr, 1)
}

// search is the check that a directory may be searched or listed.
func (c *client) search(dir uint64) wait {
	n := c.node(dir)
	if n.access {
		return 0
	}
	if a, ok := c.stat(dir); ok {
		c.learn(dir, &a)
	}
	n.access = true
	return c.rpc(ProcAccess, 1)
}

// before is what precedes a look-up of a name: it says whether the cache has the answer.
func (c *client) before(thread uint32, dir uint64, name string) (e entry, hit bool, w wait) {
	w = c.settle(thread) + c.search(dir)
	d := c.node(dir)
	e, ok := d.names[name]
	if !ok || e.version != d.version {
		return entry{}, false, w
	}
	if !c.fresh(d) {
		w += c.getattr(dir)
		if e.version != d.version {
			return entry{}, false, w
		}
	}
	return e, true, w
}

// found follows a look-up that went to the server, or whose name a listing had shown.
func (c *client) found(thread uint32, dir uint64, name string, e entry, hit bool, node uint64, a *fuse.Attr) {
	d := c.node(dir)
	if !hit || e.primed || e.node != node {
		if node != 0 {
			c.learn(node, a)
		}
	}
	if !hit || !e.primed && e.node != node {
		c.pending[thread] = lookup{dir, name, node}
	}
	d.names[name] = entry{version: d.version, node: node}
}

// named notes a name that this client has made, removed or moved.
func (c *client) named(dir uint64, name string, node uint64) {
	d := c.node(dir)
	d.names[name] = entry{version: d.version, node: node}
}

// show is a stat of a file that the kernel could or must not answer.
func (c *client) show(thread uint32, id uint64) (w wait) {
	w = c.settle(thread)
	n := c.node(id)
	forced := c.now() < n.kernel
	if len(n.dirty) > 0 {
		w += c.flush(n, false) // so that the server knows the times
	}
	if a, ok := c.stat(id); ok && n.told && c.caches() && !forced {
		n.told = false
		n.attr, n.known, n.stale, n.checked = a, true, false, c.now()
	}
	if !forced && c.fresh(n) && !n.stale {
		return w
	}
	return w + c.getattr(id)
}

// opened counts an OPEN, which asks for the attributes whatever is cached.
func (c *client) opened(thread uint32, fh, id uint64, write bool) (w wait) {
	if p, ok := c.pending[thread]; ok && p.node == id {
		delete(c.pending, thread)
	} else {
		w = c.settle(thread)
	}
	n := c.node(id)
	// The second open of a file in the same mode is the client's own affair.
	if write && n.writers == 0 || !write && n.readers == 0 {
		w += c.rpc(ProcOpen, 1)
		if a, ok := c.stat(id); ok {
			c.learn(id, &a)
		}
	}
	c.hold(fh, id, write)
	return w
}

func (c *client) hold(fh, id uint64, write bool) {
	n := c.node(id)
	if write {
		n.writers++
	} else {
		n.readers++
	}
	c.files[fh] = &open{node: id, write: write, streams: map[int64]stream{}}
}

// created counts an OPEN that made the file.
func (c *client) created(thread uint32, dir uint64, name string, fh, id uint64, exclusive bool, a *fuse.Attr) wait {
	w := c.absorb(thread, dir, name)
	if exclusive {
		// For what the server may have used to keep the verifier.
		w += c.rpc(ProcSetattr, 1)
	}
	c.procs[ProcOpen]++
	c.nodes[id] = &cached{names: map[string]entry{}}
	c.learn(id, a)
	c.hold(fh, id, true)
	// The name was found before the directory changed: it will be looked up again.
	c.named(dir, name, id)
	c.changed(dir)
	return w + wait(c.opt.Pace.Change)
}

// flush sends what is dirty. One request alone asks the server for stable storage; several
// are followed by a COMMIT.
func (c *client) flush(n *cached, commit bool) (w wait) {
	k := n.dirty.requests(ioSize)
	if k == 0 {
		return 0
	}
	w = c.rpc(ProcWrite, k)
	c.written += n.dirty.len()
	if k > 1 && commit {
		w += c.rpc(ProcCommit, 1)
	}
	n.dirty = nil
	n.told = true // without a delegation every WRITE asks for the attributes too
	return w + wait(max(0, c.free-c.now()))
}

// transfer gives bytes to the link and says when they will have passed.
func (c *client) transfer(bytes int64) wait {
	if c.opt.Pace.Rate <= 0 || bytes <= 0 {
		return 0
	}
	now := c.now()
	c.free = max(c.free, now) + time.Duration(float64(bytes)/float64(c.opt.Pace.Rate)*float64(time.Second))
	return wait(c.free - now)
}

// write keeps written data in the page cache. The link begins to send it at once.
func (c *client) write(id uint64, from, size int64) wait {
	n := c.node(id)
	s := span{from, from + size}
	before := n.dirty.len()
	n.dirty = n.dirty.add(s)
	n.pages = n.pages.add(s)
	n.stale, n.told, n.kernel = true, false, 0
	w := c.transfer(n.dirty.len() - before)
	if c.opt.Pace.Rate > 0 {
		return max(0, w-wait(float64(backlog)/float64(c.opt.Pace.Rate)*float64(time.Second)))
	}
	return 0
}

// fetch reads what the page cache does not have. Whoever reads on in small pieces where a
// read ended is read ahead for, up to the next multiple of a request's size. One who asks for
// much at once gets just that, whatever others read of the file at the same time; the kernel
// hands it on in pieces of a megabyte or, where the buffer is not aligned, nearly.
func (c *client) fetch(fh, id uint64, from, size, length int64) (w wait) {
	n, o := c.node(id), c.files[fh]
	want := span{from, from + size}
	st := stream{large: size > smallRead}
	onward := false
	if o != nil {
		if was, ok := o.streams[from]; ok {
			onward, st = true, was
			delete(o.streams, from)
		}
	}
	if !st.large && (onward || from == 0) {
		want.to = min((want.to+ioSize-1)/ioSize*ioSize, length)
	}
	miss := spans(n.pages.missing(want))
	k := miss.requests(ioSize)
	if st.large {
		st.bytes += miss.len()
		all := uint64((st.bytes + ioSize - 1) / ioSize) //nolint:gosec // not negative
		k, st.requests = all-st.requests, all
	}
	if o != nil && (!st.large || size >= ioSize-pageSize) {
		if len(o.streams) >= maxStreams {
			clear(o.streams)
		}
		o.streams[from+size] = st
	}
	if len(miss) == 0 {
		return 0
	}
	w = c.rpc(ProcRead, k)
	if onward {
		w = 0 // was asked for ahead
	}
	c.read += miss.len()
	for _, s := range miss {
		n.pages = n.pages.add(s)
	}
	return w + c.transfer(miss.len())
}

// reads is a read(2). The client knows the file's length from its attributes.
func (c *client) reads(thread uint32, fh, id uint64, from, size int64) wait {
	w := c.settle(thread)
	c.node(id).kernel = 0 // its time of access has changed
	length := c.node(id).attr.Size
	if n := c.node(id); !n.known || n.ours() {
		if a, ok := c.stat(id); ok {
			length = a.Size
		}
	}
	end := min(from+size, int64(length)) //nolint:gosec // no file is that long
	if end <= from {
		return w
	}
	return w + c.fetch(fh, id, from, end-from, int64(length)) //nolint:gosec // no file is that long
}

// setattr counts a SETATTR, whose answer brings the attributes.
func (c *client) setattr(thread uint32, id uint64, truncated bool, a *fuse.Attr) wait {
	w := c.settle(thread)
	n := c.node(id)
	if truncated {
		size := int64(a.Size) //nolint:gosec // no file is that long
		n.pages, n.dirty = n.pages.cut(size), n.dirty.cut(size)
	}
	w += c.flush(n, false) + c.rpc(ProcSetattr, 1)
	n.attr, n.known, n.stale, n.access, n.checked, n.kernel = *a, true, false, false, c.now(), 0
	n.timeout, _ = c.bounds(a)
	return w
}

// made counts the making of a name that must not exist.
func (c *client) made(thread uint32, p Proc, dir uint64, name string, out *fuse.EntryOut) wait {
	w := c.absorb(thread, dir, name)
	if p == ProcLink {
		// Whoever links must be able to read and write the file (fs.protected_hardlinks).
		w += c.flush(c.node(out.NodeId), true) + c.search(out.NodeId)
	}
	w += c.rpc(p, 1)
	c.changed(dir)
	n := c.node(out.NodeId)
	n.attr, n.known, n.stale, n.checked, n.kernel = out.Attr, true, false, c.now(), 0
	n.timeout, _ = c.bounds(&out.Attr)
	n.target = p == ProcSymlink
	c.named(dir, name, out.NodeId)
	return w
}

// readlink asks for a symbolic link's target unless that was made or read here.
func (c *client) readlink(thread uint32, id uint64) (w wait) {
	w = c.settle(thread)
	n := c.node(id)
	if n.target && c.caches() {
		return w
	}
	n.target = true
	return w + c.rpc(ProcReadlink, 1)
}

// rename counts a RENAME.
func (c *client) rename(thread uint32, from uint64, oldName string, to uint64, newName string) wait {
	w := c.absorb(thread, to, newName) + c.rpc(ProcRename, 1)
	e := c.node(from).names[oldName]
	c.changed(from)
	if to != from {
		c.changed(to)
	}
	c.named(from, oldName, 0)
	c.named(to, newName, e.node)
	return w
}

// closed is close(2): what is dirty is sent, and the caller waits for the CLOSE, which
// counts when the kernel lets the handle go.
func (c *client) closed(thread uint32, fh uint64) (w wait) {
	w = c.settle(thread)
	o := c.files[fh]
	if o == nil {
		return w
	}
	n := c.node(o.node)
	if o.write {
		w += c.flush(n, true)
	}
	if !o.closing {
		o.closing = true
		if c.closing++; c.closing == 1 {
			c.quiet = make(chan struct{})
		}
	}
	if n.readers+n.writers == 1 {
		w += wait(c.opt.Pace.Look)
	}
	return w
}

// released ends a handle.
func (c *client) released(fh uint64) {
	o := c.files[fh]
	if o == nil {
		return
	}
	delete(c.files, fh)
	n := c.node(o.node)
	if o.write {
		c.flush(n, true)
		n.writers--
	} else {
		n.readers--
	}
	if n.readers+n.writers == 0 {
		c.procs[ProcClose]++
		if n.removed {
			n.removed = false
			c.procs[ProcRemove]++
		} else if a, ok := c.stat(o.node); ok && o.write {
			// CLOSE brings the attributes.
			n.attr, n.known, n.stale, n.checked = a, true, false, c.now()
			n.timeout, _ = c.bounds(&a)
		}
	}
	if o.closing {
		if c.closing--; c.closing == 0 {
			close(c.quiet)
		}
	}
}

// remove counts a REMOVE. A file that is open only gets another name until its last close.
func (c *client) remove(thread uint32, dir uint64, name string) wait {
	w := c.settle(thread)
	e := c.node(dir).names[name]
	p := ProcRemove
	if e.node != 0 {
		if n := c.node(e.node); n.readers+n.writers > 0 {
			n.removed, p = true, ProcRename
		}
	}
	w += c.rpc(p, 1)
	c.changed(dir)
	c.named(dir, name, 0)
	return w
}

// opendir asks for the attributes, whatever is cached.
func (c *client) opendir(thread uint32, fh, id uint64) wait {
	w := c.settle(thread) + c.getattr(id) + c.search(id)
	c.dirs[fh] = &open{node: id, piece: listMin}
	return w
}

// list counts the requests for a listing, of which more names were shown. The attributes
// come along with the names: their look-ups are spared.
func (c *client) list(fh uint64, first bool, names []string) (w wait) {
	o := c.dirs[fh]
	if o == nil {
		return 0
	}
	d := c.node(o.node)
	d.kernel = 0 // its time of access has changed
	if first {
		o.shown, o.fetched, o.piece = 0, 0, listMin
		if o.cached = d.listed; o.cached {
			o.fetched = math.MaxInt64
		}
	}
	if len(names) == 0 { // the end
		d.listed = true
	}
	for _, name := range names {
		o.shown += listEntry
		if e, ok := d.names[name]; !o.cached && (!ok || e.version != d.version || e.node == 0) {
			d.names[name] = entry{version: d.version, primed: true}
		}
	}
	for o.fetched == 0 || o.fetched < o.shown {
		w += c.rpc(ProcReaddir, 1)
		o.fetched += o.piece
		o.piece = min(2*o.piece, listMax)
	}
	return w
}

// count is what was sent so far. It waits a moment for the kernel to let go of handles that
// were closed: it does that behind its caller's back.
func (c *client) count() Wire {
	c.mu.Lock()
	quiet := c.quiet
	c.mu.Unlock()
	t := time.NewTimer(250 * time.Millisecond)
	defer t.Stop()
	select {
	case <-quiet:
	case <-t.C: // somebody else has inherited a handle
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for thread := range c.pending {
		c.settle(thread)
	}
	return Wire{Ops: maps.Clone(c.procs), Read: c.read, Written: c.written}
}

func (c *client) pace(p Pace) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opt.Pace = p
}

// forget drops all that is cached and not dirty, as the machine's drop_caches does.
func (c *client) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, n := range c.nodes {
		if n.readers+n.writers > 0 || len(n.dirty) > 0 {
			n.pages = n.dirty
			continue
		}
		delete(c.nodes, id)
	}
}
