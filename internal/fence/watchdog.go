package fence

import (
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// watchdogDefault is assumed of a device that doesn't say its time-out.
const watchdogDefault = 15 * time.Second

// WatchdogConfig configures what restarts the guard, or the machine, when the guard fails.
// systemd's watchdog is used whenever the unit asks for it and needs nothing here.
type WatchdogConfig struct {
	// Device is a hardware watchdog such as /dev/watchdog; "" for none. While it is open, the
	// machine restarts when the guard hangs, or can't kill for Grace after a deadline.
	Device string
	// Interval between pings of the device; default a third of its time-out.
	Interval time.Duration
	// Grace is how long a kill may be overdue before the device is no longer pinged;
	// default 5 s.
	Grace time.Duration
	// Notify tells systemd a state; default the sd_notify protocol to $NOTIFY_SOCKET.
	Notify func(state string) error
	// SystemdInterval between pings of systemd; default half of what the unit asks for.
	SystemdInterval time.Duration
}

// watchdogs pings what watches the guard. Only the guard's loop calls it after the start.
type watchdogs struct {
	cfg WatchdogConfig
	dev *os.File
}

func newWatchdogs(cfg WatchdogConfig) (*watchdogs, error) {
	if cfg.Notify == nil {
		cfg.Notify = func(s string) error { _, err := daemon.SdNotify(false, s); return err }
	}
	if cfg.SystemdInterval == 0 {
		d, err := daemon.SdWatchdogEnabled(false)
		if err != nil {
			return nil, fmt.Errorf("read systemd's watchdog interval: %w", err)
		}
		cfg.SystemdInterval = d / 2
	}
	if cfg.Grace == 0 {
		cfg.Grace = 5 * time.Second
	}
	w := &watchdogs{cfg: cfg}
	if cfg.Device == "" {
		w.cfg.Interval = 0
		return w, nil
	}
	f, err := os.OpenFile(cfg.Device, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open watchdog: %w", err)
	}
	w.dev = f
	if cfg.Interval == 0 {
		timeout := watchdogDefault
		if s, err := unix.IoctlGetInt(int(f.Fd()), unix.WDIOC_GETTIMEOUT); err == nil && s > 0 {
			timeout = time.Duration(s) * time.Second
		}
		w.cfg.Interval = timeout / 3
	}
	return w, nil
}

// interval is how often ping wants to be called; 0 means not at all.
func (w *watchdogs) interval() time.Duration {
	a, b := w.cfg.Interval, w.cfg.SystemdInterval
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

func (w *watchdogs) grace() time.Duration { return w.cfg.Grace }

func (w *watchdogs) ready() { _ = w.cfg.Notify(daemon.SdNotifyReady) }

// ping says that the guard's loop turns. failing means that a kill is overdue: then only the
// machine's restart can help, and the device is left to do it.
func (w *watchdogs) ping(failing bool) {
	// Errors show as a missed ping, which is what a watchdog is for.
	if w.cfg.SystemdInterval > 0 {
		_ = w.cfg.Notify(daemon.SdNotifyWatchdog)
	}
	if w.dev != nil && !failing {
		_, _ = w.dev.Write([]byte{0})
	}
}

// close tells the device that this is an orderly end (the magic letter), so that a restart of
// the guard doesn't restart the machine.
func (w *watchdogs) close() {
	if w.dev != nil {
		_, _ = w.dev.Write([]byte("V"))
		_ = w.dev.Close()
	}
}
