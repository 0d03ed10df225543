package lease

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"dbsupervisor/internal/fsx"
)

// CompareAndSwap implements Register. The record is written under a temporary name, made
// durable, and then linked to its number. link(2) is used because it is the one way of
// publishing a complete file that refuses an existing name on every file system: over NFS
// rename silently replaces another host's file, and locks were granted twice.
//
// The swap counts only if the link succeeded, or reading back shows this attempt's nonce,
// and if afterwards the predecessor is found to be still there, exactly as it was loaded.
// Without the second half a caller that slept until its number had been pruned would win it.
func (r *FileRegister) CompareAndSwap(ctx context.Context, prev, next Record) (Record, error) {
	next = next.Clone()
	fail := func(err error) (Record, error) {
		return Record{}, fmt.Errorf("swap record %d: %w", prev.Version, err)
	}
	if prev.Version == 0 || prev.Nonce == "" {
		return fail(errors.New("expected record was never loaded"))
	}
	if prev.ClusterID != r.id.ClusterID || next.ClusterID != r.id.ClusterID {
		return fail(fmt.Errorf("cluster id %q instead of %q: %w", next.ClusterID, r.id.ClusterID, ErrWrongCluster))
	}
	nonce, err := r.ids.next()
	if err != nil {
		return fail(err)
	}
	next.Format, next.Version, next.Nonce = RecordFormat, prev.Version+1, nonce
	data, err := encodeRecord(next)
	if err != nil {
		return fail(err)
	}
	// What is returned equals what a later Load returns (wall clocks lose their location).
	if next, err = decodeRecord(data); err != nil {
		return fail(err)
	}
	var off offer
	_, err = inBackground(ctx, r.workers, func() (struct{}, error) {
		return struct{}{}, r.swap(ctx, prev, next, data, &off)
	})
	var left *errLeft
	switch {
	case err == nil:
		return next, nil
	case errors.As(err, &left) && !off.withdraw():
		// The worker is inside or behind the link: it may take effect now or much later.
		return next, fmt.Errorf("swap record %d: %w: %w", prev.Version, ErrUnknown, err)
	case errors.Is(err, ErrUnknown):
		return next, fmt.Errorf("swap record %d: %w", prev.Version, err)
	}
	return fail(err)
}

// swap runs in a worker. Whatever fails before the link proves that nothing was offered.
func (r *FileRegister) swap(ctx context.Context, prev, next Record, data []byte, off *offer) error {
	if err := r.checkCluster(); err != nil {
		return err
	}
	before, err := r.lookBefore(prev)
	if err != nil {
		return err
	}

	tmp := filepath.Join(r.dir, tempName(next.Version, next.Nonce))
	file, err := r.writeTemp(tmp, data)
	if err == nil && !off.make() {
		err = fmt.Errorf("given up before anything was offered: %w", context.Cause(ctx))
	}
	if err == nil {
		err = r.publish(prev, next, tmp, before)
	}
	if err == nil && r.counted(prev, next, file, tmp) {
		return nil
	}
	if !errors.Is(err, fsx.ErrCrash) {
		// Only a name: the record itself has another one by now, or was refused.
		if rerr := r.fs.Remove(tmp); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			r.log.Debug("temporary record left behind", "path", tmp, "error", rerr)
		}
	}
	return err
}

// counted keeps what a swap that counted has made. It returns true if the temporary name may stay
// for Prune: that of a holder, who swaps again and again. Each removal would make an NFS client
// ask about everything in the directory anew.
func (r *FileRegister) counted(prev, next Record, file fsx.Content, tmp string) (later bool) {
	r.mu.Lock()
	later = r.made && r.known.Version == prev.Version && len(r.spent) < keepRecords
	if later {
		r.spent = append(r.spent, tmp)
	}
	r.mu.Unlock()
	r.learn(next, file, true)
	return later
}

// lookBefore finds the file of the record that was loaded. It also keeps stray records rare (a
// link to a number that was pruned long ago, or above a register that went back), but proves
// nothing about afterwards.
func (r *FileRegister) lookBefore(prev Record) (fsx.Identity, error) {
	id, err := r.fs.Identify(r.path(prev.Version))
	if known, file := r.knownRecord(); err == nil && known.Version == prev.Version && known.Nonce == prev.Nonce && id.Content == file {
		return id, nil
	}
	versions, _, err := r.list()
	if err != nil {
		return id, err
	}
	switch newest := versions[len(versions)-1]; {
	case newest > prev.Version:
		return id, fmt.Errorf("newest is %d: %w", newest, ErrConflict)
	case newest < prev.Version:
		return id, fmt.Errorf("newest is %d: %w", newest, ErrWentBack)
	}
	rec, file, err := r.readFile(prev.Version)
	if err != nil {
		return id, err
	}
	if rec.Nonce != prev.Nonce {
		return id, fmt.Errorf("record %d is another one: %w", prev.Version, ErrConflict)
	}
	if id.Content != file {
		id = fsx.Identity{} // it changed while it was looked at: read it once more afterwards
	}
	return id, nil
}

// writeTemp makes the complete record durable under its temporary name. The name itself
// need not be durable.
func (r *FileRegister) writeTemp(tmp string, data []byte) (fsx.Content, error) {
	f, err := r.fs.Create(tmp)
	if err != nil {
		return fsx.Content{}, err
	}
	var file fsx.Content
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		// The server's answer to the write has told it; this asks nobody.
		var st fs.FileInfo
		if st, err = f.Stat(); err == nil {
			file = fsx.ContentOf(st)
		}
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return file, err
}

// publish offers the name and finds out what came of it: nil, ErrConflict or ErrUnknown.
// before is prev's file as it was seen, zero if that was not seen well.
func (r *FileRegister) publish(prev, next Record, tmp string, before fsx.Identity) error {
	unknown := func(err error) error { return fmt.Errorf("%w: %w", ErrUnknown, err) }
	lerr := r.fs.Link(tmp, r.path(next.Version))
	if errors.Is(lerr, fsx.ErrCrash) {
		return unknown(lerr)
	}
	ours := lerr == nil
	if lerr != nil {
		// "Exists" may be the answer to a repetition of a request that succeeded, and an
		// I/O error says nothing at all. The nonce tells whose record it is.
		got, err := r.read(next.Version)
		if err != nil {
			return unknown(errors.Join(lerr, err))
		}
		ours = got.Nonce == next.Nonce
	}
	if ours {
		if err := r.fs.SyncDir(r.dir); err != nil {
			return unknown(err)
		}
	}
	// On every path: only while the predecessor is still there, with the nonce that was
	// loaded, is the number the successor of what the caller has seen. Records are removed
	// in ascending order, so a number that was free because it had been pruned has no
	// predecessor any more.
	there, err := r.unchanged(prev, before)
	if err != nil {
		return unknown(err)
	}
	if !there {
		return unknown(fmt.Errorf("record %d is gone or another one", prev.Version))
	}
	if !ours {
		return ErrConflict
	}
	return nil
}

// unchanged looks up a record afresh and says whether it is exactly the one given. The same file
// under its name, with not even its names changed since it was seen before, is that record;
// otherwise a new listing and reading it tell.
func (r *FileRegister) unchanged(rec Record, before fsx.Identity) (bool, error) {
	if before != (fsx.Identity{}) {
		if id, err := r.fs.Identify(r.path(rec.Version)); err == nil && id == before {
			return true, nil
		}
	}
	versions, _, err := r.list()
	if err != nil {
		return false, err
	}
	if _, found := slices.BinarySearch(versions, rec.Version); !found {
		return false, nil
	}
	got, err := r.read(rec.Version)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return got.Nonce == rec.Nonce, nil
}
