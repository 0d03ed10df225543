package replica

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
)

// token asks the primary for a token.
func token(t *testing.T, i *cluster.Instance) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/token?wait=30s", i.HTTP), nil)
	must(t, err)
	res, err := http.DefaultClient.Do(req)
	must(t, err)
	defer res.Body.Close()
	var v struct{ Token, Reason string }
	must(t, json.NewDecoder(res.Body).Decode(&v))
	if res.StatusCode != http.StatusOK || v.Token == "" {
		t.Fatalf("no token: %s %+v", res.Status, v)
	}
	return v.Token
}

// age is what /replica says, -1 if it doesn't.
func age(ctx context.Context, i *cluster.Instance) time.Duration {
	v, err := i.AskReplica(ctx, "")
	if err != nil || v.AgeMS == nil {
		return -1
	}
	return time.Duration(*v.AgeMS) * time.Millisecond
}

// What a replica says of its age, and what a reader can ask of it, through the faults that must
// not disturb reads: the agent killed, the primary silent, a copy that does not start, and the
// takeover.
func TestReplicaLife(t *testing.T) {
	t.Parallel()
	c, p, s := start(t, "  interval: 1s\n  drain: 5s\n")
	write(t, p, "create table counter (n bigint)")
	t.Run("read your writes", func(t *testing.T) { readYourWrites(t, p, s) })
	t.Run("age", func(t *testing.T) { ageIsTrue(t, p, s) })
	r := startReaders(t, s, "127.0.0.1")
	t.Run("agent killed", func(t *testing.T) { agentKilled(t, p, s) })
	t.Run("never ready", func(t *testing.T) { neverReady(t, p, s) })
	t.Run("primary silent", func(t *testing.T) { primarySilent(t, c, p, s, r) })
	t.Run("takeover", func(t *testing.T) { takeover(t, c, p, s) })
}

func readYourWrites(t *testing.T, p, s *cluster.Instance) {
	ctx := t.Context()
	for n := range 2 {
		write(t, p, "insert into counter values ($1)", 100+n)
		tok := token(t, p)
		yes := false
		within(t, time.Minute, "a replica that has the write", func() bool {
			v, err := s.AskReplica(ctx, "at_least="+tok)
			yes = err == nil && v.OK
			return yes
		})
		if got, err := ask(ctx, s, "select count(*)::int from counter where n >= 100"); err != nil || got != n+1 {
			t.Errorf("after the token %s the replica has %d of %d rows, %v", tok, got, n+1, err)
		}
	}
	if v, err := s.AskReplica(ctx, "at_least=1.999999"); err != nil || v.OK || !strings.Contains(v.Reason, "before") {
		t.Errorf("a snapshot that will be: %+v, %v", v, err)
	}
	if _, err := s.AskReplica(ctx, "max_age=x"); err != nil {
		t.Errorf("bad wishes: %v", err)
	}
	if p.Is(ctx, "replica") || !p.Is(ctx, "read-only") {
		t.Error("the primary calls itself a replica, or not readable")
	}
}

// ageIsTrue compares the age that is claimed with the data: this machine's clock is the
// primary's and the replica's, so that the truth is known here.
func ageIsTrue(t *testing.T, p, s *cluster.Instance) {
	ctx := t.Context()
	write(t, p, "create table clock (at timestamptz)")
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	conn := connect(t, p.URL())
	var gap, wrote atomic.Int64 // the longest time between two rows, and when the last one was written
	began := time.Now()
	written := make(chan struct{})
	go func() {
		defer close(written)
		for last := time.Now(); wctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			if _, err := conn.Exec(wctx, "insert into clock values (clock_timestamp())"); err == nil {
				now := time.Now()
				gap.Store(max(gap.Load(), int64(now.Sub(last))))
				last = now
				wrote.Store(int64(now.Sub(began)))
			}
		}
	}()
	within(t, time.Minute, "an age that is known", func() bool {
		n, err := ask(ctx, s, "select count(*)::int from clock")
		return err == nil && n > 0 && age(ctx, s) > 0
	})
	least, most := time.Hour, time.Duration(0)
	for range 40 {
		asked := time.Now()
		claimed := age(ctx, s)
		newest, err := ask(ctx, s, "select (extract(epoch from clock_timestamp() - max(at)) * 1000)::int from clock")
		if claimed < 0 || err != nil {
			t.Fatalf("age %s, %v", claimed, err)
		}
		least, most = min(least, claimed), max(most, claimed)
		// A copy may have been replaced between the two questions: then the data are younger. Else
		// what was claimed covers the newest row, the time between two rows, and between the
		// questions.
		real := time.Duration(newest) * time.Millisecond
		pause := max(time.Duration(gap.Load()), time.Since(began)-time.Duration(wrote.Load()))
		if most := claimed + time.Since(asked) + pause; real > most {
			t.Errorf("claims to be at most %s old (%s with what it can't know), and the newest row is %s old", claimed, most, real)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("claimed age from %s to %s", least, most)
	if v, err := s.AskReplica(ctx, "max_age=1ms"); err != nil || v.OK {
		t.Errorf("younger than can be: %+v, %v", v, err)
	}
	if v, err := s.AskReplica(ctx, "max_age=1h"); err != nil || !v.OK {
		t.Errorf("older than it is: %+v, %v", v, err)
	}
	// An idle database does not age: the primary says "clean as of".
	stop()
	<-written
	within(t, 30*time.Second, "a replica at head", func() bool {
		st, err := s.Status(ctx)
		return err == nil && st.Replica != nil && st.Replica.Serving != nil && st.Head != nil && st.Replica.Serving.Snapshot == st.Head.ID
	})
	end := time.Now().Add(6 * time.Second)
	for time.Now().Before(end) {
		if a := age(ctx, s); a > 30*time.Second {
			t.Errorf("an idle database's replica is %s old", a)
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("age while idle: %s", age(ctx, s))
}

// agentKilled: the agent dies, also in the middle of a refresh, and reads go on; the next agent
// finds the copies.
func agentKilled(t *testing.T, p, s *cluster.Instance) {
	ctx := t.Context()
	for i, phase := range []string{"copying", "starting", ""} {
		write(t, p, "insert into counter values ($1)", 1000+i)
		r := startReaders(t, s, "127.0.0.1")
		if phase != "" {
			within(t, time.Minute, "a refresh under way", func() bool {
				write(t, p, "insert into counter values (0)")
				st, err := s.Status(ctx)
				return err == nil && st.Replica != nil && strings.HasPrefix(st.Replica.Phase, phase)
			})
		}
		before := age(ctx, s)
		must(t, s.SignalAgent(syscall.SIGKILL))
		_ = s.WaitAgent(ctx) // its status says that it was killed
		must(t, s.StartAgent())
		within(t, time.Minute, "the replica after the agent's restart", func() bool { return s.Is(ctx, "replica") })
		after := age(ctx, s)
		within(t, time.Minute, "a refresh after it", func() bool { return refreshes(ctx, s) > 0 || refreshedBy(ctx, p, s) })
		if fails := r.end(); len(fails) > 0 {
			t.Errorf("killed while %q: %d reads failed, the first: %v", phase, len(fails), fails[0])
		}
		t.Logf("killed while %q: age before %s, after %s", phase, before, after)
		copies, err := s.Copies(ctx)
		must(t, err)
		if len(copies) > 2 {
			t.Errorf("%d copies run", len(copies))
		}
	}
}

// refreshedBy writes something, so that there is a reason to refresh.
func refreshedBy(ctx context.Context, p, s *cluster.Instance) bool {
	conn, err := p.Connect(ctx)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close(ctx) }()
	_, _ = conn.Exec(ctx, "insert into counter values (0)")
	return refreshes(ctx, s) > 0
}

// neverReady: new copies don't start; the old one goes on and there is an alarm.
func neverReady(t *testing.T, p, s *cluster.Instance) {
	ctx := t.Context()
	r := startReaders(t, s, "127.0.0.1")
	// A line that the server does not understand, in a file of the snapshot.
	write(t, p, "copy (select 'no_such_setting_anywhere = 1') to program 'cat >> $PGDATA/postgresql.auto.conf'")
	within(t, time.Minute, "an alarm", func() bool {
		st, err := s.Status(ctx)
		return err == nil && strings.Contains(strings.Join(st.Degraded, " "), "replica can't be refreshed")
	})
	if !s.Is(ctx, "replica") {
		t.Error("the old copy does not serve any more")
	}
	write(t, p, "copy (select 1) to program 'sed -i /no_such_setting/d $PGDATA/postgresql.auto.conf'")
	within(t, 2*time.Minute, "a refresh after that", func() bool {
		st, err := s.Status(ctx)
		return err == nil && st.Replica != nil && st.Replica.ConsecutiveFailures == 0 && st.Replica.Refreshes > 0
	})
	if fails := r.end(); len(fails) > 0 {
		t.Errorf("%d reads failed, the first: %v", len(fails), fails[0])
	}
}

// primarySilent: nobody renews, and nobody may take over. The replica goes on and gets older.
func primarySilent(t *testing.T, c *cluster.Cluster, p, s *cluster.Instance, r *readers) {
	ctx := t.Context()
	_, err := s.CLI(ctx, "pause")
	must(t, err)
	must(t, p.SignalAgent(syscall.SIGSTOP))
	defer func() { _ = p.SignalAgent(syscall.SIGCONT) }()
	// After its lease: nothing of it is on its way any more.
	time.Sleep(c.TTL)
	first, began := age(ctx, s), time.Now()
	time.Sleep(3 * time.Second)
	grown, passed := age(ctx, s)-first, time.Since(began)
	if first < 0 || grown < passed-time.Second {
		t.Errorf("the age grew by %s in %s of silence", grown, passed)
	}
	if v, err := s.AskReplica(ctx, "max_age=3s"); err != nil || v.OK {
		t.Errorf("after %s of silence: %+v, %v", time.Since(began)+c.TTL, v, err)
	}
	if v, err := s.AskReplica(ctx, ""); err != nil || !v.OK {
		t.Errorf("reads are not served any more: %+v, %v", v, err)
	}
	if fails := r.end(); len(fails) > 0 {
		t.Errorf("%d reads failed, the first: %v", len(fails), fails[0])
	}
	// The primary is back: with its lease over it begins again.
	must(t, p.SignalAgent(syscall.SIGCONT))
	_, err = s.CLI(ctx, "resume")
	must(t, err)
	within(t, 2*time.Minute, "a primary", func() bool { return c.Primary(ctx) != nil })
}

// takeover: the standby becomes primary; its copies end and nothing of them is left.
func takeover(t *testing.T, c *cluster.Cluster, p, s *cluster.Instance) {
	ctx := t.Context()
	if c.Primary(ctx) == s {
		p, s = s, p
	}
	within(t, 2*time.Minute, "a replica on the standby", func() bool { return s.Is(ctx, "replica") })
	if copies, err := p.Copies(ctx); err != nil || len(copies) > 2 {
		t.Errorf("copies on the primary: %v, %v", copies, err)
	}
	write(t, p, "insert into counter values (5000)")
	r := startReaders(t, s, "127.0.0.1")
	if _, err := s.CLI(ctx, "switchover"); err != nil {
		t.Fatal(err)
	}
	if p2, err := c.WaitPrimary(ctx, p); err != nil || p2 != s {
		t.Fatalf("primary is %v, %v", p2, err)
	}
	within(t, time.Minute, "the end of the copies", func() bool {
		copies, err := s.Copies(ctx)
		return err == nil && len(copies) == 0
	})
	if s.Is(ctx, "replica") {
		t.Error("the primary calls itself a replica")
	}
	r.end() // until it closed its port they were served; then not
	write(t, s, "insert into counter values (5001)")
	within(t, time.Minute, "a replica on the former primary", func() bool {
		n, err := ask(ctx, p, readSQL)
		return err == nil && n == 5001
	})
	// The old primary's database and the replica's are told apart.
	if id, err := p.Container(ctx); err != nil || id != "" {
		t.Errorf("a primary's container on the standby: %q, %v", id, err)
	}
	must(t, p.Stop(ctx))
	if copies, err := p.Copies(ctx); err != nil || len(copies) != 0 {
		t.Errorf("after the agent's end: %v, %v", copies, err)
	}
	left, err := os.ReadDir(filepath.Join(p.Dir, "replica"))
	must(t, err)
	for _, e := range left {
		if e.Name() != "spare" {
			t.Errorf("left on the disk: %s", e.Name())
		}
	}
}
