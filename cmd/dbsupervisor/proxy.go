package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"dbsupervisor/internal/api"
	"dbsupervisor/internal/config"
	"dbsupervisor/internal/proxy"
)

func (a *app) proxyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "proxy --config FILE",
		Short: "Connect clients to whichever instance is primary, and let them wait while none is",
		Long: "Run a proxy: clients connect to it, it connects them to whichever instance is primary, and\n" +
			"lets them wait while none is. It has a configuration of its own (dbsupervisor proxy example)\n" +
			"and needs neither root, share nor Docker. SIGTERM lets connections finish (drain).",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.loadProxy()
			if err != nil {
				return err
			}
			return runProxy(cmd.Context(), cfg, a.logger(cfg.Log))
		},
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "check", Short: "Check a proxy's configuration", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error {
				cfg, err := a.loadProxy()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(a.out, "%s is valid: cluster %s, %d agents, clients connect to %s\n", a.configPath, cfg.Cluster, len(cfg.Agents), cfg.Write.Listen)
				return err
			},
		},
		&cobra.Command{
			Use: "example", Short: "Print a commented example configuration of a proxy", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error {
				_, err := fmt.Fprint(a.out, config.ProxyExample())
				return err
			},
		},
	)
	return cmd
}

// loadProxy reads the file that --config names: which of several proxies is meant can't be
// guessed.
func (a *app) loadProxy() (*config.Proxy, error) {
	if a.configPath == "" {
		return nil, &usageError{err: fmt.Errorf("no configuration named"), help: "dbsupervisor proxy"}
	}
	return config.LoadProxy(a.configPath)
}

func proxyConfig(c *config.Proxy, log hclog.Logger) proxy.Config {
	pc := proxy.Config{
		Cluster: c.Cluster, Agents: c.Agents, LookUpEvery: c.LookUp,
		Write:  proxy.Listener{Listen: c.Write.Listen, Port: c.Write.Port, Most: c.Write.Connections, SendHeader: c.Write.ProxyProtocol},
		Read:   proxy.Listener{Listen: c.Read.Listen, Port: c.Read.Port, Most: c.Read.Connections, SendHeader: c.Read.ProxyProtocol},
		MaxAge: c.Read.MaxAge, ReadPrimary: c.Read.Primary,
		HoldTime: c.Hold.Time, HoldMost: c.Hold.Connections, Most: c.Limits.Connections, MostSource: c.Limits.PerSource,
		DialTimeout: c.ConnectTimeout, UserTimeout: c.UserTimeout, Drain: c.Drain,
		KeepAlive: net.KeepAliveConfig{Enable: true, Idle: c.KeepAlive, Interval: c.KeepAlive / 3, Count: 3},
		Log:       log.Named("proxy"),
	}
	for _, n := range c.ProxyProtocolFrom {
		pc.TrustFrom = append(pc.TrustFrom, netip.MustParsePrefix(n)) // checked with the configuration
	}
	return pc
}

// runProxy runs until ctx ends and its clients have gone.
func runProxy(ctx context.Context, c *config.Proxy, log hclog.Logger) error {
	p, err := proxy.New(proxyConfig(c, log))
	if err != nil {
		return api.WithHint(err, "another program uses the port: change write.listen or read.listen")
	}
	live, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if c.HTTP.Listen != "" {
		l, err := net.Listen("tcp", c.HTTP.Listen)
		if err != nil {
			_ = p.Close()
			return api.WithHint(fmt.Errorf("listen for health checks: %w", err), "another program uses the port: change http.listen")
		}
		go func() {
			if err := p.Health(live, l); err != nil {
				log.Error("server ended", "server", "http", "error", err)
			}
		}()
	}
	log.Info("proxy starts", "version", programVersion(), "cluster", c.Cluster, "listen", c.Write.Listen)
	notify := notifySystemd(log)
	notify(daemon.SdNotifyReady)
	defer context.AfterFunc(ctx, func() { notify(daemon.SdNotifyStopping) })()
	return p.Run(ctx)
}
