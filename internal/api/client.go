package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strconv"
	"syscall"
)

// Client talks to a running agent over its socket. It has the methods of Agent except
// Live. Errors keep the agent's words, hints and sentinels; ErrNoAgent says that none runs.
type Client struct {
	http *http.Client
}

// NewClient makes a client for the agent with this run directory. Nothing is opened yet,
// and nothing needs to be closed.
func NewClient(runDir string) *Client {
	path := SocketPath(runDir)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Status asks for the agent's status.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.get(ctx, pathStatus, &s)
}

// History asks for the newest n entries, all for n <= 0; oldest first.
func (c *Client) History(ctx context.Context, n int) (e []Event, err error) {
	return e, c.get(ctx, pathHistory+"?n="+strconv.Itoa(n), &e)
}

// Forks asks what was set aside.
func (c *Client) Forks(ctx context.Context) (f []Fork, err error) {
	return f, c.get(ctx, pathForks, &f)
}

// Sync has a snapshot taken and committed.
func (c *Client) Sync(ctx context.Context, report Report) (res SyncResult, err error) {
	return res, c.post(ctx, pathSync, struct{}{}, &res, report)
}

// Switchover moves the term in a planned way.
func (c *Client) Switchover(ctx context.Context, req SwitchoverRequest, report Report) (res MoveResult, err error) {
	return res, c.post(ctx, pathSwitchover, req, &res, report)
}

// Failover moves the term by force.
func (c *Client) Failover(ctx context.Context, req FailoverRequest, report Report) (res MoveResult, err error) {
	return res, c.post(ctx, pathFailover, req, &res, report)
}

// Rollback goes back to an older snapshot.
func (c *Client) Rollback(ctx context.Context, req RollbackRequest, report Report) (res RollbackResult, err error) {
	return res, c.post(ctx, pathRollback, req, &res, report)
}

// Pause switches automatic failover off or on.
func (c *Client) Pause(ctx context.Context, paused bool) error {
	return c.post(ctx, pathPause, pauseRequest{Paused: paused}, nil, nil)
}

// Restart ends the agent and leaves the database alone.
func (c *Client) Restart(ctx context.Context) error {
	return c.post(ctx, pathRestart, struct{}{}, nil, nil)
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		return fmt.Errorf("read agent's answer: %w", err)
	}
	return nil
}

func (c *Client) post(ctx context.Context, path string, req, into any, report Report) error {
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return fmt.Errorf("read agent's answer: %w", err)
		}
		switch {
		case l.Error != "":
			w := wireError{Error: l.Error, Hint: l.Hint, Code: l.Code}
			return w.err()
		case l.Result != nil:
			if into == nil {
				return nil
			}
			if err := json.Unmarshal(l.Result, into); err != nil {
				return fmt.Errorf("read agent's answer: %w", err)
			}
			return nil
		case l.Progress != nil && report != nil:
			report(*l.Progress)
		}
	}
	err = sc.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return WithHint(fmt.Errorf("wait for agent: it went away before it answered: %w", err), "look at what happened with: dbsupervisor status, and at the agent's log")
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, WithHint(fmt.Errorf("talk to agent: %w", fs.ErrPermission), "run as root")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, WithHint(fmt.Errorf("talk to agent: %w", ErrNoAgent), "start it with: systemctl start dbsupervisor@CLUSTER")
	case err != nil:
		return nil, fmt.Errorf("talk to agent: %w", err)
	case resp.StatusCode == http.StatusOK:
		return resp, nil
	}
	defer resp.Body.Close()
	var w wireError
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxRequest)).Decode(&w); err != nil || w.Error == "" {
		w.Error = "talk to agent: it answered " + resp.Status
		w.Hint = "the agent may be of another version: dbsupervisor agent restart"
	}
	return nil, w.err()
}
