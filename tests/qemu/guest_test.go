package qemu_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"dbsupervisor/tests/qemu"
)

// asked skips unless a make target for machines asked for them: they take minutes.
func asked(t *testing.T) qemu.Kernel {
	t.Helper()
	if os.Getenv("DBSUPERVISOR_QEMU") == "" {
		t.Skip("needs an emulated machine: make test-kernel")
	}
	k, err := qemu.FetchKernel()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// said keeps what a guest writes.
type said struct {
	mu    sync.Mutex
	lines []string
}

func (s *said) log(t *testing.T) func(string) {
	return func(line string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.lines = append(s.lines, line)
		t.Log(line)
	}
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.lines, "\n")
}

// What a guest's script says and how it ends reaches the host; host programs run there.
func TestGuest(t *testing.T) {
	var out said
	status, err := qemu.Run(t.Context(), qemu.Config{
		Name: "guest", Kernel: asked(t), Dir: t.TempDir(), Log: out.log(t), Modules: []string{"loop", "xfs"},
		Programs: []string{"mkfs.xfs"},
		Script:   "uname -r\nhostname\ntruncate -s 320M /tmp/x && mkfs.xfs -q /tmp/x && mount -o loop /tmp/x /mnt && grep /mnt /proc/mounts\nexit 7",
	}, 2*time.Minute)
	if err != nil || status != 7 {
		t.Errorf("status %d, %v", status, err)
	}
	for _, want := range []string{"-cloud-amd64", "guest", "xfs"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the guest did not say %q", want)
		}
	}
}

// A guest that hangs is ended, tried once more, and is then an error.
func TestGuestHangs(t *testing.T) {
	var out said
	begin := time.Now()
	_, err := qemu.Run(t.Context(), qemu.Config{
		Name: "hangs", Kernel: asked(t), Dir: t.TempDir(), Log: out.log(t), Script: "echo begun; sleep 1000",
	}, 3*time.Second)
	if !errors.Is(err, qemu.ErrHung) {
		t.Errorf("got %v after %v", err, time.Since(begin))
	}
	if s := out.String(); strings.Count(s, "begun") != 2 || strings.Count(s, "ONCE MORE") != 1 {
		t.Error("it was not tried twice, visibly")
	}
}

// A machine that is killed says nothing of its end.
func TestGuestDies(t *testing.T) {
	g, err := qemu.Start(t.Context(), qemu.Config{
		Name: "dies", Kernel: asked(t), Dir: t.TempDir(), Log: func(s string) { t.Log(s) }, Script: "sleep 1000",
	})
	if err != nil {
		t.Fatal(err)
	}
	g.Kill()
	if _, err := g.Wait(context.Background()); !errors.Is(err, qemu.ErrDied) {
		t.Errorf("got %v", err)
	}
}
