package userdata

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// machine is a made-up machine: a root directory, commands that only write down how they
// were called, and an unpacked release.
type machine struct {
	t     *testing.T
	root  string
	bin   string
	calls string // file
	env   map[string]string
}

func newMachine(t *testing.T, os string) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, root: dir + "/root", bin: dir + "/bin", calls: dir + "/calls", env: map[string]string{}}
	m.write(m.root+"/etc/os-release", os, 0o644)
	for _, name := range []string{"apt-get", "dnf", "systemd-tmpfiles", "curl", "aws"} {
		m.command(name, "")
	}
	m.command("systemctl", `if [ "$1" = is-active ]; then [ -e "$CALLS.active" ]; fi`)
	m.command("id", "echo 0")
	m.command("mountpoint", `[ -e "$2/.mounted" ]`)
	rel := dir + "/release/dbsupervisor-1"
	m.write(rel+"/dbsupervisor", "#!/bin/sh\necho \"dbsupervisor $*\" >>\"$CALLS\"\n[ ! -e \"$CALLS.refuse\" ] || exit 2\n", 0o755)
	for _, name := range []string{"dbsupervisor@.service", "dbsupervisor-guard@.service", "dbsupervisorguard.slice", "dbsupervisor.tmpfiles"} {
		text, err := readFile("../packaging/systemd/" + name)
		if err != nil {
			t.Fatal(err)
		}
		m.write(rel+"/systemd/"+name, text, 0o644)
	}
	if out, err := exec.Command("tar", "-C", dir+"/release", "-czf", dir+"/release.tar.gz", "dbsupervisor-1").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m.write(dir+"/share/.mounted", "", 0o644)
	m.env = map[string]string{
		"PATH": m.bin + ":/usr/bin:/bin", "CALLS": m.calls, "HOME": dir, "TMPDIR": dir,
		"DBSUPERVISOR_ROOT": m.root, "DBSUPERVISOR_RETRY_SECONDS": "0",
		"DBSUPERVISOR_RELEASE": dir + "/release.tar.gz", "DBSUPERVISOR_CLUSTER": "shop",
		"DBSUPERVISOR_SHARE": dir + "/share", "DBSUPERVISOR_SHARE_MOUNT": dir + "/share",
		"DBSUPERVISOR_IMAGE": "postgres:17",
	}
	return m
}

func readFile(path string) (string, error) {
	data, err := os.ReadFile(path)
	return string(data), err
}

func (m *machine) write(path, text string, mode os.FileMode) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) command(name, body string) {
	m.write(m.bin+"/"+name, "#!/bin/bash\necho \""+name+" $*\" >>\"$CALLS\"\n"+body+"\n", 0o755)
}

// run runs the script and returns what it printed and the commands that it called.
func (m *machine) run() (log string, calls string, err error) {
	m.t.Helper()
	m.write(m.calls, "", 0o644)
	cmd := exec.Command("bash", "bootstrap.sh")
	for k, v := range m.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	out, err := cmd.CombinedOutput()
	calls, readErr := readFile(m.calls)
	if readErr != nil {
		m.t.Fatal(readErr)
	}
	return string(out), calls, err
}

func (m *machine) installed(name string) string {
	m.t.Helper()
	text, err := readFile(m.root + name)
	if err != nil {
		m.t.Fatal(err)
	}
	return text
}

const (
	debian = "ID=debian\nVERSION_ID=\"12\"\n"
	amazon = "ID=\"amzn\"\nVERSION_ID=\"2023\"\n"
)

func has(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s lacks %q:\n%s", what, p, text)
		}
	}
}

func TestFirstRun(t *testing.T) {
	for os, packages := range map[string]string{
		debian: "apt-get -q -y --no-install-recommends -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300 install docker.io",
		amazon: "dnf -q -y install docker nftables",
	} {
		m := newMachine(t, os)
		m.env["DBSUPERVISOR_ZONE"] = "it's a \"zone\": # 1"
		log, calls, err := m.run()
		if err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		has(t, "calls", calls, packages, "systemctl enable --now docker.service",
			"dbsupervisor config check --config "+m.root+"/etc/dbsupervisor/shop.yaml",
			"systemctl enable dbsupervisor-guard@shop.service dbsupervisor@shop.service",
			"systemctl start --no-block dbsupervisor@shop.service")
		has(t, "configuration", m.installed("/etc/dbsupervisor/shop.yaml"), "cluster: 'shop'\n",
			"zone: 'it''s a \"zone\": # 1'\n", "share_mount: '"+m.env["DBSUPERVISOR_SHARE"]+"'\n", "  image: 'postgres:17'\n")
		has(t, "agent's unit", m.installed("/etc/systemd/system/dbsupervisor@.service"),
			"ExecStart=/usr/local/bin/dbsupervisor run --config /etc/dbsupervisor/%i.yaml")
		for _, step := range []string{"check the settings", "install Docker", "fetch the release", "write the configuration", "enable the units", "start the agent"} {
			has(t, "log", log, step)
		}
	}
}

// TestVolume: a file system of its own for the volume is made before anything is configured or
// started, by the program, which refuses what holds data.
func TestVolume(t *testing.T) {
	for name, c := range map[string]struct {
		env    map[string]string
		os     string
		create string
		calls  []string
	}{
		"in a file": {map[string]string{"DBSUPERVISOR_VOLUME_SIZE": "20GiB"}, debian,
			"volume create --file ROOT/var/lib/dbsupervisor/shop.img --size 20GiB --fs xfs --mount ROOT/var/lib/dbsupervisor/shop --fstab ROOT/etc/fstab",
			[]string{"install docker.io", " xfsprogs"}},
		"on a device": {map[string]string{"DBSUPERVISOR_VOLUME_DEVICE": "/dev/nvme1n1", "DBSUPERVISOR_VOLUME_FS": "ext4", "DBSUPERVISOR_DIR": "/data/shop"}, amazon,
			"volume create --device /dev/nvme1n1 --fs ext4 --mount ROOT/data/shop --fstab ROOT/etc/fstab",
			[]string{"dnf -q -y install docker", " e2fsprogs"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.os)
			for k, v := range c.env {
				m.env[k] = v
			}
			log, calls, err := m.run()
			if err != nil {
				t.Fatalf("%v\n%s", err, log)
			}
			create := "dbsupervisor " + strings.ReplaceAll(c.create, "ROOT", m.root)
			has(t, "calls", calls, append(c.calls, create)...)
			if strings.Index(calls, create) > strings.Index(calls, "config check") {
				t.Errorf("the volume comes last:\n%s", calls)
			}
		})
	}
	m := newMachine(t, debian)
	if log, calls, err := m.run(); err != nil || strings.Contains(calls, "volume create") || strings.Contains(calls, "xfsprogs") {
		t.Errorf("a volume that nobody asked for: %v\n%s%s", err, log, calls)
	}
}

func TestRunningAgainChangesNothing(t *testing.T) {
	m := newMachine(t, debian)
	if log, _, err := m.run(); err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	m.write(m.root+"/etc/dbsupervisor/shop.yaml", "edited: by hand\n", 0o600)
	m.write(m.calls+".active", "", 0o600)
	log, calls, err := m.run()
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	if strings.Contains(log, ": installed ") {
		t.Errorf("installed again:\n%s", log)
	}
	if got := m.installed("/etc/dbsupervisor/shop.yaml"); got != "edited: by hand\n" {
		t.Errorf("the configuration became %q", got)
	}
	for _, verb := range []string{"agent restart", "systemctl start", "systemctl restart", "systemctl stop"} {
		if strings.Contains(calls, verb) {
			t.Errorf("a running agent saw %q:\n%s", verb, calls)
		}
	}

	// A new version restarts the agent in its own way, never through a stop.
	m.write(m.root+"/usr/local/bin/dbsupervisor", "#!/bin/sh\n", 0o755)
	log, calls, err = m.run()
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	has(t, "calls", calls, "dbsupervisor agent restart")
	if strings.Contains(calls, "systemctl restart") || strings.Contains(calls, "systemctl stop") {
		t.Errorf("restarted by a stop:\n%s", calls)
	}
}

func TestFailsLoudly(t *testing.T) {
	cases := []struct {
		name  string
		spoil func(m *machine)
		want  string
	}{
		{"no cluster", func(m *machine) { delete(m.env, "DBSUPERVISOR_CLUSTER") }, "DBSUPERVISOR_CLUSTER must be"},
		{"cluster that is no name", func(m *machine) { m.env["DBSUPERVISOR_CLUSTER"] = "../x" }, "DBSUPERVISOR_CLUSTER must be"},
		{"no share", func(m *machine) { delete(m.env, "DBSUPERVISOR_SHARE") }, "DBSUPERVISOR_SHARE is not set"},
		{"share not mounted", func(m *machine) { m.remove("share/.mounted") }, "is not a mount point"},
		{"share on the root disk", func(m *machine) {
			m.env["DBSUPERVISOR_SHARE"] = "/usr"
			delete(m.env, "DBSUPERVISOR_SHARE_MOUNT")
		}, "mount the share first"},
		{"no image", func(m *machine) { delete(m.env, "DBSUPERVISOR_IMAGE") }, "DBSUPERVISOR_IMAGE is not set"},
		{"another system", func(m *machine) { m.write(m.root+"/etc/os-release", "ID=arch\n", 0o644) }, "made for Debian and Amazon Linux 2023"},
		{"packages", func(m *machine) { m.command("apt-get", "exit 100") }, `FAILED at "install Docker and nftables"`},
		{"Docker", func(m *machine) { m.command("systemctl", "exit 1") }, "cannot start docker.service"},
		{"a release that is not there", func(m *machine) { m.env["DBSUPERVISOR_RELEASE"] = "/nowhere" }, `FAILED at "fetch the release"`},
		{"a fetched release without a checksum", func(m *machine) { m.env["DBSUPERVISOR_RELEASE"] = "https://localhost/r" }, "set DBSUPERVISOR_RELEASE_SHA256"},
		{"another release", func(m *machine) { m.env["DBSUPERVISOR_RELEASE_SHA256"] = strings.Repeat("0", 64) }, "not the release expected"},
		{"a refused configuration", func(m *machine) { m.write(m.calls+".refuse", "", 0o600) }, "is refused, see above"},
		{"two volumes", func(m *machine) {
			m.env["DBSUPERVISOR_VOLUME_SIZE"], m.env["DBSUPERVISOR_VOLUME_DEVICE"] = "1GiB", "/dev/x"
		}, "set only one of"},
		{"a volume on something else", func(m *machine) {
			m.env["DBSUPERVISOR_VOLUME_SIZE"], m.env["DBSUPERVISOR_VOLUME_FS"] = "1GiB", "btrfs"
		}, "must be xfs or ext4"},
		{"a volume that is refused", func(m *machine) {
			m.env["DBSUPERVISOR_VOLUME_SIZE"] = "1GiB"
			m.write(m.calls+".refuse", "", 0o600)
		}, "no file system for the volume"},
		{"no root", func(m *machine) { m.command("id", "echo 1000") }, "must be root"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, debian)
			c.spoil(m)
			log, calls, err := m.run()
			if err == nil {
				t.Fatalf("it went through:\n%s", log)
			}
			has(t, "log", log, "FAILED at", c.want)
			if strings.Contains(calls, "systemctl enable dbsupervisor") || strings.Contains(calls, "systemctl start") {
				t.Errorf("enabled all the same:\n%s", calls)
			}
		})
	}
}

func (m *machine) remove(name string) {
	m.t.Helper()
	if err := os.Remove(filepath.Join(filepath.Dir(m.root), name)); err != nil {
		m.t.Fatal(err)
	}
}
