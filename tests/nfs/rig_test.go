// Package nfs_test runs the register and the store over a real NFSv4.1 server and the Linux
// client: nfs-ganesha here, its clients in emulated machines. `make test-nfs` runs it.
package nfs_test

import (
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/efssim"
	"dbsupervisor/tests/qemu"
)

const agentEnv = "NFS_AGENT" // where a guest's agent finds the host

func TestMain(m *testing.M) {
	if code, ok := efssim.ServeIfAsked(); ok {
		os.Exit(code)
	}
	if addr := os.Getenv(agentEnv); addr != "" {
		if err := serveHost(addr); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// mountOptions are those that README.md asks for, as mount(2) wants them; the mount command
// adds the addresses.
const mountOptions = "vers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport,lookupcache=positive," +
	"proto=tcp,sec=sys,addr=10.0.2.2,clientaddr=10.0.2.15,port=%d"

// programs are what the guests run, built once.
type programs struct {
	kernel       qemu.Kernel
	agent, lease string
}

func build(t *testing.T) programs {
	t.Helper()
	if os.Getenv("DBSUPERVISOR_QEMU") == "" {
		t.Skip("needs emulated machines: make test-nfs")
	}
	kernel, err := qemu.FetchKernel()
	must(t, err)
	dir := t.TempDir()
	p := programs{kernel: kernel, agent: filepath.Join(dir, "nfs.test"), lease: filepath.Join(dir, "lease.test")}
	for out, pkg := range map[string]string{p.agent: "dbsupervisor/tests/nfs", p.lease: "dbsupervisor/internal/lease"} {
		cmd := exec.Command("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", pkg, err, text)
		}
	}
	return p
}

// guest is one machine with its agent.
type guest struct {
	*qemu.Guest
	t     *testing.T
	name  string
	rpc   *rpc.Client
	nfs   string // mount options
	limit time.Duration
}

// startGuests boots one machine for each host name. The Linux client's NFS client ID comes from
// the host name alone, so that two guests with one name are what cloned images are.
func startGuests(t *testing.T, p programs, s *server, hostnames ...string) []*guest {
	t.Helper()
	out := make([]*guest, len(hostnames))
	errs := make([]error, len(hostnames))
	var wg sync.WaitGroup
	for i, h := range hostnames {
		name := string(rune('a' + i))
		dir := t.TempDir()
		wg.Go(func() { out[i], errs[i] = startGuest(t, p, s, name, h, dir) })
	}
	wg.Wait()
	for i, g := range out {
		if errs[i] == nil {
			t.Cleanup(func() {
				if t.Failed() {
					_ = g.try("Exec", Command{Args: []string{"dmesg"}}, new(int))
				}
				g.kill()
			})
		}
	}
	for _, err := range errs {
		must(t, err)
	}
	return out
}

func startGuest(t *testing.T, p programs, s *server, name, hostname, dir string) (*guest, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	disk := filepath.Join(dir, "disk")
	if out, err := exec.Command("truncate", "-s", "512M", disk).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make disk: %w: %s", err, out)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", disk).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make disk: %w: %s", err, out)
	}
	q, err := qemu.Start(t.Context(), qemu.Config{
		Name: hostname, Kernel: p.kernel, Network: true, Modules: []string{"nfsv4"}, Disks: []string{disk}, Dir: dir,
		Files:  map[string]string{"/test/nfs.test": p.agent, "/test/lease.test": p.lease},
		Script: fmt.Sprintf("%s=%s:%d exec /test/nfs.test", agentEnv, qemu.Gateway, l.Addr().(*net.TCPAddr).Port),
		Log:    func(line string) { t.Logf("guest %s: %s", name, line) },
	})
	if err != nil {
		return nil, err
	}
	go func() { // no connection will come
		<-q.Ended()
		_ = l.Close()
	}()
	c, err := l.Accept()
	if err != nil {
		q.Kill()
		return nil, fmt.Errorf("guest %s does not call: %w", name, err)
	}
	g := &guest{Guest: q, t: t, name: name, rpc: rpc.NewClient(c), nfs: fmt.Sprintf(mountOptions, s.port), limit: 2 * time.Minute}
	if err := g.try("Mount", g.nfs, &None{}); err != nil {
		g.kill()
		return nil, err
	}
	return g, nil
}

func (g *guest) kill() {
	g.Kill()
	_ = g.rpc.Close()
}

// try asks the guest's agent for something.
func (g *guest) try(method string, arg, result any) error {
	call := g.rpc.Go("Agent."+method, arg, result, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
		if call.Error != nil {
			return fmt.Errorf("guest %s: %s: %w", g.name, method, call.Error)
		}
		return nil
	case <-time.After(g.limit):
		return fmt.Errorf("guest %s: %s takes more than %v", g.name, method, g.limit)
	}
}

// ask is try for what must succeed.
func ask[R any](g *guest, method string, arg any) R {
	g.t.Helper()
	var result R
	if err := g.try(method, arg, &result); err != nil {
		g.t.Fatal(err)
	}
	return result
}

// insist asks again where the client of a cloned guest answers with an error.
func insist[R any](g *guest, method string, arg any) R {
	g.t.Helper()
	var result R
	var err error
	for range 20 {
		if err = g.try(method, arg, &result); err == nil || !strings.Contains(err.Error(), syscall.EIO.Error()) {
			break
		}
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return result
}

// both asks all guests at once.
func both[R any](gs []*guest, method string, arg func(i int) any) []R {
	gs[0].t.Helper()
	out, errs := make([]R, len(gs)), make([]error, len(gs))
	var wg sync.WaitGroup
	for i, g := range gs {
		wg.Go(func() { errs[i] = g.try(method, arg(i), &out[i]) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			gs[0].t.Fatal(err)
		}
	}
	return out
}
