package sync

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	stdsync "sync"

	"dbsupervisor/internal/fsx"
)

// spool is a local file of blocks, in the page cache as long as it is small. It has no
// name: a crash leaves nothing behind.
type spool struct {
	f       fsx.File
	dir     string
	minFree int64

	mu    stdsync.Mutex
	next  uint64 // first unused slot
	asked uint64 // slots that there was room for when last looked
}

// spoolStep is how many blocks' room is asked for at once.
const spoolStep = 8 << 20 / BlockSize

func newSpool(fsys fsx.FS, dir string, minFree int64, name string) (*spool, error) {
	path := filepath.Join(dir, name)
	f, err := fsys.Create(path)
	if err != nil {
		return nil, fmt.Errorf("create spool: %w", noRoom(err))
	}
	if err := fsys.Remove(path); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("create spool: %w", err)
	}
	return &spool{f: f, dir: dir, minFree: minFree}, nil
}

// alloc reserves n slots in a row. It returns ErrNoRoom before the database's reserve is
// touched.
func (s *spool) alloc(n uint64) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next+n > s.asked {
		ahead := max(n, spoolStep)
		if err := room(s.dir, s.minFree, int64(ahead)*BlockSize); err != nil {
			return 0, fmt.Errorf("spool blocks: %w", err)
		}
		s.asked = s.next + ahead
	}
	first := s.next
	s.next += n
	return first, nil
}

// write fills slots from first on.
func (s *spool) write(first uint64, data []byte) error {
	if _, err := s.f.WriteAt(data, int64(first)*BlockSize); err != nil {
		return fmt.Errorf("write spool: %w", noRoom(err))
	}
	return nil
}

// read is the inverse of write.
func (s *spool) read(first uint64, buf []byte) error {
	if _, err := s.f.ReadAt(buf, int64(first)*BlockSize); err != nil {
		return fmt.Errorf("read spool: %w", err)
	}
	return nil
}

func (s *spool) close() { _ = s.f.Close() } // its content is not needed any more

// spoolRun maps blocks first.. of a spoolSource to slots.
type spoolRun struct{ first, slot, count uint64 }

// spoolSource is the BlockSource of a capture: of all that a spool holds the blocks that
// the delta needs, numbered without gaps in the order of files.
type spoolSource struct {
	spool *spool
	runs  []spoolRun
	total uint64
}

var _ BlockSource = (*spoolSource)(nil)

// add appends a slot and returns its number in the source.
func (s *spoolSource) add(slot uint64) uint64 {
	n := s.total
	if k := len(s.runs); k > 0 && s.runs[k-1].slot+s.runs[k-1].count == slot {
		s.runs[k-1].count++
	} else {
		s.runs = append(s.runs, spoolRun{first: n, slot: slot, count: 1})
	}
	s.total++
	return n
}

// Blocks implements BlockSource.
func (s *spoolSource) Blocks() uint64 { return s.total }

// ReadBlocks implements BlockSource.
func (s *spoolSource) ReadBlocks(first uint64, buf []byte) error {
	n := uint64(len(buf)) / BlockSize
	if uint64(len(buf))%BlockSize != 0 || first > s.total || n > s.total-first {
		return fmt.Errorf("read captured blocks: %d bytes from block %d of %d", len(buf), first, s.total)
	}
	i := sort.Search(len(s.runs), func(i int) bool { return s.runs[i].first+s.runs[i].count > first })
	for ; n > 0; i++ {
		r := s.runs[i]
		skip := first - r.first
		k := min(r.count-skip, n)
		if err := s.spool.read(r.slot+skip, buf[:k*BlockSize]); err != nil {
			return err
		}
		buf, first, n = buf[k*BlockSize:], first+k, n-k
	}
	return nil
}

// cleanSpool removes what an earlier process left. Files that were on their way from one
// name to another stay while the volume is half applied: they save fetching them again.
func (v *Volume) cleanSpool() error {
	es, err := v.fs.ReadDir(v.spoolDir())
	if err != nil {
		return fmt.Errorf("clean spool: %w", err)
	}
	for _, e := range es {
		p := filepath.Join(v.spoolDir(), e.Name())
		st := v.State()
		if p == v.stageDir() && st.Phase == PhaseApplying || p == v.spareStage() && st.Spare.Phase == PhaseApplying {
			continue
		}
		if err := v.fs.At("clean-spool", p); err != nil {
			return fmt.Errorf("clean spool: %w", err)
		}
		if err := os.RemoveAll(p); err != nil {
			return fmt.Errorf("clean spool: %w", err)
		}
	}
	return nil
}

// newSpool makes a spool of the volume.
func (v *Volume) newSpool() (*spool, error) {
	id, err := randomID(v.cfg.Rand)
	if err != nil {
		return nil, err
	}
	return newSpool(v.fs, v.spoolDir(), v.cfg.MinFree, id+".spool")
}
