//go:build !modules

package api

import "net/http"

// metricsHandler serves what Prometheus asks for.
func metricsHandler(HealthConfig) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "metrics are not part of this build", http.StatusNotImplemented)
	})
}
