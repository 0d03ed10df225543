package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/rogpeppe/go-internal/testscript"

	"dbsupervisor/internal/api"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"dbsupervisor": main, "fakeagent": fakeAgentMain})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Getuid() == 0, nil
			}
			if cond == "docker" {
				return exists("/var/run/docker.sock"), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(e *testscript.Env) error {
			// The configuration that most scripts use; nothing of this machine's.
			e.Setenv("DBSUPERVISOR_CONFIG", e.WorkDir+"/shop.yaml")
			e.Setenv("DOCKER_HOST", "unix://"+e.WorkDir+"/docker.sock")
			for _, d := range []string{"share", "local", "run"} {
				if err := os.Mkdir(e.WorkDir+"/"+d, 0o700); err != nil {
					return err
				}
			}
			return os.WriteFile(e.WorkDir+"/shop.yaml", fmt.Appendf(nil, `cluster: shop
instance: db-1
advertise: 127.0.0.1
share: %[1]s/share
dir: %[1]s/local
run_dir: %[1]s/run
lease: {ttl: 3s}
sync: {min_free: 0}
database:
  engine: postgres
  env:
    POSTGRES_PASSWORD: topsecret
`, e.WorkDir), 0o600)
		},
	})
}

// fakeAgentMain serves a run directory with the status in a file, until it is told to stop.
// `fakeagent wait DIR` waits for one that was started in the background.
func fakeAgentMain() {
	if err := fakeAgent(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func fakeAgent(dir, arg string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if dir == "wait" {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		for {
			_, err := api.NewClient(arg).Status(ctx)
			if err == nil || ctx.Err() != nil {
				return err
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	data, err := os.ReadFile(arg)
	if err != nil {
		return err
	}
	f := &scripted{}
	if err := json.Unmarshal(data, &f.status); err != nil {
		return err
	}
	s, err := api.NewServer(api.ServerConfig{RunDir: dir, Agent: f, Log: hclog.NewNullLogger()})
	if err != nil {
		return err
	}
	if err := s.Run(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// scripted is an agent that says on its standard output what it was asked for.
type scripted struct {
	status   api.Status
	restarts atomic.Int64
}

var errStandby = api.WithHint(fmt.Errorf("sync now: %w", api.ErrNotPrimary), "ask the primary")

func (s *scripted) Live() api.Live { return api.Live{} }

func (s *scripted) Status(context.Context) (api.Status, error) {
	st := s.status
	st.Incarnation = fmt.Sprint("i-", s.restarts.Load())
	return st, nil
}

func (s *scripted) Sync(_ context.Context, report api.Report) (api.SyncResult, error) {
	if s.status.Role != api.RolePrimary {
		return api.SyncResult{}, errStandby
	}
	report(api.Progress{Phase: "shipping", Done: 1, Total: 2})
	return api.SyncResult{ID: "7-94-xy", ChangedBytes: 3 << 20, StoredBytes: 1 << 20, FreezeMS: 8, DurationMS: 400, Skipped: []string{"a.sock"}}, nil
}

func (s *scripted) Switchover(_ context.Context, q api.SwitchoverRequest, _ api.Report) (api.MoveResult, error) {
	fmt.Printf("switchover %+v\n", q)
	return api.MoveResult{Primary: "db-2", Term: 8, DurationMS: 1500, Lossless: true}, nil
}

func (s *scripted) Failover(_ context.Context, q api.FailoverRequest, _ api.Report) (api.MoveResult, error) {
	fmt.Printf("failover %+v\n", q)
	return api.MoveResult{Primary: "db-2", Term: 8, DurationMS: 11000}, nil
}

func (s *scripted) Pause(_ context.Context, paused bool) error {
	fmt.Println("pause", paused)
	return nil
}

func (s *scripted) Rollback(_ context.Context, q api.RollbackRequest, _ api.Report) (api.RollbackResult, error) {
	fmt.Printf("rollback %+v\n", q)
	return api.RollbackResult{Head: "7-95-zz", From: "7-94-xy"}, nil
}

func (s *scripted) Token(context.Context) (api.Token, error) { return api.Token{Term: 3, Seq: 7}, nil }

func (s *scripted) Restart(context.Context) error {
	s.restarts.Add(1)
	return nil
}

func (s *scripted) History(_ context.Context, n int) ([]api.Event, error) {
	at := time.Date(2026, 1, 31, 14, 5, 0, 0, time.UTC)
	return []api.Event{{At: at, Term: 7, Kind: "acquired", Text: fmt.Sprint("asked for ", n)}}, nil
}

func (s *scripted) Forks(context.Context) ([]api.Fork, error) {
	at := time.Date(2026, 1, 31, 14, 5, 0, 0, time.UTC)
	return []api.Fork{{Name: "f", Path: "/data/forks/f/volume", Reason: "lost the term", At: at, Term: 6, Base: "6-80-aa", ExpiresAt: at.Add(168 * time.Hour)}}, nil
}
