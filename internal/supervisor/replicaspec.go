package supervisor

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/config"
	"dbsupervisor/internal/container"
	volsync "dbsupervisor/internal/sync"
)

// readOnlySpec is the container of one read-only copy: the database's, changed by what keeps
// it read-only. Its volume, labels and name are not in it yet.
func readOnlySpec(base container.Spec, ro config.ReadOnly, ref volsync.SnapshotRef) container.Spec {
	s := base
	s.Env = maps.Clone(base.Env)
	if s.Env == nil {
		s.Env = map[string]string{}
	}
	s.Env["DBSUPERVISOR_SNAPSHOT"] = ref.ID
	s.Env["DBSUPERVISOR_TERM"] = strconv.FormatUint(ref.Term, 10)
	s.Env["DBSUPERVISOR_SEQ"] = strconv.FormatUint(ref.Seq, 10)
	s.Env["DBSUPERVISOR_FROZEN"] = ref.Frozen.UTC().Format(time.RFC3339Nano)
	for _, k := range slices.Sorted(maps.Keys(ro.Env)) {
		s.Env[k] = expand(ro.Env[k], base.Env, s.Env)
	}
	if ro.Entrypoint != nil {
		s.Entrypoint = ro.Entrypoint
	}
	switch {
	case ro.Command != nil:
		s.Command = ro.Command
	case len(base.Command) == 0 && len(ro.Args) > 0:
		s.Command = ro.DefaultCommand
	}
	s.Command = slices.Clone(s.Command)
	for _, a := range ro.Args {
		s.Command = append(s.Command, expand(a, s.Env))
	}
	if ro.User != "" {
		s.User = ro.User
	}
	if ro.StopSignal != "" {
		s.StopSignal = ro.StopSignal
	}
	// Further mounts are shared with the primary's container of this machine, and perhaps with
	// the copy before.
	s.Mounts = slices.Clone(base.Mounts)
	for i := range s.Mounts {
		s.Mounts[i].ReadOnly = true
	}
	return s
}

// prepareSpec is the container that prepares a copy, made from the one that serves it.
func prepareSpec(s container.Spec, ro config.ReadOnly) container.Spec {
	s.Name += "-prepare"
	s.Entrypoint, s.Command = ro.Prepare[:1], ro.Prepare[1:]
	s.Ports, s.Network = nil, "none"
	return s
}

// expand replaces variables; the first environment that has one counts.
func expand(text string, envs ...map[string]string) string {
	return os.Expand(text, func(name string) string {
		if name == "$" {
			return "$"
		}
		for _, e := range envs {
			if v, ok := e[name]; ok {
				return v
			}
		}
		return ""
	})
}

// writeFiles puts the files that are mounted over the container's own into a directory and
// returns their mounts. data is the copy, whose owner those in the data path get.
func writeFiles(ro config.ReadOnly, env map[string]string, dir, data, dataPath string) ([]container.Mount, error) {
	var owner unix.Stat_t
	if err := unix.Stat(data, &owner); err != nil {
		return nil, fmt.Errorf("look at %s: %w", data, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for files: %w", err)
	}
	var out []container.Mount
	for i, f := range ro.Files {
		target := filepath.Clean(expand(f.Path, env))
		if !filepath.IsAbs(target) || target == "/" {
			return nil, fmt.Errorf("file %s is at %q, which is no absolute path", f.Path, target)
		}
		mode := os.FileMode(f.Mode)
		if mode == 0 {
			mode = 0o644
		}
		path := filepath.Join(dir, strconv.Itoa(i))
		if err := os.WriteFile(path, []byte(expand(f.Content, env)), mode); err != nil {
			return nil, fmt.Errorf("write file %s: %w", f.Path, err)
		}
		if target == dataPath || strings.HasPrefix(target, strings.TrimSuffix(dataPath, "/")+"/") {
			if err := os.Chown(path, int(owner.Uid), int(owner.Gid)); err != nil {
				return nil, fmt.Errorf("write file %s: %w", f.Path, err)
			}
		}
		// Whatever the umask is.
		if err := os.Chmod(path, mode); err != nil {
			return nil, fmt.Errorf("write file %s: %w", f.Path, err)
		}
		out = append(out, container.Mount{Source: path, Target: target, ReadOnly: true})
	}
	return out, nil
}
