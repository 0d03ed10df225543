package sync

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sort"

	"github.com/zeebo/xxh3"

	"dbsupervisor/internal/fsx"
)

// Moves says that blocks of packs are in a new pack, too. A snapshot that is written with it
// refers to the new one, so that the old ones can go when no retained snapshot needs them any
// more.
type Moves struct {
	pack   PackRef
	from   map[string][]moveRun // by the old pack's path, by block, without overlap
	inodes []FileID             // those that had blocks in the old packs
}

// moveRun is a run of blocks of a pack, and where it begins in the new one.
type moveRun struct{ block, count, to uint64 }

// apply adds to a change of base the new places of the moved blocks that are still base's and
// that the change leaves alone. It says whether there were any.
func (m *Moves) apply(base *Tree, c *treeChange, removed map[FileID]bool) bool {
	pack := PackID(len(c.packs))
	used := false
	for _, id := range m.inodes {
		in := base.Inodes[id]
		if in == nil || removed[id] || in.Type != TypeRegular {
			continue
		}
		moved := m.extents(base, in, pack)
		if len(moved) == 0 {
			continue
		}
		ch := c.inodes[id]
		if ch == nil {
			ch = &inodeChange{meta: *in}
			ch.meta.Extents = nil
		}
		// What the change says wins.
		exts := overlay(cutExtents(moved, blocksOf(ch.meta.Size)), ch.extents, blocksOf(ch.meta.Size))
		if !slices.ContainsFunc(exts, func(e Extent) bool { return e.Kind == ExtentData && e.Pack == pack }) {
			continue
		}
		ch.extents = exts
		c.inodes[id] = ch
		used = true
	}
	if used {
		c.packs = append(c.packs, m.pack)
	}
	return used
}

// extents are the inode's blocks that have moved.
func (m *Moves) extents(base *Tree, in *Inode, pack PackID) []Extent {
	var out []Extent
	for _, e := range in.Extents {
		if e.Kind != ExtentData {
			continue
		}
		runs := m.from[base.Packs[e.Pack].Path]
		end := e.PackBlock + e.Count
		i := sort.Search(len(runs), func(i int) bool { return runs[i].block+runs[i].count > e.PackBlock })
		for ; i < len(runs) && runs[i].block < end; i++ {
			from, to := max(runs[i].block, e.PackBlock), min(runs[i].block+runs[i].count, end)
			out = appendExtent(out, Extent{Kind: ExtentData, Start: e.Start + from - e.PackBlock, Count: to - from,
				Pack: pack, PackBlock: runs[i].to + from - runs[i].block})
		}
	}
	return out
}

// compaction is a new pack in the making. It is filled a frame at a time and may rest in
// between for as long as it takes.
type compaction struct {
	s      *Store
	moves  *Moves
	old    []PackRef
	runs   []compactRun // in the order of the new pack
	total  uint64       // blocks
	at     uint64       // of them written
	name   objectName
	file   fsx.File
	made   bool  // the file exists
	next   int64 // where the next frame goes
	foot   footer
	source compactSource
}

// compactRun is a run of blocks that goes to the new pack.
type compactRun struct {
	pack         int // in old
	block, count uint64
}

// compactSource reads old packs, one frame at a time.
type compactSource struct {
	pack   int
	open   *packReader
	frame  int    // in data; -1: none
	data   []byte // lies in raw or in stored
	raw    []byte
	stored []byte
}

func (c *compactSource) close() {
	if c.open != nil {
		_ = c.open.file.Close() // only read
	}
	*c = compactSource{}
}

// newCompaction plans to bring the head's blocks of these packs together.
func (s *Store) newCompaction(head *Tree, packs []PackID, term uint64) (*compaction, error) {
	c := &compaction{s: s, moves: &Moves{from: map[string][]moveRun{}}}
	number := make(map[PackID]int, len(packs))
	for _, p := range packs {
		number[p] = len(c.old)
		c.old = append(c.old, head.Packs[p])
	}
	for id, in := range head.Inodes {
		hit := false
		for _, e := range in.Extents {
			if k, ok := number[e.Pack]; ok && e.Kind == ExtentData {
				c.runs = append(c.runs, compactRun{pack: k, block: e.PackBlock, count: e.Count})
				hit = true
			}
		}
		if hit {
			c.moves.inodes = append(c.moves.inodes, id)
		}
	}
	slices.Sort(c.moves.inodes)
	// In the order in which they are read.
	slices.SortFunc(c.runs, func(a, b compactRun) int {
		return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.block, b.block))
	})
	runs := c.runs[:0]
	for _, r := range c.runs {
		if n := len(runs); n > 0 && runs[n-1].pack == r.pack && runs[n-1].block+runs[n-1].count >= r.block {
			runs[n-1].count = max(runs[n-1].count, r.block+r.count-runs[n-1].block)
			continue
		}
		runs = append(runs, r)
	}
	c.runs = runs
	for _, r := range c.runs {
		path := c.old[r.pack].Path
		c.moves.from[path] = append(c.moves.from[path], moveRun{block: r.block, count: r.count, to: c.total})
		c.total += r.count
	}
	if c.total == 0 || c.total > s.cfg.packBlocks {
		return nil, fmt.Errorf("compact packs: %d blocks don't fit into one pack", c.total)
	}
	r, err := s.random()
	if err != nil {
		return nil, err
	}
	c.name = objectName{kind: kindPack, term: term, seq: head.Ref.Seq + 1, rand: r}
	c.next = packHeader
	return c, nil
}

// step writes the next frame, and completes the pack with the last. It says how many bytes
// of the store it has read and written.
func (c *compaction) step(ctx context.Context) (moved int, err error) {
	n := min(c.s.cfg.frameBlocks, c.total-c.at)
	raw := make([]byte, n*BlockSize)
	if moved, err = c.read(ctx, raw); err != nil {
		return moved, err
	}
	for b := range n {
		c.foot.hashes = append(c.foot.hashes, xxh3.Hash(raw[b*BlockSize:(b+1)*BlockSize]))
	}
	out := make([]byte, 0, len(raw)+len(raw)/64+1024)
	off := c.next
	if c.at == 0 {
		out, off = append(out, packHead()...), 0
	}
	head := len(out)
	out, encoding := c.s.codec.compress(out, raw)
	c.foot.frames = append(c.foot.frames, frame{offset: c.next, stored: uint32(len(out) - head), blocks: uint16(n), //nolint:gosec // a frame is 4 MiB at most
		encoding: encoding, sum: sha256.Sum256(out[head:])})
	c.next += int64(len(out) - head)
	last := c.at+n == c.total
	var sum [sha256.Size]byte
	if last {
		foot := c.foot.encode()
		sum = sha256.Sum256(foot)
		out = append(append(out, foot...), packTail(len(foot))...)
	}
	if c.file == nil {
		var created createdFiles
		if c.file, c.name, err = c.s.create(c.name, &created); err != nil {
			return moved, fmt.Errorf("create pack: %w", err)
		}
		c.made = true
	}
	if _, err = c.file.WriteAt(out, off); err != nil {
		return moved, fmt.Errorf("write pack: %w", err)
	}
	c.at += n
	moved += len(out)
	if !last {
		return moved, nil
	}
	c.source.close()
	f := c.file
	c.file = nil
	if err := c.s.finish(f, c.name.path(), nil); err != nil {
		return moved, fmt.Errorf("write pack: %w", err)
	}
	c.moves.pack = PackRef{Path: c.name.path(), Hash: hex.EncodeToString(sum[:]), Size: off + int64(len(out))}
	return moved, nil
}

// done says that the pack is complete and durable.
func (c *compaction) done() bool { return c.moves.pack.Path != "" }

// read fills buf with the next blocks, every one of them checked.
func (c *compaction) read(ctx context.Context, buf []byte) (int, error) {
	fetched := 0
	skip := c.at
	for _, r := range c.runs {
		if skip >= r.count {
			skip -= r.count
			continue
		}
		for b := r.block + skip; b < r.block+r.count && len(buf) > 0; {
			if err := ctx.Err(); err != nil {
				return fetched, err
			}
			n, got, err := c.source.blocks(c.s, c.old, r.pack, b, min(r.block+r.count-b, uint64(len(buf)/BlockSize)), buf)
			fetched += got
			if err != nil {
				return fetched, err
			}
			b, buf = b+n, buf[n*BlockSize:]
		}
		skip = 0
		if len(buf) == 0 {
			break
		}
	}
	return fetched, nil
}

// blocks copies up to count blocks, as many as are in one frame, to buf.
func (c *compactSource) blocks(s *Store, old []PackRef, pack int, block, count uint64, buf []byte) (n uint64, fetched int, err error) {
	if c.open == nil || c.pack != pack {
		raw, stored := c.raw, c.stored
		c.close()
		if c.open, err = s.openPack(old[pack]); err != nil {
			c.open = nil
			return 0, 0, err
		}
		c.pack, c.frame, c.raw, c.stored = pack, -1, raw, stored
	}
	foot := c.open.foot
	if block+count > uint64(len(foot.hashes)) {
		return 0, 0, damaged(c.open.path, "has %d blocks, not the %d at %d that a snapshot refers to", len(foot.hashes), count, block)
	}
	i := foot.frameOf(block)
	if i != c.frame {
		if c.raw == nil {
			c.raw = make([]byte, 0, frameMaxBytes)
		}
		c.frame = -1
		if c.data, c.stored, err = s.readFrame(c.open, i, c.raw, c.stored); err != nil {
			return 0, 0, err
		}
		c.frame, fetched = i, int(foot.frames[i].stored)
	}
	first := foot.frames[i].first
	n = min(count, first+uint64(foot.frames[i].blocks)-block)
	copy(buf, c.data[(block-first)*BlockSize:(block-first+n)*BlockSize])
	return n, fetched, nil
}

// abandon gives an unfinished pack up. One that is complete stays for retention to condemn.
func (c *compaction) abandon(cause error) {
	c.source.close()
	if c.file != nil {
		_ = c.file.Close() // the file is given up
		c.file = nil
	}
	if !c.made || c.done() || errors.Is(cause, fsx.ErrCrash) {
		return // a dead process removes nothing
	}
	// Nothing refers to it: its name was never offered to anybody.
	if err := c.s.cfg.FS.Remove(c.s.path(c.name.path())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.s.log.Warn("unfinished pack left on the share", "path", c.name.path(), "error", err)
	}
}
