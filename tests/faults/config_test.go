package faults

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dbsupervisor/tests/cluster"
)

// refused starts the instance's agent and returns what it said when it ended by itself.
func refused(t *testing.T, c *cluster.Cluster, i *cluster.Instance) string {
	t.Helper()
	_ = os.Remove(i.LogPath("run"))
	must(t, i.StartAgent())
	within(t, t.Context(), 20*time.Second, "the agent refuses to run", func() bool { return i.Ended() })
	b, err := os.ReadFile(i.LogPath("run"))
	must(t, err)
	return string(b)
}

// TestBadConfiguration: refused at start with file, line and hint.
func TestBadConfiguration(t *testing.T) {
	c, _ := start(t, 0)
	i, err := c.Add("")
	must(t, err)
	good, err := os.ReadFile(i.Config)
	must(t, err)
	bad := strings.Replace(string(good), "  ttl: "+c.TTL.String(), "  ttl: 1s", 1)
	if bad == string(good) {
		t.Fatal("the configuration could not be spoilt")
	}
	must(t, os.WriteFile(i.Config, []byte(bad), 0o600))
	said := refused(t, c, i)
	if !strings.Contains(said, filepath.Base(i.Config)+":") || !strings.Contains(said, "hint:") {
		t.Errorf("want file, line and hint:\n%s", said)
	}
}

// TestWrongCluster: an instance that has belonged to one cluster doesn't join another one
// that appears in its place.
func TestWrongCluster(t *testing.T) {
	c, ctx := start(t, 1)
	a := c.Instances[0]
	must(t, a.Stop(ctx))
	must(t, os.Rename(c.Share, c.Share+".old"))
	must(t, os.Mkdir(c.Share, 0o755))
	other, err := c.Add("")
	must(t, err)
	must(t, second(other.CLI(ctx, "init")))
	must(t, a.StartGuard())
	said := refused(t, c, a)
	if !strings.Contains(said, "another cluster") || !strings.Contains(said, "hint:") {
		t.Errorf("want a refusal that says why and what to do:\n%s", said)
	}
}

// TestSameInstanceName: two machines were given one name.
func TestSameInstanceName(t *testing.T) {
	c, ctx := start(t, 1)
	a := c.Instances[0]
	twin, err := c.Add("")
	must(t, err)
	b, err := os.ReadFile(twin.Config)
	must(t, err)
	must(t, os.WriteFile(twin.Config, []byte(strings.Replace(string(b), "instance: "+twin.Name, "instance: "+a.Name, 1)), 0o600))
	must(t, twin.StartGuard())
	said := refused(t, c, twin)
	if !strings.Contains(said, "instance name") {
		t.Errorf("want a refusal that names the reason:\n%s", said)
	}
	if !a.Is(ctx, "primary") {
		t.Error("the first instance was disturbed")
	}
}
