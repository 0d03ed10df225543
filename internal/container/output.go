package container

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync/atomic"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/pkg/stdcopy"
)

const (
	maxOutput  = 64 << 10 // bytes kept of each stream of a command
	maxLogs    = 1 << 20  // bytes read of a container's log
	maxLogLine = 4 << 10  // bytes kept of one line
)

// Exec runs a command in a running container and waits for it as long as ctx lets it. A
// command that fails is no error, see ExitCode. When ctx ends first, the command is left to
// itself: Docker can't kill it. In a frozen container it fails or hangs until the thaw.
func (d *Docker) Exec(ctx context.Context, id string, cmd []string) (ExecResult, error) {
	// The command's arguments may be secret and are not in the message.
	what := "run command in container " + short(id)
	if len(cmd) == 0 {
		return ExecResult{}, d.fail(ctx, what, ErrInvalidSpec)
	}
	type outcome struct {
		res ExecResult
		err error
	}
	// Docker's client does not honour ctx while it waits for the daemon to take the connection
	// over, which it does not do for a frozen container.
	done := make(chan outcome, 1)
	var taken atomic.Bool
	go func() {
		res, err := d.exec(ctx, id, cmd, &taken)
		done <- outcome{res, err}
	}()
	var o outcome
	select {
	case o = <-done:
	case <-ctx.Done():
		o.err = ctx.Err()
	}
	if o.err != nil && ctx.Err() != nil && taken.Load() {
		// The daemon did answer; it is the command that takes its time.
		return ExecResult{}, fmt.Errorf("%s: it has not ended: %w", what, ctx.Err())
	}
	return o.res, d.fail(ctx, what, o.err)
}

// exec sets taken when the daemon has accepted the command.
func (d *Docker) exec(ctx context.Context, id string, cmd []string, taken *atomic.Bool) (ExecResult, error) {
	e, err := d.cli.ContainerExecCreate(ctx, id, container.ExecOptions{Cmd: cmd, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return ExecResult{}, err
	}
	taken.Store(true)
	conn, err := d.cli.ContainerExecAttach(ctx, e.ID, container.ExecAttachOptions{})
	if err != nil {
		return ExecResult{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, conn.Close)
	defer stop()
	var out, errOut limited
	if _, err := stdcopy.StdCopy(&out, &errOut, conn.Reader); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return ExecResult{}, err
	}
	ins, err := d.cli.ContainerExecInspect(ctx, e.ID)
	if err != nil {
		return ExecResult{}, err
	}
	if ins.Running { // the stream ended before the command: the daemon went away
		return ExecResult{}, io.ErrUnexpectedEOF
	}
	return ExecResult{ExitCode: ins.ExitCode, Stdout: out.String(), Stderr: errOut.String()}, nil
}

// limited keeps the first bytes of what is written and drops the rest.
type limited struct{ bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	l.Buffer.Write(b[:min(len(b), max(0, maxOutput-l.Len()))])
	return len(b), nil
}

// LastLogs returns the last n lines of what a container has said on both its streams.
func (d *Docker) LastLogs(ctx context.Context, id string, n int) ([]string, error) {
	if n <= 0 {
		return nil, nil
	}
	ctx, cancel := d.bound(ctx, 0)
	defer cancel()
	what := "read log of container " + short(id)
	body, err := d.cli.ContainerLogs(ctx, id, container.LogsOptions{ShowStdout: true, ShowStderr: true, Tail: strconv.Itoa(n)})
	if err != nil {
		return nil, d.fail(ctx, what, err)
	}
	defer body.Close()
	var b bytes.Buffer
	_, err = stdcopy.StdCopy(&b, &b, io.LimitReader(body, maxLogs))
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, d.fail(ctx, what, err)
	}
	if ctx.Err() != nil {
		return nil, d.fail(ctx, what, ctx.Err())
	}
	var lines []string
	in := bufio.NewReader(&b)
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			line = trimLine(line)
			lines = append(lines, line[:min(len(line), maxLogLine)])
		}
		if err != nil {
			break
		}
	}
	return lines[max(0, len(lines)-n):], nil
}

func trimLine(s string) string {
	for len(s) > 0 && (s[len(s)-1] == '\n' || s[len(s)-1] == '\r') {
		s = s[:len(s)-1]
	}
	return s
}
