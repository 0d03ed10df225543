package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/boottime"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/engine"
	"dbsupervisor/internal/fence"
	"dbsupervisor/internal/fsx"
	"dbsupervisor/internal/lease"
	"dbsupervisor/internal/supervisor"
	volsync "dbsupervisor/internal/sync"
)

const (
	// guardPatience is how long an agent waits at its start for the guard, which systemd
	// may be starting at the same time.
	guardPatience = 15 * time.Second
	// initPatience is how long an agent waits for a cluster that another one is making.
	initPatience = 10 * time.Second
)

// runAgent puts an agent together and runs it until ctx ends (a planned handoff) or an
// operator restarts it.
func runAgent(ctx context.Context, cfg *config.Config, log hclog.Logger) (err error) {
	log.Info("agent starts", "version", programVersion(), "cluster", cfg.Cluster, "instance", cfg.Instance, "config", cfg.File())
	for _, d := range []string{cfg.Dir, cfg.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("create directory: %w", err)
		}
	}
	boot, err := boottime.BootID()
	if err != nil {
		return err
	}
	name, err := claimName(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, name.Close()) }()
	volume, err := openVolume(cfg, boot, cfg.Sync.Tier, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, volume.Close()) }()
	register, store, err := joinCluster(ctx, cfg, log)
	if err != nil {
		return err
	}
	db, err := databaseParts(ctx, cfg, log)
	if err != nil {
		return err
	}
	replica, err := replicaParts(cfg)
	if err != nil {
		return err
	}
	// What is reloaded must not outlive the agent, nor end when it is told to stop.
	live, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	proxies := api.NewProxies()
	sup, err := supervisor.New(supervisor.Config{
		Settings: cfg, Clock: boottime.Real{}, Log: log, FS: fsx.OS{}, Rand: rand.Reader, Version: programVersion(),
		Lease: leaseConfig(cfg, register, boot, log), Store: store, Volume: volume, Database: db,
		Replica: replica(db.Docker),
		Notify:  notifySystemd(log), Reload: reload(live, cfg, log), Proxies: proxies,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sup.Close()) }()
	return serveAgent(ctx, live, stop, cfg, agent{sup, proxies}, log)
}

// agent is a supervisor with the proxies that follow it.
type agent struct {
	*supervisor.Supervisor
	proxies *api.Proxies
}

// claimName makes sure that no other agent on this machine runs under the same names: it
// would take our container for its own. An abstract socket vanishes with its process.
func claimName(cfg *config.Config) (io.Closer, error) {
	l, err := net.Listen("unix", "@dbsupervisor/"+cfg.Cluster+"/"+cfg.Instance)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, api.WithHint(fmt.Errorf("%w: instance name %q of cluster %q is in use on this machine", lease.ErrInstanceInUse, cfg.Instance, cfg.Cluster),
			"stop the other agent, or give this one its own `instance` name")
	}
	if err != nil {
		return nil, fmt.Errorf("claim instance name: %w", err)
	}
	return l, nil
}

// serveAgent runs the supervisor with its socket and health checks, which outlast it so
// that a handoff can be watched.
func serveAgent(ctx, live context.Context, stop context.CancelFunc, cfg *config.Config, sup agent, log hclog.Logger) error {
	var servers sync.WaitGroup
	serve := func(name string, run func(context.Context) error) {
		servers.Go(func() {
			// A server that fails is a pity, but no reason to give the database up.
			if err := run(live); err != nil && live.Err() == nil {
				log.Error("server ended", "server", name, "error", err)
			}
		})
	}
	defer servers.Wait()
	defer stop()
	socket, err := api.NewServer(api.ServerConfig{RunDir: cfg.RunDir, Agent: sup.Supervisor, Log: log.Named("socket")})
	if err != nil {
		return err
	}
	if cfg.HTTP.Listen != "" {
		health, err := api.NewHealth(api.HealthConfig{
			Listen: cfg.HTTP.Listen, Cluster: cfg.Cluster, Instance: cfg.Instance, Version: programVersion(),
			Agent: sup.Supervisor, Clock: boottime.Real{}, Log: log.Named("http"),
			Database: cfg.Database.Ports[0].Host, Reads: readPort(cfg), Proxies: sup.proxies,
		})
		if err != nil {
			return errors.Join(err, socket.Close())
		}
		serve("http", health.Run)
	}
	serve("socket", socket.Run)
	err = sup.Run(ctx)
	log.Info("agent ends", "error", err)
	if err == nil && sup.Restarting() {
		return errRestart
	}
	return err
}

// readPort is where the replica of this machine is read; 0: nowhere.
func readPort(cfg *config.Config) int {
	if !cfg.Replica.Enabled || len(cfg.Replica.Ports) == 0 {
		return 0
	}
	return cfg.Replica.Ports[0].Host
}

// errRestart says that the agent ended to be started again.
var errRestart = errors.New("agent restarts")

// joinCluster opens the register and the store of an existing cluster. Where there is none
// it makes one only if the configuration allows it and this machine has never seen one.
func joinCluster(ctx context.Context, cfg *config.Config, log hclog.Logger) (*lease.FileRegister, *volsync.Store, error) {
	looking, cancel := context.WithTimeout(ctx, shareTimeout+initPatience)
	defer cancel()
	if err := cfg.CheckHost(looking); err != nil {
		return nil, nil, err
	}
	fc := fileConfig(cfg, log.Named("register"))
	reg, err := lease.OpenFile(looking, fc)
	if errors.Is(err, lease.ErrNotInitialised) && cfg.Init == "once" {
		reg, err = makeOrJoin(looking, cfg, fc, log)
	}
	if err != nil {
		return nil, nil, err
	}
	store, err := openStore(cfg, log.Named("store"))
	if err != nil {
		return nil, nil, err
	}
	// Whoever made the cluster may have died before the store's last directory.
	_, err = os.Stat(filepath.Join(cfg.Share, "packs", "ff"))
	if errors.Is(err, fs.ErrNotExist) {
		err = store.Init(looking)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("prepare store: %w", err)
	}
	return reg, store, nil
}

// makeOrJoin makes the cluster, or joins the one that another instance is making just now.
func makeOrJoin(ctx context.Context, cfg *config.Config, fc lease.FileConfig, log hclog.Logger) (*lease.FileRegister, error) {
	id, ierr := initCluster(ctx, cfg, log)
	if ierr == nil {
		log.Info("new cluster made", "cluster_id", id, "share", cfg.Share)
		return lease.OpenFile(ctx, fc)
	}
	if !errors.Is(ierr, lease.ErrInitialised) && !errors.Is(ierr, lease.ErrUnknown) {
		return nil, ierr
	}
	clock := boottime.Real{}
	for end := clock.Now().Add(initPatience); ; {
		reg, err := lease.OpenFile(ctx, fc)
		if err == nil || clock.Now() >= end || !errors.Is(err, lease.ErrNotInitialised) {
			return reg, err
		}
		if err := clock.WaitUntil(ctx, clock.Now().Add(200*time.Millisecond)); err != nil {
			return nil, ierr
		}
	}
}

// databaseParts are the container engine, the fences and the container's description.
func databaseParts(ctx context.Context, cfg *config.Config, log hclog.Logger) (supervisor.DatabaseConfig, error) {
	var none supervisor.DatabaseConfig
	docker, err := newDocker(log)
	if err != nil {
		return none, err
	}
	guard, err := dialGuard(ctx, cfg)
	if err != nil {
		return none, err
	}
	spec, err := containerSpec(cfg)
	if err != nil {
		return none, err
	}
	gate := fence.NewGate(fence.GateConfig{Table: gateTable(cfg), Ports: hostPorts(cfg), Clock: boottime.Real{}, Log: log.Named("gate")})
	return supervisor.DatabaseConfig{Docker: docker, Gate: gate, Guard: guard, Spec: spec, Probe: newProbe(docker, cfg, cfg.Database.Probe)}, nil
}

func dialGuard(ctx context.Context, cfg *config.Config) (*fence.Guard, error) {
	clock := boottime.Real{}
	for end := clock.Now().Add(guardPatience); ; {
		g, err := fence.DialGuard(ctx, cfg.RunDir)
		if err == nil {
			return g, nil
		}
		if clock.Now() >= end || clock.WaitUntil(ctx, clock.Now().Add(200*time.Millisecond)) != nil {
			return nil, api.WithHint(fmt.Errorf("find guard: %w", err), "the agent runs no database without its guard: systemctl start dbsupervisor-guard@"+cfg.Cluster)
		}
	}
}

// gateTable names the firewall table of this instance: letters, digits, _ and - only.
func gateTable(cfg *config.Config) string {
	return "dbsupervisor-" + cfg.Cluster + "-" + strings.ReplaceAll(cfg.Instance, ".", "_")
}

// switchTable names the table that leads the read ports.
func switchTable(cfg *config.Config) string { return gateTable(cfg) + "-r" }

func hostPorts(cfg *config.Config) []uint16 {
	var out []uint16
	for _, p := range cfg.Database.Ports {
		out = append(out, uint16(p.Host)) //nolint:gosec // checked with the configuration
	}
	return out
}

// replicaParts are what reads are served with. They are needed where replicas are off, too:
// what earlier settings left is cleared away.
func replicaParts(cfg *config.Config) (func(supervisor.Containers) *supervisor.ReplicaConfig, error) {
	spec, err := replicaSpec(cfg)
	if err != nil {
		return nil, err
	}
	var ports []fence.SwitchPort
	for _, p := range cfg.Replica.Ports {
		ports = append(ports, fence.SwitchPort{Port: uint16(p.Host), Address: p.Address}) //nolint:gosec // checked with the configuration
	}
	return func(docker supervisor.Containers) *supervisor.ReplicaConfig {
		return &supervisor.ReplicaConfig{
			Switch: fence.NewSwitch(fence.SwitchConfig{Table: switchTable(cfg), Ports: ports}),
			Spec:   spec, Probe: newProbe(docker, cfg, cfg.Replica.ReadOnly.Probe),
		}
	}, nil
}

// notifySystemd tells the service manager, if there is one. Pings of the watchdog are only
// sent where the unit asks for them.
func notifySystemd(log hclog.Logger) func(string) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("watchdog settings of the service manager not understood", "error", err)
	}
	var once sync.Once
	return func(state string) {
		if state == daemon.SdNotifyWatchdog && interval == 0 {
			return
		}
		if _, err := daemon.SdNotify(false, state); err != nil {
			once.Do(func() { log.Warn("service manager not told", "error", err) })
		}
	}
}

// reload follows the configuration file. A file that can't be watched, and settings that
// don't fit the profile, leave what is in force as it is.
func reload(ctx context.Context, cfg *config.Config, log hclog.Logger) <-chan *config.Config {
	log = log.Named("config")
	out := make(chan *config.Config)
	if cfg.File() == "" {
		return out
	}
	in, err := config.Watch(ctx, cfg.File(), log)
	if err != nil {
		log.Warn("configuration is not watched", "error", err)
		return out
	}
	go func() {
		for c := range in {
			if _, err := engine.Resolve(c); err != nil {
				log.Error("new configuration is invalid, keeping the old one", "error", err)
				continue
			}
			select {
			case out <- c:
			case <-ctx.Done():
			}
		}
	}()
	return out
}
