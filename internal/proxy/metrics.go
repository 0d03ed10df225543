package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are one proxy's; nothing global.
type metrics struct {
	registry *prometheus.Registry
	relays   *relays

	clients, refused, retries, dialErrors *prometheus.CounterVec
	held                                  *prometheus.GaugeVec
	holdTime                              *prometheus.HistogramVec
	cut                                   prometheus.Counter
	term                                  prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), relays: newRelays()}
	name := func(n, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "dbsupervisor", Subsystem: "proxy", Name: n, Help: help}
	}
	counter := func(n, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts(name(n, help)), append([]string{"listener"}, labels...))
	}
	m.clients = counter("clients_total", "Clients that were accepted.")
	m.refused = counter("refused_total", "Clients that were turned away, or went away while they waited.", "why")
	m.retries = counter("retries_total", "Connections made anew because the database closed the last one without a word.")
	m.dialErrors = counter("dial_errors_total", "Connections that a database did not take.")
	m.held = prometheus.NewGaugeVec(prometheus.GaugeOpts(name("held", "Clients that wait for a database.")), []string{"listener"})
	h := name("hold_seconds", "How long clients waited for a database that did wait.")
	m.holdTime = prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: h.Namespace, Subsystem: h.Subsystem, Name: h.Name, Help: h.Help,
		Buckets: []float64{.01, .1, .5, 1, 2, 5, 10, 20, 60}}, []string{"listener"})
	m.cut = prometheus.NewCounter(prometheus.CounterOpts(name("cut_total", "Connections cut off because the term of their database was over.")))
	m.term = prometheus.NewGauge(prometheus.GaugeOpts(name("primary_term", "Term of the primary that takes connections; 0: none does.")))
	bytes := func(path string, f func() int64) prometheus.Collector {
		o := prometheus.CounterOpts(name("bytes_total", "Bytes moved, through this process or inside of the kernel."))
		o.ConstLabels = prometheus.Labels{"path": path}
		return prometheus.NewCounterFunc(o, func() float64 { return float64(f()) })
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		m.clients, m.refused, m.retries, m.dialErrors, m.held, m.holdTime, m.cut, m.term,
		bytes("copied", m.relays.copied.Load), bytes("spliced", m.relays.spliced.Load))
	return m
}

func (m *metrics) primary(a *agent) {
	if a == nil {
		m.term.Set(0)
		return
	}
	m.term.Set(float64(a.claim.Term))
}

// Health serves /health (200: new clients could be served now), /liveness and /metrics until
// ctx ends, and closes the listener.
func (p *Proxy) Health(ctx context.Context, l net.Listener) error {
	open := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "dbsupervisor", Subsystem: "proxy", Name: "clients", Help: "Clients that are connected."},
		func() float64 { return float64(p.open()) })
	if err := p.metrics.registry.Register(open); err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	mux := http.NewServeMux()
	answer := func(why func() string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			v := struct {
				OK      bool   `json:"ok"`
				Cluster string `json:"cluster"`
				Clients int    `json:"clients"`
				Reason  string `json:"reason,omitempty"`
			}{Cluster: p.cfg.Cluster, Clients: p.open(), Reason: why()}
			v.OK = v.Reason == ""
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Cache-Control", "no-store")
			if !v.OK {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			_ = json.NewEncoder(w).Encode(v) // a client that went away is no error of ours
		}
	}
	mux.HandleFunc("GET /health", answer(p.Ready))
	mux.HandleFunc("GET /liveness", answer(func() string { return "" }))
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.metrics.registry, promhttp.HandlerOpts{}))
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 1 << 14,
		ErrorLog: p.log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health checks: %w", err)
	}
	return nil
}
