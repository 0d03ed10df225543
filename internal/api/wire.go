package api

import (
	"encoding/json"
	"errors"
)

// The socket speaks HTTP. Reading is GET with one JSON value in the answer. Everything
// else is POST and answered with lines of JSON: any number of progress lines, then one
// with the result or the error.
const (
	pathStatus     = "/v1/status"
	pathHistory    = "/v1/history"
	pathForks      = "/v1/forks"
	pathSync       = "/v1/sync"
	pathSwitchover = "/v1/switchover"
	pathFailover   = "/v1/failover"
	pathPause      = "/v1/pause"
	pathRollback   = "/v1/rollback"
	pathRestart    = "/v1/restart"
)

// line is one line of a streamed answer; exactly one of Progress, Result and Error is set.
type line struct {
	Progress *Progress       `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    string          `json:"error,omitempty"`
	Hint     string          `json:"hint,omitempty"`
	Code     string          `json:"code,omitempty"`
}

func errorLine(err error) line {
	w := toWire(err)
	return line{Error: w.Error, Hint: w.Hint, Code: w.Code}
}

// wireError is an error on its way through the socket.
type wireError struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	Code  string `json:"code,omitempty"`
}

type pauseRequest struct {
	Paused bool `json:"paused"`
}

// coded pairs the errors that keep their identity with their names on the wire.
func coded() map[string]error {
	return map[string]error{
		"not_primary":  ErrNotPrimary,
		"busy":         ErrBusy,
		"no_successor": ErrNoSuccessor,
		"no_snapshot":  ErrNoSnapshot,
	}
}

func toWire(err error) *wireError {
	w := &wireError{Error: err.Error(), Hint: HintOf(err)}
	for code, sentinel := range coded() {
		if errors.Is(err, sentinel) {
			w.Code = code
		}
	}
	return w
}

func (w *wireError) err() error {
	return WithHint(&remoteError{msg: w.Error, is: coded()[w.Code]}, w.Hint)
}

// remoteError has the agent's words and, where there is one, the sentinel behind them.
type remoteError struct {
	msg string
	is  error
}

func (e *remoteError) Error() string { return e.msg }
func (e *remoteError) Unwrap() error { return e.is }
