package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
)

// probe asks the database once and keeps the answer.
func (d *database) probe(ctx context.Context) error {
	d.use.Lock()
	defer d.use.Unlock()
	id := d.state().id
	if id == "" {
		return errors.New("no container")
	}
	err := d.ask(ctx, id)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.st.id != id {
		return err // replaced meanwhile
	}
	d.st.healthy = err == nil
	d.st.lastProbe, d.st.probed = d.clock.Wall(), d.clock.Now()
	d.st.err = text(err)
	return err
}

// ask asks the database. A probe goes through Docker: when that is what does not answer, the
// database is not to blame, and clients go on as long as it takes their connections.
func (d *database) ask(ctx context.Context, id string) error {
	if d.state().engineErr == "" {
		pctx, cancel := context.WithTimeout(ctx, d.set.Database.ProbeTimeout)
		defer cancel()
		err := d.cfg.Probe(pctx, id)
		if err == nil || !d.engineHangs(ctx) {
			return err
		}
	}
	dctx, cancel := context.WithTimeout(ctx, engineAnswer)
	defer cancel()
	return d.dial(dctx)
}

// engineHangs asks Docker something quick.
func (d *database) engineHangs(ctx context.Context) bool {
	ectx, cancel := context.WithTimeout(ctx, engineAnswer)
	defer cancel()
	_, err := d.cfg.Docker.Find(ectx, d.labels())
	if err == nil || ctx.Err() != nil {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.engineFailed(err)
	return true
}

// dial connects to the database's own address, without Docker.
func (d *database) dial(ctx context.Context) error {
	d.mu.Lock()
	ip, g := d.st.ip, d.group
	d.mu.Unlock()
	if empty, err := g.Empty(); err != nil || empty || g.IsZero() || ip == "" || len(d.set.Database.Ports) == 0 {
		return errors.New("database can't be asked while Docker does not answer")
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(d.set.Database.Ports[0].Container)))
	if err != nil {
		return fmt.Errorf("connect to database while Docker does not answer: %w", err)
	}
	return c.Close()
}
