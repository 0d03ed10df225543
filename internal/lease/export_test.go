package lease

import "context"

// Step lets tests do by hand what Run does at its pace.
func (l *Lease) Step(ctx context.Context) error { return l.step(ctx) }
