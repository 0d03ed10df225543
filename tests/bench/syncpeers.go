package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"dbsupervisor/tests/efssim"
)

// peer is another tool that copies a directory to a share.
type peer struct {
	name  string
	share *sharedDir
	env   []string
	first []string // makes the repository, not counted; may be nil
	copy  []string
	// seeded says that its first copy is not counted: it is the same as another one's.
	seeded bool
}

// peers are the tools, each with a share of its own.
func (r *syncRun) peers(source string, o efssim.Options) ([]*peer, error) {
	local := filepath.Join(r.root, "caches")
	if err := os.MkdirAll(local, 0o700); err != nil {
		return nil, err
	}
	var out []*peer
	var errs []error
	add := func(name string, f func(at string) *peer) {
		d, err := r.share(name, o)
		if err != nil {
			errs = append(errs, err)
			return
		}
		p := f(d.at)
		p.name, p.share = name, d
		out = append(out, p)
	}
	add("rsync", func(at string) *peer {
		return &peer{copy: []string{"rsync", "-a", "--delete", source + "/", at + "/copy/"}}
	})
	add("rsync-inplace", func(at string) *peer {
		return &peer{seeded: true, copy: []string{"rsync", "-a", "--inplace", "--no-whole-file", "--delete", source + "/", at + "/copy/"}}
	})
	add("rclone", func(at string) *peer {
		return &peer{seeded: true, copy: []string{"rclone", "sync", "--config", os.DevNull, "--transfers", "8", "--checkers", "16", source, at + "/copy"}}
	})
	add("restic", func(at string) *peer {
		repo := []string{"restic", "-q", "-r", at + "/repo", "--cache-dir", local + "/restic"}
		return &peer{env: []string{"RESTIC_PASSWORD=bench"},
			first: append(repo[:len(repo):len(repo)], "init"), copy: append(repo[:len(repo):len(repo)], "backup", source)}
	})
	add("borg", func(at string) *peer {
		return &peer{env: []string{"BORG_BASE_DIR=" + local + "/borg", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes"},
			first: []string{"borg", "init", "-e", "none", at + "/repo"},
			copy:  []string{"borg", "create", at + "/repo::{now:%s%f}", source}}
	})
	return out, errors.Join(errs...)
}

func (p *peer) run(ctx context.Context) error { return command(ctx, p.env, p.copy...) }

func (p *peer) prepare(ctx context.Context) error {
	if p.first == nil {
		return nil
	}
	return command(ctx, p.env, p.first...)
}

// seed makes its first copy of a directory, beside its share.
func (p *peer) seed(ctx context.Context, source string) error {
	if p.first == nil { // it keeps plain files
		return command(ctx, nil, "cp", "-a", source, filepath.Join(p.share.backing, "copy"))
	}
	return errors.Join(p.prepare(ctx), p.run(ctx))
}
