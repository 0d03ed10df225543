package sync

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sort"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// pending is what has been read of the volume since the baseline and is not committed. It
// survives failed and abandoned captures.
type pending struct {
	base  *Tree
	idx   *index
	spool *spool
	next  FileID
	// ids are the inodes that the index does not know by number.
	ids   map[uint64]identity
	taken map[FileID]bool // inodes of the baseline that were found by name
	work  map[FileID]*work
}

type identity struct {
	birth int64
	typ   FileType
	id    FileID
}

// work is what was read of one inode.
type work struct {
	key     statKey // zero while its content is not known as a whole
	settled bool
	meta    *Inode
	codes   []code
	slots   []uint32 // per block: slot in the spool plus one, 0 if there is none
}

func newPending(base *Tree, idx *index, sp *spool) *pending {
	return &pending{
		base: base, idx: idx, spool: sp, next: max(base.NextID, 1),
		ids: map[uint64]identity{}, taken: map[FileID]bool{}, work: map[FileID]*work{},
	}
}

func (p *pending) close() { p.spool.close() }

// lookup finds an inode by number, and by what tells it from an earlier one of that number.
func (p *pending) lookup(key statKey, typ FileType) (FileID, bool) {
	if e, ok := p.ids[key.Ino]; ok && e.birth == key.Birth && e.typ == typ {
		return e.id, true
	}
	if id, ok := p.idx.byIno[key.Ino]; ok {
		if f := p.idx.files[id]; f.key.Birth == key.Birth && f.typ == typ {
			return id, true
		}
	}
	return 0, false
}

// known implements scanConfig.known.
func (p *pending) known(key statKey, typ FileType) *Inode {
	id, ok := p.lookup(key, typ)
	if !ok {
		return nil
	}
	if w := p.work[id]; w != nil {
		if w.key == key && w.settled {
			return w.meta
		}
		return nil
	}
	if f := p.idx.files[id]; f != nil && f.key == key && f.settled {
		if in := p.base.Inodes[id]; in != nil {
			return metaOf(in)
		}
	}
	return nil
}

// identify gives an inode its number in the lineage. One that the index knows without a
// stat (after a restart) is recognised by name.
func (p *pending) identify(n *node) FileID {
	if id, ok := p.lookup(n.key, n.typ); ok {
		return id
	}
	id, found := FileID(0), false
	for _, name := range n.names {
		b, ok := p.base.Names[name]
		if !ok || p.taken[b] {
			continue
		}
		if f := p.idx.files[b]; f != nil && f.key.Ino == 0 && f.typ == n.typ {
			id, found = b, true
			p.taken[b] = true
			break
		}
	}
	if !found {
		id = p.next
		p.next++
	}
	p.ids[n.key.Ino] = identity{birth: n.key.Birth, typ: n.typ, id: id}
	return id
}

// consider notes an inode's metadata, and returns what must be read of a file.
func (p *pending) consider(n *node, rd round) *readJob {
	prev, settled := statKey{}, false
	w := p.work[n.id]
	if w != nil {
		prev, settled = w.key, w.settled
	} else if f := p.idx.files[n.id]; f != nil {
		prev, settled = f.key, f.settled
	}
	if n.typ != TypeRegular {
		if prev != n.key || !settled {
			p.work[n.id] = &work{key: n.key, settled: rd.settled(n.key), meta: n.meta}
		}
		return nil
	}
	ranges := rd.suspect(n.key, prev, settled)
	if ranges == nil && prev == n.key {
		return nil
	}
	var base []code
	if f := p.idx.files[n.id]; f != nil {
		base = f.codes
	}
	if w == nil {
		w = &work{}
		if len(ranges) != 1 || ranges[0].From > 0 || ranges[0].To < blocksOf(n.key.Size) {
			w.codes = append(w.codes, base...) // only ranges are read: the rest is as it was
		}
		p.work[n.id] = w
	}
	w.meta = n.meta
	w.resize(blocksOf(n.key.Size))
	// Until it has been read as a whole it must not be taken for known.
	w.key, w.settled = statKey{}, false
	return &readJob{n: n, w: w, base: base, cut: p.cut(n), ranges: ranges, settled: rd.settled(n.key)}
}

// cut is one more than the number of the block that a file ends in, if it ended later in
// the baseline; 0 otherwise. The store wants such a block anew even if it is equal.
func (p *pending) cut(n *node) uint64 {
	if in := p.base.Inodes[n.id]; in != nil && n.key.Size < in.Size && n.key.Size%BlockSize != 0 {
		return blocksOf(n.key.Size)
	}
	return 0
}

func (w *work) resize(n uint64) {
	for uint64(len(w.codes)) < n {
		w.codes = append(w.codes, codeUnknown)
	}
	for uint64(len(w.slots)) < n {
		w.slots = append(w.slots, 0)
	}
	w.codes, w.slots = w.codes[:n:n], w.slots[:n:n]
}

// delta says how what was found differs from the baseline.
func (p *pending) delta(found *scanned) (*Delta, *spoolSource, error) {
	d := &Delta{Base: p.base.Ref, Inodes: map[FileID]*InodeDelta{}, Names: map[string]FileID{}, NextID: p.next}
	src := &spoolSource{spool: p.spool}
	nodes := append([]*node(nil), found.nodes...)
	sort.Slice(nodes, func(i, j int) bool { return nodes[i].id < nodes[j].id })
	for i, n := range nodes {
		if i > 0 && nodes[i-1].id == n.id {
			return nil, nil, fmt.Errorf("%q and %q were taken for one file", nodes[i-1].names[0], n.names[0])
		}
		var changed []SpoolExtent
		if w := p.work[n.id]; w != nil && n.typ == TypeRegular {
			if w.key != n.key {
				return nil, nil, fmt.Errorf("%w: %q changed while it was captured", ErrFreezeBroken, n.names[0])
			}
			var err error
			if changed, err = p.changed(n, w, src); err != nil {
				return nil, nil, err
			}
		}
		in := p.base.Inodes[n.id]
		if in == nil || len(changed) > 0 || !sameMeta(in, n.meta) {
			d.Inodes[n.id] = &InodeDelta{Meta: *n.meta, Changed: changed}
		}
	}
	alive := make(map[FileID]bool, len(nodes))
	for _, n := range nodes {
		alive[n.id] = true
		for _, name := range n.names {
			if old, ok := p.base.Names[name]; !ok || old != n.id {
				d.Names[name] = n.id
			}
		}
	}
	for id := range p.base.Inodes {
		if !alive[id] {
			d.Removed = append(d.Removed, id)
		}
	}
	for name := range p.base.Names {
		if _, ok := found.names[name]; !ok {
			d.Unnamed = append(d.Unnamed, name)
		}
	}
	sort.Slice(d.Removed, func(i, j int) bool { return d.Removed[i] < d.Removed[j] })
	sort.Strings(d.Unnamed)
	return d, src, nil
}

// changed lists the blocks of a file that differ from the baseline's.
func (p *pending) changed(n *node, w *work, src *spoolSource) ([]SpoolExtent, error) {
	var base []code
	if f := p.idx.files[n.id]; f != nil && p.base.Inodes[n.id] != nil {
		base = f.codes
	}
	cut := p.cut(n)
	var out []SpoolExtent
	for i, c := range w.codes {
		b := uint64(i)
		if i < len(base) && base[i] == c && b+1 != cut {
			continue
		}
		e := SpoolExtent{Kind: c.kind(), Start: b, Count: 1}
		if e.Kind == ExtentData {
			if c == codeUnknown || w.slots[i] == 0 {
				return nil, fmt.Errorf("block %d of %q was not captured", b, n.names[0])
			}
			e.SpoolBlock = src.add(uint64(w.slots[i] - 1))
		}
		if k := len(out) - 1; k >= 0 && out[k].Kind == e.Kind && out[k].Start+out[k].Count == b {
			out[k].Count++ // the source numbers them in a row
		} else {
			out = append(out, e)
		}
	}
	return out, nil
}

// readJob is one file to be read.
type readJob struct {
	n       *node
	w       *work
	base    []code
	cut     uint64
	ranges  []blockRange
	settled bool
	left    atomic.Int64 // pieces that are not done
	missed  atomic.Bool  // it was gone, or another file had its name
}

// pieceBlocks is how much of a file one worker reads.
const pieceBlocks = 32 << 20 / BlockSize

// reader reads files and spools the blocks that the baseline doesn't have.
type reader struct {
	fs       fsx.FS
	root     *os.File
	spool    *spool
	tolerant bool // files may vanish: the database is running
	progress Progress
	bytes    atomic.Int64
}

func (r *reader) run(ctx context.Context, jobs []*readJob, workers int) error {
	var total int64
	for _, j := range jobs {
		total += j.n.key.Size
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(workers, 1))
	for _, j := range jobs {
		var pieces []blockRange
		for _, br := range j.ranges {
			for at := br.From; at < br.To; at += pieceBlocks {
				pieces = append(pieces, blockRange{at, min(at+pieceBlocks, br.To)})
			}
		}
		if len(pieces) == 0 {
			pieces = []blockRange{{}} // an empty file is done at once
		}
		j.left.Store(int64(len(pieces)))
		for _, piece := range pieces {
			g.Go(func() error {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := r.piece(ctx, j, piece); err != nil {
					return err
				}
				if r.progress != nil {
					r.progress.Set("copying", r.bytes.Load(), total)
				}
				if j.left.Add(-1) == 0 && !j.missed.Load() {
					j.w.key, j.w.settled = j.n.key, j.settled
				}
				return nil
			})
		}
	}
	return g.Wait()
}

func (r *reader) piece(ctx context.Context, j *readJob, piece blockRange) error {
	name := j.n.names[0]
	if err := r.fs.At("capture-read", name); err != nil {
		return err
	}
	if piece.From == piece.To {
		return nil
	}
	f, err := openBelow(int(r.root.Fd()), name)
	if err == nil {
		defer f.Close()
		var st unix.Stat_t
		if err = unix.Fstat(int(f.Fd()), &st); err == nil && (st.Ino != j.n.key.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG) {
			err = unix.ENOENT // another file by now
		}
	}
	if err != nil {
		if r.tolerant {
			j.missed.Store(true)
			return nil
		}
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%w: %q vanished while it was captured", ErrFreezeBroken, name)
		}
		return fmt.Errorf("read %q: %w", name, err)
	}
	return readBlocks(ctx, f, j.n.key.Size, j.n.alloc, piece.From, piece.To, func(first uint64, codes []code, data []byte) error {
		r.bytes.Add(int64(len(data)))
		return r.keep(j, first, codes, data)
	})
}

// keep notes codes and spools the blocks that neither the baseline nor the spool has.
func (r *reader) keep(j *readJob, first uint64, codes []code, data []byte) error {
	w := j.w
	wanted := func(i int) bool {
		b := first + uint64(i)
		c := codes[i]
		if c.kind() != ExtentData || b < uint64(len(j.base)) && j.base[b] == c && b+1 != j.cut {
			return false
		}
		return w.slots[b] == 0 || w.codes[b] != c
	}
	for i := 0; i < len(codes); {
		b := first + uint64(i)
		if !wanted(i) {
			if w.codes[b] != codes[i] {
				w.codes[b], w.slots[b] = codes[i], 0 // the slot has something else
			}
			i++
			continue
		}
		// A run of blocks that go to slots in a row, old ones or new.
		end := i + 1
		for end < len(codes) && wanted(end) {
			s, next := w.slots[b], w.slots[first+uint64(end)]
			if s == 0 && next != 0 || s != 0 && next != s+uint32(end-i) {
				break
			}
			end++
		}
		n := uint64(end - i)
		if w.slots[b] == 0 {
			slot, err := r.spool.alloc(n)
			if err != nil {
				return err
			}
			if slot+n >= math.MaxUint32 {
				return errors.New("too many changed blocks for one spool")
			}
			for k := range n {
				w.slots[b+k] = uint32(slot+k) + 1
			}
		}
		for k := range n {
			w.codes[b+k] = codeUnknown // until it has been written
		}
		if err := r.spool.write(uint64(w.slots[b]-1), data[i*BlockSize:end*BlockSize]); err != nil {
			return err
		}
		copy(w.codes[b:b+n], codes[i:end])
		i = end
	}
	return nil
}
