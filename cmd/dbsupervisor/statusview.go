package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	volsync "dbsupervisor/internal/sync"
)

// view renders a status as one screen of text.
type view struct {
	strings.Builder
	s api.Status
}

// renderStatus writes a status for people. Everything relative is relative to s.At, so that
// the same status always looks the same.
func renderStatus(w io.Writer, s api.Status) error {
	v := &view{s: s}
	v.head()
	v.loss()
	v.cluster()
	v.data()
	v.reads()
	v.machine()
	v.trouble()
	v.past()
	_, err := io.WriteString(w, v.String())
	return err
}

// row is one line with a label; an empty text leaves it out.
func (v *view) row(label, format string, args ...any) {
	if text := fmt.Sprintf(format, args...); text != "" {
		fmt.Fprintf(v, "%-13s%s\n", label, text)
	}
}

func (v *view) head() {
	s := v.s
	fmt.Fprintf(v, "cluster %s, instance %s", s.Cluster, s.Instance)
	if s.Zone != "" {
		fmt.Fprintf(v, " in %s", s.Zone)
	}
	fmt.Fprintf(v, " at %s\n\n  %s", s.At.UTC().Format(stamp), strings.ToUpper(string(s.Role)))
	if s.Term > 0 {
		fmt.Fprintf(v, "   term %d", s.Term)
	}
	if s.State != "" && s.State != string(s.Role) {
		fmt.Fprintf(v, "   (%s)", s.State)
	}
	v.WriteString("\n")
	for _, d := range s.Degraded {
		fmt.Fprintf(v, "  ! %s\n", d)
	}
	if s.Paused {
		v.WriteString("  ! PAUSED: nobody takes over by itself until: dbsupervisor resume\n")
	}
	if p := s.Progress; p != nil && p.Phase != "" {
		fmt.Fprintf(v, "  > %s", p.Phase)
		if p.Total > 0 {
			fmt.Fprintf(v, ": %s of %s (%d%%)", bytes(p.Done), bytes(p.Total), 100*p.Done/p.Total)
		}
		if r := p.BytesPerSecond; r != nil {
			fmt.Fprintf(v, ", %s/s", bytes(int64(*r)))
		}
		if r := p.RemainingSeconds; r != nil {
			fmt.Fprintf(v, ", %s left", since(seconds(*r)))
		}
		v.WriteString("\n")
	}
	v.WriteString("\n")
}

// loss says in big plain words what an unplanned loss would cost now.
func (v *view) loss() {
	s := v.s
	switch {
	case s.LossWindowSeconds != nil:
		fmt.Fprintf(v, "  WOULD BE LOST NOW with this machine: the last %s of writes\n\n", strings.ToUpper(longSince(*s.LossWindowSeconds)))
	case s.Role == api.RolePrimary || s.Role == api.RoleStarting || s.Role == api.RoleHandoff:
		v.WriteString("  WOULD BE LOST NOW with this machine: NOT KNOWN, count on everything since the last commit\n\n")
	case s.HeadComplete:
		v.WriteString("  NOTHING MORE CAN BE LOST: nobody writes, and the next primary starts from the newest snapshot\n\n")
	case s.Head != nil:
		fmt.Fprintf(v, "  WOULD BE LOST NOW with the primary: what it wrote in the last %s (by this machine's clock)\n\n", strings.ToUpper(longSince(s.Head.AgeSeconds)))
	case s.Lease.LastContactMS == nil:
		v.WriteString("  WOULD BE LOST NOW: NOT KNOWN, the register can't be reached\n\n")
	default:
		v.WriteString("  NOTHING IS SAFE YET: no snapshot has been committed\n\n")
	}
}

// longSince is a number of seconds in words.
func longSince(secs float64) string {
	d := seconds(secs)
	switch {
	case d < time.Second:
		return "second"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds", int(d.Seconds()+0.999))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes", int(d.Minutes()+0.999))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()+0.999))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24+0.999))
}

func (v *view) cluster() {
	s := v.s
	v.row("Primary", "%s", v.primary())
	l := s.Lease
	var parts []string
	switch {
	case l.DeadlineInMS != nil && *l.DeadlineInMS > 0:
		parts = append(parts, fmt.Sprintf("held, %s left of %s", since(ms(*l.DeadlineInMS)), since(ms(l.TTLMS))))
	case l.DeadlineInMS != nil:
		parts = append(parts, "OVER")
	case l.ChallengeInMS != nil && *l.ChallengeInMS > 0:
		parts = append(parts, "may be taken here in "+since(ms(*l.ChallengeInMS))+" if the primary stays silent")
	}
	if l.LastContactMS != nil {
		parts = append(parts, fmt.Sprintf("register version %d, seen %s ago", l.Version, since(ms(*l.LastContactMS))))
	} else {
		parts = append(parts, "register not reached")
	}
	if l.Error != "" {
		parts = append(parts, "ERROR: "+l.Error)
	}
	v.row("Lease", "%s", strings.Join(parts, "; "))
	v.row("Failover", "%s", v.failover())
}

// failover is left out while there is nothing to say about it.
func (v *view) failover() string {
	f, usual := v.s.Failover, config.Default().Failover
	var parts []string
	switch {
	case f == (api.Failover{}):
		return "" // read from the register without an agent
	case f.Never:
		parts = append(parts, "this instance never becomes primary")
	case f.Priority != usual.Priority:
		parts = append(parts, fmt.Sprintf("priority %d", f.Priority))
	}
	if f.LastHour > 0 {
		parts = append(parts, fmt.Sprintf("%d within the last hour that nobody asked for, at most %d", f.LastHour, f.MaxPerHour))
	}
	return strings.Join(parts, "; ")
}

func (v *view) primary() string {
	s := v.s
	p := s.Primary
	if p.Instance == "" && s.Lease.LastContactMS == nil {
		return "not known"
	}
	if p.Instance == "" {
		return "nobody has held the term yet"
	}
	text := p.Instance
	if p.Self {
		text += " (this instance)"
	}
	if p.Address != "" {
		text += " at " + p.Address
	}
	if p.Zone != "" {
		text += " in " + p.Zone
	}
	if s.Released {
		text += "; has given the term up"
		if s.Successor != "" {
			text += " to " + s.Successor
		}
	}
	return text
}

func (v *view) data() {
	s := v.s
	if h := s.Head; h != nil {
		v.row("Newest", "%s, frozen %s ago (%s)", h.ID, since(seconds(h.AgeSeconds)), h.Frozen.UTC().Format(stamp))
	} else if s.Lease.LastContactMS == nil {
		v.row("Newest", "not known: the register can't be read")
	} else {
		v.row("Newest", "no snapshot yet")
	}
	if c := s.LastCommit; c != nil {
		v.row("Last commit", "%s, %s ago: froze %s, changed %s, stored %s, took %s", c.ID, since(s.At.Sub(c.At)),
			since(millis(c.FreezeMS)), bytes(c.ChangedBytes), bytes(c.StoredBytes), since(millis(c.DurationMS)))
	}
	parts := []string{s.Sync.Schedule}
	if s.Sync.Slowed {
		parts = append(parts, "SLOWED to one every "+since(seconds(s.Sync.IntervalSeconds)))
	}
	if s.Sync.Running {
		parts = append(parts, "running now")
	}
	if n := s.Sync.Next; n != nil {
		parts = append(parts, "next in "+since(n.Sub(s.At)))
	}
	if s.Sync.Tier != "" {
		parts = append(parts, "tier "+s.Sync.Tier)
	}
	if n := s.Sync.ConsecutiveFailures; n > 0 {
		parts = append(parts, fmt.Sprintf("FAILED %d times in a row: %s", n, s.Sync.LastError))
	}
	if n := s.Sync.FreezeAborts; n > 0 {
		parts = append(parts, fmt.Sprintf("%d given up to spare the database a long freeze", n))
	}
	v.row("Snapshots", "%s", strings.Join(parts, "; "))
	parts = []string{s.Local.Phase}
	if s.Local.Base != "" {
		parts = append(parts, "from "+s.Local.Base)
	}
	if n := s.Local.BehindSnapshots; n > 0 {
		behind := fmt.Sprintf("BEHIND by %d snapshots", n)
		if b := s.Local.BehindBytes; b > 0 {
			behind += " (" + bytes(b) + ")"
		}
		parts = append(parts, behind)
	}
	parts = append(parts, refreshed(s.Local)...)
	if f := s.Local.FreeBytes; f != nil {
		parts = append(parts, bytes(*f)+" free")
	}
	v.row("Local copy", "%s", strings.Join(parts, "; "))
}

// refreshed says how the copy follows the newest snapshot.
func refreshed(l api.Local) []string {
	switch {
	case l.Refreshed == volsync.CopyClone:
		return []string{"refreshed in a clone"}
	case l.Refreshed == volsync.CopyTwo:
		return []string{"refreshed with two copies"}
	case l.RefreshReason != "": // the first time there is nothing to spare
		return []string{"refreshed IN PLACE, of no use meanwhile: " + l.RefreshReason}
	}
	return nil
}

// reads says what is served to readers, and how old it may be.
func (v *view) reads() {
	r := v.s.Replica
	if r == nil {
		return
	}
	var parts []string
	if c := r.Serving; c != nil {
		age := "AGE NOT KNOWN YET"
		if c.AgeSeconds != nil {
			age = "at most " + since(seconds(*c.AgeSeconds)) + " old"
		}
		parts = append(parts, fmt.Sprintf("%s, %s, %d sessions", c.Snapshot, age, c.Sessions))
		if !c.Healthy {
			parts = append(parts, "DOES NOT ANSWER "+c.Error)
		}
	} else {
		parts = append(parts, "nothing is served")
	}
	if c := r.Draining; c != nil {
		parts = append(parts, fmt.Sprintf("%d sessions still with %s", c.Sessions, c.Snapshot))
	}
	if r.Phase != "" {
		parts = append(parts, "next: "+r.Phase)
	}
	if n := r.ConsecutiveFailures; n > 0 {
		parts = append(parts, fmt.Sprintf("refresh FAILED %d times in a row: %s", n, r.LastError))
	}
	v.row("Reads", "%s", strings.Join(parts, "; "))
}

func (v *view) machine() {
	s := v.s
	d := s.Database
	var parts []string
	switch {
	case d.Running && d.Healthy:
		parts = append(parts, "runs and answers")
	case d.Running && s.Source != "agent":
		parts = append(parts, "runs; only an agent could ask it")
	case d.Running:
		parts = append(parts, "runs, DOES NOT ANSWER")
	case d.Container != "":
		parts = append(parts, "stopped")
	default:
		parts = append(parts, "no container")
	}
	if d.LastProbe != nil {
		parts = append(parts, "asked "+since(s.At.Sub(*d.LastProbe))+" ago")
	}
	if d.Container != "" {
		parts = append(parts, "container "+d.Container)
	}
	if d.Restarts > 0 {
		parts = append(parts, fmt.Sprintf("restarted %d times in this term", d.Restarts))
	}
	if d.Error != "" {
		parts = append(parts, "ERROR: "+d.Error)
	}
	v.row("Database", "%s", strings.Join(parts, "; "))
	if s.Source != "agent" {
		return // only the agent knows the rest
	}
	gate := "closed"
	if s.Gate.Open {
		gate = "open, closes by itself in " + since(ms(s.Gate.RemainingMS))
	}
	if s.Gate.Error != "" {
		gate += "; ERROR: " + s.Gate.Error
	}
	v.row("Write port", "%s", gate)
	guard := "watches"
	if !s.Guard.OK {
		guard = "DOES NOT ANSWER"
	}
	if s.Guard.Error != "" {
		guard += ": " + s.Guard.Error
	}
	v.row("Guard", "%s", guard)
	if n := len(s.Forks); n > 0 {
		v.row("Forks", "%d set aside; list them with: dbsupervisor forks", n)
	}
}

func (v *view) trouble() {
	p := v.s.LastError
	if p == nil {
		return
	}
	fmt.Fprintf(v, "\nLast error   %s ago: %s\n", since(v.s.At.Sub(p.At)), p.What)
	if p.Hint != "" {
		fmt.Fprintf(v, "  what to do: %s\n", p.Hint)
	}
}

func (v *view) past() {
	if len(v.s.History) == 0 {
		return
	}
	v.WriteString("\nHistory\n")
	for _, e := range v.s.History {
		fmt.Fprintf(v, "  %s  term %-4d %s: %s\n", e.At.UTC().Format(stamp), e.Term, e.Kind, eventText(e))
	}
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
