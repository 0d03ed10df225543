package lease

import (
	"context"
	"errors"
	"fmt"

	"dbsupervisor/internal/fsx"
)

// CompareAndSwap implements Register. The record is written as the target of a symbolic link
// whose name is its number. symlink(2) makes name and content in one step, refuses an existing
// name on every file system, and over NFS is one request, answered when it is durable; rename
// silently replaces another host's file there, and locks were granted twice.
//
// The swap counts only if the link was made, or reading back shows this attempt's nonce, and if
// afterwards the predecessor's name still has the very file that was loaded. Without the second
// half a caller that slept until its number had been pruned would win it. The nonce is not
// enough: a server without a reply cache may execute the request that made the predecessor once
// more after that was pruned, which makes another file with the same record.
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
	target, err := encodeRecord(next)
	if err != nil {
		return fail(err)
	}
	// What is returned equals what a later Load returns (wall clocks lose their location).
	if next, err = decodeRecord(target); err != nil {
		return fail(err)
	}
	var off offer
	_, err = inBackground(ctx, r.workers, func() (struct{}, error) {
		return struct{}{}, r.swap(ctx, prev, next, target, &off)
	})
	var left *errLeft
	switch {
	case err == nil:
		return next, nil
	case errors.As(err, &left) && !off.withdraw():
		// The worker is inside or behind the offer: it may take effect now or much later.
		return next, fmt.Errorf("swap record %d: %w: %w", prev.Version, ErrUnknown, err)
	case errors.Is(err, ErrUnknown):
		return next, fmt.Errorf("swap record %d: %w", prev.Version, err)
	}
	return fail(err)
}

// swap runs in a worker. Whatever fails before the offer proves that nothing was offered.
func (r *FileRegister) swap(ctx context.Context, prev, next Record, target string, off *offer) error {
	if err := r.checkCluster(); err != nil {
		return err
	}
	file, err := r.lookBefore(ctx, prev)
	if err != nil {
		return err
	}
	if !off.make() {
		return fmt.Errorf("given up before anything was offered: %w", context.Cause(ctx))
	}
	return r.publish(prev, next, target, file)
}

// lookBefore returns the file of the record that was loaded. That it is still there proves
// nothing about afterwards, but keeps stray records rare (a link to a number that was pruned long
// ago, or above a register that went back).
func (r *FileRegister) lookBefore(ctx context.Context, prev Record) (fsx.Identity, error) {
	if known, file := r.knownRecord(); known.Version == prev.Version && known.Nonce == prev.Nonce {
		if id, err := r.fs.Identify(r.path(prev.Version)); err == nil && id == file {
			return file, nil
		}
	}
	rec, file, err := r.newest(ctx)
	switch {
	case err != nil:
		return file, err
	case rec.Version > prev.Version:
		return file, fmt.Errorf("newest is %d: %w", rec.Version, ErrConflict)
	case rec.Version < prev.Version:
		return file, fmt.Errorf("newest is %d: %w", rec.Version, ErrWentBack)
	case rec.Nonce != prev.Nonce:
		return file, fmt.Errorf("record %d is another one: %w", prev.Version, ErrConflict)
	}
	return file, nil
}

// publish offers the name and finds out what came of it: nil, ErrConflict or ErrUnknown. file is
// prev's.
func (r *FileRegister) publish(prev, next Record, target string, file fsx.Identity) error {
	unknown := func(err error) error { return fmt.Errorf("%w: %w", ErrUnknown, err) }
	lerr := r.fs.Symlink(target, r.path(next.Version))
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
	var made fsx.Identity
	if ours {
		if err := r.fs.SyncDir(r.dir); err != nil {
			return unknown(err)
		}
		// Before the look at the predecessor: if that is still there, this name was never
		// freed, and what it has is what was made.
		var err error
		if made, err = r.fs.Glance(r.path(next.Version)); err != nil {
			return unknown(err)
		}
	}
	// On every path: only while the predecessor is still there, the very file that was loaded,
	// is the number the successor of what the caller has seen. Records are removed in
	// ascending order, so a number that was free because it had been pruned has no
	// predecessor any more, or another file in its place.
	now, err := r.fs.Identify(r.path(prev.Version))
	if err != nil {
		return unknown(err)
	}
	if now != file {
		return unknown(fmt.Errorf("record %d is another file", prev.Version))
	}
	if !ours {
		return ErrConflict
	}
	r.learn(next, made)
	return nil
}
