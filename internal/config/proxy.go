package config

import (
	"bytes"
	_ "embed"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/goccy/go-yaml"
)

// Proxy is the configuration of `dbsupervisor proxy`, a file of its own: application hosts
// have no agent. Zero values are replaced by the defaults named here when it is loaded.
type Proxy struct {
	// Cluster is the name of the cluster; what agents of another one say is not believed.
	// Required.
	Cluster string `yaml:"cluster"`
	// Agents are the health servers (http.listen) of all instances, host:port; the port may
	// be left out where it is 8008. A host name stands for all its addresses. Required.
	Agents []string `yaml:"agents"`
	// LookUp is how often host names are resolved again. Default 5s.
	LookUp time.Duration `yaml:"look_up"`

	Write  ProxyWrite  `yaml:"write"`
	Read   ProxyRead   `yaml:"read"`
	Hold   ProxyHold   `yaml:"hold"`
	Limits ProxyLimits `yaml:"limits"`

	// ConnectTimeout is how long an instance may take to accept a connection. Default 1s.
	ConnectTimeout time.Duration `yaml:"connect_timeout"`
	// UserTimeout is how long a client may leave unread what the database sends before it
	// is cut off. Default 10m; 0: for ever.
	UserTimeout time.Duration `yaml:"user_timeout"`
	// KeepAlive is the time after which a silent peer is asked for a sign of life; three
	// that stay out, a third of it apart, end the connection. Default 30s.
	KeepAlive time.Duration `yaml:"keep_alive"`
	// Drain is how long connections may go on after the proxy was told to stop. Default 30s.
	Drain time.Duration `yaml:"drain"`
	// ProxyProtocolFrom are the networks of load balancers in front of the proxy, whose
	// connections begin with a PROXY protocol header (version 2) and are refused without.
	ProxyProtocolFrom []string `yaml:"proxy_protocol_from"`

	HTTP HTTP `yaml:"http"` // /health, /metrics; default "127.0.0.1:8009"
	Log  Log  `yaml:"log"`

	src *source
}

// ProxyWrite is the address for writing.
type ProxyWrite struct {
	Listen        string `yaml:"listen"`         // default "127.0.0.1:5432"
	Port          int    `yaml:"port"`           // of the database on the instances; default: what the agent says
	Connections   int    `yaml:"connections"`    // to the database at a time, others wait; default 0: no limit
	ProxyProtocol bool   `yaml:"proxy_protocol"` // connections to the database begin with a header
}

// ProxyRead is the address for reading.
type ProxyRead struct {
	Listen        string        `yaml:"listen"` // default "": none
	Port          int           `yaml:"port"`   // of the replicas on the instances; default: what the agent says
	Connections   int           `yaml:"connections"`
	ProxyProtocol bool          `yaml:"proxy_protocol"`
	MaxAge        time.Duration `yaml:"max_age"` // of a replica's data; default 0: any
	Primary       bool          `yaml:"primary"` // serves reads while no replica can
}

// ProxyHold bounds the waiting for a database.
type ProxyHold struct {
	Time        time.Duration `yaml:"time"`        // default 30s
	Connections int           `yaml:"connections"` // for each address; default 1000
}

// ProxyLimits are for clients.
type ProxyLimits struct {
	Connections int `yaml:"connections"` // in all; default 10000
	PerSource   int `yaml:"per_source"`  // from one address; default 0: no limit
}

//go:embed proxy.yaml
var proxyExample string

// ProxyExample is the commented example configuration of a proxy.
func ProxyExample() string { return proxyExample }

const proxyExampleCommand = "dbsupervisor proxy example"

// DefaultProxy is a proxy's configuration with every default.
func DefaultProxy() *Proxy {
	return &Proxy{
		LookUp: 5 * time.Second,
		Write:  ProxyWrite{Listen: "127.0.0.1:5432"},
		Hold:   ProxyHold{Time: 30 * time.Second, Connections: 1000}, Limits: ProxyLimits{Connections: 10000},
		ConnectTimeout: time.Second, UserTimeout: 10 * time.Minute, KeepAlive: 30 * time.Second, Drain: 30 * time.Second,
		HTTP: HTTP{Listen: "127.0.0.1:8009"}, Log: Log{Level: "info"},
	}
}

// LoadProxy is Load for a proxy.
func LoadProxy(path string) (*Proxy, error) {
	data, err := read(path, "write one: "+proxyExampleCommand+" > "+path)
	if err != nil {
		return nil, err
	}
	return ParseProxy(path, data)
}

// ParseProxy is LoadProxy for content that is already there; name is used in messages.
func ParseProxy(name string, data []byte) (*Proxy, error) {
	root, err := document(name, data, proxyExampleCommand)
	if err != nil {
		return nil, err
	}
	ck := checker{file: name}
	ck.checkFile(root, reflect.TypeFor[Proxy](), proxyExampleCommand)
	if len(ck.errs) > 0 {
		return nil, ck.errs
	}
	p := DefaultProxy()
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(p); err != nil {
		return nil, fromYAML(name, err)
	}
	p.src = &source{file: name, root: root}
	for i, a := range p.Agents {
		if _, _, err := net.SplitHostPort(a); err != nil {
			p.Agents[i] = net.JoinHostPort(a, "8008")
		}
	}
	v := &validator{src: p.src}
	v.proxy(p)
	slices.SortStableFunc(v.errs, func(a, b *Error) int { return a.Line - b.Line })
	if err := v.errs.orNil(); err != nil {
		return nil, err
	}
	return p, nil
}

func (v *validator) proxy(p *Proxy) {
	v.cluster(p.Cluster)
	v.need(len(p.Agents) > 0, "agents", "is required", "list the health servers of all instances, such as agents: [db-1:8008, db-2:8008]")
	for i, a := range p.Agents {
		host, port, err := net.SplitHostPort(a)
		v.need(err == nil && host != "" && isPort(port), fmt.Sprintf("agents[%d]", i), "is not host:port", "write for example db-1:8008")
	}
	v.listen("write.listen", p.Write.Listen, false)
	v.listen("read.listen", p.Read.Listen, true)
	v.need(p.Read.Listen == "" || p.Read.Listen != p.Write.Listen, "read.listen", "is the same as write.listen", "give each a port of its own")
	v.listen("http.listen", p.HTTP.Listen, true)
	v.need(p.Write.Port >= 0 && p.Write.Port <= 65535, "write.port", "is not a port", "leave it out to use what the agents say")
	v.need(p.Read.Port >= 0 && p.Read.Port <= 65535, "read.port", "is not a port", "leave it out to use what the agents say")
	for _, n := range []struct {
		key        string
		val, least int
	}{
		{"write.connections", p.Write.Connections, 0}, {"read.connections", p.Read.Connections, 0},
		{"hold.connections", p.Hold.Connections, 0}, {"limits.connections", p.Limits.Connections, 1}, {"limits.per_source", p.Limits.PerSource, 0},
	} {
		v.need(n.val >= n.least, n.key, fmt.Sprintf("must be at least %d", n.least), "see: "+proxyExampleCommand)
	}
	for _, d := range []struct {
		key        string
		val, least time.Duration
	}{
		{"look_up", p.LookUp, time.Second}, {"hold.time", p.Hold.Time, 0}, {"read.max_age", p.Read.MaxAge, 0},
		{"connect_timeout", p.ConnectTimeout, 50 * time.Millisecond}, {"user_timeout", p.UserTimeout, 0},
		{"keep_alive", p.KeepAlive, 3 * time.Second}, {"drain", p.Drain, 0},
	} {
		v.need(d.val >= d.least, d.key, fmt.Sprintf("must be at least %s", d.least), "see: "+proxyExampleCommand)
	}
	for i, n := range p.ProxyProtocolFrom {
		_, err := netip.ParsePrefix(n)
		v.need(err == nil, fmt.Sprintf("proxy_protocol_from[%d]", i), "is not a network", "write for example 10.0.0.0/16")
	}
	v.logging(p.Log)
}

func (v *validator) listen(key, addr string, optional bool) {
	_, port, err := net.SplitHostPort(addr)
	v.need(addr == "" && optional || err == nil && isPort(port), key, "is not an address to listen on", `use for example "127.0.0.1:5432" or ":5432"`)
}

func isPort(s string) bool {
	n, err := net.LookupPort("tcp", s)
	return err == nil && n > 0
}
