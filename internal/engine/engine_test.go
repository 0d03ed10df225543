package engine

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"dbsupervisor/internal/config"
)

func TestEveryProfileLoads(t *testing.T) {
	names := Names()
	if !reflect.DeepEqual(names, []string{"firebird", "generic", "mariadb", "openldap", "postgres", "redis"}) {
		t.Fatalf("names = %v", names)
	}
	for _, n := range names {
		p, err := Load(n)
		if err != nil {
			t.Fatal(err)
		}
		if p.StopSignal == "" || p.StopTimeout < 30*time.Second {
			t.Errorf("%s: a database must be given a signal and time to stop, got %q %s", n, p.StopSignal, p.StopTimeout)
		}
	}
	for _, n := range []string{"", "oracle", "../engine"} {
		if _, err := Load(n); !errors.Is(err, ErrUnknown) {
			t.Errorf("Load(%q) = %v", n, err)
		}
	}
}

func TestPostgresProfile(t *testing.T) {
	p, err := Load("postgres")
	if err != nil {
		t.Fatal(err)
	}
	d := p.Merge(config.Database{})
	if d.DataPath != "/var/lib/postgresql/data" || d.Env["PGDATA"] != d.DataPath {
		t.Errorf("data path %q, PGDATA %q", d.DataPath, d.Env["PGDATA"])
	}
	if d.StopSignal != "SIGINT" || d.StopTimeout != 5*time.Minute {
		t.Errorf("stop %s after %s: fast shutdown needs SIGINT and time for a checkpoint", d.StopSignal, d.StopTimeout)
	}
	if !reflect.DeepEqual(d.Ports, []config.Port{{Container: 5432, Host: 5432}}) {
		t.Errorf("ports %v", d.Ports)
	}
	if d.ShmSize != 256<<20 {
		t.Errorf("shm size %d", d.ShmSize)
	}
	if len(d.Probe) != 3 || d.Probe[0] != "sh" || strings.Contains(d.Probe[2], "\n") {
		t.Errorf("probe %q", d.Probe)
	}
	for _, want := range []string{"psql", "-h /var/run/postgresql", "select "} {
		if !strings.Contains(d.Probe[2], want) {
			t.Errorf("probe %q has no %q", d.Probe[2], want)
		}
	}
}

// Every field that a profile can set must give way to the configuration.
func TestEverythingCanBeOverridden(t *testing.T) {
	p := Profile{
		Image: "p", DataPath: "/p", Ports: []int{1}, Env: map[string]string{"A": "p", "B": "p"},
		Entrypoint: []string{"p"}, Command: []string{"p"}, User: "p", ShmSize: 1, Probe: []string{"p"},
		StopSignal: "SIGINT", StopTimeout: time.Second, BeforeFreeze: []string{"p"}, AfterFreeze: []string{"p"},
		BeforeReady: []string{"p"}, BeforeStop: []string{"p"}, HookTimeout: time.Second,
		Files:           map[string]string{"/a": "p", "/b": "p"},
		FirstStartNeeds: []string{"not merged"},
	}
	set := config.Database{
		Image: "c", DataPath: "/c", Ports: []config.Port{{Container: 2, Host: 3}}, Env: map[string]string{"A": "c"},
		Entrypoint: []string{"c"}, Command: []string{"c"}, User: "c", ShmSize: 2, Probe: []string{"c"},
		StopSignal: "SIGTERM", StopTimeout: time.Minute, BeforeFreeze: []string{"c"}, AfterFreeze: []string{"c"},
		BeforeReady: []string{"c"}, BeforeStop: []string{"c"}, HookTimeout: time.Minute, Files: map[string]string{"/a": "c"},
	}
	got := p.Merge(set)
	want := set
	want.Env = map[string]string{"A": "c", "B": "p"}
	want.Files = map[string]string{"/a": "c", "/b": "p"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("merged\n got %+v\nwant %+v", got, want)
	}

	empty := config.Database{Entrypoint: []string{}, Command: []string{}, Probe: []string{}, BeforeFreeze: []string{}, AfterFreeze: []string{}}
	got = p.Merge(empty)
	for name, l := range map[string][]string{"entrypoint": got.Entrypoint, "command": got.Command, "probe": got.Probe, "before": got.BeforeFreeze, "after": got.AfterFreeze} {
		if len(l) != 0 {
			t.Errorf("%s: set to [], got %v", name, l)
		}
	}

	got = p.Merge(config.Database{})
	pv, gv := reflect.ValueOf(p), reflect.ValueOf(got)
	for i := range pv.NumField() {
		name := pv.Type().Field(i).Name
		switch name {
		case "Ports", "FirstStartNeeds", "Replica":
			continue
		}
		if !reflect.DeepEqual(pv.Field(i).Interface(), gv.FieldByName(name).Interface()) {
			t.Errorf("%s: profile's %v was not taken, got %v", name, pv.Field(i), gv.FieldByName(name))
		}
	}
}

func TestMergeLeavesProfileAlone(t *testing.T) {
	p := Profile{Env: map[string]string{"A": "p"}}
	d := p.Merge(config.Database{Env: map[string]string{"A": "c"}})
	d.Env["X"] = "y"
	if len(p.Env) != 1 || p.Env["A"] != "p" {
		t.Errorf("profile's environment became %v", p.Env)
	}
}

func TestResolve(t *testing.T) {
	secrets := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(secrets, []byte("POSTGRES_PASSWORD=x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, db, err, hint, warning string }{
		{name: "unknown engine", db: "{engine: oracle}", err: "c.yaml:3: database.engine: is not a known engine", hint: "known: firebird, generic,"},
		{name: "generic image", db: "{engine: generic}", err: "c.yaml:3: database.image: is required"},
		{name: "generic data path", db: "{engine: generic, image: x}", err: "database.data_path: is required"},
		{name: "generic ports", db: "{engine: generic, image: x, data_path: /d}", err: "database.ports: must name"},
		{name: "generic complete", db: "{engine: generic, image: x, data_path: /d, ports: [{container: 1}]}"},
		{name: "ports emptied", db: "{engine: postgres, ports: []}", err: "database.ports: must name"},
		{name: "host network without a command", db: "{engine: generic, image: x, data_path: /d, ports: [{container: 1}], network: host}", err: "database.probe: is required with network: host"},
		{name: "no password", db: "{engine: postgres}", warning: "POSTGRES_PASSWORD"},
		{name: "password", db: "{engine: postgres, env: {POSTGRES_PASSWORD: x}}"},
		{name: "password in file", db: "{engine: postgres, env_file: " + secrets + "}"},
		{name: "mount on profile's data path", db: "{engine: postgres, env: {POSTGRES_PASSWORD: x}, mounts: [{source: /a, target: /var/lib/postgresql/data}]}", err: "database.mounts[0].target: is mounted twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, err := config.Parse("c.yaml", []byte("cluster: shop\nshare: /mnt/shop\ndatabase: "+tc.db+"\n"))
			if err != nil {
				t.Fatal(err)
			}
			warnings, err := Resolve(cfg)
			if tc.err == "" {
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.Join(warnings, "\n"); (tc.warning == "") != (got == "") || !strings.Contains(got, tc.warning) {
					t.Errorf("warnings %q, want %q", got, tc.warning)
				}
				again := *cfg
				if _, err := Resolve(&again); err != nil || !reflect.DeepEqual(again.Database, cfg.Database) {
					t.Errorf("second Resolve changed something: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("err = %v, want %q", err, tc.err)
			}
			var h interface{ Hint() string }
			if !errors.As(err, &h) || !strings.Contains(h.Hint(), tc.hint) || h.Hint() == "" {
				t.Errorf("no hint %q", tc.hint)
			}
		})
	}
}
