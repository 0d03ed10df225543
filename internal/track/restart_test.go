package track

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// agentMain is an agent that drains once, says so, and is killed.
func agentMain() int {
	tr, err := Open(Config{Root: os.Getenv("TRACK_TEST_DIR"), Pin: os.Getenv("TRACK_TEST_PIN"), Key: "test"})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	c, err := tr.Drain(context.Background())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if os.Getenv("TRACK_TEST_SETTLE") != "" {
		if err := tr.Settle(); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	fmt.Printf("drained, lost %q, %d inodes\n", c.Lost, len(c.Inodes))
	select {}
}

// killedAgent runs an agent until it has drained, calls then, and kills it.
func killedAgent(t *testing.T, v *volume, settle string, then func()) string {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), "TRACK_TEST_ROLE=agent", "TRACK_TEST_DIR="+v.root, "TRACK_TEST_PIN="+v.pin, "TRACK_TEST_SETTLE="+settle)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, _ := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "drained") {
		t.Fatalf("the agent says %q", line)
	}
	then()
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	return line
}

func wrote(t testing.TB, c *Changes, v *volume, name string) bool {
	t.Helper()
	n := c.Inodes[v.ino(t, name)]
	return n != nil && len(n.Written) > 0
}

// An agent that is killed loses nothing: neither what was written before and is not settled,
// nor what is written while there is no agent.
func TestKilledAgent(t *testing.T) {
	eachFS(t, func(t *testing.T, v *volume) {
		write := func(name string) { byOther(t, `echo x >"$1"`, v.path(name)) }
		killedAgent(t, v, "yes", func() { write("running") })
		write("between")
		said := killedAgent(t, v, "", func() { write("later") })
		if !strings.Contains(said, `lost ""`) {
			t.Errorf("the second agent says %q", said)
		}
		write("alone")
		tr := v.open(t)
		c := drain(t, tr)
		if c.Lost != "" || c.NamesLost == "" {
			t.Errorf("lost %q, names %q", c.Lost, c.NamesLost)
		}
		for _, name := range []string{"running", "between", "later", "alone"} {
			if !wrote(t, c, v, name) {
				t.Errorf("what was written to %q is lost", name)
			}
		}
		// Settled is not reported again.
		must(t, tr.Settle())
		must(t, tr.Close())
		c = drain(t, v.open(t))
		if len(c.Inodes) != 0 || c.Lost != "" {
			t.Errorf("after settling: %d inodes, lost %q", len(c.Inodes), c.Lost)
		}
	})
}

// What was recorded for another key, or for another mounting of the file system, says
// nothing of this one.
func TestForeignPins(t *testing.T) {
	eachFS(t, func(t *testing.T, v *volume) {
		must(t, v.opened(t).Close())
		tr, err := Open(Config{Root: v.root, Pin: v.pin, Key: "other"})
		must(t, err)
		if c := drain(t, tr); !strings.Contains(c.Lost, "another volume") {
			t.Errorf("another key: lost %q", c.Lost)
		}
		must(t, tr.Close())
		v.remount(t, nil)
		tr, err = Open(Config{Root: v.root, Pin: v.pin, Key: "other"})
		must(t, err)
		defer tr.Close()
		if c := drain(t, tr); !strings.Contains(c.Lost, "another volume, mount") {
			t.Errorf("mounted again: lost %q", c.Lost)
		}
		v.remount(t, nil)
		if c := drain(t, tr); c.Lost == "" || c.NamesLost == "" {
			t.Errorf("mounted again under an open tracker: lost %q, names %q", c.Lost, c.NamesLost)
		}
		must(t, tr.Remove())
		if _, err := os.Stat(v.pin); !os.IsNotExist(err) {
			t.Errorf("pins after Remove: %v", err)
		}
	})
}
