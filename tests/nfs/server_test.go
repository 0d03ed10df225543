package nfs_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dbsupervisor/tests/qemu"
)

// server is nfs-ganesha in user space, on a port of the loopback and a file system of its own.
type server struct {
	dir   string
	share string // what it exports, on this side
	port  int
	proc  *qemu.Process
	bus   *qemu.Process
}

const ganeshaConf = `
NFS_CORE_PARAM {
	Protocols = 4;
	NFS_Port = @PORT@;
	Bind_addr = 127.0.0.1;
	Enable_NLM = false;
	Enable_RQUOTA = false;
	Enable_UDP = false;
	Enable_NFS_Stats = true;
	Enable_FULLV4_Stats = true;
}
NFSv4 {
	Minor_Versions = 1;
	Grace_Period = 20;
	Lease_Lifetime = 20;
	RecoveryBackend = fs;
	RecoveryRoot = "@DIR@/recovery";
	Only_Numeric_Owners = true;
	Delegations = false;
}
EXPORT {
	Export_Id = 1;
	Path = "@SHARE@";
	Pseudo = "/share";
	Protocols = 4;
	Transports = TCP;
	Access_Type = RW;
	Squash = No_Root_Squash;
	SecType = sys;
	MaxRead = 1048576;
	MaxWrite = 1048576;
	FSAL { Name = VFS; }
}
LOG { Default_Log_Level = EVENT; }
`

// The server reports on a message bus, and this one is nobody else's.
const busConf = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>custom</type><listen>unix:path=@DIR@/bus</listen><policy context="default">
<allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
`

func newServer(t *testing.T) *server {
	t.Helper()
	// Not t.TempDir: a socket's path may have 107 bytes.
	dir, err := os.MkdirTemp("", "dbsupervisor-nfs-")
	must(t, err)
	s := &server{dir: dir, share: filepath.Join(dir, "share")}
	must(t, os.MkdirAll(s.share, 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "recovery"), 0o755))
	image := filepath.Join(dir, "share.img")
	run(t, "truncate", "-s", "1G", image)
	run(t, "mkfs.ext4", "-q", "-F", image)
	run(t, "mount", "-o", "loop", image, s.share)
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(s.path("log"))
			t.Logf("the server says:\n%s", log)
		}
		s.proc.Stop()
		s.bus.Stop()
		run(t, "umount", s.share)
		must(t, os.RemoveAll(dir))
	})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s.port = free.Addr().(*net.TCPAddr).Port
	must(t, free.Close())
	fill := strings.NewReplacer("@DIR@", dir, "@SHARE@", s.share, "@PORT@", fmt.Sprint(s.port))
	must(t, os.WriteFile(s.path("ganesha.conf"), []byte(fill.Replace(ganeshaConf)), 0o600))
	must(t, os.WriteFile(s.path("bus.conf"), []byte(fill.Replace(busConf)), 0o600))
	s.bus, err = qemu.StartProcess(exec.Command("dbus-daemon", "--config-file="+s.path("bus.conf"), "--nofork", "--nopidfile"))
	must(t, err)
	eventually(t, "the message bus is there", 10*time.Second, func() bool {
		_, err := os.Stat(s.path("bus"))
		return err == nil
	})
	s.start(t)
	return s
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

// start starts the server, at the first time or after a kill, and waits until it accepts.
func (s *server) start(t *testing.T) {
	t.Helper()
	cmd := exec.Command("ganesha.nfsd", "-F", "-f", s.path("ganesha.conf"), "-p", s.path("pid"), "-L", s.path("log"))
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+s.path("bus"))
	var err error
	s.proc, err = qemu.StartProcess(cmd)
	must(t, err)
	eventually(t, "the server accepts", 30*time.Second, func() bool {
		select {
		case <-s.proc.Done():
			log, _ := os.ReadFile(s.path("log"))
			t.Fatalf("the server ended: %v\n%s", s.proc.Err(), log)
		default:
		}
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", s.port), time.Second)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
}

// pause and resume stop the server in the middle of whatever it does.
func (s *server) pause(t *testing.T)  { must(t, s.proc.Signal(syscall.SIGSTOP)) }
func (s *server) resume(t *testing.T) { must(t, s.proc.Signal(syscall.SIGCONT)) }

// kill ends the server as a crash would: it forgets all it knew of its clients but their names.
func (s *server) kill() { s.proc.Stop() }

// counts returns how often the server did each operation since it was started.
func (s *server) counts(t *testing.T) map[string]int {
	t.Helper()
	out := run(t, "dbus-send", "--bus=unix:path="+s.path("bus"), "--print-reply", "--dest=org.ganesha.nfsd",
		"/org/ganesha/nfsd/ExportMgr", "org.ganesha.nfsd.exportstats.GetFULLV4Stats")
	counts := map[string]int{}
	op := ""
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		var n int
		if name, ok := strings.CutPrefix(line, `string "`); ok {
			op = strings.TrimSuffix(name, `"`)
		} else if _, err := fmt.Sscanf(line, "uint64 %d", &n); err == nil && op != "" {
			// The first number behind a name; errors follow.
			counts[op] = n
			op = ""
		}
	}
	delete(counts, "None")
	delete(counts, "OK")
	return counts
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func eventually(t testing.TB, what string, limit time.Duration, f func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}
