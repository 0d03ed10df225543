package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// install installs the units below a new directory and returns it.
func install(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	out, err := exec.Command("make", "-C", "..", "install-files", "DESTDIR="+root).CombinedOutput()
	if err != nil {
		t.Fatalf("make install-files: %v\n%s", err, out)
	}
	return root
}

// unit is section.key to all values, split at blanks for lists of units.
type unit map[string][]string

func readUnit(t *testing.T, path string) unit {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	u, section := unit{}, ""
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", line[0] == '#':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		default:
			key, value, ok := strings.Cut(line, "=")
			if !ok {
				t.Fatalf("%s: %q", path, line)
			}
			u[section+"."+key] = append(u[section+"."+key], strings.Fields(value)...)
		}
	}
	return u
}

func (u unit) one(key string) string { return strings.Join(u[key], " ") }

const (
	agentUnit = "etc/systemd/system/dbsupervisor@.service"
	guardUnit = "etc/systemd/system/dbsupervisor-guard@.service"
)

func TestAgentCannotRunWithoutTheGuard(t *testing.T) {
	agent := readUnit(t, filepath.Join(install(t), agentUnit))
	const guard = "dbsupervisor-guard@%i.service"
	for _, key := range []string{"Unit.Requires", "Unit.After"} {
		if !slices.Contains(agent[key], guard) {
			t.Errorf("%s lacks %s: %v", key, guard, agent[key])
		}
	}
	if slices.Contains(agent["Unit.Requires"], "docker.service") || slices.Contains(agent["Unit.BindsTo"], "docker.service") {
		t.Error("restarting Docker would restart the agent")
	}
}

func TestAgentGoesWithoutTouchingTheDatabase(t *testing.T) {
	agent := readUnit(t, filepath.Join(install(t), agentUnit))
	for key, want := range map[string]string{
		"Service.Type": "notify", "Service.KillMode": "process", "Service.Restart": "always",
		"Service.WatchdogSignal": "SIGKILL", "Service.RuntimeDirectoryPreserve": "yes",
		"Unit.StartLimitIntervalSec": "0",
	} {
		if got := agent.one(key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	if agent.one("Service.WatchdogSec") == "" {
		t.Error("no watchdog")
	}
	for _, dep := range []string{"docker.service", "remote-fs.target", "nftables.service"} {
		if !slices.Contains(agent["Unit.After"], dep) {
			t.Errorf("not after %s", dep)
		}
	}
}

func TestGuardStandsAlone(t *testing.T) {
	root := install(t)
	guard := readUnit(t, filepath.Join(root, guardUnit))
	for key, want := range map[string]string{
		"Service.Restart": "always", "Service.OOMScoreAdjust": "-999", "Service.WatchdogSignal": "SIGKILL",
		"Unit.StartLimitIntervalSec": "0", "Service.RuntimeDirectoryPreserve": "yes",
	} {
		if got := guard.one(key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	if guard.one("Service.WatchdogSec") == "" {
		t.Error("no watchdog")
	}
	slice := guard.one("Service.Slice")
	if _, err := os.Stat(filepath.Join(root, "etc/systemd/system", slice)); slice == "" || err != nil {
		t.Errorf("slice %q: %v", slice, err)
	}
	if readUnit(t, filepath.Join(root, agentUnit)).one("Service.Slice") == slice {
		t.Error("the agent is in the guard's slice")
	}
	// What would stop it with something else, or keep it from starting without.
	for key, values := range guard {
		name := strings.TrimPrefix(key, "Unit.")
		switch name {
		case "PartOf", "BindsTo", "Requires", "Requisite", "Wants", "RequiresMountsFor", "AssertPathExists", "ConditionPathExists":
			t.Errorf("%s=%s", name, values)
		case "After":
			for _, v := range values {
				if v != "local-fs.target" {
					t.Errorf("After=%s", v)
				}
			}
		}
	}
	// A mount namespace is made by visiting every mount, hung ones too.
	for _, key := range []string{
		"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectKernelTunables",
		"ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProtectClock",
		"ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "BindPaths", "BindReadOnlyPaths",
		"TemporaryFileSystem", "RootDirectory", "RootImage", "MountAPIVFS", "DynamicUser", "WorkingDirectory",
		"StateDirectory",
	} {
		if v := guard["Service."+key]; v != nil {
			t.Errorf("%s=%v makes a mount namespace or needs a directory", key, v)
		}
	}
}

// The proxy runs on application hosts: it needs nothing of an instance, and no rights.
func TestProxyStandsAlone(t *testing.T) {
	proxy := readUnit(t, filepath.Join(install(t), "etc/systemd/system/dbsupervisor-proxy@.service"))
	for key, want := range map[string]string{
		"Service.DynamicUser": "yes", "Service.NoNewPrivileges": "yes", "Service.ProtectSystem": "strict",
		"Service.CapabilityBoundingSet": "CAP_NET_BIND_SERVICE", "Service.Restart": "always", "Unit.StartLimitIntervalSec": "0",
	} {
		if got := proxy.one(key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	for key, values := range proxy {
		if !strings.HasPrefix(key, "Unit.") || key == "Unit.AssertPathExists" {
			continue
		}
		for _, v := range values {
			if key != "Unit.Description" && (strings.HasPrefix(v, "dbsupervisor") || strings.HasPrefix(v, "docker") || strings.HasPrefix(v, "remote-fs")) {
				t.Errorf("%s=%s ties it to an instance", key, v)
			}
		}
	}
}

func TestUnitsAreValid(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze")
	}
	root := install(t)
	dir := filepath.Join(root, "etc/systemd/system")
	// The program need not be there to check its units.
	units, err := filepath.Glob(dir + "/*.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range units {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(data), "/usr/local/bin/dbsupervisor", "/bin/true")
		if text == string(data) || strings.Contains(text, "@BINDIR@") || strings.Contains(text, "@SYSCONFDIR@") {
			t.Errorf("%s: places are not filled in", filepath.Base(path))
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(analyze, "verify", dir+"/dbsupervisor@shop.service", dir+"/dbsupervisor-guard@shop.service", dir+"/dbsupervisor-proxy@shop.service").CombinedOutput()
	var bad []string
	for line := range strings.Lines(string(out)) {
		// Complaints about other units of this machine are not ours.
		if strings.Contains(line, "dbsupervisor") {
			bad = append(bad, line)
		}
	}
	if len(bad) > 0 {
		t.Errorf("systemd-analyze verify (%v):\n%s", err, strings.Join(bad, ""))
	}
}
