package config

import (
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/robfig/cron/v3"
	"golang.org/x/sys/unix"
)

// validator collects what is wrong, with the line of the key.
type validator struct {
	c    *Config
	src  *source
	errs Errors
}

// need records an error at key unless ok.
func (v *validator) need(ok bool, key, msg, hint string) bool {
	if !ok {
		v.errs = append(v.errs, v.src.errorAt(key, msg, hint))
	}
	return ok
}

// Validate checks a configuration that was made or changed by hand; Load did it already.
func (c *Config) Validate() error { return c.validate().orNil() }

func (c *Config) validate() Errors {
	v := &validator{c: c, src: c.src}
	v.names()
	v.places()
	v.timing()
	v.sync()
	v.database()
	v.ports()
	v.failover()
	v.need(c.Handoff.Drain >= 0 && c.Handoff.Drain <= time.Minute, "handoff.drain", "must be between 0 and 1m", "all clients wait as long as this: use for example 2s")
	v.logging(c.Log)
	slices.SortStableFunc(v.errs, func(a, b *Error) int { return a.Line - b.Line })
	return v.errs
}

func (v *validator) logging(l Log) {
	v.need(hclog.LevelFromString(l.Level) != hclog.NoLevel && l.Level != "off", "log.level", "is not a log level", "use trace, debug, info, warn or error")
}

func (v *validator) cluster(name string) {
	if v.need(name != "", "cluster", "is required", "give the cluster a name, the same on every instance, such as cluster: shop") {
		v.need(matches(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`, name), "cluster", "is not a valid name", "use at most 32 lower-case letters, digits and dashes")
	}
}

func (v *validator) names() {
	c := v.c
	v.cluster(c.Cluster)
	v.need(matches(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`, c.Instance), "instance", "is not a valid name", "use at most 63 letters, digits, dots, dashes and underscores")
	v.need(c.Zone == "" || matches(`^[A-Za-z0-9._-]{1,64}$`, c.Zone), "zone", "is not a valid name", "use letters, digits and dashes")
	if c.Advertise != "" {
		ok := net.ParseIP(c.Advertise) != nil || matches(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$`, c.Advertise)
		v.need(ok, "advertise", "is not a host name or IP address", "give it without a port; ports come from database.ports and http.listen")
	}
	v.need(c.Init == "never" || c.Init == "once", "init", "is not a known value", `use "never" (initialise with: dbsupervisor init) or "once"`)
}

func (v *validator) places() {
	c := v.c
	if v.need(c.Share != "", "share", "is required", "name the cluster's directory on the shared file system, such as share: /mnt/efs/shop") {
		v.absolute("share", c.Share)
	}
	v.absolute("dir", c.Dir)
	v.absolute("run_dir", c.RunDir)
	if c.ShareMount != "" && v.absolute("share_mount", c.ShareMount) {
		v.need(within(c.Share, c.ShareMount), "share_mount", "does not contain share", "set it to the directory where the shared file system is mounted; share must be that directory or below it")
	}
	if !filepath.IsAbs(c.Share) || c.Share == "/" {
		return
	}
	v.need(!within(c.Dir, c.Share), "dir", "must not be on the share", "choose a directory on a local disk")
	v.need(!within(c.RunDir, c.Share), "run_dir", "must not be on the share", "leave it out: the default is below /run")
	v.need(!within(c.Share, c.Dir), "share", "must not be inside dir", "the share is a shared file system, dir a local one")
	v.need(!within(c.RunDir, filepath.Join(c.Dir, "volume")), "run_dir", "must not be inside the volume", "leave it out: the default is below /run")
	// The kernel's limit for a unix socket's path is 107 bytes.
	v.need(len(c.RunDir) <= 80, "run_dir", "is too long for a socket's path", "use at most 80 characters")
}

func (v *validator) absolute(key, path string) bool {
	return v.need(filepath.IsAbs(path) && path != "/", key, "is not an absolute path below /", "write it from the root, such as /mnt/efs/shop")
}

// minOp is the shortest time that makes sense for an operation on a shared file system.
const minOp = 50 * time.Millisecond

// timing checks the inequalities on which safety rests.
func (v *validator) timing() {
	l := v.c.Lease
	v.need(l.Backend == "file", "lease.backend", "is not a known backend", `use "file"`)
	ok := true
	for _, d := range []struct {
		key string
		val time.Duration
		min time.Duration
	}{
		{"lease.ttl", l.TTL, 3 * time.Second},
		{"lease.renew_interval", l.RenewInterval, minOp},
		{"lease.op_timeout", l.OpTimeout, minOp},
	} {
		ok = v.need(d.val >= d.min, d.key, fmt.Sprintf("is too short (%s)", d.val), fmt.Sprintf("use at least %s", d.min)) && ok
	}
	ok = v.need(l.TTL <= 10*time.Minute, "lease.ttl", fmt.Sprintf("is too long (%s)", l.TTL), "nobody takes over before it is over; use at most 10m") && ok
	if !ok {
		return // the rest would only repeat it
	}
	least := max(time.Second, l.TTL/5)
	ok = v.need(l.RenewInterval < l.TTL/2, "lease.renew_interval",
		fmt.Sprintf("must be less than half of lease.ttl: %s is not less than %s", l.RenewInterval, l.TTL/2),
		"a lease must survive one renewal that fails: shorten renew_interval or lengthen ttl")
	ok = v.need(l.OpTimeout <= l.RenewInterval, "lease.op_timeout",
		fmt.Sprintf("must not be longer than lease.renew_interval: %s is longer than %s", l.OpTimeout, l.RenewInterval),
		"a renewal must have ended before the next begins: shorten op_timeout") && ok
	ok = v.need(l.Margin >= least, "lease.margin",
		fmt.Sprintf("must be at least %s (the larger of 1s and a fifth of lease.ttl), is %s", least, l.Margin),
		"within the margin the old database is killed before a successor may start: lengthen margin") && ok
	if !ok {
		return
	}
	left := l.TTL - l.Margin
	if !v.need(l.RenewInterval+l.OpTimeout < left, "lease.ttl",
		fmt.Sprintf("is too short: renew_interval + op_timeout (%s) must be less than ttl - margin (%s)", l.RenewInterval+l.OpTimeout, left),
		"one slow renewal would stop the database: lengthen ttl or shorten the others") {
		return
	}
	v.need(v.c.Sync.MaxFreeze < left-l.RenewInterval, "sync.max_freeze",
		fmt.Sprintf("must be less than ttl - margin - renew_interval: %s is not less than %s", v.c.Sync.MaxFreeze, left-l.RenewInterval),
		"a freeze must be over before the lease could be: shorten max_freeze or lengthen lease.ttl")
}

func (v *validator) sync() {
	s, r := v.c.Sync, v.c.Retention
	if _, err := ParseSchedule(s.Schedule); err != nil {
		v.need(false, "sync.schedule", "is not a schedule", `use "@every 1m" or five cron fields, such as "*/5 * * * *"`)
	}
	if v.c.Has("sync.interval") {
		v.need(s.Schedule == every(s.Interval), "sync.interval", "says something else than sync.schedule", "remove one of the two")
		v.need(s.Interval >= time.Second && s.Interval%time.Second == 0, "sync.interval", "must be whole seconds, at least 1s", "use for example 5s")
		v.need(s.MaxInterval >= s.Interval, "sync.max_interval", "must not be shorter than sync.interval", "leave it out, or use for example 1m")
	}
	v.need(s.MaxInterval >= time.Second, "sync.max_interval", "must be at least 1s", "leave it out, or use for example 1m")
	v.need(slices.Contains([]string{"auto", "tracked", "hashed"}, s.Tier), "sync.tier", "is not a known tier", `use "auto", "tracked" or "hashed"`)
	v.need(s.Rehash >= 0, "sync.rehash", "must not be negative", "use for example 4MiB; 0 means none")
	v.need(s.SpareCopy == "auto" || s.SpareCopy == "never", "sync.spare_copy", "is not a known value", `use "auto" or "never"`)
	v.need(s.MaxFreeze > 0, "sync.max_freeze", "must be more than 0", "use for example 250ms")
	v.need(s.Workers >= 1 && s.Workers <= 1024, "sync.workers", "must be between 1 and 1024", "leave it out to use one worker per CPU")
	v.need(s.MinFree >= 0, "sync.min_free", "must not be negative", "use for example 256MiB")
	v.need(s.ForkKeep >= 0, "sync.fork_keep", "must not be negative", "use for example 168h")
	v.need(r.All >= 0, "retention.all", "must not be negative", "use for example 1h")
	v.need(r.Hourly >= 0, "retention.hourly", "must not be negative", "use for example 24h; 0 keeps none by the hour")
	v.need(r.Daily >= 0, "retention.daily", "must not be negative", "use for example 168h; 0 keeps none by the day")
	v.need(r.CompactBelow >= 0 && r.CompactBelow <= 90, "retention.compact_below", "must be between 0 and 90 percent", "leave it out, or use 0 to keep packs as they are")
	v.need(r.Verify >= 0, "retention.verify", "must not be negative", "use for example 168h; 0 means never")
	v.need(r.Rate > 0, "retention.rate", "must be more than 0", "use for example 16MiB")
	v.need(r.Grace > 0, "retention.grace", "must be more than 0", "readers of old snapshots need time to finish; use for example 1h")
}

// every is an interval as a schedule.
func every(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return "@every " + s
}

// ParseSchedule reads a cron expression of five fields or a descriptor such as "@every 1m".
func ParseSchedule(s string) (sched cron.Schedule, err error) {
	defer func() {
		if r := recover(); r != nil { // the library does, for "TZ=" without a blank
			err = fmt.Errorf("parse schedule %q: %v", s, r)
		}
	}()
	sched, err = cron.ParseStandard(s)
	if err != nil {
		return nil, fmt.Errorf("parse schedule %q: %w", s, err)
	}
	return sched, nil
}

func (v *validator) database() {
	d := v.c.Database
	v.need(d.Engine != "", "database.engine", "is required", `use "postgres", or "generic" for any other database`)
	v.need(slices.Contains([]string{"missing", "always", "never"}, d.Pull), "database.pull", "is not a known value", "use missing, always or never")
	if d.DataPath != "" {
		v.absolute("database.data_path", d.DataPath)
	}
	targets := map[string]bool{filepath.Clean(d.DataPath): true}
	for i, m := range d.Mounts {
		key := fmt.Sprintf("database.mounts[%d]", i)
		v.absolute(key+".source", m.Source)
		if v.absolute(key+".target", m.Target) {
			t := filepath.Clean(m.Target)
			v.need(!targets[t], key+".target", "is mounted twice", "give every mount a place of its own; data_path is the volume's")
			targets[t] = true
		}
	}
	for k := range d.Env {
		v.need(matches(`^[A-Za-z_][A-Za-z0-9_.-]*$`, k), "database.env."+k, "is not a name of a variable", "use letters, digits and underscores")
	}
	v.envFile(d.EnvFile)
	v.need(d.CPUs >= 0, "database.cpus", "must not be negative", "use for example 1.5; 0 means no limit")
	for key, s := range map[string]Size{"database.shm_size": d.ShmSize, "database.memory": d.Memory} {
		v.need(s >= 0, key, "must not be negative", "use for example 256MiB")
	}
	v.need(d.Memory == 0 || d.Memory >= 6<<20, "database.memory", "is less than Docker's minimum of 6MiB", "give the size with a unit, such as 4GiB")
	for name := range d.Ulimits {
		v.need(knownUlimit(name), "database.ulimits."+name, "is not a known limit", "use for example nofile, nproc, memlock, core")
	}
	v.need(d.StopSignal == "" || knownSignal(d.StopSignal), "database.stop_signal", "is not a signal", "use for example SIGINT or SIGTERM")
	v.need(d.StopTimeout >= 0, "database.stop_timeout", "must not be negative", "use for example 5m")
	v.need(d.ProbeInterval >= 100*time.Millisecond, "database.probe_interval", fmt.Sprintf("is too short (%s)", d.ProbeInterval), "use at least 100ms")
	v.need(d.ProbeTimeout >= 100*time.Millisecond, "database.probe_timeout", fmt.Sprintf("is too short (%s)", d.ProbeTimeout), "use at least 100ms")
	v.need(d.StartTimeout >= d.ProbeTimeout, "database.start_timeout", "must not be shorter than database.probe_timeout", "crash recovery of a large database takes minutes: use for example 5m")
	v.need(d.HookTimeout >= 0, "database.hook_timeout", "must not be negative", "use for example 30s")
	for name := range d.Files {
		v.need(filepath.IsAbs(name) && filepath.Clean(name) == name && name != "/", "database.files", fmt.Sprintf("has a name that is not an absolute, plain path: %q", name), "write it as it is in the container, such as /etc/mysql/conf.d/x.cnf")
	}
	v.need(d.MaxRestarts >= 0, "database.max_restarts", "must not be negative", "0 gives the term up at the first death")
	v.need(d.RestartWindow > 0, "database.restart_window", "must be more than 0", "use for example 10m")
}

func (v *validator) ports() {
	c := v.c
	used := map[int]string{}
	_, port, err := net.SplitHostPort(c.HTTP.Listen)
	httpPort, perr := net.LookupPort("tcp", port)
	if v.need(c.HTTP.Listen == "" || (err == nil && perr == nil), "http.listen", "is not an address to listen on", `use ":8008" or "127.0.0.1:8008"; "" switches it off`) && httpPort != 0 {
		used[httpPort] = "http.listen"
	}
	inside := map[int]bool{}
	for i, p := range c.Database.Ports {
		key := fmt.Sprintf("database.ports[%d]", i)
		ok := v.need(p.Container >= 1 && p.Container <= 65535, key+".container", "is not a port", "use a number from 1 to 65535")
		ok = v.need(p.Host >= 0 && p.Host <= 65535, key+".host", "is not a port", "use a number from 1 to 65535, or leave it out to use the container's") && ok
		v.need(p.Address == "" || net.ParseIP(p.Address) != nil, key+".address", "is not an IP address", "leave it out to listen on all addresses")
		if !ok {
			continue
		}
		v.need(!inside[p.Container], key+".container", "is published twice", "remove one of the two")
		inside[p.Container] = true
		other, taken := used[p.Host]
		v.need(!taken, key, fmt.Sprintf("uses host port %d, which is taken by %s", p.Host, other), "give each a port of its own")
		used[p.Host] = key
	}
	v.replica(used)
}

// mostFailovers is how many failovers the register remembers.
const mostFailovers = 10

func (v *validator) failover() {
	f := v.c.Failover
	v.need(f.Priority >= 0 && f.Priority <= 1000, "failover.priority", "must be between 0 and 1000", "the default is 100; 0 keeps this instance from becoming primary")
	v.need(f.MaxPerHour >= 0 && f.MaxPerHour <= mostFailovers, "failover.max_per_hour", fmt.Sprintf("must be between 0 and %d", mostFailovers),
		"the default is 4; 0 means that a person is asked each time")
}

func matches(pattern, s string) bool { return regexp.MustCompile(pattern).MatchString(s) }

// within says whether path is dir or below it. Both are clean and absolute.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func knownSignal(s string) bool {
	return strings.HasPrefix(s, "SIG") && unix.SignalNum(s) != 0
}

func knownUlimit(s string) bool {
	return slices.Contains([]string{
		"core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile",
		"nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
	}, s)
}
