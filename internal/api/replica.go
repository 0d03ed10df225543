package api

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"dbsupervisor/internal/boottime"
)

// LiveReplica is the snapshot that a standby serves to readers.
type LiveReplica struct {
	Snapshot  string // its ID
	Term, Seq uint64
	Frozen    time.Time // by the time of day of the primary that took it, for people
	// FreshAt is a moment at which it certainly held everything that had been written; 0: not
	// known. The age counts from there.
	FreshAt boottime.Instant
	// MaxAge is the age from which on it is not to be read; 0: never.
	MaxAge time.Duration
}

// Age is an upper bound of how old the data are; false: not known.
func (l *LiveReplica) Age(now boottime.Instant) (time.Duration, bool) {
	if l.FreshAt == 0 {
		return 0, false
	}
	return max(now.Sub(l.FreshAt), 0), true
}

// Token names a committed snapshot by its place in the cluster's one history.
type Token struct {
	Term, Seq uint64
}

// String is how clients keep it: "7.1234".
func (t Token) String() string { return fmt.Sprintf("%d.%d", t.Term, t.Seq) }

// ParseToken reads what String wrote.
func ParseToken(s string) (Token, error) {
	term, seq, ok := strings.Cut(s, ".")
	var t Token
	var err1, err2 error
	t.Term, err1 = strconv.ParseUint(term, 10, 64)
	t.Seq, err2 = strconv.ParseUint(seq, 10, 64)
	if err := errors.Join(err1, err2); err != nil || !ok {
		return Token{}, fmt.Errorf("%q is no token; it looks like 7.1234", s)
	}
	return t, nil
}

// In says whether a snapshot has everything that the token stands for. Sequence numbers rise by
// one with each snapshot and terms never fall along the one history.
func (t Token) In(term, seq uint64) bool { return seq >= t.Seq && term >= t.Term }

// wishes are what a reader asks of a replica.
type wishes struct {
	maxAge  time.Duration // 0: any
	atLeast *Token
}

// wishesOf reads ?max_age=90s (or plain seconds) and ?at_least=7.1234.
func wishesOf(r *http.Request) (wishes, error) {
	var w wishes
	q := r.URL.Query()
	if text := q.Get("max_age"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			d, err = time.ParseDuration(text + "s")
		}
		if err != nil || d <= 0 {
			return w, fmt.Errorf("max_age %q is no duration; write 90s", text)
		}
		w.maxAge = d
	}
	if text := q.Get("at_least"); text != "" {
		t, err := ParseToken(text)
		if err != nil {
			return w, fmt.Errorf("at_least: %w", err)
		}
		w.atLeast = &t
	}
	return w, nil
}

// refuses says why a replica does not fulfil the wishes; "" means it does.
func (w wishes) refuses(l *LiveReplica, now boottime.Instant) string {
	if l == nil {
		if w != (wishes{}) {
			return "it is not known what is served"
		}
		return ""
	}
	limit := w.maxAge
	if l.MaxAge > 0 && (limit == 0 || l.MaxAge < limit) {
		limit = l.MaxAge
	}
	if limit > 0 {
		switch age, known := l.Age(now); {
		case !known:
			return "the age of the data is not known yet"
		case age > limit:
			return fmt.Sprintf("the data may be %s old", age.Round(time.Millisecond))
		}
	}
	if w.atLeast != nil && !w.atLeast.In(l.Term, l.Seq) {
		return fmt.Sprintf("serves %s, before %s", Token{l.Term, l.Seq}, w.atLeast)
	}
	return ""
}

// Names of the headers that say what a replica serves.
const (
	HeaderAge      = "X-Dbsupervisor-Age"      // seconds, an upper bound; missing when not known
	HeaderToken    = "X-Dbsupervisor-Token"    // "term.sequence" of the snapshot served
	HeaderSnapshot = "X-Dbsupervisor-Snapshot" // its ID
)

// tell adds what is served to an answer.
func (l *LiveReplica) tell(h http.Header, v *verdict, now boottime.Instant) {
	if l == nil {
		return
	}
	v.Snapshot, v.Token = l.Snapshot, Token{l.Term, l.Seq}.String()
	h.Set(HeaderSnapshot, v.Snapshot)
	h.Set(HeaderToken, v.Token)
	if age, known := l.Age(now); known {
		ms := age.Milliseconds()
		v.AgeMS = &ms
		h.Set(HeaderAge, strconv.FormatFloat(age.Seconds(), 'f', 3, 64))
	}
}

// tokenPatience is how long /token waits by default, and at most.
const (
	tokenPatience = time.Minute
	tokenMost     = 10 * time.Minute
)

// tokenAnswer is the body of /token.
type tokenAnswer struct {
	Token  string `json:"token,omitempty"`
	Term   uint64 `json:"term,omitempty"`
	Seq    uint64 `json:"seq,omitempty"`
	Reason string `json:"reason,omitempty"`
}
