package qemu

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Gateway is the host's loopback, seen from a guest.
const Gateway = "10.0.2.2"

// bootLimit is how long a guest may take until its script begins; 5 s are usual.
const bootLimit = 2 * time.Minute

// Errors of a guest.
var (
	// ErrHung: the guest did not come up, or did not end in its time. It has been killed.
	ErrHung = errors.New("the guest hangs")
	// ErrDied: the guest ended without saying how its script ended.
	ErrDied = errors.New("the guest died")
)

// Config says what a guest is.
type Config struct {
	Name    string // host name, and the prefix of its output
	Kernel  Kernel
	Modules []string // by name; what they depend on is found
	// Programs of the host's are copied with their libraries.
	Programs []string
	// Files are copied: the host's file or directory by the guest's path.
	Files map[string]string
	// Script is run by busybox's sh, as root, in /test, with /proc, /sys, /dev, /run and
	// /tmp (memory) mounted, loopback up and, with Network, 10.0.2.15 on eth0. Its exit
	// status is the guest's.
	Script  string
	Network bool
	Memory  int      // MiB; default 512
	Disks   []string // raw images on the host, /dev/vda and so on
	// Dir is where the initramfs is made; one for each guest.
	Dir string
	// Log gets every line that the guest writes, and what happens to it.
	Log func(line string)
}

// Guest is a running machine. Kill it at the end; Kill may be called at any time.
type Guest struct {
	cfg    Config
	mark   string
	cancel context.CancelFunc
	up     chan struct{}
	ended  chan struct{}

	mu     sync.Mutex
	status int
	known  bool // status was seen
	err    error
}

// Start boots a guest and waits until its script begins. A guest that does not come up is
// killed and, visibly, started once more.
func Start(ctx context.Context, cfg Config) (*Guest, error) {
	if cfg.Log == nil {
		cfg.Log = func(string) {}
	}
	mark := rand.Text()
	if err := writeInitramfs(cfg, mark); err != nil {
		return nil, fmt.Errorf("start guest %s: make initramfs: %w", cfg.Name, err)
	}
	var g *Guest
	for try := range 2 {
		g = boot(ctx, cfg, mark)
		select {
		case <-g.up:
			return g, nil
		case <-g.ended:
		case <-time.After(bootLimit):
			g.Kill()
		}
		if ctx.Err() != nil {
			break
		}
		if try == 0 {
			cfg.Log(fmt.Sprintf("NOT UP, STARTED ONCE MORE (%v)", g.err))
		}
	}
	return nil, fmt.Errorf("start guest %s: %w: %w", cfg.Name, ErrHung, errors.Join(ctx.Err(), g.err))
}

// Run boots a guest and waits for the end of its script, whose exit status it returns. A
// guest that does not end within limit is killed and, visibly, tried once more.
func Run(ctx context.Context, cfg Config, limit time.Duration) (status int, err error) {
	for try := range 2 {
		var g *Guest
		if g, err = Start(ctx, cfg); err != nil {
			return 0, err
		}
		wctx, cancel := context.WithTimeout(ctx, limit)
		status, err = g.Wait(wctx)
		cancel()
		g.Kill()
		if !errors.Is(err, ErrHung) || ctx.Err() != nil {
			break
		}
		if try == 0 && cfg.Log != nil {
			cfg.Log(fmt.Sprintf("HUNG FOR %v, STARTED ONCE MORE", limit))
		}
	}
	return status, err
}

// Wait waits for the end of the script and returns its exit status.
func (g *Guest) Wait(ctx context.Context) (status int, err error) {
	select {
	case <-g.ended:
	case <-ctx.Done():
		g.Kill()
		return 0, fmt.Errorf("wait for guest %s: %w: %w", g.cfg.Name, ErrHung, context.Cause(ctx))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.known {
		return 0, fmt.Errorf("wait for guest %s: %w: %w", g.cfg.Name, ErrDied, g.err)
	}
	return g.status, nil
}

// Kill ends the machine as a power failure would, and returns when it is gone.
func (g *Guest) Kill() {
	g.cancel()
	<-g.ended
}

// Ended is closed when the machine is gone.
func (g *Guest) Ended() <-chan struct{} { return g.ended }

func initramfs(cfg Config) string { return filepath.Join(cfg.Dir, cfg.Name+".cpio") }

func writeInitramfs(cfg Config, mark string) (err error) {
	f, err := os.Create(initramfs(cfg))
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	buf := bufio.NewWriter(f)
	a := newArchive(buf)
	for _, d := range []string{"/bin", "/sbin", "/dev", "/proc", "/sys", "/run", "/tmp", "/mnt", "/test", "/modules", "/etc"} {
		if err := a.dir(d); err != nil {
			return err
		}
	}
	if err := a.program("/bin", "busybox"); err != nil {
		return err
	}
	modules := cfg.Modules
	if cfg.Network {
		modules = append([]string{"virtio_pci", "virtio_net"}, modules...)
	}
	if len(cfg.Disks) > 0 {
		modules = append([]string{"virtio_pci", "virtio_blk"}, modules...)
	}
	files, err := cfg.Kernel.loadOrder(modules...)
	if err != nil {
		return err
	}
	var load strings.Builder
	for _, m := range files {
		name := filepath.Base(m)
		if err := a.copy("/modules/"+name, m); err != nil {
			return err
		}
		fmt.Fprintf(&load, "insmod /modules/%s\n", name)
	}
	for _, p := range cfg.Programs {
		if err := a.program("/sbin", p); err != nil {
			return err
		}
	}
	for to, from := range cfg.Files {
		if err := a.copy(to, from); err != nil {
			return err
		}
	}
	if err := a.data("/test/script", 0o755, []byte(cfg.Script)); err != nil {
		return err
	}
	network := ""
	if cfg.Network {
		network = "ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0 && ip route add default via " + Gateway + "\n"
	}
	if err := a.data("/init", 0o755, []byte(strings.NewReplacer(
		"@LOAD@", load.String(), "@NETWORK@", network, "@NAME@", cfg.Name, "@MARK@", mark,
	).Replace(initScript))); err != nil {
		return err
	}
	if err := a.close(); err != nil {
		return err
	}
	return buf.Flush()
}

const initScript = `#!/bin/busybox sh
/bin/busybox mkdir -p /usr/bin /usr/sbin
/bin/busybox --install -s
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing
mount -t cgroup2 cgroup2 /sys/fs/cgroup
chmod 1777 /tmp /dev/shm
echo "root:x:0:0:root:/tmp:/bin/sh" >/etc/passwd
hostname @NAME@
ip link set lo up
@LOAD@@NETWORK@printf '\n@MARK@ up %s\n' "$(cut -d' ' -f1 /proc/uptime)"
cd /test
sh /test/script </dev/null
printf '\n@MARK@ status %s\n' $?
sync
poweroff -f
`

func boot(ctx context.Context, cfg Config, mark string) *Guest {
	ctx, cancel := context.WithCancel(ctx)
	g := &Guest{cfg: cfg, mark: mark, cancel: cancel, up: make(chan struct{}), ended: make(chan struct{})}
	memory := cfg.Memory
	if memory == 0 {
		memory = 512
	}
	// q35 with software emulation: works where there is no KVM, and always the same.
	args := []string{
		"-M", "q35", "-accel", "tcg", "-cpu", "qemu64,+rdrand", "-smp", "1", "-m", fmt.Sprint(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", cfg.Kernel.image, "-initrd", initramfs(cfg),
		"-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on",
	}
	if cfg.Network {
		args = append(args, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	for i, d := range cfg.Disks {
		args = append(args, "-drive", fmt.Sprintf("file=%s,format=raw,if=none,id=disk%d", d, i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	go func() {
		err := g.follow(cmd)
		cancel()
		g.mu.Lock()
		g.err = err
		g.mu.Unlock()
		close(g.ended)
	}()
	return g
}

// follow runs QEMU until it ends.
func (g *Guest) follow(cmd *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	p, err := StartProcess(cmd)
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	g.read(r) // until it has closed its end
	<-p.Done()
	if p.Err() != nil {
		return fmt.Errorf("qemu: %w", p.Err())
	}
	return nil
}

func (g *Guest) read(r io.Reader) {
	lines := bufio.NewReader(r)
	isUp := false
	for {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		_, said, marked := strings.Cut(line, g.mark+" ")
		switch {
		case marked && strings.HasPrefix(said, "up ") && !isUp:
			isUp = true
			close(g.up)
			g.cfg.Log("up after " + strings.TrimPrefix(said, "up ") + " s of its time")
		case marked && strings.HasPrefix(said, "status "):
			g.mu.Lock()
			_, serr := fmt.Sscanf(said, "status %d", &g.status)
			g.known = serr == nil
			g.mu.Unlock()
		case line != "":
			g.cfg.Log(line)
		}
		if err != nil {
			return
		}
	}
}
