package lease

import "context"

// Step lets tests do by hand what Run does at its pace.
func (l *Lease) Step(ctx context.Context) error { return l.step(ctx) }

// Drain waits until no operation runs or hangs any more.
func (r *FileRegister) Drain() {
	for range cap(r.workers) {
		r.workers <- struct{}{}
	}
	for range cap(r.workers) {
		<-r.workers
	}
}
