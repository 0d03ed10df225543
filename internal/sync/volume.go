package sync

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	stdsync "sync"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// Errors of the volume half of this package. They come wrapped; use errors.Is.
var (
	// ErrVolumeLocked: another agent uses the instance's directory.
	ErrVolumeLocked = errors.New("the directory is in use by another agent")
	// ErrPhase: the volume is not in a phase in which this can be done.
	ErrPhase = errors.New("wrong phase of the volume")
	// ErrNotEmpty: a directory that has to be empty is not.
	ErrNotEmpty = errors.New("directory is not empty")
	// ErrNoBaseline: Capture was called before Baseline, Hydrate or Import.
	ErrNoBaseline = errors.New("no baseline has been loaded")
	// ErrNoRoom: the local disk would be left with less than MinFree bytes.
	ErrNoRoom = errors.New("not enough room on the local disk")
	// ErrEscapes: data of the volume lies outside of it (a symbolic link or a mount point),
	// so that one snapshot could not be one point in time of all of it.
	ErrEscapes = errors.New("the volume has data outside of it")
	// ErrFreezeTooLong: the capture would have had to freeze the database for longer than
	// MaxFreeze. The database goes on; the next attempt has less to do.
	ErrFreezeTooLong = errors.New("the freeze would take too long")
	// ErrFreezeBroken: the database ran during the capture although it should have stood
	// still. What was captured has been thrown away. Freezer.Thaw returns it.
	ErrFreezeBroken = errors.New("the freeze was broken")
)

// VolumeConfig is what a Volume needs.
type VolumeConfig struct {
	// Dir is the instance's own directory. The volume, its state, the spool and the forks
	// are below it, all on one file system.
	Dir string
	// FS is used for state, spool and labelled points; nil means the real file system.
	FS  fsx.FS
	Log hclog.Logger // nil discards
	// Workers is how many files are read or written at once while the database runs or is
	// stopped; 0 means one per CPU. In a freeze there are always two.
	Workers int
	// MinFree is how many bytes of the local disk are always left to the database.
	MinFree int64
	// BootID identifies this boot of the machine (boottime.BootID).
	BootID string
	// Rand makes volume IDs and names of forks (crypto/rand.Reader).
	Rand io.Reader
	// SpareCopy is SpareAuto, the default, or SpareNever.
	SpareCopy string
	// Clock tells how long a freeze takes; nil means the machine's.
	Clock boottime.Clock
	// Tier is how change is found: TierAuto (also ""), TierTracked or TierHashed.
	Tier string

	track func() (tracker, error) // tests put a tracker of their own here
}

// Volume is the local copy of the database's files. All methods are safe for concurrent
// use; long ones wait for each other. Close releases the directory.
type Volume struct {
	cfg  VolumeConfig
	fs   fsx.FS
	log  hclog.Logger
	lock *os.File

	op stdsync.Mutex // held by one long operation

	mu      stdsync.Mutex // guards what follows
	st      VolumeState
	tier    string
	tierWhy string
	tracked TrackStats

	// Guarded by op.
	base *Tree    // what the volume descends from; nil: not loaded
	idx  *index   // block hashes and file keys of base
	pend *pending // what was read since base and is not committed
	out  *Capture // a capture that was neither adopted nor abandoned

	spare     spareCopy // what is known of the second copy
	keepSpare bool      // it must not be given up now
	half      *index    // what is known of a half-applied volume
	reflink   *bool     // whether the file system can clone; nil: not tried
	trash     stdsync.WaitGroup

	follow   *follower // nil in the tier "hashed"
	distrust string    // why the tracker is not believed any more
	pace     pace
	rehash   rehash
}

// OpenVolume takes possession of the directory, creating what is missing, and cleans up
// after an earlier process. It returns ErrVolumeLocked if another process has it open.
func OpenVolume(cfg VolumeConfig) (*Volume, error) {
	if cfg.FS == nil {
		cfg.FS = fsx.OS{}
	}
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.Workers <= 0 {
		cfg.Workers = runtime.NumCPU()
	}
	if cfg.Clock == nil {
		cfg.Clock = boottime.Real{}
	}
	if cfg.Rand == nil {
		return nil, errors.New("open volume: no source of randomness")
	}
	v := &Volume{cfg: cfg, fs: cfg.FS, log: cfg.Log, tier: TierHashed, tierWhy: "nothing has been captured yet"}
	if err := v.open(); err != nil {
		_ = v.Close()
		return nil, fmt.Errorf("open volume %s: %w", cfg.Dir, err)
	}
	return v, nil
}

func (v *Volume) open() error {
	for _, d := range []string{v.cfg.Dir, v.stateDir(), v.spoolDir(), v.forksDir()} {
		if err := v.fs.MkdirAll(d); err != nil {
			return err
		}
	}
	lock, err := os.OpenFile(v.cfg.Dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	v.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return ErrVolumeLocked
		}
		return fmt.Errorf("lock directory: %w", err)
	}
	if err := v.loadState(); err != nil {
		return err
	}
	if err := v.cleanSpool(); err != nil {
		return err
	}
	return v.checkOneFS()
}

// checkOneFS refuses a layout in which renaming the volume into a fork would copy it.
func (v *Volume) checkOneFS() error {
	var a, b unix.Stat_t
	if err := unix.Stat(v.cfg.Dir, &a); err != nil {
		return fmt.Errorf("stat directory: %w", err)
	}
	if err := unix.Stat(v.Path(), &b); err != nil {
		return fmt.Errorf("stat volume: %w", err)
	}
	if a.Dev != b.Dev {
		return fmt.Errorf("%s is a file system of its own: mount that file system at %s instead, so that forks can be set aside by renaming", v.Path(), v.cfg.Dir)
	}
	return nil
}

// Close gives the directory up. An unsettled capture is abandoned.
func (v *Volume) Close() error {
	v.op.Lock()
	defer v.op.Unlock()
	v.trash.Wait()
	var err error
	if v.follow != nil {
		err = v.follow.tracker.Close()
		v.follow = nil
	}
	v.dropPending()
	if v.lock == nil {
		return err
	}
	err = errors.Join(err, v.lock.Close()) // releases the lock too
	v.lock = nil
	return err
}

// dropWork forgets everything that was captured and not committed.
func (v *Volume) dropWork() {
	v.dropPending()
	if v.follow != nil {
		v.follow.restart()
	}
}

func (v *Volume) dropPending() {
	if v.pend != nil {
		v.pend.close()
	}
	v.pend, v.out = nil, nil
}

// Path is the volume's root, which the database's container mounts. It changes its inode,
// but not its name, when a fork is set aside.
func (v *Volume) Path() string { return filepath.Join(v.cfg.Dir, "volume") }

func (v *Volume) stateDir() string  { return filepath.Join(v.cfg.Dir, "state") }
func (v *Volume) statePath() string { return filepath.Join(v.stateDir(), "volume.json") }
func (v *Volume) indexPath() string { return v.indexOfCopy(v.State().Copy) }
func (v *Volume) carryPath() string { return filepath.Join(v.stateDir(), "carry") }
func (v *Volume) spoolDir() string  { return filepath.Join(v.cfg.Dir, "spool") }
func (v *Volume) forksDir() string  { return filepath.Join(v.cfg.Dir, "forks") }
func (v *Volume) stageDir() string  { return filepath.Join(v.spoolDir(), "apply") }

// indexOfCopy is where the index of one of the volume's copies is kept.
func (v *Volume) indexOfCopy(id string) string {
	if id == "" {
		return filepath.Join(v.stateDir(), "index")
	}
	return filepath.Join(v.stateDir(), "index-"+id)
}

// SyncFS makes everything that has been written to the volume so far durable. To be called
// between the thaw and the commit, so that the head is never ahead of the local disk.
func (v *Volume) SyncFS(ctx context.Context) error {
	if err := v.fs.At("syncfs", v.Path()); err != nil {
		return err
	}
	return syncFS(ctx, v.Path())
}

// syncFS waits off the caller's goroutine, because a sync of a slow disk can't be
// interrupted.
func syncFS(ctx context.Context, path string) error {
	done := make(chan error, 1)
	go func() {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		err = unix.Syncfs(fd)
		_ = unix.Close(fd)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("sync file system of %s: %w", path, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sync file system of %s: %w", path, ctx.Err())
	}
}

// freeBytes is how much an ordinary user (the database) can still write at path.
func freeBytes(path string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(s.Bavail) * s.Frsize, nil
}

// room returns ErrNoRoom if writing need more bytes would leave less than MinFree. A second
// copy gives way.
func (v *Volume) room(need int64) error {
	err := room(v.cfg.Dir, v.cfg.MinFree, need)
	if !errors.Is(err, ErrNoRoom) {
		return err
	}
	if gone, gerr := v.giveWay(err.Error()); gerr != nil || !gone {
		return errors.Join(err, gerr)
	}
	return room(v.cfg.Dir, v.cfg.MinFree, need)
}

func room(dir string, minFree, need int64) error {
	free, err := freeBytes(dir)
	if err != nil {
		return err
	}
	if free-need < minFree {
		return fmt.Errorf("%w: %d bytes are needed at %s, %d are free, of which %d are reserved for the database (sync.min_free)", ErrNoRoom, need, dir, free, minFree)
	}
	return nil
}

// noRoom turns the kernel's "disk full" into ErrNoRoom.
func noRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoRoom, err)
	}
	return err
}

// dirEmpty says whether a directory has no entries; one that does not exist is empty.
func dirEmpty(path string) (bool, error) {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}
