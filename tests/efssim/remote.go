package efssim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// request and reply are one line of JSON each on the control socket.
type request struct {
	Cmd   string `json:"cmd"` // inject, heal, stats, pace, forget, unmount
	Fault Fault  `json:"fault,omitzero"`
	Pace  Pace   `json:"pace,omitzero"`
}

type reply struct {
	Error string `json:"error,omitempty"`
	Stats Stats  `json:"stats,omitzero"`
}

// ServeConfig is what a serving process is told.
type ServeConfig struct {
	Backing    string  `json:"backing"`
	Mountpoint string  `json:"mountpoint"`
	Control    string  `json:"control"` // path of the unix socket
	Options    Options `json:"options,omitzero"`
	// Life ends the server when it is at its end: the pipe to the parent. May be nil.
	Life io.Reader `json:"-"`
}

// Serve mounts and serves until the context ends, Life ends or the file system is
// unmounted. It writes one line to ready (may be nil) when all is in place.
func Serve(ctx context.Context, cfg ServeConfig, ready io.Writer) (err error) {
	s, err := Mount(cfg.Backing, cfg.Mountpoint, cfg.Options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Unmount()) }()
	// A socket's path is bounded at about 100 bytes; the caller chose a short one.
	l, err := net.Listen("unix", cfg.Control)
	if err != nil {
		return fmt.Errorf("listen on control socket: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { _ = l.Close() }() // ends the accept loop; also after an error there
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serveControl(ctx, c, s) })
		}
	})
	ended := make(chan struct{})
	if cfg.Life != nil {
		// Not waited for: the read returns only when the other end is closed.
		go func() {
			_, _ = io.Copy(io.Discard, cfg.Life)
			close(ended)
		}()
	}
	if ready != nil {
		if _, err := fmt.Fprintln(ready, "ready"); err != nil {
			return fmt.Errorf("report ready: %w", err)
		}
	}
	select {
	case <-ctx.Done():
	case <-ended:
	case <-s.Done():
	}
	cancel()
	return nil
}

func serveControl(ctx context.Context, c net.Conn, s *Share) {
	stop := context.AfterFunc(ctx, func() {
		// A moment for the answer to an unmount that is just being written.
		_ = c.SetDeadline(time.Now().Add(time.Second))
	})
	defer stop()
	defer func() { _ = c.Close() }()
	in, out := json.NewDecoder(c), json.NewEncoder(c)
	for {
		var r request
		if in.Decode(&r) != nil {
			return // the client went away
		}
		a, err := s.handle(r)
		if err != nil {
			a.Error = err.Error()
		}
		if out.Encode(a) != nil {
			return
		}
	}
}

// Remote is a mounted file system that another process serves.
type Remote struct {
	Controls
	cmd  *exec.Cmd // nil when only connected to
	life io.Closer
	exit chan struct{}
	dir  string
	once sync.Once
	err  error
}

// Dial connects to the control socket of a serving process. It does not end with the
// Remote; Close is not needed.
func Dial(control string) *Remote {
	r := &Remote{}
	r.Controls = Controls{do: func(q request) (reply, error) { return call(control, q) }}
	return r
}

func call(control string, q request) (a reply, err error) {
	c, err := net.DialTimeout("unix", control, 5*time.Second)
	if q.Cmd == "unmount" && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)) {
		return a, nil // the server ended, and took the mount along
	}
	if err != nil {
		return a, fmt.Errorf("reach share server: %w", err)
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return a, fmt.Errorf("reach share server: %w", err)
	}
	if err := json.NewEncoder(c).Encode(q); err != nil {
		return a, fmt.Errorf("ask share server: %w", err)
	}
	if err := json.NewDecoder(c).Decode(&a); err != nil {
		return a, fmt.Errorf("ask share server: %w", err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// serveEnv tells a process started by Spawn what to serve.
const serveEnv = "DBSUPERVISOR_TEST_SHARE"

// Spawn mounts backing at mountpoint, served by a process of its own: another start of this
// program, which must call ServeIfAsked before anything else (a test in its TestMain). The
// server ends with this process at the latest, however that ends. The caller calls Close.
func Spawn(backing, mountpoint string) (*Remote, error) {
	return SpawnWith(backing, mountpoint, Options{})
}

// SpawnWith is Spawn for a share that is more like EFS.
func SpawnWith(backing, mountpoint string, o Options) (*Remote, error) {
	if os.Getenv(serveEnv) != "" {
		return nil, errors.New("spawn share server: this is one; does TestMain call ServeIfAsked?")
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	dir, err := os.MkdirTemp("", "share")
	if err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	r := Dial(filepath.Join(dir, "control"))
	r.dir = dir
	r.exit = make(chan struct{})
	cfg, err := json.Marshal(ServeConfig{Backing: backing, Mountpoint: mountpoint, Control: filepath.Join(dir, "control"), Options: o})
	if err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	r.cmd = exec.Command(self)
	// The race detector would sleep for a second at every exit.
	r.cmd.Env = append(os.Environ(), serveEnv+"="+string(cfg), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	r.cmd.Stderr = os.Stderr
	in, err := r.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	r.life = in
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("spawn share server: %w", err)
	}
	ready := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n') // "" when it ended before
		ready <- line
		// Nothing more is said; reading to the end must precede Wait.
		_, _ = io.Copy(io.Discard, out)
		r.err = r.cmd.Wait()
		close(r.exit)
	}()
	select {
	case line := <-ready:
		if line != "ready\n" {
			return nil, errors.Join(errors.New("spawn share server: it did not start"), r.Close())
		}
	case <-time.After(20 * time.Second):
		return nil, errors.Join(errors.New("spawn share server: no answer"), r.Close())
	}
	return r, nil
}

// Pid is the serving process's; killing it leaves a dead mount, as a crashed client does.
func (r *Remote) Pid() int {
	if r.cmd == nil {
		return 0
	}
	return r.cmd.Process.Pid
}

// Close unmounts and waits for the serving process. Closing twice is no error.
func (r *Remote) Close() error {
	if r.cmd == nil {
		return nil
	}
	var err error
	r.once.Do(func() {
		_ = r.life.Close() // the server unmounts and ends
		select {
		case <-r.exit:
			err = r.err
		case <-time.After(30 * time.Second):
			_ = r.cmd.Process.Kill()
			<-r.exit
			err = errors.New("share server did not end")
		}
		err = errors.Join(err, os.RemoveAll(r.dir))
	})
	return err
}

// ServeIfAsked serves if Spawn started this process. It then returns the exit code and true:
//
//	if code, ok := efssim.ServeIfAsked(); ok {
//		os.Exit(code)
//	}
func ServeIfAsked() (code int, asked bool) {
	text := os.Getenv(serveEnv)
	if text == "" {
		return 0, false
	}
	var cfg ServeConfig
	err := json.Unmarshal([]byte(text), &cfg)
	if err == nil {
		cfg.Life = os.Stdin
		err = Serve(context.Background(), cfg, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "share server:", err)
		return 1, true
	}
	return 0, true
}
