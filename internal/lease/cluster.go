package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// clusterFormat is the version of the encoding of the file `cluster`, and of what it names. In
// format 1 records were files; in 2 they are symbolic links.
const clusterFormat = 2

// clusterInfo is the file `cluster`: created exclusively, never changed, never removed.
//
// FSID is a random id and not statfs's f_fsid, because that is 0 on NFS and FUSE and on XFS
// changes with the device's number: it would be missing where it matters and wrong after a
// remount. A random id is copied along with the directory, though; what gives a copy (a
// restored backup) away is the file's own inode number, which the file contains. It is
// compared only on the kind of file system on which it was taken, and taken only where
// inode numbers are known to be stable.
type clusterInfo struct {
	Format    int    `json:"format"`
	ClusterID string `json:"cluster_id"`
	Backend   string `json:"backend"`
	Address   string `json:"address"` // the records' directory below the share, with slashes
	FSID      string `json:"fs_id"`
	FSType    string `json:"fs_type,omitempty"` // "" = Inode was not taken
	Inode     uint64 `json:"inode,omitempty"`
}

// InitFile makes a new cluster in the share: record 1 in a register directory of its own and
// then, exclusively, the file `cluster` that names it. It is only ever called on an explicit
// wish. It returns ErrInitialised if there is a cluster or the remains of one, and
// ErrSeenCluster if this instance has already seen a cluster (SeenFile exists): the share is
// then not new but not mounted. first's version, nonce, format and, if empty, cluster ID are
// set here. After ErrUnknown the cluster may exist.
func InitFile(ctx context.Context, cfg FileConfig, first Record) (clusterID string, err error) {
	return initFile(ctx, cfg, first, false)
}

// RescueFile makes a new register in a share that holds snapshots but whose register is lost
// or damaged. first carries the head and a term at least as high as any found. An existing
// file `cluster` is kept as cluster.retired-<random>; agents that still use the old register
// refuse to go on. The caller has made sure that no agent runs, or that the cluster ID is new.
// It makes no use of SeenFile: instances that remember the old register refuse this one until
// their memory is removed.
func RescueFile(ctx context.Context, cfg FileConfig, first Record) (clusterID string, err error) {
	return initFile(ctx, cfg, first, true)
}

func initFile(ctx context.Context, cfg FileConfig, first Record, rescue bool) (string, error) {
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("initialise cluster in %s: %w", cfg.Share, err)
	}
	r := newFileRegister(cfg)
	var ids [4]string // cluster, register directory, file system, nonce
	for i := range ids {
		id, err := r.ids.next()
		if err != nil {
			return fail(err)
		}
		ids[i] = id
	}
	if cfg.ClusterID != "" {
		ids[0] = cfg.ClusterID
	}
	if first.ClusterID != "" && cfg.ClusterID == "" {
		ids[0] = first.ClusterID
	}
	if first.TTL <= 0 {
		return fail(errors.New("the first record has no ttl"))
	}
	info := clusterInfo{
		Format: clusterFormat, ClusterID: ids[0], Backend: backendFile,
		Address: path.Join(registerDir, ids[1]), FSID: ids[2],
	}
	first = first.Clone()
	first.Format, first.ClusterID, first.Version, first.Nonce = RecordFormat, info.ClusterID, 1, ids[3]

	seenOff := cfg.SeenFile != "" && !rescue
	if seenOff {
		seen, err := readSeen(cfg.FS, cfg.SeenFile)
		if err != nil {
			return fail(err)
		}
		if seen != nil {
			return fail(fmt.Errorf("%s remembers cluster %s; mount its share, or remove that file to really begin anew: %w", cfg.SeenFile, seen.ClusterID, ErrSeenCluster))
		}
	}
	r.use(info)
	var off offer
	_, err := inBackground(ctx, r.workers, func() (struct{}, error) {
		if err := r.checkVirgin(rescue); err != nil {
			return struct{}{}, err
		}
		// Off the share first: a crash after this point refuses another init, rather
		// than a lost mount allowing a second cluster.
		if seenOff {
			s := seenState{Format: seenFormat, ClusterID: info.ClusterID, FSID: info.FSID}
			if err := writeSeen(r.fs, cfg.SeenFile, s); err != nil {
				return struct{}{}, err
			}
		}
		err := r.create(ctx, info, first, rescue, &off)
		if err != nil && seenOff && !errors.Is(err, ErrUnknown) && !errors.Is(err, fsx.ErrCrash) {
			if rerr := r.fs.Remove(cfg.SeenFile); rerr != nil {
				return struct{}{}, errors.Join(err, rerr)
			}
		}
		return struct{}{}, err
	})
	var left *errLeft
	if errors.As(err, &left) && !off.withdraw() {
		err = fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	if err != nil {
		return fail(err)
	}
	return info.ClusterID, nil
}

// checkVirgin refuses a share that holds, or held, a cluster. Register directories with
// nothing but an unused record 1 are what a crashed initialisation leaves, and harmless.
func (r *FileRegister) checkVirgin(rescue bool) error {
	if _, err := r.fs.Stat(r.share); err != nil {
		return err
	}
	if rescue {
		return nil
	}
	if _, err := r.fs.Stat(filepath.Join(r.share, clusterFile)); err == nil {
		return fmt.Errorf("the file %s exists: %w", clusterFile, ErrInitialised)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range []string{"packs", "manifests", "catalogs"} {
		entries, err := r.fs.ReadDir(filepath.Join(r.share, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("%s is not empty but the file %s is missing (see `dbsupervisor rescue`): %w", dir, clusterFile, ErrInitialised)
		}
	}
	registers, err := r.fs.ReadDir(filepath.Join(r.share, registerDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, reg := range registers {
		records, err := r.fs.ReadDir(filepath.Join(r.share, registerDir, reg.Name()))
		if err != nil {
			return err
		}
		for _, e := range records {
			if v, ok := parseVersion(e.Name()); ok && v > 1 {
				return fmt.Errorf("%s/%s was in use but the file %s is missing (see `dbsupervisor rescue`): %w", registerDir, reg.Name(), clusterFile, ErrInitialised)
			}
		}
	}
	return nil
}

// create runs in a worker. Errors before the link of `cluster` leave an unused register
// directory at most.
func (r *FileRegister) create(ctx context.Context, info clusterInfo, first Record, rescue bool, off *offer) error {
	target, err := encodeRecord(first)
	if err != nil {
		return err
	}
	if _, err := decodeRecord(target); err != nil {
		return err
	}
	parent := filepath.Join(r.share, registerDir)
	if err := r.fs.Mkdir(parent); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := r.fs.Mkdir(r.dir); err != nil {
		return err
	}
	if err := r.fs.SyncDir(parent); err != nil {
		return err
	}
	if err := r.tryLink(); err != nil {
		return fmt.Errorf("this file system can't hold a register: %w", err)
	}
	// The directory's name is random and ours alone, so this can't meet another record 1. It is
	// answered before anybody learns of the directory: record 1 is never made once more.
	if err := r.fs.Symlink(target, r.path(1)); err != nil {
		return err
	}
	if err := r.fs.SyncDir(r.dir); err != nil {
		return err
	}
	if rescue {
		if err := r.retireCluster(); err != nil {
			return err
		}
	}
	return r.linkCluster(ctx, info, off)
}

// tryLink finds out now, and not at some later record, whether the file system keeps symbolic
// links that are as long as a record.
func (r *FileRegister) tryLink() error {
	long, name := strings.Repeat("x", goodTarget), filepath.Join(r.dir, ".try")
	if err := r.fs.Symlink(long, name); err != nil {
		return err
	}
	got, err := r.fs.Readlink(name)
	if err == nil && got != long {
		err = fmt.Errorf("a symbolic link of %d bytes came back as %d", len(long), len(got))
	}
	return errors.Join(err, r.fs.Remove(name))
}

func (r *FileRegister) linkCluster(ctx context.Context, info clusterInfo, off *offer) (err error) {
	tmp := filepath.Join(r.share, "."+clusterFile+"-"+info.FSID+".tmp")
	f, err := r.fs.Create(tmp)
	if err != nil {
		return err
	}
	defer func() {
		if errors.Is(err, fsx.ErrCrash) {
			return
		}
		if rerr := r.fs.Remove(tmp); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			r.log.Debug("temporary cluster file left behind", "path", tmp, "error", rerr)
		}
	}()
	st, err := f.Stat()
	if err == nil {
		if info.FSType = r.stableInodes(); info.FSType != "" {
			info.Inode = inodeOf(st)
		}
		var data []byte
		if data, err = json.MarshalIndent(info, "", " "); err == nil {
			_, err = f.Write(append(data, '\n'))
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if !off.make() {
		return fmt.Errorf("given up before anything was offered: %w", context.Cause(ctx))
	}
	lerr := r.fs.Link(tmp, filepath.Join(r.share, clusterFile))
	if lerr != nil {
		// As with records: only reading back tells whose file it is.
		got, err := r.readCluster()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUnknown, errors.Join(lerr, err))
		}
		if got.FSID != info.FSID {
			return fmt.Errorf("cluster %s was made at the same time: %w", got.ClusterID, ErrInitialised)
		}
	}
	if err := r.fs.SyncDir(r.share); err != nil {
		return fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	return nil
}

// retireCluster keeps the old file under another name and frees the name. Never by rename,
// which would overwrite.
func (r *FileRegister) retireCluster() error {
	old := filepath.Join(r.share, clusterFile)
	id, err := r.ids.next()
	if err != nil {
		return err
	}
	err = r.fs.Link(old, filepath.Join(r.share, clusterFile+".retired-"+id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := r.fs.SyncDir(r.share); err != nil {
		return err
	}
	return r.fs.Remove(old)
}

// readCluster reads and checks the file `cluster`.
func (r *FileRegister) readCluster() (clusterInfo, error) {
	name := filepath.Join(r.share, clusterFile)
	b, err := fsx.ReadFile(r.fs, name, maxRecordSize)
	if errors.Is(err, fs.ErrNotExist) {
		return clusterInfo{}, fmt.Errorf("%s is missing (is the share mounted?): %w", name, ErrNotInitialised)
	}
	if err != nil {
		return clusterInfo{}, err
	}
	var info clusterInfo
	if err := json.Unmarshal(b, &info); err != nil {
		return clusterInfo{}, fmt.Errorf("decode %s: %w: %w", name, ErrCorrupt, err)
	}
	if info.Format < clusterFormat && info.Format > 0 {
		return clusterInfo{}, fmt.Errorf("decode %s: format %d is that of an earlier program, which kept its records otherwise (stop all agents, then rebuild the register from the snapshots: dbsupervisor rescue): %w", name, info.Format, ErrCorrupt)
	}
	if info.Format != clusterFormat {
		return clusterInfo{}, fmt.Errorf("decode %s: format %d, this program knows %d (upgrade it): %w", name, info.Format, clusterFormat, ErrCorrupt)
	}
	if info.Backend != backendFile {
		return clusterInfo{}, fmt.Errorf("its register is kept in %q at %q: %w", info.Backend, info.Address, ErrWrongCluster)
	}
	if info.ClusterID == "" || info.FSID == "" || !strings.HasPrefix(info.Address, registerDir+"/") || path.Clean(info.Address) != info.Address {
		return clusterInfo{}, fmt.Errorf("decode %s: incomplete: %w", name, ErrCorrupt)
	}
	if info.FSType != "" && info.FSType == r.stableInodes() {
		st, err := r.fs.Stat(name)
		if err != nil {
			return clusterInfo{}, err
		}
		if ino := inodeOf(st); ino != 0 && ino != info.Inode {
			return clusterInfo{}, fmt.Errorf("this directory is a copy of the one that cluster %s was made in (%s has inode %d, not %d); see `dbsupervisor rescue`: %w", info.ClusterID, clusterFile, ino, info.Inode, ErrWrongCluster)
		}
	}
	return info, nil
}

// checkCluster is done on every operation: a share that was unmounted, replaced or rescued
// under a running agent must be noticed before anything is believed or written. The file is
// read anew when anything about it has changed, its names included; whether it has is asked
// of the server each time.
func (r *FileRegister) checkCluster() error {
	id, err := r.fs.Identify(filepath.Join(r.share, clusterFile))
	if err == nil {
		r.mu.Lock()
		same := id == r.cluster
		r.mu.Unlock()
		if same {
			return nil
		}
	}
	// Also after an error: reading says what is wrong.
	info, rerr := r.readCluster()
	if rerr != nil {
		return rerr
	}
	if info != r.id {
		return fmt.Errorf("the file %s has changed: %w", clusterFile, ErrWrongCluster)
	}
	if err == nil {
		// As it was before it was read: had it changed since, the next look shows it.
		r.mu.Lock()
		r.cluster = id
		r.mu.Unlock()
	}
	return nil
}

func inodeOf(st fs.FileInfo) uint64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Ino
	}
	return 0
}

// stableInodes names the share's kind of file system if a file keeps its inode number there
// for life, across remounts and on every host; otherwise "".
func (r *FileRegister) stableInodes() string {
	if err := r.fs.At("statfs", r.share); err != nil {
		return ""
	}
	var st unix.Statfs_t
	if err := unix.Statfs(r.share, &st); err != nil {
		return ""
	}
	switch st.Type {
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.EXT4_SUPER_MAGIC:
		return "ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	}
	return ""
}
