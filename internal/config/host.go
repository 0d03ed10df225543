package config

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// mountInfo is where the kernel lists this process's mounts; reading it never touches a
// file system that may hang.
const mountInfo = "/proc/self/mountinfo"

// CheckHost looks at what the configuration refers to on this machine: that the share is
// mounted and a directory, and that the sources of mounts exist. A share that hangs is
// reported when ctx ends; the look at it is left behind then.
func (c *Config) CheckHost(ctx context.Context) error {
	v := &validator{c: c, src: c.src}
	if err := c.ShareMounted(); err != nil {
		v.errs = append(v.errs, c.ErrorAt("share_mount", err.Error(), "mount the shared file system, or correct share_mount; nothing was created in its place"))
		return v.errs
	}
	st, err := statBounded(ctx, c.Share)
	switch {
	case ctx.Err() != nil:
		v.need(false, "share", "does not answer: "+c.Share, "check the mount and the network (security groups, DNS, the file system's state)")
	case err != nil:
		v.need(false, "share", errText(err)+" "+c.Share, "mount the shared file system; create the directory once with: mkdir "+c.Share)
	default:
		v.need(st.IsDir(), "share", "is not a directory", "name the cluster's directory on the shared file system")
	}
	for i, m := range c.Database.Mounts {
		if _, err := statBounded(ctx, m.Source); err != nil {
			v.need(false, fmt.Sprintf("database.mounts[%d].source", i), errText(err)+" "+m.Source, "create it: Docker would make an empty directory in its place")
		}
	}
	return v.errs.orNil()
}

// statBounded is os.Stat that gives up when ctx ends.
func statBounded(ctx context.Context, path string) (os.FileInfo, error) {
	type result struct {
		st  os.FileInfo
		err error
	}
	done := make(chan result, 1)
	go func() {
		st, err := os.Stat(path)
		done <- result{st, err}
	}()
	select {
	case r := <-done:
		return r.st, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("stat %s: %w", path, ctx.Err())
	}
}

// ShareMounted says whether share_mount is a mount point now (nil), without touching the
// share itself. It is nil when share_mount is not set.
func (c *Config) ShareMounted() error { return mountedIn(mountInfo, c.ShareMount) }

func mountedIn(table, dir string) error {
	if dir == "" {
		return nil
	}
	f, err := os.Open(table)
	if err != nil {
		return fmt.Errorf("read mount table: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// The fifth field is the mount point, with blanks and the like as \040.
		fields := strings.Fields(sc.Text())
		if len(fields) > 4 && unescapeMount(fields[4]) == dir {
			return nil
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read mount table: %w", err)
	}
	return fmt.Errorf("%s is not mounted", dir)
}

func unescapeMount(s string) string {
	for _, e := range [][2]string{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, e[0], e[1])
	}
	return s
}

// AdvertisedDatabase is the host:port under which writers reach the database here.
func (c *Config) AdvertisedDatabase() string {
	if len(c.Database.Ports) == 0 {
		return ""
	}
	p := c.Database.Ports[0]
	if ip := net.ParseIP(p.Address); ip != nil && !ip.IsUnspecified() && c.Advertise == "" {
		return net.JoinHostPort(p.Address, strconv.Itoa(p.Host))
	}
	return net.JoinHostPort(c.advertisedHost(), strconv.Itoa(p.Host))
}

// AdvertisedHTTP is the host:port under which the health endpoints are reached; "" when
// they are switched off.
func (c *Config) AdvertisedHTTP() string {
	host, port, err := net.SplitHostPort(c.HTTP.Listen)
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() && c.Advertise == "" {
		return c.HTTP.Listen
	}
	return net.JoinHostPort(c.advertisedHost(), port)
}

// advertisedHost falls back to the address that the default route uses, and to the
// host's name where there is none.
func (c *Config) advertisedHost() string {
	if c.Advertise != "" {
		return c.Advertise
	}
	// Connecting a UDP socket only asks the kernel for a route; nothing is sent. The
	// address is one of those reserved for documentation.
	d := net.Dialer{Timeout: time.Second}
	if conn, err := d.Dial("udp4", "192.0.2.1:9"); err == nil {
		defer conn.Close()
		if a, ok := conn.LocalAddr().(*net.UDPAddr); ok && !a.IP.IsLoopback() {
			return a.IP.String()
		}
	}
	if h, err := os.Hostname(); err == nil {
		return h
	}
	return "localhost"
}
