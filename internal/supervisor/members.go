package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
)

// Member is what an instance tells the others about itself. It is advice (who could take
// over, whom to show in status); nothing that matters for safety is decided by it.
type Member struct {
	Instance    string `json:"instance"`
	Incarnation string `json:"incarnation"`
	State       State  `json:"state"`
	Base        string `json:"base"` // ID of the snapshot that its volume holds
	BaseSeq     uint64 `json:"base_seq"`
	Newest      bool   `json:"newest,omitempty"`  // its volume is the last holder's own: it has more than head
	Follows     bool   `json:"follows,omitempty"` // its volume is at head, or nearly
	Priority    int    `json:"priority,omitempty"`
	Eligible    bool   `json:"eligible"` // may become primary
	HTTP        string `json:"http,omitempty"`
	Zone        string `json:"zone,omitempty"`
	Version     string `json:"version,omitempty"`
}

// members is the directory members/ of the share. A beat is a file named
// <instance>~<beat>~<nonce>. When there is news it is a new file, created exclusively, whose
// nonce stands for what it says; otherwise the file only gets the next beat's name: linked to
// it, the old name removed. Nothing is ever overwritten, so a reader never sees a half-written
// mixture of two beats, and it reads only what says something new. Whether another instance is
// alive is judged by its beat changing, on one's own clock.
type members struct {
	fs    fsx.FS
	dir   string
	clock boottime.Clock

	// Of the last beat; only beat uses them.
	name, nonce string
	said        []byte

	mu     sync.Mutex
	seen   map[string]seenBeat
	kick   context.CancelFunc // ends the wait for the next beat
	looked bool               // the directory has been read before: a name that is new is a live one
}

type seenBeat struct {
	name    string
	since   boottime.Instant
	changed bool // it was seen to change: the instance lives, or lived then
	member  Member
}

const (
	maxMemberFile = 64 << 10
	// memberSeparator can't occur in an instance's name.
	memberSeparator = "~"
)

func newMembers(fsys fsx.FS, share string, clock boottime.Clock) *members {
	return &members{fs: fsys, dir: filepath.Join(share, "members"), clock: clock, seen: map[string]seenBeat{}}
}

// beat announces m, under a name with this nonce if it says something new, and looks at the
// others. Of a primary the others know by its lease that it lives: it only tells news. It may
// hang with the share.
func (ms *members) beat(m Member, nonce string) error {
	newest, own, last, err := ms.list(m.Instance)
	if errors.Is(err, fs.ErrNotExist) {
		if err := ms.fs.MkdirAll(ms.dir); err != nil {
			return fmt.Errorf("make members directory: %w", err)
		}
		newest, own, last, err = ms.list(m.Instance)
	}
	if err != nil {
		return err
	}
	if err := ms.announce(m, nonce, last, slices.Contains(own, ms.name)); err != nil {
		return err
	}
	for _, o := range own {
		if o == ms.name {
			continue
		}
		if err := ms.fs.Remove(filepath.Join(ms.dir, o)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove old member file: %w", err)
		}
	}
	ms.look(newest)
	return nil
}

// announce makes the beat after the one numbered last. there says that the last beat's file
// still is.
func (ms *members) announce(m Member, nonce string, last uint64, there bool) error {
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode member: %w", err)
	}
	same := there && bytes.Equal(data, ms.said)
	if same && m.State == StatePrimary {
		return nil
	}
	if same {
		name := beatName(m.Instance, last+1, ms.nonce)
		if err := ms.fs.Link(filepath.Join(ms.dir, ms.name), filepath.Join(ms.dir, name)); err == nil {
			ms.name = name
			return nil
		}
		// Whatever it was: a new file needs nothing of the old one.
	}
	name := beatName(m.Instance, last+1, nonce)
	if err := ms.write(filepath.Join(ms.dir, name), data); err != nil {
		return err
	}
	ms.name, ms.nonce, ms.said = name, nonce, data
	return nil
}

// beatName is zero-padded, so that names sort like numbers.
func beatName(instance string, beat uint64, nonce string) string {
	return fmt.Sprintf("%s%s%016x%s%s", instance, memberSeparator, beat, memberSeparator, nonce)
}

// nonceOf returns what a beat's name says about its content.
func nonceOf(name string) string { return name[strings.LastIndex(name, memberSeparator)+1:] }

// refresh looks at the others without announcing anything. It may hang with the share.
func (ms *members) refresh(self string) error {
	newest, _, _, err := ms.list(self)
	if err == nil {
		ms.look(newest)
	}
	return err
}

// list reads the directory: the newest beat of every other instance, all of one's own and
// the highest number among those.
func (ms *members) list(self string) (newest map[string]string, own []string, last uint64, err error) {
	list, err := ms.fs.ReadDir(ms.dir)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("list members: %w", err)
	}
	newest = map[string]string{}
	for _, de := range list {
		inst, rest, ok := strings.Cut(de.Name(), memberSeparator)
		if !ok {
			continue
		}
		n, _, _ := strings.Cut(rest, memberSeparator)
		num, err := strconv.ParseUint(n, 16, 64)
		if err != nil {
			continue
		}
		if inst == self {
			own = append(own, de.Name())
			last = max(last, num)
			continue
		}
		if old, ok := newest[inst]; !ok || de.Name() > old {
			newest[inst] = de.Name()
		}
	}
	return newest, own, last, nil
}

func (ms *members) write(path string, data []byte) error {
	f, err := ms.fs.Create(path)
	if err != nil {
		return fmt.Errorf("create member file: %w", err)
	}
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write member file: %w", err)
	}
	return nil
}

func (ms *members) look(newest map[string]string) {
	now := ms.clock.Now()
	for inst, name := range newest {
		ms.mu.Lock()
		old, known := ms.seen[inst]
		ms.mu.Unlock()
		if known && old.name == name {
			continue
		}
		if known && nonceOf(old.name) == nonceOf(name) {
			ms.mu.Lock()
			ms.seen[inst] = seenBeat{name: name, since: now, changed: true, member: old.member}
			ms.mu.Unlock()
			continue
		}
		b, err := fsx.ReadFile(ms.fs, filepath.Join(ms.dir, name), maxMemberFile)
		if err != nil {
			continue // replaced in between, or the share fails: the next beat looks again
		}
		var m Member
		if json.Unmarshal(b, &m) != nil || m.Instance != inst {
			continue // still being written
		}
		ms.mu.Lock()
		ms.seen[inst] = seenBeat{name: name, since: now, changed: known || ms.looked, member: m}
		ms.mu.Unlock()
	}
	ms.mu.Lock()
	ms.looked = true
	ms.mu.Unlock()
}

// alive lists the other instances whose beat has changed within the given time, by name.
func (ms *members) alive(within time.Duration) []Member {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	now := ms.clock.Now()
	var out []Member
	for _, s := range ms.seen {
		if s.changed && now.Sub(s.since) <= within {
			out = append(out, s.member)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Instance < out[j].Instance })
	return out
}

// successor picks who should take over from an instance in zone from: the one asked for, else
// the first in the order of takeovers. Whoever follows head counts as being there: how old its
// last beat is shall not decide. "" and false: nobody that could.
func (ms *members) successor(want, from string, within time.Duration) (Member, bool) {
	var best Member
	found := false
	for _, m := range ms.alive(within) {
		if !m.Eligible || want != "" && m.Instance != want {
			continue
		}
		if m.Follows {
			m.BaseSeq = math.MaxUint64
		}
		if !found || goesFirst(m, best, "", from) {
			best, found = m, true
		}
	}
	return best, found
}

// run beats until ctx ends, every so often, and whenever changed is called. A share that hangs
// only makes the beats stop.
func (ms *members) run(ctx context.Context, every func() time.Duration, self func() Member, nonce func() string, failed func(error)) {
	for ctx.Err() == nil {
		wait, cancel := context.WithCancel(ctx)
		ms.mu.Lock()
		ms.kick = cancel
		ms.mu.Unlock()
		failed(ms.beat(self(), nonce()))
		_ = ms.clock.WaitUntil(wait, ms.clock.Now().Add(every())) // either way it is time for the next beat
		cancel()
	}
}

// changed makes the next beat come at once: there is news.
func (ms *members) changed() {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if ms.kick != nil {
		ms.kick()
	}
}
