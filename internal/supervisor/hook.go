package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"dbsupervisor/internal/api"
)

const (
	// defaultHookTimeout is database.hook_timeout where nothing says otherwise.
	defaultHookTimeout = 30 * time.Second
	// hookSaid is how much of a failed command's output is told.
	hookSaid = 1000
)

func (d *database) hookTimeout() time.Duration {
	if t := d.set.Database.HookTimeout; t > 0 {
		return t
	}
	return defaultHookTimeout
}

// hook runs one of the engine's commands in the container, which must not be frozen. A command
// that takes too long is left to itself (Docker can't end it), and counts as failed.
func (d *database) hook(ctx context.Context, name string, cmd []string, within time.Duration) error {
	if len(cmd) == 0 {
		return nil
	}
	hctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	res, err := d.cfg.Docker.Exec(hctx, d.state().id, cmd)
	if err != nil && hctx.Err() != nil && ctx.Err() == nil {
		return api.WithHint(fmt.Errorf("run %s: it has not ended after %s: %w", name, within, err),
			"see why in the database, or give it longer with database.hook_timeout")
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	if res.ExitCode != 0 {
		said := strings.TrimSpace(res.Stderr + res.Stdout)
		return api.WithHint(fmt.Errorf("run %s: exit status %d: %s", name, res.ExitCode, said[:min(len(said), hookSaid)]),
			"the command is database."+name+", from the configuration or the engine's profile")
	}
	return nil
}

// prime runs before_ready: the database has answered, and no client has reached it yet.
func (d *database) prime(ctx context.Context) error {
	if len(d.set.Database.BeforeReady) == 0 {
		return nil
	}
	err := d.hook(ctx, "before_ready", d.set.Database.BeforeReady, d.set.Database.StartTimeout)
	if err != nil {
		return errors.Join(err, d.kill(ctx))
	}
	return nil
}

// quiesce runs before_stop with the gate closed: what a client was told before is there, and
// nothing is written after it.
func (d *database) quiesce(ctx context.Context) error {
	if len(d.set.Database.BeforeStop) == 0 {
		return nil
	}
	d.serve(false)
	if err := d.cfg.Gate.Close(ctx); err != nil {
		return fmt.Errorf("close gate: %w", err)
	}
	d.mu.Lock()
	d.gateTill = 0
	d.mu.Unlock()
	return d.hook(ctx, "before_stop", d.set.Database.BeforeStop, d.hookTimeout())
}
