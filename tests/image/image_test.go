// Package image tests the PostgreSQL image that is built where no registry can be reached:
// above all that a container that dies while it makes its cluster never leaves one that
// looks whole.
package image

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	ref   = "dbsupervisor/postgres:15"
	label = "dbsupervisor.test=image"
)

func docker(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command("docker", args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func mustDocker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := docker(t, args...)
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// ours skips where the official image stands in for the built one.
func ours(t *testing.T) {
	t.Helper()
	out, err := docker(t, "image", "inspect", "-f", `{{index .Config.Labels "dbsupervisor.content"}}`, ref)
	if err != nil {
		t.Fatalf("no image %s, run `make image`: %s", ref, out)
	}
	if out == "" {
		t.Skip("the image is not the one built here")
	}
}

// run starts a container in the background and returns its ID.
func run(t *testing.T, args ...string) string {
	t.Helper()
	id := mustDocker(t, append([]string{"run", "-d", "--label", label}, args...)...)
	t.Cleanup(func() { mustDocker(t, "rm", "-f", "-v", id) })
	return id
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func ready(t *testing.T, id string) {
	t.Helper()
	eventually(t, "the database answers", func() bool {
		_, err := docker(t, "exec", id, "pg_isready", "-q", "-h", "127.0.0.1", "-U", "postgres")
		if err != nil {
			if state := mustDocker(t, "inspect", "-f", "{{.State.Status}}", id); state == "exited" {
				t.Fatalf("it ended:\n%s", mustDocker(t, "logs", id))
			}
		}
		return err == nil
	})
}

func query(t *testing.T, id, db, sql string) string {
	t.Helper()
	return mustDocker(t, "exec", id, "psql", "-h", "127.0.0.1", "-U", "postgres", "-XAt", "-d", db, "-c", sql)
}

func volume(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	// The cluster's files belong to the image's user; go test could not remove them else.
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Join(dir, "data")) })
	return dir + "/data"
}

func TestConventions(t *testing.T) {
	ours(t)
	dir := t.TempDir()
	data := volume(t)
	for name, text := range map[string]string{
		"password": "from a file", "init/1.sql": "create table first (n int);\n", "init/2.sh": "psql -U postgres -d shop -c 'insert into first values (42)'\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil { //nolint:gosec // read by another user
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // read by another user
		t.Fatal(err)
	}
	id := run(t, "-v", data+":/var/lib/postgresql/data", "-v", dir+":/x:ro", "-v", dir+"/init:/docker-entrypoint-initdb.d:ro",
		"-e", "POSTGRES_PASSWORD_FILE=/x/password", "-e", "POSTGRES_DB=shop", "-e", "POSTGRES_INITDB_ARGS=--wal-segsize=1",
		ref, "-c", "shared_buffers=17MB")
	ready(t, id)
	show := func(sql, want string) {
		t.Helper()
		if got := query(t, id, "shop", sql); got != want {
			t.Errorf("%s: %q, want %q", sql, got, want)
		}
	}
	show("show data_checksums", "on")
	show("show listen_addresses", "*")
	show("show shared_buffers", "17MB")
	show("show wal_segment_size", "1MB")
	show("show server_encoding", "UTF8")
	show("select n from first", "42")
	for _, tool := range []string{"pgbench", "pg_amcheck", "pg_checksums"} {
		mustDocker(t, "exec", id, tool, "--version")
	}
	// Others need the password.
	own := mustDocker(t, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", id)
	login := func(password string) error {
		_, err := docker(t, "exec", "-e", "PGPASSWORD="+password, id, "psql", "-h", own, "-U", "postgres", "-d", "shop", "-c", "select 1")
		return err
	}
	if err := login("wrong"); err == nil {
		t.Error("a wrong password is let in")
	}
	if err := login("from a file"); err != nil {
		t.Error("the right password is refused")
	}
	// The server is process 1, so that signals reach it, and not root.
	if got := mustDocker(t, "exec", id, "stat", "-c", "%U", "/proc/1"); got != "postgres" {
		t.Errorf("the server runs as %s", got)
	}
	begin := time.Now()
	mustDocker(t, "stop", "-t", "60", id)
	if code := mustDocker(t, "inspect", "-f", "{{.State.ExitCode}}", id); code != "0" || time.Since(begin) > 30*time.Second {
		t.Errorf("asked to stop it ended with %s after %s", code, time.Since(begin))
	}
	if log := mustDocker(t, "logs", id); !strings.Contains(log, "database system is shut down") {
		t.Errorf("no clean shutdown:\n%s", log)
	}
}

func TestRefusals(t *testing.T) {
	ours(t)
	full := t.TempDir()
	if err := os.WriteFile(full+"/something", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no password":        {[]string{ref}, "set POSTGRES_PASSWORD"},
		"two passwords":      {[]string{"-e", "POSTGRES_PASSWORD=a", "-e", "POSTGRES_PASSWORD_FILE=/etc/hostname", ref}, "set one"},
		"somebody's data":    {[]string{"-e", "POSTGRES_PASSWORD=a", "-v", full + ":/var/lib/postgresql/data", ref}, "is not empty"},
		"the server as root": {[]string{"--entrypoint", "postgres", ref}, "not permitted"},
	} {
		out, err := docker(t, append([]string{"run", "--rm", "--label", label}, c.args...)...)
		if err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if _, err := os.Stat(full + "/something"); err != nil {
		t.Error(err)
	}
}

// Killed at many moments while it makes the cluster, the next start makes a whole one.
func TestKilledWhileMakingTheCluster(t *testing.T) {
	ours(t)
	data := volume(t)
	start := func() string {
		return run(t, "-e", "POSTGRES_PASSWORD=pw", "-e", "POSTGRES_DB=shop", "-v", data+":/var/lib/postgresql/data", ref)
	}
	exists := func(name string) func() bool {
		return func() bool { _, err := os.Stat(filepath.Join(data, name)); return err == nil }
	}
	// Each condition holds at a later moment: the directory is made, initdb is at work,
	// the first server runs, the files are being moved up.
	for n, moment := range []string{".init", ".init/global/pg_control", ".init/postmaster.pid", "base"} {
		id := start()
		eventually(t, moment, exists(moment))
		mustDocker(t, "kill", "-s", "KILL", id)
		if n < 3 && exists("PG_VERSION")() {
			t.Fatalf("killed at %s it looks whole", moment)
		}
	}
	id := start()
	ready(t, id)
	if got := query(t, id, "shop", "show data_checksums"); got != "on" {
		t.Errorf("checksums are %q", got)
	}
	if exists(".init")() {
		t.Error("a half-made cluster is left")
	}
	// And killed afterwards, it recovers what it has.
	query(t, id, "shop", "create table kept as select 1 as n")
	mustDocker(t, "kill", "-s", "KILL", id)
	id = start()
	ready(t, id)
	if got := query(t, id, "shop", "select n from kept"); got != "1" {
		t.Errorf("kept %s", fmt.Sprint(got))
	}
}
