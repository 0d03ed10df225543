package sync

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// readCounter counts what is read of a file system.
type readCounter struct {
	fsx.FS
	bytes, packBytes, opens atomic.Int64
}

func (c *readCounter) Open(path string) (fsx.File, error) {
	f, err := c.FS.Open(path)
	if err != nil {
		return nil, err
	}
	c.opens.Add(1)
	return &countedFile{File: f, c: c, pack: strings.HasSuffix(path, ".pack")}, nil
}

func (c *readCounter) reset() { c.bytes.Store(0); c.packBytes.Store(0); c.opens.Store(0) }

type countedFile struct {
	fsx.File
	c    *readCounter
	pack bool
}

func (f *countedFile) count(n int) {
	f.c.bytes.Add(int64(n))
	if f.pack {
		f.c.packBytes.Add(int64(n))
	}
}

func (f *countedFile) ReadAt(b []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(b, off)
	f.count(n)
	return n, err
}

func (f *countedFile) Read(b []byte) (int, error) {
	n, err := f.File.Read(b)
	f.count(n)
	return n, err
}

// deltaRig is a primary with a volume of some size and a standby, on a counted store.
type deltaRig struct {
	*volRig
	reads *readCounter
	v     *Volume
	size  int // blocks of its one large file
}

func newDeltaRig(t *testing.T) *deltaRig {
	t.Helper()
	c := &readCounter{FS: fsx.OS{}}
	s, err := OpenStore(StoreConfig{FS: c, Dir: volRAM(t), Workers: 2, frameBlocks: 64})
	volOK(t, err)
	volOK(t, s.Init(t.Context()))
	d := &deltaRig{volRig: &volRig{t: t, store: s, temp: t.TempDir}, reads: c, size: 2048}
	d.v = d.open(volRAM(t), nil)
	volOK(t, d.v.MarkLive(t.Context(), 1))
	volOK(t, d.v.Baseline(t.Context(), s, SnapshotRef{}))
	volWrite(t, d.path(d.v, "data"), 0, volData(1, d.size*BlockSize))
	for i := range 20 {
		volWrite(t, d.path(d.v, fmt.Sprint("f", i)), 0, volData(byte(i), 3*BlockSize))
	}
	d.snapshot(d.v, CaptureRequest{})
	return d
}

func (d *deltaRig) path(v *Volume, name string) string { return filepath.Join(v.Path(), name) }

// change writes n scattered blocks and takes a snapshot.
func (d *deltaRig) change(seed byte, n int) SnapshotRef {
	d.t.Helper()
	for i := range n {
		b := (i*37 + int(seed)*11) % d.size
		volWrite(d.t, d.path(d.v, "data"), int64(b)*BlockSize, volData(seed, BlockSize))
	}
	_, ref := d.snapshot(d.v, CaptureRequest{})
	return ref
}

func (d *deltaRig) hydrate(f *Volume, ref SnapshotRef) HydrateStats {
	d.t.Helper()
	d.reads.reset()
	st, err := f.Hydrate(context.Background(), d.store, ref, nil)
	volOK(d.t, err)
	return st
}

// TestVolumeDeltaCost: a standby that goes along reads of the share what changed and
// little more, never the volume, and of its own disk no file that it knows, however it
// keeps its old state meanwhile.
func TestVolumeDeltaCost(t *testing.T) {
	for _, c := range []struct{ system, spare, way string }{
		{"ext4", SpareAuto, CopyTwo}, {"xfs", SpareAuto, CopyClone}, {"btrfs", SpareAuto, CopyClone}, {"ext4", SpareNever, CopyInPlace},
	} {
		t.Run(c.system+" "+c.way, func(t *testing.T) {
			d := newDeltaRig(t)
			temp := volTemps(t, volLoop(t, c.system))
			edit := func(vc *VolumeConfig) { vc.SpareCopy = c.spare }
			f := d.open(temp(), edit)
			d.hydrate(f, d.ref())
			const blocks = 300
			for i := range 5 {
				ref := d.change(byte(10+i), blocks)
				if i == 3 { // an agent that restarts in the same boot knows as much
					volOK(t, f.Close())
					f = d.open(f.cfg.Dir, edit)
				}
				st := d.hydrate(f, ref)
				if st.Copy != c.way || st.FetchedBytes != blocks*BlockSize {
					t.Fatalf("round %d: %+v", i, st)
				}
				if most := int64(blocks * BlockSize * 12 / 10); i != 3 && d.reads.bytes.Load() > most {
					t.Fatalf("round %d: %d bytes were read of the share for %d that changed", i, d.reads.bytes.Load(), blocks*BlockSize)
				}
				// Local copying: nothing in place, nothing that is cloned; of the second copy
				// what it lacks of the round before, but for the first time all of it.
				most := int64(0)
				if c.way == CopyTwo {
					most = blocks * BlockSize
					if i == 0 {
						most = int64(d.size+60) * BlockSize
					}
				}
				if st.ReusedBytes > most {
					t.Fatalf("round %d: copied %d bytes on this disk, not %d at most", i, st.ReusedBytes, most)
				}
				if f.loadIndex(ref) == nil {
					t.Fatalf("round %d: the index is of no use", i)
				}
				if sp := f.State().Spare; c.way == CopyTwo && (sp.Phase != PhaseClean || f.loadIndexOf(sp.Copy, sp.Base) == nil) {
					t.Fatalf("round %d: of the second copy nothing is known: %+v", i, sp)
				}
				volSame(t, fmt.Sprint("round ", i), volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
			}
		})
	}
}

// TestVolumeDeltaMovedBlocks: blocks that lie elsewhere in the store since, as compaction
// puts them, are not fetched again.
func TestVolumeDeltaMovedBlocks(t *testing.T) {
	for _, spare := range []string{SpareAuto, SpareNever} {
		t.Run(spare, func(t *testing.T) {
			d := newDeltaRig(t)
			f := d.open(volRAM(t), func(c *VolumeConfig) { c.SpareCopy = spare })
			d.hydrate(f, d.ref())
			moved := d.moveAll()
			st := d.hydrate(f, moved)
			if st.FetchedBytes != 0 || d.reads.packBytes.Load() > dataBytes(d.head)/20 {
				t.Fatalf("%+v, %d bytes were read of packs", st, d.reads.packBytes.Load())
			}
			volSame(t, "moved", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
			ref := d.change(50, 100)
			if st := d.hydrate(f, ref); st.FetchedBytes != 100*BlockSize {
				t.Fatalf("%+v", st)
			}
			volSame(t, "changed", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
		})
	}
}

// moveAll writes a snapshot of the same content with all blocks in new packs.
func (d *deltaRig) moveAll() SnapshotRef {
	d.t.Helper()
	c, err := d.v.Capture(context.Background(), CaptureRequest{NoFreeze: true})
	volOK(d.t, err)
	src := &fileBlocks{}
	for name, id := range d.head.Names {
		in := d.head.Inodes[id]
		if in.Type != TypeRegular || in.Size == 0 {
			continue
		}
		b, err := os.ReadFile(d.path(d.v, name))
		volOK(d.t, err)
		first := uint64(len(src.data)) / BlockSize
		src.data = append(src.data, b...)
		src.data = append(src.data, make([]byte, int(blocksOf(in.Size)*BlockSize)-len(b))...)
		c.Delta.Inodes[id] = &InodeDelta{Meta: *metaOf(in), Changed: []SpoolExtent{{Kind: ExtentData, Count: blocksOf(in.Size), SpoolBlock: first}}}
	}
	c.Blocks = src
	tree := d.write(c)
	volOK(d.t, d.v.Adopt(c, tree))
	d.head = tree
	return tree.Ref
}

type fileBlocks struct{ data []byte }

func (f *fileBlocks) Blocks() uint64 { return uint64(len(f.data)) / BlockSize }

func (f *fileBlocks) ReadBlocks(first uint64, buf []byte) error {
	copy(buf, f.data[first*BlockSize:])
	return nil
}

// TestVolumeDeltaGoesOn: what has been fetched and verified is kept when the store turns
// out to lack something, and the next attempt, to a newer snapshot, fetches only the rest.
func TestVolumeDeltaGoesOn(t *testing.T) {
	for _, c := range []struct{ system, spare string }{{"ext4", SpareAuto}, {"xfs", SpareAuto}} {
		t.Run(c.system, func(t *testing.T) {
			d := newDeltaRig(t)
			hook := &volHook{}
			f := d.open(volTemps(t, volLoop(t, c.system))(), func(vc *VolumeConfig) { vc.SpareCopy, vc.FS = c.spare, hook.fs() })
			first := d.ref()
			d.hydrate(f, first)
			second := d.change(60, 4*64)
			// The first of its four frames is damaged.
			bad := d.head.Packs[len(d.head.Packs)-1]
			p := filepath.Join(d.store.cfg.Dir, bad.Path)
			b, err := os.ReadFile(p)
			volOK(t, err)
			good := append([]byte(nil), b...)
			pack, err := d.store.openPack(bad)
			volOK(t, err)
			volOK(t, pack.file.Close())
			b[pack.foot.frames[0].offset] ^= 1
			volOK(t, os.WriteFile(p, b, 0o600))
			_, err = f.Hydrate(t.Context(), d.store, second, nil)
			volIs(t, err, ErrDamaged)
			if st := f.State(); st.Phase != PhaseClean || st.Base != first {
				t.Fatalf("the volume is %s at %s", st.Phase, st.Base.ID)
			}
			volOK(t, os.WriteFile(p, good, 0o600))
			third := d.change(61, 10)
			st := d.hydrate(f, third)
			if st.FetchedBytes > (64+10)*BlockSize {
				t.Fatalf("verified blocks were fetched again: %+v", st)
			}
			volSame(t, "went on", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))

			// Interrupted at any write, in the same process.
			for _, at := range []int{1, 30, 150} {
				ref := d.change(byte(70+at), 200)
				n := 0
				hook.set(func(op fsx.Op, path string) error {
					if volPoint("apply-write", op, path) {
						if n++; n >= at {
							return errors.New("interrupted")
						}
					}
					return nil
				})
				if _, err := f.Hydrate(t.Context(), d.store, ref, nil); err == nil {
					t.Fatal("not interrupted")
				}
				hook.set(nil)
				st := d.hydrate(f, ref)
				// In a second copy the first writes are those that bring it forward.
				if most := int64(200-at+2) * BlockSize; st.FetchedBytes > most && st.Copy == CopyClone || st.FetchedBytes > 200*BlockSize {
					t.Fatalf("interrupted at write %d: %d bytes were fetched, not %d at most", at, st.FetchedBytes, most)
				}
				volSame(t, "interrupted", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
			}
		})
	}
}

// TestVolumeSpareGivesWay: the second copy is given up for the database's room, and a
// standby without room for it follows in place and says why.
func TestVolumeSpareGivesWay(t *testing.T) {
	ctx := context.Background()
	d := newDeltaRig(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skip("may not mount here: ", err)
	}
	t.Cleanup(func() { volOK(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	f := d.open(filepath.Join(dir, "v"), nil)
	d.hydrate(f, d.ref())
	if st := d.hydrate(f, d.change(1, 100)); st.Copy != CopyTwo {
		t.Fatalf("%+v", st)
	}
	// A volume that is half done needs the room more.
	free, err := freeBytes(dir)
	volOK(t, err)
	volOK(t, f.markApplying())
	volOK(t, os.Remove(d.path(f, "data")))
	f.cfg.MinFree = free - 1<<20 + int64(d.size)*BlockSize
	d.hydrate(f, d.ref())
	if sp := f.State().Spare; sp.Phase != "" {
		t.Fatalf("the second copy has not given way: %+v", sp)
	}
	f.cfg.MinFree = 0
	d.hydrate(f, d.change(3, 100))
	// The database fills the disk: the next capture frees the second copy's room.
	volOK(t, f.MarkLive(ctx, 2))
	volOK(t, f.Baseline(ctx, d.store, d.ref()))
	f.cfg.MinFree = 40 << 20
	c, err := f.Capture(ctx, CaptureRequest{Freezer: &volFreezer{}})
	volOK(t, err)
	f.Abandon(c)
	if sp := f.State().Spare; sp.Phase != "" {
		t.Fatalf("the second copy has not given way: %+v", sp)
	}
	if _, err = os.Stat(f.sparePath()); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("its directory is there: ", err)
	}
	volOK(t, f.Close())

	g := d.open(filepath.Join(dir, "w"), func(c *VolumeConfig) { c.MinFree = 20 << 20 })
	d.hydrate(g, d.ref())
	st := d.hydrate(g, d.change(2, 100))
	if st.Copy != CopyInPlace || !strings.Contains(st.Why, "not enough room") {
		t.Fatalf("%+v", st)
	}
	volSame(t, "in place", volDescribe(t, d.v.Path()), volDescribe(t, g.Path()))
}

// TestVolumeSpareAfterFork: what a fork leaves behind is an empty volume beside a second
// copy, which is the base of the next hydration.
func TestVolumeSpareAfterFork(t *testing.T) {
	ctx := context.Background()
	d := newDeltaRig(t)
	f := d.open(volRAM(t), nil)
	d.hydrate(f, d.ref())
	d.hydrate(f, d.change(1, 100))
	volOK(t, f.MarkLive(ctx, 2))
	volWrite(t, d.path(f, "beyond"), 0, []byte("x"))
	fork, err := f.SetAside(ctx, "test", d.ref())
	volOK(t, err)
	if _, err := os.Stat(filepath.Join(fork.Path, "beyond")); err != nil {
		t.Fatal(err)
	}
	volOK(t, f.Close())
	f = d.open(f.cfg.Dir, nil)
	if st := f.State(); st.Phase != PhaseEmpty || st.Spare.Phase != PhaseClean {
		t.Fatalf("%+v", st)
	}
	st := d.hydrate(f, d.change(2, 50))
	if st.FetchedBytes > 50*BlockSize || st.Copy != CopyTwo {
		t.Fatalf("%+v", st)
	}
	volSame(t, "after a fork", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
	if sp := f.State().Spare; sp.Phase != "" {
		t.Fatalf("an empty directory is kept: %+v", sp)
	}
}

// TestVolumePrepare: a generation that has been prepared is there after a restart, costs
// nothing again, and the volume can be used as it was instead.
func TestVolumePrepare(t *testing.T) {
	ctx := context.Background()
	d := newDeltaRig(t)
	f := d.open(volRAM(t), nil)
	first := d.ref()
	d.hydrate(f, first)
	want := volDescribe(t, f.Path())
	second := d.change(1, 100)
	g, err := f.Prepare(ctx, d.store, second, nil)
	volOK(t, err)
	volSame(t, "the volume", want, volDescribe(t, f.Path()))
	volSame(t, "the generation", volDescribe(t, d.v.Path()), volDescribe(t, g.Path))
	volOK(t, f.Close())
	f = d.open(f.cfg.Dir, nil)
	if st := d.hydrate(f, second); st.FetchedBytes+st.ReusedBytes != 0 {
		t.Fatalf("%+v", st)
	}
	volSame(t, "swapped", volDescribe(t, d.v.Path()), volDescribe(t, f.Path()))
	g, err = f.Prepare(ctx, d.store, first, nil)
	volOK(t, err)
	volOK(t, f.MarkLive(ctx, 5))
	volIs(t, f.Swap(g), ErrPhase)
	if st := f.State(); st.Phase != PhaseLive || st.Base != second {
		t.Fatalf("%+v", st)
	}
}

// TestVolumeRegrownHole: a file that ends in a hole and becomes longer keeps it, though btrfs
// fills what is behind the old end.
func TestVolumeRegrownHole(t *testing.T) {
	for _, system := range loopSystems() {
		t.Run(system, func(t *testing.T) {
			d := newDeltaRig(t)
			temp := volTemps(t, volLoop(t, system))
			p := filepath.Join(d.v.Path(), "regrown")
			volOK(t, os.WriteFile(p, nil, 0o600))
			volOK(t, os.Truncate(p, 1))
			_, ref := d.snapshot(d.v, CaptureRequest{NoFreeze: true})
			clone, place := d.open(temp(), nil), d.open(temp(), func(c *VolumeConfig) { c.SpareCopy = SpareNever })
			d.hydrate(clone, ref)
			d.hydrate(place, ref)
			volWrite(t, p, BlockSize, volData(3, 5000))
			_, ref = d.snapshot(d.v, CaptureRequest{NoFreeze: true})
			d.hydrate(clone, ref)
			d.hydrate(place, ref)
			volSame(t, "clone", volDescribe(t, d.v.Path()), volDescribe(t, clone.Path()))
			volSame(t, "in place", volDescribe(t, d.v.Path()), volDescribe(t, place.Path()))
		})
	}
}
