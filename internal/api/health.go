package api

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/boottime"
)

// staleBeat is how old the supervisor loop's last round may be before the agent counts as
// hung. It decides only what health checks say; the guard, not this, keeps writers apart.
const staleBeat = 15 * time.Second

// HealthConfig is what NewHealth needs.
type HealthConfig struct {
	Listen   string // ":8008"
	Cluster  string
	Instance string
	Version  string
	Agent    Agent
	Clock    boottime.Clock
	Log      hclog.Logger
	// Database is the port of this machine under which the database is reached; 0: unknown.
	Database int
	// Reads is the port for reading, where there is a replica; 0: none, or unknown.
	Reads int
	// Proxies are served at /proxy; nil: none are.
	Proxies *Proxies
}

// Health is the read-only HTTP server for load balancers and Prometheus. The paths have
// the meanings that Patroni gave them.
type Health struct {
	cfg      HealthConfig
	listener net.Listener
}

// NewHealth starts to listen, so that an address that is taken is found out at the start.
// Close must be called unless Run was.
func NewHealth(cfg HealthConfig) (*Health, error) {
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, WithHint(fmt.Errorf("listen for health checks: %w", err), "another program uses the port: change http.listen")
	}
	return &Health{cfg: cfg, listener: l}, nil
}

// Addr is where it listens.
func (h *Health) Addr() net.Addr { return h.listener.Addr() }

// Close stops listening. It is idempotent.
func (h *Health) Close() error {
	_ = h.listener.Close() // the only error is that it was closed already
	return nil
}

// Run serves until ctx ends.
func (h *Health) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           h.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    1 << 14,
		ErrorLog:          h.cfg.Log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	if h.cfg.Proxies != nil {
		go h.cfg.Proxies.watch(ctx, h.proxyEvent)
	}
	return serve(ctx, srv, h.listener, h.Close)
}

// verdict is the small body of every answer.
type verdict struct {
	OK       bool   `json:"ok"`
	Role     Role   `json:"role"`
	Term     uint64 `json:"term"`
	Cluster  string `json:"cluster"`
	Instance string `json:"instance"`
	LeaseMS  *int64 `json:"lease_ms,omitempty"` // left until the deadline
	Port     int    `json:"port,omitempty"`     // of the database on this machine
	ReadPort int    `json:"read_port,omitempty"`
	Reason   string `json:"reason,omitempty"` // why it is not OK
	// What is served to readers, on an instance that serves reads.
	Snapshot string `json:"snapshot,omitempty"`
	Token    string `json:"token,omitempty"`
	AgeMS    *int64 `json:"age_ms,omitempty"` // an upper bound
}

// Handler is what Run serves.
func (h *Health) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, p := range []string{"/{$}", "/primary", "/master", "/leader", "/read-write"} {
		mux.HandleFunc(p, h.answer(h.primary))
	}
	mux.HandleFunc("/replica", h.readers(h.replica))
	mux.HandleFunc("/read-only", h.readers(func(l Live, w wishes, now boottime.Instant) string {
		if h.primary(l, now) == "" {
			return "" // there is nothing newer
		}
		return h.replica(l, w, now)
	}))
	mux.HandleFunc("GET /token", h.token)
	mux.HandleFunc("/health", h.answer(h.health))
	mux.HandleFunc("/readiness", h.answer(h.health))
	mux.HandleFunc("/liveness", h.answer(h.alive))
	mux.Handle("GET /metrics", metricsHandler(h.cfg))
	if h.cfg.Proxies != nil {
		mux.Handle("GET /proxy", h.cfg.Proxies)
	}
	return mux
}

// answer turns a question, which returns why not ("" for yes), into a handler. It works
// for GET, HEAD and OPTIONS, which load balancers use, and for nothing that could write.
func (h *Health) answer(why func(Live, boottime.Instant) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodGet, http.MethodHead, http.MethodOptions:
		default:
			w.Header().Set("Allow", "GET, HEAD, OPTIONS")
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		// The clock is read after the state: what it says can only be older than now.
		l := h.cfg.Agent.Live()
		now := h.cfg.Clock.Now()
		v := verdict{Role: l.Role, Term: l.Term, Cluster: h.cfg.Cluster, Instance: h.cfg.Instance, Port: h.cfg.Database, ReadPort: h.cfg.Reads, Reason: why(l, now)}
		v.OK = v.Reason == ""
		if l.Role == RoleStandby {
			l.Replica.tell(w.Header(), &v, now)
		}
		if l.Deadline > now {
			ms := l.Deadline.Sub(now).Milliseconds()
			v.LeaseMS = &ms
		}
		w.Header().Set("Cache-Control", "no-store")
		code := http.StatusOK
		if !v.OK {
			code = http.StatusServiceUnavailable
		}
		writeJSON(w, code, v)
	}
}

// primary: yes only while the term is live at this very moment and the database answers.
func (h *Health) primary(l Live, now boottime.Instant) string {
	switch {
	case l.Role != RolePrimary:
		return "not the primary"
	case l.Deadline <= now:
		return "the lease is over"
	case !l.DatabaseAnswers:
		return "the database does not answer"
	}
	return ""
}

func (h *Health) replica(l Live, w wishes, now boottime.Instant) string {
	switch {
	case l.Role != RoleStandby:
		return "not a standby"
	case l.NoLoadBalance:
		return "load balancers shall not use this instance (replica.noloadbalance)"
	case !l.ServesReads:
		return "no reads are served here"
	}
	return w.refuses(l.Replica, now)
}

// readers is answer for questions that a reader's wishes belong to.
func (h *Health) readers(why func(Live, wishes, boottime.Instant) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		wish, err := wishesOf(r)
		if err != nil {
			writeJSON(w, http.StatusBadRequest, verdict{Cluster: h.cfg.Cluster, Instance: h.cfg.Instance, Reason: err.Error()})
			return
		}
		h.answer(func(l Live, now boottime.Instant) string { return why(l, wish, now) })(w, r)
	}
}

// token answers, after the next snapshot, with what a replica must have to show everything that
// was acknowledged before the question. It makes no snapshot come earlier: ?wait=30s bounds
// the time, 503 says that it was too short or that this is not the primary.
func (h *Health) token(w http.ResponseWriter, r *http.Request) {
	wait := tokenPatience
	if text := r.URL.Query().Get("wait"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			writeJSON(w, http.StatusBadRequest, tokenAnswer{Reason: fmt.Sprintf("wait %q is no duration; write 30s", text)})
			return
		}
		wait = min(d, tokenMost)
	}
	// The server's own limit is for quick answers.
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(wait + 10*time.Second)); err != nil {
		h.cfg.Log.Debug("deadline of an answer not set", "error", err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	defer cancel()
	w.Header().Set("Cache-Control", "no-store")
	t, err := h.cfg.Agent.Token(ctx)
	if err != nil {
		writeJSON(w, http.StatusServiceUnavailable, tokenAnswer{Reason: err.Error()})
		return
	}
	w.Header().Set(HeaderToken, t.String())
	writeJSON(w, http.StatusOK, tokenAnswer{Token: t.String(), Term: t.Term, Seq: t.Seq})
}

// alive: the supervisor's loop goes round.
func (h *Health) alive(l Live, now boottime.Instant) string {
	if l.Beat != 0 && now.Sub(l.Beat) > staleBeat {
		return "the agent's loop has been stuck for " + now.Sub(l.Beat).Truncate(time.Second).String()
	}
	return ""
}

// health: the duty of the role is fulfilled.
func (h *Health) health(l Live, now boottime.Instant) string {
	if why := h.alive(l, now); why != "" {
		return why
	}
	if l.Failing != "" {
		return l.Failing
	}
	switch l.Role {
	case RolePrimary:
		return h.primary(l, now)
	case RoleStandby:
		return ""
	}
	return "the agent is neither primary nor standby"
}

// proxyEvent is what proxies are told. A primary that hands off goes on taking connections
// until it announces that it stops (ProxyEvent.Hold).
func (h *Health) proxyEvent() ProxyEvent {
	l := h.cfg.Agent.Live()
	now := h.cfg.Clock.Now()
	serves := l.Role == RolePrimary || l.Role == RoleHandoff
	return ProxyEvent{Cluster: h.cfg.Cluster, Instance: h.cfg.Instance, Role: l.Role, Term: l.Term, Port: h.cfg.Database,
		Primary: serves && l.Deadline > now && l.DatabaseAnswers}
}
