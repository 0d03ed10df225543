package sync

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	stdsync "sync"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/internal/fsx"
)

// Checker verifies the store in the background, one file after the other, the one that was
// checked longest ago first. What it has checked, and when, it keeps in a file of this
// instance. It may be interrupted at any time and goes on where it was, in the middle of a
// pack. It is safe for concurrent use.
type Checker struct {
	s    *Store
	fs   fsx.FS
	path string

	working stdsync.Mutex // a Check
	at      string        // pack being checked
	frame   int           // next in it
	suspect string        // file that was missing the last time

	mu      stdsync.Mutex
	loaded  bool
	files   map[string]checked // what there is to check
	bad     []string           // of them
	every   time.Duration
	read    int64 // bytes so far
	unsaved int
}

// checked is what is known of one file.
type checked struct {
	At  int64  `json:"at"` // seconds since 1970; of the first sight if never checked
	Bad string `json:"bad,omitempty"`
	New bool   `json:"new,omitempty"` // never checked
}

// CheckRequest says what to check.
type CheckRequest struct {
	Catalog CatalogRef // the committed one
	// Every is the time in which each file is to be checked once. 0: never.
	Every time.Duration
	// Rate bounds the bytes per second that are read; 0: no bound.
	Rate     int64
	Progress Progress // may be nil
}

// CheckReport is how far a Checker has come.
type CheckReport struct {
	Files     int           // that the committed snapshots need
	Checked   int           // of them, checked by this instance
	Oldest    time.Duration // since the check, or the first sight, of the one that waits longest
	ReadBytes int64         // since the agent started
	Problems  []Problem     // what was found damaged; Snapshots is not filled in
}

// NewChecker makes a Checker that remembers in the file path, on this instance's own disk.
func (s *Store) NewChecker(fsys fsx.FS, path string) *Checker {
	return &Checker{s: s, fs: fsys, path: path}
}

// checkFile is a file that a catalog names.
type checkFile struct {
	pack PackRef
	hash string // manifests
}

// Check checks what is due until nothing is, or ctx ends. Damage is no error: Report tells.
func (c *Checker) Check(ctx context.Context, r CheckRequest) error {
	if r.Every <= 0 || r.Catalog.Name == "" {
		return nil
	}
	c.working.Lock()
	defer c.working.Unlock()
	cat, err := c.s.knownCatalog(ctx, r.Catalog)
	if err != nil {
		return fmt.Errorf("check store: %w", err)
	}
	files := make(map[string]checkFile, len(cat.packs)+len(cat.entries))
	for _, p := range cat.packs {
		files[p.Path] = checkFile{pack: p}
	}
	for i := range cat.entries {
		files[cat.entries[i].info.Manifest] = checkFile{hash: cat.entries[i].info.Hash}
	}
	if err := c.follow(files, r.Every); err != nil {
		return fmt.Errorf("check store: %w", err)
	}
	var pace *pacer
	if r.Rate > 0 {
		pace = &pacer{clock: c.s.cfg.Clock, rate: r.Rate}
	}
	for {
		path, ok := c.due()
		if !ok {
			break
		}
		if err = c.check(ctx, path, files[path], pace, r.Progress); err != nil {
			break
		}
	}
	if errors.Is(err, errStale) {
		err = nil
	}
	if serr := c.save(0); err == nil {
		err = serr
	}
	if err != nil {
		return fmt.Errorf("check store: %w", err)
	}
	return nil
}

// follow takes up what is new and forgets what is gone.
func (c *Checker) follow(files map[string]checkFile, every time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.loaded {
		b, err := fsx.ReadFile(c.fs, c.path, maxPin)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.files = map[string]checked{}
		if err == nil && json.Unmarshal(b, &c.files) != nil {
			c.files = map[string]checked{} // everything counts as new
		}
		c.loaded = true
	}
	c.every = every
	now := c.s.cfg.Clock.Wall().Unix()
	maps.DeleteFunc(c.files, func(path string, _ checked) bool { _, ok := files[path]; return !ok })
	for path := range files {
		if f, ok := c.files[path]; !ok {
			c.files[path] = checked{At: now, New: true}
		} else if f.At > now { // the clock was wrong then, or is now
			f.At = now
			c.files[path] = f
		}
	}
	c.noteBad()
	return nil
}

// due returns the file that was checked longest ago, if it is time: when half the time is
// over, so that the other half is left for all of them. A pack that has been begun comes
// first.
func (c *Checker) due() (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.files[c.at]; ok && c.at != "" {
		return c.at, true
	}
	c.at, c.frame = "", 0
	least, path := int64(0), ""
	for p, f := range c.files {
		if path == "" || f.At < least || f.At == least && p < path {
			least, path = f.At, p
		}
	}
	now := c.s.cfg.Clock.Wall().Unix()
	return path, path != "" && time.Duration(now-least)*time.Second >= c.every/2
}

func (c *Checker) check(ctx context.Context, path string, f checkFile, pace *pacer, p Progress) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var err error
	if f.hash != "" {
		err = c.manifest(ctx, path, f.hash, pace)
	} else {
		err = c.pack(ctx, f.pack, pace, p)
	}
	var o *ObjectError
	switch {
	case err == nil:
		c.suspect = ""
	case !errors.As(err, &o):
		return err
	case errors.Is(err, ErrMissing) && c.suspect != path:
		// The catalog may be of yesterday: the next Check comes with the newest.
		c.suspect = path
		return errStale
	}
	c.at, c.frame = "", 0
	done := checked{At: c.s.cfg.Clock.Wall().Unix()}
	if o != nil {
		if done.Bad = o.What; done.Bad == "" {
			done.Bad = "missing"
		}
		c.s.log.Error("damage found in the store", "path", path, "what", done.Bad)
	}
	c.mu.Lock()
	was := c.files[path].Bad
	c.files[path] = done
	if was != done.Bad {
		c.noteBad()
	}
	c.unsaved++
	c.mu.Unlock()
	return c.save(64)
}

// errStale ends a Check that has to look at a newer catalog first.
var errStale = errors.New("a file is missing; looking again with the newest catalog")

func (c *Checker) manifest(ctx context.Context, path, hash string, pace *pacer) error {
	m, err := c.s.readManifest(ctx, path, hash, false)
	if err != nil {
		return err
	}
	c.count(m.size)
	return pace.wait(ctx, int(m.size))
}

// pack checks a pack's frames from where it was left.
func (c *Checker) pack(ctx context.Context, ref PackRef, pace *pacer, p Progress) error {
	pr, err := c.s.openPack(ref)
	if err != nil {
		return err
	}
	defer func() { _ = pr.file.Close() }() // only read
	dropCache(pr.file)
	if err := checkEnds(pr, ref.Size); err != nil {
		return err
	}
	if c.at != ref.Path {
		c.at, c.frame = ref.Path, 0
	}
	raw := make([]byte, 0, frameMaxBytes)
	var stored []byte
	for c.frame < len(pr.foot.frames) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, stored, err = c.s.readFrame(pr, c.frame, raw, stored); err != nil {
			return err
		}
		fr := &pr.foot.frames[c.frame]
		c.frame++
		c.count(int64(fr.stored))
		if p != nil {
			p.Set("verifying", fr.offset+int64(fr.stored), ref.Size)
		}
		if err := pace.wait(ctx, int(fr.stored)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Checker) count(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.read += n
}

// dropCache makes the next reads come from the share, not from this machine's memory.
func dropCache(f fsx.File) {
	if fd, ok := f.(interface{ Fd() uintptr }); ok {
		_ = unix.Fadvise(int(fd.Fd()), 0, 0, unix.FADV_DONTNEED) //nolint:gosec // advice; a descriptor fits
	}
}

// save writes down what has been checked, if it is more than a few files.
func (c *Checker) save(more int) error {
	c.mu.Lock()
	if c.unsaved <= more {
		c.mu.Unlock()
		return nil
	}
	b, err := json.Marshal(c.files)
	c.unsaved = 0
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("encode what was checked: %w", err)
	}
	return fsx.ReplaceLocal(c.fs, c.path, b)
}

// Damage is Report's Problems alone, cheaply.
func (c *Checker) Damage() []Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.damage()
}

// damage lists what is bad. c.mu is held.
func (c *Checker) damage() []Problem {
	var out []Problem
	for _, path := range c.bad {
		if f := c.files[path]; f.Bad != "" {
			out = append(out, Problem{Path: path, What: f.Bad})
		}
	}
	return out
}

// noteBad keeps the list of bad files. c.mu is held.
func (c *Checker) noteBad() {
	c.bad = nil
	for path, f := range c.files {
		if f.Bad != "" {
			c.bad = append(c.bad, path)
		}
	}
	slices.Sort(c.bad)
}

// Report tells how far the Checker has come.
func (c *Checker) Report() CheckReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := CheckReport{Files: len(c.files), ReadBytes: c.read}
	now := c.s.cfg.Clock.Wall().Unix()
	for _, f := range c.files {
		if !f.New {
			r.Checked++
		}
		r.Oldest = max(r.Oldest, time.Duration(now-f.At)*time.Second)
	}
	r.Problems = c.damage()
	return r
}
