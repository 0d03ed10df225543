package fence

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/cgroup"

	"github.com/hashicorp/go-hclog"
)

// TestMain lets the test binary play the other processes: a guard, and an agent that is
// stopped or killed at the wrong moment.
func TestMain(m *testing.M) {
	switch os.Getenv("FENCE_TEST_ROLE") {
	case "":
		os.Exit(m.Run())
	case "guard":
		os.Exit(playGuard())
	case "agent":
		os.Exit(playAgent())
	}
	os.Exit(2)
}

func playGuard() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	boot, err := boottime.BootID()
	if err == nil {
		err = RunGuard(ctx, GuardConfig{
			RunDir: os.Getenv("FENCE_TEST_DIR"), BootID: boot, OwnProcess: true,
			Log: hclog.New(&hclog.LoggerOptions{Output: os.Stderr, Level: hclog.Debug}),
		})
	}
	if errors.Is(err, context.Canceled) {
		return 0
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// playAgent obeys one line after the other from its standard input: "arm TERM CONTAINER
// DEADLINE", "freeze CONTAINER BUDGET_MS", "thaw". It answers each with "ok" or the error.
func playAgent() int {
	ctx := context.Background()
	g, err := DialGuard(ctx, os.Getenv("FENCE_TEST_DIR"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	var f *Freezer
	for {
		var line string
		if line, err = readLine(); err != nil {
			return 0
		}
		w := strings.Fields(line)
		switch w[0] {
		case "arm":
			term, _ := strconv.ParseUint(w[1], 10, 64)
			deadline, _ := strconv.ParseInt(w[3], 10, 64)
			groups, _ := cgroup.Find(w[2])
			err = g.Arm(ctx, ArmRequest{Term: term, Container: w[2], Group: groups[0], Deadline: boottime.Instant(deadline)})
		case "freeze":
			ms, _ := strconv.Atoi(w[2])
			groups, _ := cgroup.Find(w[1])
			f = NewFreezer(FreezerConfig{Guard: g, Group: groups[0], Budget: time.Duration(ms) * time.Millisecond})
			err = f.Freeze(ctx)
		case "thaw":
			err = f.Thaw()
		}
		if err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("ok")
		}
	}
}

// readLine reads byte by byte, so that nothing is read ahead.
func readLine() (string, error) {
	var b strings.Builder
	var one [1]byte
	for {
		if _, err := os.Stdin.Read(one[:]); err != nil {
			return "", err
		}
		if one[0] == '\n' {
			return b.String(), nil
		}
		b.WriteByte(one[0])
	}
}
