// Package cluster runs real agents, guards and databases on this machine, for tests, the
// demo and benchmarks: every instance is a pair of processes with its own local directory,
// its own ports and the shared directory.
package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"dbsupervisor/internal/api"
)

// Options describe a cluster. Zero values have sensible defaults for tests.
type Options struct {
	Root     string        // a directory of the cluster's own; required
	Binary   string        // the program; required
	Image    string        // of the database; default dbsupervisor/postgres:15
	Engine   string        // profile; default postgres
	Port     int           // the database's own; default 5432
	Env      string        // lines of env_file, with %s for the password; default PostgreSQL's
	TTL      time.Duration // default 10s
	Renew    time.Duration // default 2s
	Margin   time.Duration // default 2s
	Schedule string        // default "@every 5s"
	Grace    time.Duration // retention's grace; default 1h
	KeepAll  time.Duration // retention.all; default 1h
	MinFree  string        // sync.min_free; default 64MiB
	Extra    string        // more YAML, at the top level
	// Sync and Retention are more YAML for the sections of that name, indented by two.
	Sync, Retention string
	// Database is more YAML for the database section, indented by two.
	Database string
	// Replica is YAML for the replica section, indented by two; "" leaves the section out, and
	// instances serve no reads. The read port is the instance's ReadPort.
	Replica string
	// DockerHost is the engine that instances are given by Add ("unix:///..."); "" is the
	// machine's own.
	DockerHost string
}

// Cluster is a set of instances.
type Cluster struct {
	Options
	Name      string
	Share     string
	Password  string
	Instances []*Instance
}

// Instance is one "machine".
type Instance struct {
	c      *Cluster
	Name   string
	Dir    string // local disk
	RunDir string
	Share  string // where it sees the shared directory
	Config string
	Port   int // the stable write port
	HTTP   int
	// ReadPort is the stable read port (Options.Replica).
	ReadPort int
	// DockerHost is the engine of this instance, Options.DockerHost at first.
	DockerHost string

	mu    sync.Mutex
	agent *process
	guard *process
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// New prepares a cluster; nothing runs yet.
func New(o Options) (*Cluster, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.TTL, 10*time.Second)
	def(&o.Renew, 2*time.Second)
	def(&o.Margin, 2*time.Second)
	def(&o.Grace, time.Hour)
	def(&o.KeepAll, time.Hour)
	if o.Engine == "" {
		o.Engine, o.Port, o.Env = "postgres", 5432, "POSTGRES_PASSWORD=%s"
		o.Database = "  command: [postgres, -c, fsync=on, -c, shared_buffers=128MB]\n" + o.Database
	}
	if o.Image == "" {
		o.Image = "dbsupervisor/postgres:15"
	}
	if o.MinFree == "" {
		o.MinFree = "64MiB"
	}
	if o.Schedule == "" {
		o.Schedule = "@every 5s"
	}
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	c := &Cluster{Options: o, Name: "t" + hex.EncodeToString(b[:]), Share: filepath.Join(o.Root, "share"), Password: "pw-" + hex.EncodeToString(b[:])}
	if err := os.MkdirAll(c.Share, 0o755); err != nil {
		return nil, err
	}
	return c, nil
}

// Add prepares another instance that sees the shared directory at share ("" for the
// directory itself).
func (c *Cluster) Add(share string) (*Instance, error) {
	if share == "" {
		share = c.Share
	}
	i := &Instance{c: c, Name: fmt.Sprintf("%s-%c", c.Name, 'a'+len(c.Instances)), Share: share, DockerHost: c.DockerHost}
	i.Dir = filepath.Join(c.Root, i.Name)
	i.RunDir = filepath.Join(c.Root, i.Name+".run")
	i.Config = filepath.Join(c.Root, i.Name+".yaml")
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	i.Port, i.HTTP, i.ReadPort = ports[0], ports[1], ports[2]
	if err := os.MkdirAll(i.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := i.WriteConfig(c.Schedule); err != nil {
		return nil, err
	}
	c.Instances = append(c.Instances, i)
	return i, nil
}

// WriteConfig writes the instance's configuration file (again).
func (i *Instance) WriteConfig(schedule string) error {
	c := i.c
	env := filepath.Join(c.Root, "database.env")
	if err := os.WriteFile(env, []byte(strings.ReplaceAll(c.Env, "%s", c.Password)+"\n"), 0o600); err != nil {
		return err
	}
	text := fmt.Sprintf(`cluster: %s
instance: %s
advertise: 127.0.0.1
share: %s
dir: %s
run_dir: %s
init: once
lease:
  ttl: %s
  renew_interval: %s
  op_timeout: %s
  margin: %s
sync:
  schedule: %q
  min_free: %s
%sretention:
  all: %s
  grace: %s
%shttp:
  listen: 127.0.0.1:%d
database:
  engine: %s
  image: %s
  env_file: %s
  probe_interval: 500ms
  ports:
    - container: %d
      host: %d
      address: 127.0.0.1
%s%s`, c.Name, i.Name, i.Share, i.Dir, i.RunDir, c.TTL, c.Renew, c.Renew, c.Margin, schedule, c.MinFree, c.Sync,
		c.KeepAll, c.Grace, c.Retention, i.HTTP, c.Engine, c.Image, env, c.Options.Port, i.Port, c.Database, c.Extra)
	if c.Replica != "" {
		text += fmt.Sprintf("\nreplica:\n  ports:\n    - host: %d\n%s\n", i.ReadPort, c.Replica)
	}
	return os.WriteFile(i.Config, []byte(text), 0o600)
}

func freePorts(n int) ([]int, error) {
	var out []int
	var ls []net.Listener
	defer func() {
		for _, l := range ls {
			_ = l.Close()
		}
	}()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		ls = append(ls, l)
		out = append(out, l.Addr().(*net.TCPAddr).Port)
	}
	return out, nil
}

// Start starts guard and agent.
func (i *Instance) Start() error {
	if err := i.StartGuard(); err != nil {
		return err
	}
	return i.StartAgent()
}

// StartGuard starts the guard process.
func (i *Instance) StartGuard() error {
	p, err := i.spawn("guard")
	i.mu.Lock()
	i.guard = p
	i.mu.Unlock()
	return err
}

// StartAgent starts the agent process.
func (i *Instance) StartAgent() error {
	p, err := i.spawn("run")
	i.mu.Lock()
	i.agent = p
	i.mu.Unlock()
	return err
}

func (i *Instance) spawn(command string) (*process, error) {
	log, err := os.OpenFile(i.LogPath(command), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(i.c.Binary, command, "--config", i.Config)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = withEngine(i.DockerHost)
	// Its own process group: a signal to the test is not a signal to the instance.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", command, err)
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() { p.err = cmd.Wait(); close(p.done) }()
	return p, nil
}

// LogPath is where the process's output goes ("run" or "guard").
func (i *Instance) LogPath(command string) string {
	return filepath.Join(i.c.Root, i.Name+"."+command+".log")
}

// SignalAgent sends a signal to the agent alone.
func (i *Instance) SignalAgent(sig syscall.Signal) error { return i.signal(&i.agent, sig) }

// SignalGuard sends a signal to the guard alone.
func (i *Instance) SignalGuard(sig syscall.Signal) error { return i.signal(&i.guard, sig) }

func (i *Instance) signal(p **process, sig syscall.Signal) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if *p == nil {
		return errors.New("not running")
	}
	return (*p).cmd.Process.Signal(sig)
}

// AgentPID is the agent's process ID, 0 without one.
func (i *Instance) AgentPID() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.agent == nil {
		return 0
	}
	return i.agent.cmd.Process.Pid
}

// WaitAgent waits until the agent has ended.
func (i *Instance) WaitAgent(ctx context.Context) error {
	i.mu.Lock()
	p := i.agent
	i.mu.Unlock()
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("agent of %s still runs: %w", i.Name, ctx.Err())
	}
}

// Container returns the full ID of the instance's running container, "" without one.
func (i *Instance) Container(ctx context.Context) (string, error) {
	out, err := docker(ctx, i.DockerHost, "ps", "-q", "--no-trunc",
		"--filter", "label=dbsupervisor.cluster="+i.c.Name, "--filter", "label=dbsupervisor.instance="+i.Name,
		"--filter", "label=dbsupervisor.role=primary").Output()
	if err != nil {
		return "", fmt.Errorf("docker ps: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Copies returns the full IDs of the instance's read-only copies that run, by name.
func (i *Instance) Copies(ctx context.Context) ([]string, error) {
	out, err := docker(ctx, i.DockerHost, "ps", "-q", "--no-trunc",
		"--filter", "label=dbsupervisor.cluster="+i.c.Name, "--filter", "label=dbsupervisor.instance="+i.Name,
		"--filter", "label=dbsupervisor.role=replica").Output()
	if err != nil {
		return nil, fmt.Errorf("docker ps: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// ReadURL is how a reader connects to this instance's stable read port at one of this
// machine's addresses.
func (i *Instance) ReadURL(address string) string {
	return fmt.Sprintf("postgres://postgres:%s@%s:%d/postgres?connect_timeout=30&sslmode=disable", i.c.Password, address, i.ReadPort)
}

// ReplicaLive is what an instance's /replica answers.
type ReplicaLive struct {
	OK       bool   `json:"ok"`
	Reason   string `json:"reason"`
	Snapshot string `json:"snapshot"`
	Token    string `json:"token"`
	AgeMS    *int64 `json:"age_ms"`
}

// AskReplica asks /replica with these wishes ("max_age=5s").
func (i *Instance) AskReplica(ctx context.Context, wishes string) (ReplicaLive, error) {
	var v ReplicaLive
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/replica?%s", i.HTTP, wishes), nil)
	if err != nil {
		return v, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return v, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&v); err != nil {
		return v, err
	}
	if v.OK != (res.StatusCode == http.StatusOK) {
		return v, fmt.Errorf("status %s with ok: %t", res.Status, v.OK)
	}
	return v, nil
}

// Crash is the loss of a machine: agent, guard and containers are killed with SIGKILL.
func (i *Instance) Crash(ctx context.Context) error {
	id, err := i.Container(ctx)
	_ = i.SignalAgent(syscall.SIGKILL)
	_ = i.SignalGuard(syscall.SIGKILL)
	if copies, cerr := i.Copies(ctx); cerr == nil {
		for _, c := range copies {
			err = errors.Join(err, docker(ctx, i.DockerHost, "kill", c).Run())
		}
	}
	if id != "" {
		if kerr := docker(ctx, i.DockerHost, "kill", id).Run(); err == nil {
			err = kerr
		}
	}
	for _, p := range []*process{i.agent, i.guard} {
		if p != nil {
			<-p.done
		}
	}
	return err
}

// EraseDisk is what happens to the local disk of a terminated machine.
func (i *Instance) EraseDisk() error {
	return errors.Join(os.RemoveAll(i.Dir), os.RemoveAll(i.RunDir))
}

// Stop asks the agent to stop (a planned handoff) and ends the guard after it.
func (i *Instance) Stop(ctx context.Context) error {
	if err := i.SignalAgent(syscall.SIGTERM); err != nil {
		return err
	}
	if err := i.WaitAgent(ctx); err != nil {
		return err
	}
	_ = i.SignalGuard(syscall.SIGTERM)
	return nil
}

// CLI runs a command of the program against this instance.
func (i *Instance) CLI(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, i.c.Binary, append(args, "--config", i.Config)...)
	cmd.Env = withEngine(i.DockerHost)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("dbsupervisor %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errb.String()))
	}
	return out.String(), err
}

// Status asks the agent.
func (i *Instance) Status(ctx context.Context) (api.Status, error) {
	return api.NewClient(i.RunDir).Status(ctx)
}

// healthPatience is how long a load balancer would wait: an agent that is stopped takes the
// connection and never answers.
const healthPatience = time.Second

// Is asks an HTTP endpoint ("primary", "replica", "health") and says whether it is 200.
func (i *Instance) Is(ctx context.Context, endpoint string) bool {
	ctx, cancel := context.WithTimeout(ctx, healthPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/%s", i.HTTP, endpoint), nil)
	if err != nil {
		return false
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// URL is how a client connects to this instance's stable port.
func (i *Instance) URL() string {
	return fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/postgres?connect_timeout=2&sslmode=disable", i.c.Password, i.Port)
}

// Connect opens a connection to the database through the stable port.
func (i *Instance) Connect(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, i.URL()) }

// Primary returns the instance whose /primary is 200 now, nil without one.
func (c *Cluster) Primary(ctx context.Context) *Instance {
	for _, i := range c.Instances {
		if i.Is(ctx, "primary") {
			return i
		}
	}
	return nil
}

// WaitPrimary waits for a primary that is none of those given.
func (c *Cluster) WaitPrimary(ctx context.Context, not ...*Instance) (*Instance, error) {
	var found *Instance
	err := Until(ctx, func() bool {
		if c.allEnded() {
			return true
		}
		p := c.Primary(ctx)
		for _, n := range not {
			if p == n {
				return false
			}
		}
		found = p
		return p != nil
	})
	if err == nil && found == nil {
		err = errors.New("every agent has ended, see its log")
	}
	if err != nil {
		return nil, fmt.Errorf("no primary: %w", err)
	}
	return found, nil
}

func (c *Cluster) allEnded() bool {
	for _, i := range c.Instances {
		if !i.Ended() {
			return false
		}
	}
	return true
}

// WaitWarm waits until the instance is a standby whose copy is at head.
func (i *Instance) WaitWarm(ctx context.Context) error {
	var last api.Status
	err := Until(ctx, func() bool {
		st, err := i.Status(ctx)
		last = st
		return err == nil && st.Role == api.RoleStandby && st.Head != nil && st.Local.Base == st.Head.ID && st.Local.Phase == "clean"
	})
	if err != nil {
		return fmt.Errorf("%s is not warm (role %s, base %s): %w", i.Name, last.Role, last.Local.Base, err)
	}
	return nil
}

// Until polls a condition until it holds or ctx ends.
func Until(ctx context.Context, cond func() bool) error {
	for !cond() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// Close ends everything that belongs to the cluster: processes by their ID, containers and
// firewall tables by the cluster's name. Directories stay.
func (c *Cluster) Close() error {
	for _, i := range c.Instances {
		for _, p := range []*process{i.agent, i.guard} {
			if p == nil {
				continue
			}
			_ = p.cmd.Process.Signal(syscall.SIGCONT)
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
	return c.sweep()
}

// docker is a command of an engine.
func docker(ctx context.Context, host string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = withEngine(host)
	return cmd
}

// withEngine is the environment that leads to an engine; nil (our own) for the machine's.
func withEngine(host string) []string {
	if host == "" {
		return nil
	}
	return append(os.Environ(), "DOCKER_HOST="+host)
}

// sweep removes containers and firewall tables.
func (c *Cluster) sweep() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	name := c.Name
	hosts := []string{c.DockerHost}
	for _, i := range c.Instances {
		if !slices.Contains(hosts, i.DockerHost) {
			hosts = append(hosts, i.DockerHost)
		}
	}
	var errs []error
	for _, host := range hosts {
		out, err := docker(ctx, host, "ps", "-aq", "--filter", "label=dbsupervisor.cluster="+name).Output()
		errs = append(errs, err)
		for _, id := range strings.Fields(string(out)) {
			// A frozen container can't be removed.
			_ = docker(ctx, host, "unpause", id).Run()
			errs = append(errs, docker(ctx, host, "rm", "-f", "-v", id).Run())
		}
	}
	tables, err := exec.CommandContext(ctx, "nft", "list", "tables").Output()
	errs = append(errs, err)
	for _, line := range strings.Split(string(tables), "\n") {
		if f := strings.Fields(line); len(f) == 3 && strings.Contains(f[2], name) {
			errs = append(errs, exec.CommandContext(ctx, "nft", "delete", "table", f[1], f[2]).Run())
		}
	}
	return errors.Join(errs...)
}

// kept is what Keep writes down.
type kept struct {
	Name string         `json:"name"`
	Root string         `json:"root"`
	PIDs map[int]string `json:"pids"` // process ID -> start time as in /proc
}

// Keep writes down what runs, so that StopKept can end it after this process has gone.
func (c *Cluster) Keep(path string) error {
	k := kept{Name: c.Name, Root: c.Root, PIDs: map[int]string{}}
	for _, i := range c.Instances {
		for _, p := range []*process{i.agent, i.guard} {
			if p != nil {
				k.PIDs[p.cmd.Process.Pid] = startTime(p.cmd.Process.Pid)
			}
		}
	}
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

// startTime tells a process from a later one with the same ID.
func startTime(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The command's name, in parentheses, may contain spaces; field 22 is counted after it.
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 20 {
		return ""
	}
	return f[19]
}

// StopKept ends what Keep wrote down, directories included.
func StopKept(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var k kept
	if err := json.Unmarshal(b, &k); err != nil {
		return err
	}
	for pid, began := range k.PIDs {
		if began != "" && startTime(pid) == began {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return errors.Join((&Cluster{Name: k.Name}).sweep(), os.RemoveAll(k.Root), os.Remove(path))
}

// Pgbench runs pgbench inside of the instance's container.
func (i *Instance) Pgbench(ctx context.Context, args ...string) error {
	_, err := i.Exec(ctx, append([]string{"pgbench", "-h", "/var/run/postgresql", "-U", "postgres"}, append(args, "postgres")...)...)
	return err
}

// Exec runs a command inside of the instance's container and returns its output.
func (i *Instance) Exec(ctx context.Context, args ...string) (string, error) {
	id, err := i.Container(ctx)
	if err != nil {
		return "", err
	}
	if id == "" {
		return "", fmt.Errorf("%s runs no container", i.Name)
	}
	cmd := docker(ctx, i.DockerHost, append([]string{"exec", "-e", "PGPASSWORD=" + i.c.Password, id}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// Ended says whether the agent has ended by itself.
func (i *Instance) Ended() bool {
	i.mu.Lock()
	p := i.agent
	i.mu.Unlock()
	if p == nil {
		return true
	}
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}
