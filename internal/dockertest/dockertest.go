// Package dockertest gives tests a container image without any registry, and containers that
// are gone when the test is. It uses the docker command, so that what it makes does not depend
// on the code under test.
package dockertest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Label marks containers and images of tests; its value is the package that made them.
const Label = "dbsupervisor.test"

// maxCall bounds one docker command.
const maxCall = time.Minute

// source returns the probe program's directory and a hash of its source.
func source(t testing.TB) (dir, hash string) {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("no source path")
	}
	dir = filepath.Join(filepath.Dir(file), "probe")
	b, err := os.ReadFile(filepath.Join(dir, "main.go"))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return dir, hex.EncodeToString(sum[:6])
}

// Binary returns the path of the probe program (see probe/main.go), which is built once for
// each version of its source and kept in the user's cache directory.
func Binary(t testing.TB) string {
	t.Helper()
	dir, hash := source(t)
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	cache = filepath.Join(cache, "dbsupervisor-test")
	out := filepath.Join(cache, "probe-"+hash)
	if _, err := os.Stat(out); err == nil {
		return out
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	// Under a name of its own first: other tests may be building it at this moment.
	tmp, err := os.MkdirTemp(cache, "build-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	built := filepath.Join(tmp, "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", built, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, b)
	}
	if err := os.Rename(built, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// Image returns an image that has nothing but the probe program as its entry point. It is
// built when the engine does not have it yet. The test is skipped without a Docker engine.
func Image(t testing.TB) string {
	t.Helper()
	if testing.Short() {
		t.Skip("short: no Docker")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := docker(t, nil, "version"); err != nil {
		t.Skipf("needs a Docker engine: %v", err)
	}
	_, hash := source(t)
	ref := "dbsupervisor-test:" + hash
	if _, err := docker(t, nil, "image", "inspect", ref); err == nil {
		return ref
	}
	prog, err := os.ReadFile(Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "probe", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(prog))},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(prog); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := docker(t, &b, "import", "--change", `ENTRYPOINT ["/probe"]`, "--change", "LABEL "+Label+"=image", "-", ref); err != nil {
		t.Fatal(err)
	}
	return ref
}

// Docker runs the docker command and returns what it printed, trimmed.
func Docker(t testing.TB, args ...string) string {
	t.Helper()
	out, err := docker(t, nil, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func docker(t testing.TB, stdin *bytes.Buffer, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), maxCall)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	if stdin != nil {
		cmd.Stdin = stdin
	}
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", &callError{args: args, out: strings.TrimSpace(errOut.String()), err: err}
	}
	return strings.TrimSpace(string(out)), nil
}

type callError struct {
	args []string
	out  string
	err  error
}

func (e *callError) Error() string {
	return "docker " + strings.Join(e.args, " ") + ": " + e.err.Error() + ": " + e.out
}

// Run starts a container in the background and removes it when the test ends. args are those
// of `docker run`, image and command included. It returns the full ID.
func Run(t testing.TB, pkg string, args ...string) string {
	t.Helper()
	// In two steps, as a container that can't be started is left by `docker run`, too.
	id := Docker(t, append([]string{"create", "--label", Label + "=" + pkg}, args...)...)
	Cleanup(t, id)
	Docker(t, "start", id)
	return id
}

// Cleanup removes a container when the test ends, thawing it first if need be.
func Cleanup(t testing.TB, id string) {
	t.Cleanup(func() {
		if _, err := docker(t, nil, "rm", "-f", "-v", id); err != nil && !strings.Contains(err.Error(), "No such container") {
			t.Errorf("remove container: %v", err)
		}
	})
}

// Pid returns the container's first process.
func Pid(t testing.TB, id string) string {
	t.Helper()
	return Docker(t, "inspect", "-f", "{{.State.Pid}}", id)
}

// FreePort returns a TCP port of this machine that nobody uses right now.
func FreePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Until polls a condition and fails the test when it does not come true in time.
func Until(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
