package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const minimal = "cluster: shop\nshare: /mnt/efs/shop\ndatabase: {engine: postgres}\n"

func parse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("c.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	c := parse(t, minimal)
	want := Default()
	want.Cluster, want.Share = "shop", "/mnt/efs/shop"
	want.Dir, want.RunDir = "/var/lib/dbsupervisor/shop", "/run/dbsupervisor/shop"
	want.Database.Engine = "postgres"
	want.Instance = c.Instance
	if host, err := os.Hostname(); err != nil || !strings.HasPrefix(host, c.Instance) || c.Instance == "" {
		t.Errorf("instance %q, host's name %q, %v", c.Instance, host, err)
	}
	want.Lease = Lease{Backend: "file", TTL: 10 * time.Second, RenewInterval: 2 * time.Second, OpTimeout: 2 * time.Second, Margin: 2 * time.Second}
	want.Sync.MaxFreeze, want.Sync.MaxInterval = 250*time.Millisecond, 2*time.Minute
	if d := Diff(c, want); d != nil {
		t.Errorf("differs in %v", d)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("defaults are not valid: %v", err)
	}
}

// A section that is there but empty, or that sets one key, must not lose the others.
func TestPartialSectionsKeepDefaults(t *testing.T) {
	for _, s := range []string{"lease:\n", "lease: {}\n", "lease: {ttl: 12s}\n", "sync:\nretention:\nhttp:\nlog:\nfailover:\n"} {
		c := parse(t, minimal+s)
		if c.Lease.RenewInterval != c.Lease.TTL/5 || c.Sync.Schedule != "@every 1m" || c.HTTP.Listen != ":8008" || c.Log.Level != "info" {
			t.Errorf("%q: %+v", s, c)
		}
	}
}

// The short form of the schedule, and what follows from it.
func TestInterval(t *testing.T) {
	for give, want := range map[string]Sync{
		"interval: 1s": {Schedule: "@every 1s", MaxInterval: 2 * time.Minute},
		"interval: 2m": {Schedule: "@every 2m", MaxInterval: 4 * time.Minute},
	} {
		c := parse(t, minimal+"sync: {"+give+"}\n")
		if c.Sync.Schedule != want.Schedule || c.Sync.MaxInterval != want.MaxInterval {
			t.Errorf("%s: %+v", give, c.Sync)
		}
		if _, err := ParseSchedule(c.Sync.Schedule); err != nil {
			t.Error(err)
		}
	}
}

// Whoever sets only the ttl must get times that fit it.
func TestTimesFollowTTL(t *testing.T) {
	for _, ttl := range []string{"3s", "4s", "5s", "10s", "30s", "1m", "10m"} {
		c := parse(t, minimal+"lease: {ttl: "+ttl+", margin: null}\n")
		if c.Lease.Margin < time.Second || c.Lease.RenewInterval <= 0 || c.Sync.MaxFreeze <= 0 || c.Sync.MaxFreeze > 250*time.Millisecond {
			t.Errorf("ttl %s: %+v, freeze %s", ttl, c.Lease, c.Sync.MaxFreeze)
		}
	}
}

func TestEveryKeyIsRead(t *testing.T) {
	secrets := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(secrets, []byte("# comment\n\nPW=a=b \"c\"\nX=file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := parse(t, `
cluster: shop
instance: db-1
zone: eu-1a
advertise: 10.0.0.1
share: /mnt/efs/shop/
share_mount: /mnt/efs
dir: /data/shop
run_dir: /run/x
init: once
lease: {backend: file, ttl: 20s, renew_interval: 3s, op_timeout: 2500ms, margin: 4s}
sync: {schedule: "@every 5m", interval: 5m, max_interval: 2h, tier: hashed, rehash: 1MiB, spare_copy: never, max_freeze: 1500ms, workers: 3, min_free: 1GB, fork_keep: 24h}
retention: {all: 2h, hourly: 48h, daily: 240h, grace: 30m, compact_below: 50, verify: 1h, rate: 1MiB}
database:
  engine: postgres
  image: img:1
  pull: never
  entrypoint: [/e]
  command: [a, b]
  env: {A: "x", N: 0123, D: 1.50, Y: yes, T: true, X: yaml}
  env_file: `+secrets+`
  user: "999"
  data_path: /data
  mounts: [{source: /s, target: /t, read_only: true}]
  ports: [{container: 5432, host: 15432, address: 127.0.0.1}, {container: 99}]
  shm_size: 64MiB
  memory: 1073741824
  cpus: 1.5
  ulimits: {nofile: 1000}
  cap_add: [SYS_NICE]
  cap_drop: [NET_RAW]
  sysctls: {net.core.somaxconn: "1024"}
  network: db-net
  stop_signal: SIGTERM
  stop_timeout: 1m
  probe: [true-ish]
  probe_interval: 1s
  probe_timeout: 2s
  start_timeout: 3m
  before_freeze: [x]
  after_freeze: [y]
  before_ready: [r]
  before_stop: [s]
  hook_timeout: 7s
  files: {/etc/a: text}
  max_restarts: 0
  restart_window: 5m
role: replica
replica:
  enabled: true
  ports: [{container: 5432, host: 5433, address: 127.0.0.1}]
  interval: 5s
  schedule: "@every 1h"
  warm: [[a, b], [c]]
  warm_timeout: 2m
  drain: 3m
  on_failure: stop
  noloadbalance: true
  max_age: 4m
  memory: 1GiB
  cpus: 2.5
  read_only:
    enforced: rights
    why: because
    entrypoint: [/e]
    command: [c]
    default_command: [d]
    args: [-x]
    env: {E: f}
    user: "5"
    files: [{path: /f, content: g, mode: 0600}]
    volume_read_only: true
    prepare: [p]
    ready: [r]
    probe: [q]
    stop_signal: SIGQUIT
http: {listen: "127.0.0.1:9000"}
failover: {nofailover: true, priority: 7, max_per_hour: 9}
handoff: {drain: 7s}
log: {level: debug, json: true}
`)
	want := &Config{
		Cluster: "shop", Instance: "db-1", Zone: "eu-1a", Advertise: "10.0.0.1", Share: "/mnt/efs/shop", ShareMount: "/mnt/efs",
		Dir: "/data/shop", RunDir: "/run/x", Init: "once",
		Lease: Lease{Backend: "file", TTL: 20 * time.Second, RenewInterval: 3 * time.Second, OpTimeout: 2500 * time.Millisecond, Margin: 4 * time.Second},
		Sync: Sync{
			Schedule: "@every 5m", Interval: 5 * time.Minute, MaxInterval: 2 * time.Hour, Tier: "hashed", Rehash: 1 << 20, SpareCopy: "never",
			MaxFreeze: 1500 * time.Millisecond, Workers: 3, MinFree: 1e9, ForkKeep: 24 * time.Hour,
		},
		Retention: Retention{All: 2 * time.Hour, Hourly: 48 * time.Hour, Daily: 240 * time.Hour, Grace: 30 * time.Minute, CompactBelow: 50, Verify: time.Hour, Rate: 1 << 20},
		Database: Database{
			Engine: "postgres", Image: "img:1", Pull: "never", Entrypoint: []string{"/e"}, Command: []string{"a", "b"},
			Env:     map[string]string{"A": "x", "N": "0123", "D": "1.50", "Y": "yes", "T": "true", "X": "yaml"},
			EnvFile: secrets, User: "999", DataPath: "/data",
			Mounts:  []Mount{{Source: "/s", Target: "/t", ReadOnly: true}},
			Ports:   []Port{{Container: 5432, Host: 15432, Address: "127.0.0.1"}, {Container: 99, Host: 99}},
			ShmSize: 64 << 20, Memory: 1 << 30, CPUs: 1.5, Ulimits: map[string]int64{"nofile": 1000},
			CapAdd: []string{"SYS_NICE"}, CapDrop: []string{"NET_RAW"}, Sysctls: map[string]string{"net.core.somaxconn": "1024"},
			Network: "db-net", StopSignal: "SIGTERM", StopTimeout: time.Minute, Probe: []string{"true-ish"},
			ProbeInterval: time.Second, ProbeTimeout: 2 * time.Second, StartTimeout: 3 * time.Minute,
			BeforeFreeze: []string{"x"}, AfterFreeze: []string{"y"},
			BeforeReady: []string{"r"}, BeforeStop: []string{"s"}, HookTimeout: 7 * time.Second,
			Files: map[string]string{"/etc/a": "text"}, MaxRestarts: 0, RestartWindow: 5 * time.Minute,
		},
		Role: RoleReplica,
		Replica: Replica{
			Enabled: true, Ports: []Port{{Container: 5432, Host: 5433, Address: "127.0.0.1"}}, Interval: 5 * time.Second,
			Schedule: "@every 1h", Warm: [][]string{{"a", "b"}, {"c"}}, WarmTimeout: 2 * time.Minute, Drain: 3 * time.Minute,
			OnFailure: "stop", NoLoadBalance: true, MaxAge: 4 * time.Minute, Memory: 1 << 30, CPUs: 2.5,
			ReadOnly: ReadOnly{
				Enforced: EnforcedByRights, Why: "because", Entrypoint: []string{"/e"}, Command: []string{"c"}, DefaultCommand: []string{"d"},
				Args: []string{"-x"}, Env: map[string]string{"E": "f"}, User: "5", Files: []ReadOnlyFile{{Path: "/f", Content: "g", Mode: 0o600}},
				VolumeReadOnly: true, Prepare: []string{"p"}, Ready: []string{"r"}, Probe: []string{"q"}, StopSignal: "SIGQUIT",
			},
		},
		HTTP: HTTP{Listen: "127.0.0.1:9000"}, Failover: Failover{NoFailover: true, Priority: 7, MaxPerHour: 9}, Handoff: Handoff{Drain: 7 * time.Second}, Log: Log{Level: "debug", JSON: true},
	}
	if d := Diff(c, want); d != nil {
		t.Errorf("differs in %v\n got %+v\nwant %+v", d, c, want)
	}
	// The list above must not forget a key that is added later: no field of want may be zero.
	forgotten(t, reflect.ValueOf(*want), "")

	env, err := c.Database.Environment()
	if err != nil {
		t.Fatal(err)
	}
	if env["PW"] != `a=b "c"` || env["X"] != "file" || env["N"] != "0123" {
		t.Errorf("environment %q", env)
	}
}

func forgotten(t *testing.T, v reflect.Value, prefix string) {
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if !f.IsExported() || f.Name == "MaxRestarts" {
			continue
		}
		if f.Type.Kind() == reflect.Struct {
			forgotten(t, v.Field(i), prefix+f.Name+".")
		} else if v.Field(i).IsZero() {
			t.Errorf("the test does not set %s%s", prefix, f.Name)
		}
	}
}

func TestEmptyListIsNotUnset(t *testing.T) {
	c := parse(t, "cluster: shop\nshare: /mnt/shop\ndatabase: {engine: postgres, probe: [], command: []}\n")
	if c.Database.Probe == nil || c.Database.Command == nil {
		t.Error("[] was read as not set")
	}
	if c.Database.Entrypoint != nil {
		t.Error("a list that is not set was read as []")
	}
}

func TestErrors(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	broken := filepath.Join(t.TempDir(), "broken")
	content := map[string]string{open: "A=topsecret\n", broken: "A=topsecret\ntopsecret without equals\n"}
	for p, m := range map[string]os.FileMode{open: 0o644, broken: 0o600} {
		if err := os.WriteFile(p, []byte(content[p]), m); err != nil {
			t.Fatal(err)
		}
	}
	db := func(s string) string {
		return "cluster: shop\nshare: /mnt/shop\ndatabase:\n  engine: postgres\n" + s
	}
	lease := func(s string) string { return minimal + "lease:\n" + s }
	for _, tc := range []struct{ name, in, want, hint string }{
		// shape
		{"empty", "", "c.yaml: is empty", "config example"},
		{"only comments", "# nothing\n", "c.yaml: is empty", "config example"},
		{"scalar", "hello\n", "c.yaml:1: is not a configuration", "config example"},
		{"list", "- a\n", "c.yaml:1: is not a configuration", "config example"},
		{"two documents", minimal + "---\n" + minimal, "c.yaml:5: holds more than one YAML document", "merge"},
		{"syntax", "cluster: [\n", "c.yaml:1: is not valid YAML", "quotes"},
		{"tab", "cluster: shop\nlease:\n\tttl: 3s\n", "c.yaml:3: is not valid YAML", "tabs"},
		{"syntax beside a secret", db("  env:\n    PW: topsecret\n    X: [\n"), "c.yaml:7: is not valid YAML", "quotes"},
		{"secret with a colon", db("  env:\n    PW: topsecret: x\n"), "c.yaml:6: ", "quote"},
		{"duplicate", minimal + "cluster: other\n", "c.yaml:4: ", ""},
		{"unknown key", minimal + "shaer: /x\n", "c.yaml:4: shaer: is not a known key", `did you mean "share"?`},
		{"unknown key in section", lease("  ttll: 3s\n"), "c.yaml:5: lease.ttll: is not a known key", `did you mean "ttl"?`},
		{"unknown key far off", lease("  whatever: 3s\n"), "c.yaml:5: lease.whatever: is not a known key", "known keys here: backend"},
		{"section is scalar", minimal + "lease: 5\n", "c.yaml:4: lease: must be a section, not a single value", "ttl"},
		{"scalar is section", "cluster:\n  name: shop\nshare: /x\n", "c.yaml:1: cluster: must be a single value, not a section", "indentation"},
		{"list is scalar", db("  probe: pg_isready\n"), "c.yaml:5: database.probe: must be a list", `"- item"`},
		{"map is list", db("  env:\n    - A=topsecret\n"), "c.yaml:5: database.env: must be a list of NAME: value lines, not a list", "without dashes"},
		{"env value is map", db("  env:\n    PW: {topsecret: x}\n"), "c.yaml:6: database.env.PW: must be a single value", "quote"},
		{"element of a list", db("  ports:\n    - container: 1\n    - hots: 2\n"), "c.yaml:7: database.ports[1].hots: is not a known key", `"host"`},
		{"number", db("  max_restarts: many\n"), "c.yaml:5: database.max_restarts: must be a whole number", ""},
		{"float", db("  cpus: two\n"), "c.yaml:5: database.cpus: must be a number", ""},
		{"bool", minimal + "log:\n  json: maybe\n", "c.yaml:5: log.json: must be true or false", ""},
		{"duration without unit", lease("  ttl: 10\n"), "c.yaml:5: lease.ttl: is not a duration", `"10s"`},
		{"duration", lease("  ttl: ten\n"), "c.yaml:5: lease.ttl: is not a duration", `"10s"`},
		{"size", minimal + "sync:\n  min_free: lots\n", "c.yaml:5: sync.min_free: is not a size", `"64MiB"`},
		// names and places
		{"no cluster", "share: /x\ndatabase: {engine: postgres}\n", "c.yaml: cluster: is required", "cluster: shop"},
		{"cluster name", "cluster: My Shop\nshare: /x\ndatabase: {engine: postgres}\n", "c.yaml:1: cluster: is not a valid name", "32"},
		{"cluster too long", "cluster: " + strings.Repeat("a", 33) + "\nshare: /x\ndatabase: {engine: postgres}\n", "c.yaml:1: cluster: is not a valid name", "32"},
		{"instance name", minimal + "instance: a/b\n", "c.yaml:4: instance: is not a valid name", "letters"},
		{"zone", minimal + "zone: a b\n", "c.yaml:4: zone: ", "letters"},
		{"advertise with port", minimal + "advertise: host:1\n", "c.yaml:4: advertise: is not a host name", "without a port"},
		{"init", minimal + "init: always\n", "c.yaml:4: init: ", "once"},
		{"no share", "cluster: shop\ndatabase: {engine: postgres}\n", "c.yaml: share: is required", "/mnt/efs/shop"},
		{"relative share", "cluster: shop\nshare: efs\ndatabase: {engine: postgres}\n", "c.yaml:2: share: is not an absolute path", "/mnt"},
		{"root as share", "cluster: shop\nshare: /\ndatabase: {engine: postgres}\n", "c.yaml:2: share: is not an absolute path below /", "/mnt"},
		{"dir on share", minimal + "dir: /mnt/efs/shop/local\n", "c.yaml:4: dir: must not be on the share", "local disk"},
		{"share in dir", minimal + "dir: /mnt\n", "c.yaml:2: share: must not be inside dir", "local"},
		{"run_dir on share", minimal + "run_dir: /mnt/efs/shop\n", "c.yaml:4: run_dir: must not be on the share", "/run"},
		{"long run_dir", minimal + "run_dir: /" + strings.Repeat("x", 80) + "\n", "c.yaml:4: run_dir: is too long", "80"},
		{"share not below mount", minimal + "share_mount: /mnt/ef\n", "c.yaml:4: share_mount: does not contain share", "below"},
		// timing: rule 15
		{"renew", lease("  renew_interval: 5s\n  op_timeout: 1s\n"), "c.yaml:5: lease.renew_interval: must be less than half of lease.ttl: 5s is not less than 5s", "lengthen ttl"},
		{"op timeout", lease("  op_timeout: 2100ms\n"), "c.yaml:5: lease.op_timeout: must not be longer than lease.renew_interval", "shorten"},
		{"margin", lease("  margin: 1999ms\n"), "c.yaml:5: lease.margin: must be at least 2s", "lengthen margin"},
		{"margin of a short ttl", lease("  ttl: 4s\n  renew_interval: 1s\n  op_timeout: 1s\n  margin: 900ms\n"), "c.yaml:8: lease.margin: must be at least 1s", ""},
		{"no room for a failed renewal", lease("  ttl: 10s\n  renew_interval: 4s\n  op_timeout: 4s\n  margin: 2s\n"), "c.yaml:5: lease.ttl: is too short", "lengthen ttl"},
		{"freeze", minimal + "sync:\n  max_freeze: 6s\n", "c.yaml:5: sync.max_freeze: must be less than ttl - margin - renew_interval: 6s is not less than 6s", "shorten max_freeze"},
		{"ttl too short", lease("  ttl: 1s\n"), "c.yaml:5: lease.ttl: is too short (1s)", "3s"},
		{"ttl too long", lease("  ttl: 1h\n"), "c.yaml:5: lease.ttl: is too long", "10m"},
		{"zero renew", lease("  renew_interval: 0s\n"), "c.yaml:5: lease.renew_interval: is too short", "50ms"},
		{"negative op", lease("  op_timeout: -1s\n"), "c.yaml:5: lease.op_timeout: is too short", "50ms"},
		{"backend", lease("  backend: etcd\n"), "c.yaml:5: lease.backend: ", "file"},
		// sync and retention
		{"schedule", minimal + "sync:\n  schedule: sometimes\n", "c.yaml:5: sync.schedule: is not a schedule", "@every 1m"},
		{"schedule that the library panics on", minimal + "sync:\n  schedule: TZ=\n", "c.yaml:5: sync.schedule: is not a schedule", "@every 1m"},
		{"interval beside schedule", minimal + "sync:\n  schedule: \"@every 1m\"\n  interval: 5s\n", "c.yaml:6: sync.interval: says something else than sync.schedule", "remove one"},
		{"interval too short", minimal + "sync:\n  interval: 500ms\n", "c.yaml:5: sync.interval: must be whole seconds", "5s"},
		{"max_interval", minimal + "sync:\n  interval: 1m\n  max_interval: 30s\n", "c.yaml:6: sync.max_interval: must not be shorter", ""},
		{"tier", minimal + "sync:\n  tier: fast\n", "c.yaml:5: sync.tier: ", "hashed"},
		{"spare_copy", minimal + "sync:\n  spare_copy: two\n", "c.yaml:5: sync.spare_copy: ", "never"},
		{"compact_below", minimal + "retention:\n  compact_below: 95\n", "c.yaml:5: retention.compact_below: ", ""},
		{"rate", minimal + "retention:\n  rate: 0\n", "c.yaml:5: retention.rate: ", ""},
		{"max_freeze zero", minimal + "sync:\n  max_freeze: 0s\n", "c.yaml:5: sync.max_freeze: must be more than 0", ""},
		{"workers", minimal + "sync:\n  workers: 0\n", "c.yaml:5: sync.workers: ", "CPU"},
		{"fork_keep", minimal + "sync:\n  fork_keep: -1h\n", "c.yaml:5: sync.fork_keep: ", ""},
		{"all", minimal + "retention:\n  all: -1h\n", "c.yaml:5: retention.all: ", ""},
		{"hourly", minimal + "retention:\n  hourly: -1h\n", "c.yaml:5: retention.hourly: ", ""},
		{"daily", minimal + "retention:\n  daily: -1h\n", "c.yaml:5: retention.daily: ", ""},
		{"grace", minimal + "retention:\n  grace: 0s\n", "c.yaml:5: retention.grace: ", ""},
		// database
		{"no engine", "cluster: shop\nshare: /x\ndatabase: {image: x}\n", "c.yaml:3: database.engine: is required", "generic"},
		{"no database", "cluster: shop\nshare: /x\n", "c.yaml: database.engine: is required", "generic"},
		{"pull", db("  pull: often\n"), "c.yaml:5: database.pull: ", "missing"},
		{"data path", db("  data_path: data\n"), "c.yaml:5: database.data_path: is not an absolute", ""},
		{"mount source", db("  mounts: [{source: a, target: /b}]\n"), "c.yaml:5: database.mounts[0].source: is not an absolute", ""},
		{"mount twice", db("  mounts:\n  - {source: /a, target: /b}\n  - {source: /c, target: /b/}\n"), "c.yaml:7: database.mounts[1].target: is mounted twice", ""},
		{"env name", db("  env:\n    a b: x\n"), "c.yaml:6: database.env.a b: is not a name", ""},
		{"env file missing", db("  env_file: /nonexistent/file\n"), "c.yaml:5: database.env_file: ", "0600"},
		{"env file open", db("  env_file: " + open + "\n"), "c.yaml:5: database.env_file: " + open + " can be read by everybody", "chmod 600"},
		{"env file broken", db("  env_file: " + broken + "\n"), broken + ":2 is no KEY=VALUE line", "KEY=VALUE"},
		{"cpus", db("  cpus: -1\n"), "c.yaml:5: database.cpus: ", ""},
		{"memory", db("  memory: 4\n"), "c.yaml:5: database.memory: ", "4GiB"},
		{"ulimit", db("  ulimits: {files: 3}\n"), "c.yaml:5: database.ulimits.files: ", "nofile"},
		{"signal", db("  stop_signal: SIGNOPE\n"), "c.yaml:5: database.stop_signal: ", "SIGINT"},
		{"signal number", db("  stop_signal: 15\n"), "c.yaml:5: database.stop_signal: ", "SIGINT"},
		{"stop_timeout", db("  stop_timeout: -1s\n"), "c.yaml:5: database.stop_timeout: ", ""},
		{"probe_interval", db("  probe_interval: 1ms\n"), "c.yaml:5: database.probe_interval: is too short", "100ms"},
		{"probe_timeout", db("  probe_timeout: 0s\n"), "c.yaml:5: database.probe_timeout: is too short", "100ms"},
		{"start_timeout", db("  start_timeout: 1s\n"), "c.yaml:5: database.start_timeout: ", "5m"},
		{"max_restarts", db("  max_restarts: -1\n"), "c.yaml:5: database.max_restarts: ", ""},
		{"restart_window", db("  restart_window: 0s\n"), "c.yaml:5: database.restart_window: ", ""},
		// ports
		{"port zero", db("  ports: [{host: 1}]\n"), "c.yaml:5: database.ports[0].container: is not a port", ""},
		{"port high", db("  ports: [{container: 1, host: 70000}]\n"), "c.yaml:5: database.ports[0].host: is not a port", ""},
		{"port address", db("  ports: [{container: 1, address: localhost}]\n"), "c.yaml:5: database.ports[0].address: is not an IP", ""},
		{"host port twice", db("  ports:\n  - {container: 1, host: 5}\n  - {container: 2, host: 5}\n"), "c.yaml:7: database.ports[1]: uses host port 5, which is taken by database.ports[0]", ""},
		{"container port twice", db("  ports:\n  - {container: 1, host: 5}\n  - {container: 1, host: 6}\n"), "c.yaml:7: database.ports[1].container: is published twice", ""},
		{"http port taken", db("  ports: [{container: 8008}]\n"), "c.yaml:5: database.ports[0]: uses host port 8008, which is taken by http.listen", ""},
		{"listen", minimal + "http:\n  listen: everywhere\n", "c.yaml:5: http.listen: ", ":8008"},
		{"level", minimal + "log:\n  level: loud\n", "c.yaml:5: log.level: ", "info"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("c.yaml", []byte(tc.in))
			if err == nil {
				t.Fatal("was accepted")
			}
			var list Errors
			if !errors.As(err, &list) || len(list) != 1 {
				t.Fatalf("want one error, got %T: %v", err, err)
			}
			if !strings.Contains(list[0].Error(), tc.want) {
				t.Errorf("got  %s\nwant %s", list[0], tc.want)
			}
			if list[0].Hint() == "" || !strings.Contains(list[0].Hint(), tc.hint) {
				t.Errorf("hint %q, want %q", list[0].Hint(), tc.hint)
			}
			if !errors.Is(err, ErrInvalid) {
				t.Error("is not ErrInvalid")
			}
			if s := fmt.Sprintf("%v %+v %s", err, err, list[0].Hint()); strings.Contains(s, "topsecret") {
				t.Errorf("shows a secret: %s", s)
			}
		})
	}
}

func TestAllErrorsAtOnceInOrder(t *testing.T) {
	_, err := Parse("c.yaml", []byte("cluster: A B\nshare: x\nlog:\n  level: loud\ndatabase:\n  engine: postgres\n  pull: no\n"))
	var list Errors
	if !errors.As(err, &list) {
		t.Fatal(err)
	}
	var lines []int
	for _, e := range list {
		lines = append(lines, e.Line)
	}
	if !reflect.DeepEqual(lines, []int{1, 2, 4, 7}) {
		t.Errorf("lines %v in\n%v", lines, err)
	}
}

func TestAnchorsWork(t *testing.T) {
	c := parse(t, "cluster: &n shop\nshare: /mnt/shop\ninstance: *n\ndatabase: {engine: postgres}\n")
	if c.Instance != "shop" {
		t.Errorf("instance %q", c.Instance)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	_, err := Load(filepath.Join(dir, "none.yaml"))
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(e.Hint(), "config example") {
		t.Errorf("missing file: %v", err)
	}
	big := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("big file: %v", err)
	}
	if _, err := Load(dir); err == nil {
		t.Error("a directory was loaded")
	}
}

// What the commented-out lines of the example show must be the defaults, and the file
// must name every key.
func TestExample(t *testing.T) {
	c := parse(t, Example())
	want := Default()
	want.Cluster, want.Share, want.ShareMount = "shop", "/mnt/efs/shop", "/mnt/efs"
	want.Database.Engine, want.Database.Image = "postgres", "postgres:17"
	if err := want.derive(); err != nil {
		t.Fatal(err)
	}
	if d := Diff(c, want); d != nil {
		t.Errorf("example differs from the defaults in %v", d)
	}

	var open []string
	for line := range strings.SplitSeq(Example(), "\n") {
		i := len(line) - len(strings.TrimLeft(line, " "))
		if rest, ok := strings.CutPrefix(line[i:], "#"); ok && !strings.HasPrefix(rest, " ") || strings.HasPrefix(line[i:], "#  ") {
			line = line[:i] + line[i+1:]
		}
		if strings.Contains(line, "env_file:") {
			continue // the file need not exist here
		}
		open = append(open, line)
	}
	full := parse(t, strings.Join(open, "\n"))
	// Keys whose example differs from the default on purpose.
	free := map[string]bool{
		"instance": true, "zone": true, "sync.interval": true, "advertise": true, "sync.workers": true, "database.env": true, "database.ports": true, "database.command": true,
		"database.user": true, "database.mounts": true, "database.memory": true, "database.cpus": true, "database.ulimits": true,
		"replica.ports": true, "replica.schedule": true, "replica.warm": true, "replica.memory": true, "replica.cpus": true,
		// from the profile:
		"replica.read_only.enforced": true, "replica.read_only.why": true, "replica.read_only.args": true, "replica.read_only.files": true,
		"replica.read_only.probe": true, "replica.read_only.default_command": true,
		"database.data_path": true, "database.stop_signal": true, "database.stop_timeout": true, "database.shm_size": true, "database.probe": true,
		// [] instead of unset:
		"database.entrypoint": true, "database.cap_add": true, "database.cap_drop": true, "database.sysctls": true, "database.before_freeze": true, "database.after_freeze": true,
		"replica.read_only.entrypoint": true, "replica.read_only.command": true, "replica.read_only.env": true, "replica.read_only.prepare": true,
		"replica.read_only.ready": true, "replica.read_only.user": true, "replica.read_only.stop_signal": true,
		"database.before_ready": true, "database.before_stop": true, "database.files": true,
		"database.hook_timeout": true, // of the profile, else of the supervisor
	}
	for _, k := range Diff(full, want) {
		if !free[k] {
			t.Errorf("the example shows another default for %s", k)
		}
	}
	var missing func(typ reflect.Type, prefix string)
	missing = func(typ reflect.Type, prefix string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if !f.IsExported() {
				continue
			}
			key := prefix + yamlName(f)
			if f.Type.Kind() == reflect.Struct {
				missing(f.Type, key+".")
			} else if key != "lease.backend" && key != "database.env_file" && !full.Has(key) {
				t.Errorf("the example does not mention %s", key)
			}
		}
	}
	missing(reflect.TypeFor[Config](), "")
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]Size{"0": 0, "10": 10, "64MiB": 64 << 20, "1GB": 1e9, "1.5KiB": 1536, "2 GiB": 2 << 30} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "x", "-1", "10XB", "99999999999999999999", "9300000000000000000"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d", in, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(Example()))
	f.Add([]byte("database: {env: {A: [x]}}\nlease: &a {<<: *a}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("c.yaml", data)
		if (c == nil) == (err == nil) {
			t.Fatalf("config %v, error %v", c, err)
		}
	})
}
