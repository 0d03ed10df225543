package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"
)

// ErrRunning is wrapped when another agent serves the same run directory.
var ErrRunning = errors.New("another agent of this cluster is running on this machine")

// SocketPath is where the agent with this run directory listens.
func SocketPath(runDir string) string { return filepath.Join(runDir, "agent.sock") }

// ServerConfig is what NewServer needs.
type ServerConfig struct {
	RunDir string
	Agent  Agent
	Log    hclog.Logger
	// Allow says which users may connect; nil means root, and the user that the agent
	// itself runs as.
	Allow func(uid uint32) bool
}

// Server answers the command line on the agent's unix socket.
type Server struct {
	cfg      ServerConfig
	lock     *os.File
	listener net.Listener
}

// NewServer claims the run directory and starts to listen; a second agent on the same
// directory gets ErrRunning. Close must be called unless Run was.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Allow == nil {
		own := uint32(os.Geteuid()) //nolint:gosec // user IDs are unsigned in the kernel
		cfg.Allow = func(uid uint32) bool { return uid == 0 || uid == own }
	}
	if err := os.MkdirAll(cfg.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("create run directory: %w", err)
	}
	if err := os.Chmod(cfg.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("protect run directory: %w", err)
	}
	// The lock, not the socket, tells a running agent from a socket that was left behind.
	lock, err := os.OpenFile(filepath.Join(cfg.RunDir, "agent.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, WithHint(fmt.Errorf("lock %s: %w", cfg.RunDir, ErrRunning), "stop it first, or use another run_dir and dir for a second instance")
		}
		return nil, fmt.Errorf("lock run directory: %w", err)
	}
	path := SocketPath(cfg.RunDir)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		_ = lock.Close()
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err == nil {
		// The directory keeps others out until this has happened.
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("listen on agent socket: %w", err)
	}
	return &Server{cfg: cfg, lock: lock, listener: l}, nil
}

// Close stops listening and gives the run directory up. It is idempotent.
func (s *Server) Close() error {
	err := s.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if cerr := s.lock.Close(); err == nil && !errors.Is(cerr, fs.ErrClosed) {
		err = cerr
	}
	return err
}

type uidKey struct{}

// Run serves until ctx ends, then lets requests under way finish for a moment.
func (s *Server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          s.cfg.Log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if uid, err := peer(c); err == nil {
				ctx = context.WithValue(ctx, uidKey{}, uid)
			}
			return ctx
		},
	}
	return serve(ctx, srv, s.listener, s.Close)
}

// serve runs srv until ctx ends. Requests under way get a second to finish.
func serve(ctx context.Context, srv *http.Server, l net.Listener, after func() error) error {
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return errors.Join(fmt.Errorf("serve %s: %w", l.Addr(), err), after())
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		_ = srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return errors.Join(fmt.Errorf("serve %s: %w", l.Addr(), err), after())
	}
	return errors.Join(after(), ctx.Err())
}

// peer asks the kernel who is at the other end.
func peer(c net.Conn) (uint32, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("ask for peer: not a unix socket")
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask for peer: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, cerr); err != nil {
		return 0, fmt.Errorf("ask for peer: %w", err)
	}
	return cred.Uid, nil
}

func (s *Server) handler() http.Handler {
	a := s.cfg.Agent
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, get(func(r *http.Request) (any, error) { return a.Status(r.Context()) }))
	mux.HandleFunc("GET "+pathForks, get(func(r *http.Request) (any, error) { return a.Forks(r.Context()) }))
	mux.HandleFunc("GET "+pathHistory, get(func(r *http.Request) (any, error) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil {
			n = 0
		}
		return a.History(r.Context(), n)
	}))
	mux.HandleFunc("POST "+pathSync, stream(func(ctx context.Context, _ struct{}, rep Report) (any, error) {
		return a.Sync(ctx, rep)
	}))
	mux.HandleFunc("POST "+pathSwitchover, stream(func(ctx context.Context, q SwitchoverRequest, rep Report) (any, error) {
		return a.Switchover(ctx, q, rep)
	}))
	mux.HandleFunc("POST "+pathFailover, stream(func(ctx context.Context, q FailoverRequest, rep Report) (any, error) {
		return a.Failover(ctx, q, rep)
	}))
	mux.HandleFunc("POST "+pathRollback, stream(func(ctx context.Context, q RollbackRequest, rep Report) (any, error) {
		return a.Rollback(ctx, q, rep)
	}))
	mux.HandleFunc("POST "+pathPause, stream(func(ctx context.Context, q pauseRequest, _ Report) (any, error) {
		return struct{}{}, a.Pause(ctx, q.Paused)
	}))
	mux.HandleFunc("POST "+pathRestart, stream(func(ctx context.Context, _ struct{}, _ Report) (any, error) {
		return struct{}{}, a.Restart(ctx)
	}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := r.Context().Value(uidKey{}).(uint32)
		if !ok || !s.cfg.Allow(uid) {
			writeJSON(w, http.StatusForbidden, wireError{Error: "talk to agent: not allowed for this user", Hint: "run as root"})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func get(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			writeJSON(w, http.StatusInternalServerError, toWire(err))
			return
		}
		writeJSON(w, http.StatusOK, v)
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // a client that went away is no error of ours
}

// maxRequest bounds what a request may hold.
const maxRequest = 1 << 16

// stream answers with progress lines and one last line. Progress that the client is too
// slow for is dropped, never queued: only the newest matters.
func stream[Q any](f func(context.Context, Q, Report) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q Q
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&q); err != nil {
			writeJSON(w, http.StatusBadRequest, wireError{Error: "read request: " + err.Error()})
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		w.WriteHeader(http.StatusOK)
		out := &lines{enc: json.NewEncoder(w), flush: http.NewResponseController(w).Flush}
		out.send(line{Progress: &Progress{}}) // the client sees that it was heard
		pending := make(chan Progress, 1)
		var writer sync.WaitGroup
		writer.Go(func() {
			for p := range pending {
				out.send(line{Progress: &p})
			}
		})
		var mu sync.Mutex
		closed := false
		v, err := f(r.Context(), q, func(p Progress) {
			mu.Lock()
			defer mu.Unlock()
			if closed {
				return // the operation left a goroutine behind that still reports
			}
			select {
			case <-pending:
			default:
			}
			pending <- p
		})
		mu.Lock()
		closed = true
		close(pending)
		mu.Unlock()
		writer.Wait()
		if err != nil {
			out.send(errorLine(err))
			return
		}
		raw, err := json.Marshal(v)
		if err != nil {
			out.send(errorLine(fmt.Errorf("encode result: %w", err)))
			return
		}
		out.send(line{Result: raw})
	}
}

// lines writes one JSON value per line and pushes it out at once.
type lines struct {
	enc   *json.Encoder
	flush func() error
}

// send ignores errors: the client went away, and the operation goes on without it.
func (l *lines) send(v line) {
	if l.enc.Encode(v) == nil {
		_ = l.flush()
	}
}
