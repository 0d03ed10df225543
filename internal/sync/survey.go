package sync

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Survey is what a look at a directory tells about it as a volume.
type Survey struct {
	Files, Dirs, Symlinks, Others int
	Bytes                         int64 // length of all files
	Allocated                     int64 // what they take on the disk
	// Outside says, in one sentence each, what no snapshot would contain: symbolic links that
	// lead out, mount points.
	Outside []string
	// Took is how long it took to look at every name.
	Took time.Duration
	// Touched and TouchedBytes are the files that were changed after the moment given, and their length:
	// what would have to be read without a tracker.
	Touched      int
	TouchedBytes int64
}

// maxOutside bounds Survey.Outside; one is one too many.
const maxOutside = 20

// Look surveys a directory that may be in use; what vanishes meanwhile is left out. since, if
// not zero, is the moment from which on changes are counted. It only reads.
func Look(ctx context.Context, dir string, since time.Time) (Survey, error) {
	var s Survey
	began := time.Now()
	var top unix.Stat_t
	if err := unix.Stat(dir, &top); err != nil {
		return s, fmt.Errorf("look at %s: %w", dir, err)
	}
	views := viewsOf(dir, nil)
	outside := func(text string) {
		if len(s.Outside) < maxOutside {
			s.Outside = append(s.Outside, text)
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if cerr := ctx.Err(); cerr != nil {
			return cerr
		}
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if os.IsNotExist(err) && path != dir {
			return nil
		}
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("stat %s tells too little", path)
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			s.Dirs++
			if st.Dev != top.Dev {
				outside(path + " is a mount point")
				return filepath.SkipDir
			}
		case d.Type() == fs.ModeSymlink:
			s.Symlinks++
			target, err := os.Readlink(path)
			if err == nil {
				err = checkLink(dir, rel, []byte(target), views)
			}
			if err != nil && !os.IsNotExist(err) {
				outside(err.Error())
			}
		case d.Type().IsRegular():
			s.Files++
			s.Bytes += info.Size()
			s.Allocated += st.Blocks * 512
			if !since.IsZero() && time.Unix(st.Ctim.Unix()).After(since) {
				s.Touched++
				s.TouchedBytes += info.Size()
			}
		default:
			s.Others++
		}
		return nil
	})
	s.Took = time.Since(began)
	if err != nil {
		return s, fmt.Errorf("look at %s: %w", dir, err)
	}
	return s, nil
}
