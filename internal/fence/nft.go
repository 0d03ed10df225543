package fence

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"
)

const (
	nftTimeout = 5 * time.Second // of one nft call when ctx allows longer
	// nftKillWait is how long a killed nft may hold our pipes open.
	nftKillWait = 500 * time.Millisecond
)

// nftCommand runs the nft command, one call at a time.
type nftCommand struct {
	argv []string
	mu   sync.Mutex
}

// run runs the command; with a script, it is made when nft already waits for it.
func (n *nftCommand) run(ctx context.Context, script func() (string, error), args ...string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	argv := append([]string(nil), n.argv...)
	if script != nil {
		argv = append(argv, "-f", "-")
	}
	argv = append(argv, args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = nftKillWait
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", fmt.Errorf("run nft: %w", err)
	}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			err = ErrNoNFT
		}
		return "", fmt.Errorf("run nft: %w", err)
	}
	var serr error
	if script != nil {
		var text string
		if text, serr = script(); serr == nil {
			_, serr = io.WriteString(stdin, text)
		} else {
			cancel() // an empty script would be a success
		}
	}
	_ = stdin.Close() // nft's exit code tells whether it got everything
	err = cmd.Wait()
	switch {
	case serr != nil && err == nil, errors.Is(serr, ErrTooLate):
		return "", serr
	case err == nil:
		return out.String(), nil
	case ctx.Err() != nil:
		return "", fmt.Errorf("run nft: no answer: %w", ctx.Err())
	}
	msg := strings.TrimSpace(errOut.String())
	first, _, _ := strings.Cut(msg, "\n")
	if strings.Contains(msg, "Operation not permitted") || strings.Contains(msg, "netlink: Error: cache initialization failed") {
		return "", fmt.Errorf("run nft: %s: %w", first, ErrNoNFT)
	}
	return "", &nftError{msg: msg, err: err}
}

// nftError is a script that nft or the kernel refused.
type nftError struct {
	msg string
	err error
}

func (e *nftError) Error() string {
	return fmt.Sprintf("run nft: %s (%v)", strings.Join(strings.Fields(e.msg), " "), e.err)
}

func (e *nftError) Unwrap() error { return e.err }

// isMissing says that the table or set is not there.
func isMissing(err error) bool {
	var e *nftError
	return errors.As(err, &e) && strings.Contains(e.msg, "No such file or directory")
}
