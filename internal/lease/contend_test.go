package lease_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/lease/history"
	"dbsupervisor/internal/lease/leasetest"
)

const (
	contenderEnv = "LEASE_CONTENDER" // JSON of contender, in the processes that TestContenders starts
	roundsEnv    = "LEASE_ROUNDS"    // how many rounds TestContenders does (default 15)
	contenders   = 16
)

func TestMain(m *testing.M) {
	if s := os.Getenv(contenderEnv); s != "" {
		if err := contend(s, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// contender is what a process of TestContenders is told.
type contender struct {
	Share, ClusterID, Dir, Name string
	Faulty                      bool // replies are lost and requests fail
}

// report is what a contender tells after a round.
type report struct {
	Calls []leasetest.Call
	Terms []uint64 // won in this round
}

// contend is the process: for every line on in it tries to get the lease a few times, uses it
// for a moment, and gives it back.
func contend(config string, in io.Reader, out io.Writer) (err error) {
	var c contender
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	share := newFaultFS(quickFS{})
	if c.Faulty {
		share.set(func(op fsx.Op, _ string) error {
			if op == fsx.OpSymlink && mrand.IntN(2) == 0 {
				return syscall.EIO
			}
			return nil
		}, func(op fsx.Op, _ string, err error) error {
			switch {
			case op != fsx.OpSymlink || err != nil:
			case mrand.IntN(5) == 0:
				return syscall.EIO
			case mrand.IntN(5) == 0:
				return syscall.EEXIST
			}
			return err
		})
	}
	ctx := context.Background()
	reg, err := lease.OpenFile(ctx, lease.FileConfig{FS: share, Share: c.Share, ClusterID: c.ClusterID, Rand: rand.Reader})
	if err != nil {
		return err
	}
	rec := &leasetest.Recorder{Register: reg, Clock: boottime.Real{}}
	l, err := lease.New(lease.Config{
		Register: rec, Clock: boottime.Real{}, Rand: rand.Reader, FS: quickFS{},
		Self: lease.Holder{Instance: c.Name},
		TTL:  10 * time.Minute, RenewInterval: time.Minute, OpTimeout: time.Minute, Margin: time.Second,
		SeenFile: filepath.Join(c.Dir, "seen.json"), RunFile: filepath.Join(c.Dir, "run.json"), BootID: "boot",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	enc := json.NewEncoder(out)
	if err := enc.Encode(report{}); err != nil { // ready
		return err
	}
	for lines := bufio.NewScanner(in); lines.Scan(); {
		var rep report
		for range 3 {
			term, err := try(ctx, l)
			if err != nil {
				return err
			}
			if term > 0 {
				rep.Terms = append(rep.Terms, term)
			}
		}
		rep.Calls = rec.Take()
		if err := enc.Encode(rep); err != nil {
			return err
		}
	}
	return nil
}

// try returns the term that it won, or 0.
func try(ctx context.Context, l *lease.Lease) (uint64, error) {
	if err := l.Refresh(ctx); err != nil {
		return 0, err
	}
	switch err := l.Acquire(ctx, nil); {
	case errors.Is(err, lease.ErrConflict), errors.Is(err, lease.ErrNotYet):
		return 0, nil
	case err != nil:
		return 0, err
	}
	v := l.View()
	if !v.Holding {
		return 0, fmt.Errorf("acquired but not holding: %+v", v)
	}
	if _, err := l.Commit(ctx, v.Record, func(r *lease.Record) {
		seq := uint64(1)
		if r.Head != nil {
			seq = r.Head.Seq + 1
		}
		r.Head = headOf(r.Term, seq)
	}); err != nil {
		return 0, err
	}
	if err := l.Release(ctx, ""); err != nil {
		return 0, err
	}
	return v.Record.Term, nil
}

// TestLinearizabilityChecker shows that the check below can fail.
func TestLinearizabilityChecker(t *testing.T) {
	win := func(nonce string, from, to boottime.Instant) leasetest.Call {
		return leasetest.Call{Swap: true, Prev: 1, PrevNonce: "n", Version: 2, Nonce: nonce, Outcome: "ok", Begin: from, Return: to}
	}
	lost, unknown := win("b", 1, 5), win("b", 1, 5)
	lost.Outcome, unknown.Outcome = "conflict", "unknown"
	load := func(v uint64, nonce string, from boottime.Instant) leasetest.Call {
		return leasetest.Call{Version: v, Nonce: nonce, Outcome: "ok", Begin: from, Return: from + 1}
	}
	for _, c := range []struct {
		name  string
		calls [][]leasetest.Call
		want  porcupine.CheckResult
	}{
		{"one winner", [][]leasetest.Call{{win("a", 1, 5)}, {lost}}, porcupine.Ok},
		{"two winners", [][]leasetest.Call{{win("a", 1, 5)}, {win("b", 1, 5)}}, porcupine.Illegal},
		{"conflict without a winner", [][]leasetest.Call{{lost}}, porcupine.Illegal},
		{"stale load", [][]leasetest.Call{{win("a", 1, 5)}, {load(1, "n", 6)}}, porcupine.Illegal},
		{"unknown took effect late", [][]leasetest.Call{{unknown}, {load(1, "n", 6), load(2, "b", 9)}}, porcupine.Ok},
		{"unknown took no effect", [][]leasetest.Call{{unknown}, {load(1, "n", 6)}, {win("a", 10, 12), load(2, "a", 13)}}, porcupine.Ok},
		{"unknown was undone", [][]leasetest.Call{{unknown}, {load(2, "b", 6), load(1, "n", 9)}}, porcupine.Illegal},
	} {
		if got := leasetest.Linearizable(1, "n", c.calls); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestContenders lets 16 processes fight for a free lease over many rounds, half of them with
// replies that get lost. Every term has one holder, and what the register answered is
// linearizable.
func TestContenders(t *testing.T) {
	rounds := 15
	if s := os.Getenv(roundsEnv); s != "" {
		if _, err := fmt.Sscan(s, &rounds); err != nil {
			t.Fatal(err)
		}
	}
	share := newShare(t, quickFS{})
	reader := mustOpen(t, share)
	first := mustLoad(t, reader)
	exe, err := os.Executable()
	must(t, err)
	type proc struct {
		in  io.WriteCloser
		out *json.Decoder
	}
	var procs []proc
	for i := range contenders {
		config, err := json.Marshal(contender{
			Share: share.Share, ClusterID: share.ClusterID, Dir: t.TempDir(),
			Name: fmt.Sprintf("i%02d", i), Faulty: i%2 == 1,
		})
		must(t, err)
		cmd := exec.Command(exe)
		// The race detector would let every process sleep for a second at its end.
		cmd.Env = append(os.Environ(), contenderEnv+"="+string(config), "GORACE=atexit_sleep_ms=0")
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		must(t, err)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		t.Cleanup(func() {
			_ = in.Close() // also ends it
			if err := cmd.Wait(); err != nil {
				t.Errorf("contender %d: %v", i, err)
			}
		})
		procs = append(procs, proc{in, json.NewDecoder(out)})
	}
	for i, p := range procs {
		if err := p.out.Decode(&report{}); err != nil {
			t.Fatalf("contender %d does not start: %v", i, err)
		}
	}
	calls := make([][]leasetest.Call, contenders)
	winner := map[uint64]int{}
	records := map[uint64]lease.Record{}
	unknown := 0
	for range rounds {
		for i, p := range procs {
			if _, err := io.WriteString(p.in, "go\n"); err != nil {
				t.Fatalf("contender %d: %v", i, err)
			}
		}
		for i, p := range procs {
			var rep report
			if err := p.out.Decode(&rep); err != nil {
				t.Fatalf("contender %d: %v", i, err)
			}
			calls[i] = append(calls[i], rep.Calls...)
			for _, c := range rep.Calls {
				if c.Outcome == "unknown" {
					unknown++
				}
			}
			for _, term := range rep.Terms {
				if other, taken := winner[term]; taken {
					t.Errorf("term %d has the holders %d and %d", term, other, i)
				}
				winner[term] = i
			}
		}
		recs, err := reader.History(testContext(t))
		must(t, err)
		for _, r := range recs {
			records[r.Version] = r
		}
	}
	last := mustLoad(t, reader)
	if uint64(len(winner)) != last.Term || last.Term < uint64(rounds) {
		t.Errorf("%d terms were won, the register says %d", len(winner), last.Term)
	}
	var all []lease.Record
	for v := uint64(1); v <= last.Version; v++ {
		if r, ok := records[v]; ok {
			all = append(all, r)
		}
	}
	if len(all) != int(last.Version) {
		t.Errorf("%d records of %d were seen", len(all), last.Version)
	}
	if bad := history.Check(all); len(bad) > 0 {
		t.Errorf("history: %v", bad)
	}
	n := 0
	for _, c := range calls {
		n += len(c)
	}
	if res := leasetest.Linearizable(first.Version, first.Nonce, calls); res != porcupine.Ok {
		t.Errorf("%d calls are not linearizable: %v", n, res)
	}
	t.Logf("%d terms, %d calls, %d of unknown outcome", last.Term, n, unknown)
	if unknown == 0 {
		t.Error("no outcome was unknown: the faults do not work")
	}
}
