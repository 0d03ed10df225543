package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

// start serves agent on a socket of its own and returns its run directory.
func start(t *testing.T, a Agent, allow func(uint32) bool) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	s, err := NewServer(ServerConfig{RunDir: dir, Agent: a, Log: hclog.NewNullLogger(), Allow: allow})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v", err)
		}
	})
	return dir
}

func TestSocketIsForRootOnly(t *testing.T) {
	dir := start(t, &fakeAgent{}, nil)
	for path, want := range map[string]os.FileMode{dir: 0o700, SocketPath(dir): 0o600} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", path, st.Mode().Perm(), want)
		}
	}
}

func TestPeerIsChecked(t *testing.T) {
	var asked uint32 = 1 << 31
	a := &fakeAgent{}
	dir := start(t, a, func(uid uint32) bool { asked = uid; return false })
	_, err := NewClient(dir).Status(t.Context())
	if err == nil || HintOf(err) != "run as root" {
		t.Errorf("err = %v, hint %q", err, HintOf(err))
	}
	if err := NewClient(dir).Pause(t.Context(), true); err == nil {
		t.Error("a user who is not allowed could write")
	}
	if asked != uint32(os.Geteuid()) { //nolint:gosec // user IDs are unsigned
		t.Errorf("asked for user %d", asked)
	}
	if a.calls != nil {
		t.Errorf("the agent was called: %v", a.calls)
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	dir := t.TempDir()
	cfg := ServerConfig{RunDir: dir, Agent: &fakeAgent{}, Log: hclog.NewNullLogger()}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewServer(cfg); !errors.Is(err, ErrRunning) || HintOf(err) == "" {
		t.Errorf("second agent: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// What a killed agent leaves behind must not keep its successor out.
	if err := os.WriteFile(SocketPath(dir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err = NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestNoAgent(t *testing.T) {
	dir := t.TempDir()
	check := func(when string) {
		t.Helper()
		if _, err := NewClient(dir).Status(t.Context()); !errors.Is(err, ErrNoAgent) || HintOf(err) == "" {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("no socket")
	l, err := net.Listen("unix", SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	check("socket left behind")
}

func TestEveryCallArrives(t *testing.T) {
	window := 12.5
	a := &fakeAgent{status: Status{Role: RolePrimary, Term: 3, LossWindowSeconds: &window}}
	c := NewClient(start(t, a, nil))
	ctx := t.Context()
	var got []any
	add := func(v any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, v)
	}
	s, err := c.Status(ctx)
	add(fmt.Sprint(s.Role, " ", s.Term, " ", *s.LossWindowSeconds, " ", s.LastCommit), err)
	h, err := c.History(ctx, 7)
	add(h, err)
	f, err := c.Forks(ctx)
	add(f, err)
	sy, err := c.Sync(ctx, nil)
	add(sy, err)
	m, err := c.Switchover(ctx, SwitchoverRequest{To: "b"}, nil)
	add(m, err)
	m, err = c.Failover(ctx, FailoverRequest{To: "c", Terminated: true}, nil)
	add(m, err)
	r, err := c.Rollback(ctx, RollbackRequest{Snapshot: "1-2-x"}, nil)
	add(r, err)
	add(nil, c.Pause(ctx, true))
	add(nil, c.Pause(ctx, false))
	add(nil, c.Restart(ctx))
	want := []any{
		"primary 3 12.5 <nil>", []Event{{Kind: "acquired", Term: 7, At: time.Unix(5, 0).UTC()}}, []Fork{{Name: "f1"}},
		SyncResult{ID: "3-7-ab", ChangedBytes: 42}, MoveResult{Primary: "b", Term: 4, Lossless: true}, MoveResult{Primary: "c", Term: 5},
		RollbackResult{Head: "4-9-cd", From: "1-2-x"}, nil, nil, nil,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("answers\n got %v\nwant %v", got, want)
	}
	calls := []any{
		"status", 7, "forks", "sync", SwitchoverRequest{To: "b"}, FailoverRequest{To: "c", Terminated: true},
		RollbackRequest{Snapshot: "1-2-x"}, true, false, "restart",
	}
	if !reflect.DeepEqual(a.calls, calls) {
		t.Errorf("calls\n got %v\nwant %v", a.calls, calls)
	}
}

// Words, hint and sentinel must come through, from both kinds of answers.
func TestErrorsComeThrough(t *testing.T) {
	for _, sentinel := range coded() {
		a := &fakeAgent{err: WithHint(fmt.Errorf("sync now: %w", sentinel), "do this")}
		c := NewClient(start(t, a, nil))
		_, serr := c.Status(t.Context())
		_, yerr := c.Sync(t.Context(), nil)
		for _, err := range []error{serr, yerr} {
			if !errors.Is(err, sentinel) || err.Error() != "sync now: "+sentinel.Error() || HintOf(err) != "do this" {
				t.Errorf("got %v (hint %q), want %v", err, HintOf(err), sentinel)
			}
		}
	}
	c := NewClient(start(t, &fakeAgent{err: errors.New("plain")}, nil))
	if err := c.Pause(t.Context(), true); err == nil || err.Error() != "plain" || HintOf(err) != "" || errors.Is(err, ErrBusy) {
		t.Errorf("got %v", err)
	}
}

// Progress arrives while the operation runs, the newest at least, and a client that goes
// away ends the operation's context.
func TestProgressAndCancel(t *testing.T) {
	a := &fakeAgent{hold: make(chan struct{}), ended: make(chan error, 1)}
	for i := range 1000 {
		a.progress = append(a.progress, Progress{Phase: "shipping", Done: int64(i + 1), Total: 1000})
	}
	c := NewClient(start(t, a, nil))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen []Progress
	_, err := c.Sync(ctx, func(p Progress) {
		seen = append(seen, p)
		if p.Done == 1000 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
	for i := 1; i < len(seen); i++ {
		if seen[i].Done < seen[i-1].Done {
			t.Errorf("progress went back from %v to %v", seen[i-1], seen[i])
		}
	}
	select {
	case err := <-a.ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the operation was not told that the client went away")
	}

	close(a.hold)
	a.progress = a.progress[:3]
	if _, err := c.Sync(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// A terminal that was stopped (Ctrl-S) must not hold up a snapshot.
func TestSlowClientDoesNotBlockTheAgent(t *testing.T) {
	a := &fakeAgent{progress: make([]Progress, 100_000)}
	for i := range a.progress {
		a.progress[i] = Progress{Phase: strings.Repeat("x", 100), Done: int64(i)}
	}
	c, err := net.Dial("unix", SocketPath(start(t, a, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: agent\r\nContent-Length: 2\r\n\r\n{}", pathSync); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		a.mu.Lock()
		n := len(a.calls)
		a.mu.Unlock()
		if n == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the operation waits for a client that does not read")
		}
	}
}

func TestAgentThatDiesIsReported(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"progress":{"phase":"shipping"}}` + "\n"))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	_, err = NewClient(dir).Sync(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "went away before it answered") || HintOf(err) == "" {
		t.Errorf("err = %v", err)
	}
}
