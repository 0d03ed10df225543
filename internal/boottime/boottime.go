// Package boottime tells time on CLOCK_BOOTTIME, the only clock on which dbsupervisor
// measures leases. It counts while the machine is suspended, which Go's monotonic
// clock does not, and nobody can set it. Instants of two hosts, or of two boots of one
// host, must never be compared: that is what BootID is for.
package boottime

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Instant is a moment in nanoseconds since this boot of this machine. Zero means "never".
type Instant int64

// Add returns the moment d later.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub returns the time from o to i.
func (i Instant) Sub(o Instant) time.Duration { return time.Duration(i - o) }

// Clock is what lease code knows of time. Real implements it for production; tests use Fake.
type Clock interface {
	// Now is the current moment on CLOCK_BOOTTIME.
	Now() Instant
	// Wall is the time of day, for people to read; it decides nothing.
	Wall() time.Time
	// WaitUntil blocks until the moment has come (nil) or ctx has ended (its error).
	WaitUntil(ctx context.Context, at Instant) error
}

// Real is the machine's own clock.
type Real struct{}

// Now implements Clock.
func (Real) Now() Instant {
	var ts unix.Timespec
	// CLOCK_BOOTTIME exists since Linux 2.6.39; the call can't fail with a valid pointer.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return Instant(ts.Nano())
}

// Wall implements Clock.
func (Real) Wall() time.Time { return time.Now() }

// WaitUntil implements Clock with a timerfd, which fires at once when a suspended
// machine resumes after the moment.
func (r Real) WaitUntil(ctx context.Context, at Instant) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if at <= r.Now() {
		return nil
	}
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create timerfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "timerfd")
	defer f.Close()
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(at))}
	if err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME, &spec, nil); err != nil {
		return fmt.Errorf("arm timerfd: %w", err)
	}
	// A read deadline in the past is how the poller is told to give the read up.
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var buf [8]byte
	if _, err := f.Read(buf[:]); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("read timerfd: %w", err)
	}
	return nil
}

// BootID identifies this boot of this machine (/proc/sys/kernel/random/boot_id).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
