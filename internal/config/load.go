package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// maxFile bounds a configuration file, so that a wrong path can't take the memory.
const maxFile = 1 << 20

// Load reads a configuration file, fills in the defaults and checks everything that can
// be checked without looking at the share, Docker or the network; it never hangs on them.
// What is wrong in the content is reported all at once, as Errors. See CheckHost for the
// rest and engine.Resolve for what the database's profile adds.
func Load(path string) (*Config, error) {
	data, err := read(path, "write one: dbsupervisor config example > "+path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// read reads a file of ours; missing says what to do where there is none.
func read(path, missing string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		hint := "check the path given with --config"
		switch {
		case errors.Is(err, fs.ErrNotExist):
			hint = missing
		case errors.Is(err, fs.ErrPermission):
			hint = "run as root"
		}
		return nil, &Error{File: path, Msg: errText(err), Advice: hint}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, &Error{File: path, Msg: errText(err), Advice: "check the path given with --config"}
	}
	if len(data) > maxFile {
		return nil, &Error{File: path, Msg: "is larger than 1 MiB", Advice: "check that this is the configuration file"}
	}
	return data, nil
}

// Parse is Load for content that is already there; name is used in messages.
func Parse(name string, data []byte) (*Config, error) {
	root, err := document(name, data, "dbsupervisor config example")
	if err != nil {
		return nil, err
	}
	c := Default()
	ck := checker{file: name}
	ck.checkFile(root, reflect.TypeFor[Config](), "dbsupervisor config example")
	c.src = &source{file: name, root: root}
	if len(ck.errs) > 0 {
		return nil, ck.errs.with(c.rest(data))
	}
	src := c.src
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(c); err != nil {
		return nil, fromYAML(name, err)
	}
	c.src = src
	c.literalEnv(root)
	if err := c.derive(); err != nil {
		return nil, err
	}
	if err := c.validate().orNil(); err != nil {
		return nil, err
	}
	return c, nil
}

// document finds the one document of a file; example is the command that prints one.
func document(name string, data []byte, example string) (ast.Node, error) {
	file, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, fromYAML(name, err)
	}
	var docs []ast.Node
	for _, d := range file.Docs {
		if d.Body != nil {
			docs = append(docs, d.Body)
		}
	}
	switch {
	case len(docs) == 0:
		return nil, Errors{{File: name, Msg: "is empty", Advice: "print a commented example with: " + example}}
	case len(docs) > 1:
		return nil, Errors{{File: name, Line: lineOf(docs[1]), Msg: "holds more than one YAML document", Advice: "remove the line --- and what follows, or merge the two"}}
	}
	return docs[0], nil
}

// rest finds what else is wrong with a file whose keys are not all right, so that everything is
// said in one round. Where the file can't be decoded at all that is nothing.
func (c *Config) rest(data []byte) Errors {
	src := c.src
	if err := yaml.NewDecoder(bytes.NewReader(data)).Decode(c); err != nil {
		return nil //nolint:nilerr // the bad keys, which are told already, are why
	}
	c.src = src
	var errs Errors
	if err := c.derive(); err != nil {
		var e *Error
		if errors.As(err, &e) {
			errs = append(errs, e)
		}
	}
	return append(errs, c.validate()...)
}

// Default is a configuration with every default that does not depend on other keys.
func Default() *Config {
	return &Config{
		Init:  "never",
		Role:  RoleAny,
		Lease: Lease{Backend: "file", TTL: 10 * time.Second},
		Sync: Sync{
			Schedule: "@every 1m", Tier: "auto", Rehash: 4 << 20, SpareCopy: "auto",
			Workers: runtime.NumCPU(), MinFree: 256 << 20, ForkKeep: 7 * 24 * time.Hour,
		},
		Retention: Retention{
			All: time.Hour, Hourly: 24 * time.Hour, Daily: 7 * 24 * time.Hour, Grace: time.Hour,
			CompactBelow: 30, Verify: 7 * 24 * time.Hour, Rate: 16 << 20,
		},
		Database: Database{
			Pull: "missing", Network: "bridge", ProbeInterval: 2 * time.Second, ProbeTimeout: 5 * time.Second,
			StartTimeout: 5 * time.Minute, MaxRestarts: 3, RestartWindow: 10 * time.Minute,
		},
		Replica:  Replica{Interval: 10 * time.Second, WarmTimeout: time.Minute, Drain: time.Minute, OnFailure: "keep"},
		HTTP:     HTTP{Listen: ":8008"},
		Failover: Failover{Priority: 100, MaxPerHour: 4},
		Handoff:  Handoff{Drain: 2 * time.Second},
		Log:      Log{Level: "info"},
	}
}

// derive fills in the defaults that depend on other keys or on this machine.
func (c *Config) derive() error {
	if c.Instance == "" {
		h, err := os.Hostname()
		if err != nil {
			return c.ErrorAt("instance", "is not set and the host's name is not known: "+errText(err), "set instance to a name of this machine")
		}
		c.Instance, _, _ = strings.Cut(h, ".")
	}
	if c.Dir == "" {
		c.Dir = "/var/lib/dbsupervisor/" + c.Cluster
	}
	if c.RunDir == "" {
		c.RunDir = "/run/dbsupervisor/" + c.Cluster
	}
	l := &c.Lease
	if !c.Has("lease.renew_interval") {
		l.RenewInterval = l.TTL / 5
	}
	if !c.Has("lease.op_timeout") {
		l.OpTimeout = max(l.RenewInterval, minOp)
	}
	if !c.Has("lease.margin") {
		l.Margin = max(time.Second, l.TTL/5)
	}
	if !c.Has("sync.max_freeze") {
		// At least something, so that times that don't fit are blamed on the lease's keys.
		c.Sync.MaxFreeze = max(time.Millisecond, min(250*time.Millisecond, (l.TTL-l.Margin-l.RenewInterval)/2))
	}
	if c.Has("sync.interval") && !c.Has("sync.schedule") {
		c.Sync.Schedule = every(c.Sync.Interval)
	}
	if !c.Has("sync.max_interval") {
		c.Sync.MaxInterval = max(2*time.Minute, 2*c.Sync.Interval)
	}
	for _, p := range []*string{&c.Share, &c.ShareMount, &c.Dir, &c.RunDir} {
		if *p != "" {
			*p = filepath.Clean(*p)
		}
	}
	for i := range c.Database.Ports {
		if p := &c.Database.Ports[i]; p.Host == 0 {
			p.Host = p.Container
		}
	}
	c.replicaDefaults()
	return nil
}

// checkFile checks a whole file; a document that is no mapping gets a message of its own.
func (c *checker) checkFile(root ast.Node, t reflect.Type, example string) {
	if !isMapping(plain(root)) {
		c.add(root, "", "is not a configuration: it holds "+kindOf(root)+" instead of keys", "print a commented example with: "+example)
		return
	}
	c.check(root, root, "", t)
}

// literalEnv takes unquoted numbers in the environment as they were written: YAML would
// turn a password 0123 into 83.
func (c *Config) literalEnv(root ast.Node) {
	db := lookUp(plain(root), "database")
	if db == nil {
		return
	}
	env := lookUp(plain(db.Value), "env")
	if env == nil {
		return
	}
	for _, kv := range pairs(plain(env.Value)) {
		if text, ok := scalarText(plain(kv.Value)); ok {
			c.Database.Env[keyText(kv)] = text
		}
	}
}

// fromYAML turns an error of the YAML library into one of ours; the library's own text
// would quote the lines around it, secrets included.
func fromYAML(name string, err error) error {
	e := &Error{File: name, Msg: "can't be read as YAML", Advice: "check indentation (spaces, no tabs) and quotes at this line"}
	var ye yaml.Error
	if errors.As(err, &ye) {
		e.Msg = "is not valid YAML: " + ye.GetMessage()
		if t := ye.GetToken(); t != nil && t.Position != nil {
			e.Line = t.Position.Line
		}
	}
	return Errors{e}
}

// errText is a file error without its path, which the message has already.
func errText(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return fmt.Sprintf("%s: %s", pe.Op, pe.Err)
	}
	return err.Error()
}
