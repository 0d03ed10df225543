package config

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/hashicorp/go-hclog"
)

// settle is the time between the first sign of a change and the reading: editors and
// deployment tools write in several steps. A last step that comes later begins it anew.
const settle = 300 * time.Millisecond

// Watch follows a configuration file and sends every new content that is valid. A file that
// is invalid or gone is logged with everything that is wrong with it, and the last good one
// stays in force. The channel is closed when ctx ends; a configuration that was not taken
// yet is replaced by a newer one.
//
// The directory is watched, not the file, so that a file that is replaced by renaming
// another over it (or a symbolic link that is switched) is followed too.
func Watch(ctx context.Context, path string, log hclog.Logger) (<-chan *Config, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch configuration: %w", err)
	}
	if err := w.Add(filepath.Dir(path)); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("watch configuration: %w", err)
	}
	last, err := os.ReadFile(path)
	if err != nil {
		last = nil // it will be new when it appears
	}
	out := make(chan *Config, 1)
	go watch(ctx, w, path, last, log, out)
	return out, nil
}

func watch(ctx context.Context, w *fsnotify.Watcher, path string, last []byte, log hclog.Logger, out chan *Config) {
	defer close(out)
	defer w.Close()
	timer := time.NewTimer(settle)
	timer.Stop()
	defer timer.Stop()
	armed := false // the file will be read when the timer ends
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-w.Events:
			if !ok {
				return
			}
			// Any event of the directory: what is read decides, not what was reported. A
			// directory that is never quiet must not put the reading off for ever.
			if !armed {
				timer.Reset(settle)
				armed = true
			}
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			log.Warn("configuration watch has lost events, reading the file again", "error", err)
			timer.Reset(settle)
			armed = true
		case <-timer.C:
			armed = false
			data, err := os.ReadFile(path)
			if err == nil && bytes.Equal(data, last) {
				continue
			}
			if err != nil && last == nil {
				continue // was gone before
			}
			last = data
			c, err := Load(path)
			if err != nil {
				log.Error("new configuration is invalid, keeping the old one", "error", err)
				continue
			}
			select {
			case <-out: // nobody took the last one; it is out of date
			default:
			}
			out <- c
		}
	}
}
