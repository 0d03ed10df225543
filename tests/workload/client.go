package workload

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"dbsupervisor/tests/cluster"
)

// Client runs the engine's client program, in a container that shares this machine's network.
type Client struct {
	e  Engine
	c  *cluster.Cluster
	id string
}

// Start starts the client's container. Close removes it.
func Start(ctx context.Context, e Engine, c *cluster.Cluster) (*Client, error) {
	// With the cluster's label it is swept with the cluster, but it has no instance's.
	out, err := exec.CommandContext(ctx, "docker", "run", "-d", "--network", "host", "--label", "dbsupervisor.cluster="+c.Name,
		"--entrypoint", "sleep", e.Image, "infinity").Output()
	if err != nil {
		return nil, fmt.Errorf("start client: %w", withOutput(err))
	}
	return &Client{e: e, c: c, id: strings.TrimSpace(string(out))}, nil
}

// Close removes the client's container.
func (k *Client) Close() error {
	return exec.CommandContext(context.Background(), "docker", "rm", "-f", "-v", k.id).Run()
}

func (k *Client) program(ctx context.Context, argv []string) *exec.Cmd {
	args := append([]string{"exec", "-i", "-e", k.e.Password, k.id}, argv...)
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), k.e.Password+"="+k.c.Password)
	return cmd
}

// Do runs statements through an instance's write port and returns what the program printed;
// its messages are part of the error.
func (k *Client) Do(ctx context.Context, i *cluster.Instance, statements string) (string, error) {
	return k.run(ctx, k.e.Client(i.Port), statements)
}

func (k *Client) run(ctx context.Context, argv []string, statements string) (string, error) {
	cmd := k.program(ctx, argv)
	cmd.Stdin = strings.NewReader(statements)
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", argv[0], withOutput(err), strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

func withOutput(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}

// Numbers reads what is there.
func (k *Client) Numbers(ctx context.Context, i *cluster.Instance) (map[int64]bool, error) {
	return k.NumbersAt(ctx, i.Port)
}

// Try runs statements through any port of this machine, whatever comes of them, and returns
// what the program said.
func (k *Client) Try(ctx context.Context, port int, statements string) string {
	out, err := k.run(ctx, k.e.Client(port), statements)
	if err != nil {
		out += err.Error()
	}
	return out
}

// NumbersAt reads what is there through any port of this machine.
func (k *Client) NumbersAt(ctx context.Context, port int) (map[int64]bool, error) {
	argv := k.e.Client(port)
	if k.e.Reader != nil {
		argv = k.e.Reader(port)
	}
	out, err := k.run(ctx, argv, k.e.Read)
	if err != nil {
		return nil, err
	}
	have := map[int64]bool{}
	for _, f := range strings.Fields(out) {
		if n, err := strconv.ParseInt(f, 10, 64); err == nil {
			have[n] = true
		}
	}
	return have, nil
}

// Missing returns the acknowledged writes that the database on i does not have.
func (k *Client) Missing(ctx context.Context, i *cluster.Instance, acks []cluster.Ack) ([]cluster.Ack, error) {
	have, err := k.Numbers(ctx, i)
	if err != nil {
		return nil, err
	}
	var missing []cluster.Ack
	for _, a := range acks {
		if !have[a.N] {
			missing = append(missing, a)
		}
	}
	return missing, nil
}

// CheckCopy has the engine's own checker look at a copy of the volume.
func (k *Client) CheckCopy(ctx context.Context, dir string) (string, error) {
	out, err := exec.CommandContext(ctx, "docker", "run", "--rm", "--network", "none", "--label", "dbsupervisor.cluster="+k.c.Name,
		"-v", dir+":"+k.e.DataPath, "-w", k.e.DataPath, "--entrypoint", "bash", k.e.Image, "-euo", "pipefail", "-c", k.e.Check).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("the engine's checker: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Writer writes one number after another to whichever instance is primary. A write whose
// answer was lost is not counted as acknowledged; it may be there all the same.
type Writer struct {
	k    *Client
	stop context.CancelFunc
	done chan struct{}

	mu   sync.Mutex
	acks []cluster.Ack
	last error
}

// StartWriter begins to write, from the number after the given one.
func (k *Client) StartWriter(ctx context.Context, after int64) *Writer {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &Writer{k: k, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for n := after; ctx.Err() == nil; {
			p := k.c.Primary(ctx)
			if p == nil {
				pause(ctx, 50*time.Millisecond)
				continue
			}
			n = w.session(ctx, p, n)
			pause(ctx, 50*time.Millisecond)
		}
	}()
	return w
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// answerTimeout is how long a write may take before its session is given up.
const answerTimeout = 3 * time.Second

// session writes through one connection until something fails. It returns the last number
// that was tried.
func (w *Writer) session(ctx context.Context, on *cluster.Instance, n int64) int64 {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := w.k.program(ctx, w.k.e.Client(on.Port))
	in, err := cmd.StdinPipe()
	if err != nil {
		return w.failed(n, err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return w.failed(n, err)
	}
	if err := cmd.Start(); err != nil {
		return w.failed(n, err)
	}
	defer func() {
		_ = in.Close()
		cancel()
		_ = cmd.Wait()
	}()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			select {
			case lines <- strings.TrimSpace(sc.Text()):
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		n++
		if _, err := io.WriteString(in, w.k.e.Write(n)); err != nil {
			return w.failed(n, err)
		}
		if err := w.answered(ctx, lines, n); err != nil {
			return w.failed(n, err)
		}
		w.mu.Lock()
		w.acks = append(w.acks, cluster.Ack{N: n, At: time.Now(), By: on.Name})
		w.mu.Unlock()
		pause(ctx, time.Millisecond)
	}
}

func (w *Writer) answered(ctx context.Context, lines <-chan string, n int64) error {
	late := time.After(answerTimeout)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				return errors.New("the client program has ended")
			}
			if w.k.e.Acked(line, n) {
				return nil
			}
		case <-late:
			return errors.New("no answer")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (w *Writer) failed(n int64, err error) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = err
	return n
}

// Acks is what has been acknowledged so far.
func (w *Writer) Acks() []cluster.Ack {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]cluster.Ack(nil), w.acks...)
}

// Err is why the last session ended, nil if none did.
func (w *Writer) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// Stop ends the writer and returns what was acknowledged.
func (w *Writer) Stop() []cluster.Ack {
	w.stop()
	<-w.done
	return w.Acks()
}
