package config

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestProxyExample(t *testing.T) {
	p, err := ParseProxy("p.yaml", []byte(ProxyExample()))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultProxy()
	want.Cluster, want.Agents = "shop", []string{"db-1:8008", "db-2:8008"}
	p.src = nil
	if !reflect.DeepEqual(p, want) {
		t.Errorf("the example gives\n%+v, the defaults are\n%+v", p, want)
	}
	var open []string
	for line := range strings.SplitSeq(ProxyExample(), "\n") {
		if i := strings.Index(line, "#"); i >= 0 && !strings.HasPrefix(line[i:], "# ") {
			line = line[:i] + line[i+1:]
		}
		open = append(open, line)
	}
	full, err := ParseProxy("p.yaml", []byte(strings.Join(open, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	var missing func(typ reflect.Type, prefix string)
	missing = func(typ reflect.Type, prefix string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			switch key := prefix + yamlName(f); {
			case !f.IsExported():
			case f.Type.Kind() == reflect.Struct:
				missing(f.Type, key+".")
			case !full.src.has(key):
				t.Errorf("the example does not mention %s", key)
			}
		}
	}
	missing(reflect.TypeFor[Proxy](), "")
	full.src, full.ProxyProtocolFrom = nil, nil
	if !reflect.DeepEqual(full, want) {
		t.Errorf("what is commented out gives\n%+v, the defaults are\n%+v", full, want)
	}
}

func TestProxyErrors(t *testing.T) {
	const good = "cluster: shop\nagents: [db-1, 10.0.0.1:9000]\n"
	p, err := ParseProxy("p.yaml", []byte(good))
	if err != nil || p.Agents[0] != "db-1:8008" || p.Agents[1] != "10.0.0.1:9000" {
		t.Fatalf("%+v, %v", p, err)
	}
	for text, want := range map[string]string{
		"":                                       "is empty",
		"cluster: shop":                          "agents: is required",
		"agents: [a]":                            "cluster: is required",
		good + "write: {listen: x}":              "p.yaml:3: write.listen: is not an address",
		good + "read: {port: -1}":                "read.port: is not a port",
		good + "write: {listne: x}":              "write.listne: is not a known key",
		good + "hold: {time: 5}":                 "hold.time: is not a duration",
		good + "limits: {connections: 0}":        "limits.connections: must be at least 1",
		good + "proxy_protocol_from: [10.0.0.1]": "proxy_protocol_from[0]: is not a network",
		good + "log: {level: loud}":              "log.level: is not a log level",
		good + "read: {listen: \"127.0.0.1:5432\", port: 1}": "is the same as write.listen",
	} {
		_, err := ParseProxy("p.yaml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
