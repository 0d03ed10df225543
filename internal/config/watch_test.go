package config

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestWatch(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	write := func(text string) {
		t.Helper()
		// As editors do: a new file renamed over the old one.
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write(minimal)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var logged lockedBuffer
	ch, err := Watch(ctx, path, hclog.New(&hclog.LoggerOptions{Output: &logged}))
	if err != nil {
		t.Fatal(err)
	}
	next := func() *Config {
		t.Helper()
		select {
		case c := <-ch:
			return c
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing came; log: %s", logged.String())
			return nil
		}
	}
	write(minimal + "zone: a\n")
	if c := next(); c == nil || c.Zone != "a" {
		t.Fatalf("got %+v", c)
	}
	// Invalid, then gone, then unchanged: none of them may be sent.
	write(minimal + "zon: b\n")
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(logged.String(), "zon: is not a known key"); {
		if time.Now().After(deadline) {
			t.Fatalf("invalid file was not logged: %s", logged.String())
		}
		<-time.After(10 * time.Millisecond)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write(minimal + "zone: c\n")
	if c := next(); c == nil || c.Zone != "c" {
		t.Fatalf("got %+v", c)
	}
	cancel()
	select {
	case c, ok := <-ch:
		if ok {
			t.Errorf("sent %+v after the end", c)
		}
	case <-time.After(10 * time.Second):
		t.Error("channel was not closed")
	}
	if _, err := Watch(ctx, "/nonexistent/c.yaml", hclog.NewNullLogger()); err == nil {
		t.Error("a directory that does not exist was watched")
	}
}

func TestDiff(t *testing.T) {
	a, b := parse(t, minimal), parse(t, minimal)
	if d := Diff(a, b); d != nil {
		t.Errorf("equal ones differ in %v", d)
	}
	b.Sync.Schedule, b.Zone, b.Database.Env = "@every 5s", "x", map[string]string{"A": "topsecret"}
	if d := strings.Join(Diff(a, b), " "); d != "zone sync.schedule database.env" {
		t.Errorf("differ in %s", d)
	}
}

func TestMountedIn(t *testing.T) {
	table := filepath.Join(t.TempDir(), "mountinfo")
	text := `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:40 / /mnt/efs rw,relatime shared:20 - nfs4 127.0.0.1:/ rw,vers=4.1
41 22 0:41 / /mnt/with\040blank rw - nfs4 127.0.0.1:/ rw
`
	if err := os.WriteFile(table, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for dir, ok := range map[string]bool{"": true, "/mnt/efs": true, "/mnt/with blank": true, "/mnt": false, "/mnt/efs/shop": false, "8:1": false} {
		if err := mountedIn(table, dir); (err == nil) != ok {
			t.Errorf("%q: %v", dir, err)
		}
	}
	if err := mountedIn(table+"x", "/mnt/efs"); err == nil {
		t.Error("no table, no error")
	}
}

func TestCheckHost(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, share, more, want string }{
		{"there", dir, "", ""},
		{"not there", dir + "/no", "", "c.yaml:2: share: stat: no such file or directory"},
		{"a file", file, "", "c.yaml:2: share: is not a directory"},
		{"not mounted", dir, "share_mount: " + dir + "\n", "c.yaml:4: share_mount: " + dir + " is not mounted"},
		{"mount source", dir, "database: {engine: postgres, mounts: [{source: /nonexistent, target: /x}]}\n", "database.mounts[0].source: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := "cluster: shop\nshare: " + tc.share + "\n"
			if !strings.Contains(tc.more, "database") {
				text += "database: {engine: postgres}\n"
			}
			err := parse(t, text+tc.more).CheckHost(t.Context())
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("err = %v, want %s", err, tc.want)
			}
		})
	}
}

func TestAdvertised(t *testing.T) {
	for _, tc := range []struct{ more, db, http string }{
		{"advertise: db1.example.com\n", "db1.example.com:5432", "db1.example.com:8008"},
		{"advertise: fd00::1\nhttp: {listen: '127.0.0.1:9'}\n", "[fd00::1]:5432", "[fd00::1]:9"},
		{"http: {listen: '127.0.0.1:9'}\n", "", "127.0.0.1:9"},
		{"advertise: a\nhttp: {listen: ''}\n", "a:5432", ""},
	} {
		c := parse(t, "cluster: shop\nshare: /s/shop\ndatabase: {engine: postgres, ports: [{container: 5432}]}\n"+tc.more)
		if got := c.AdvertisedDatabase(); tc.db != "" && got != tc.db {
			t.Errorf("%q: database %q", tc.more, got)
		} else if h, p, err := net.SplitHostPort(got); err != nil || h == "" || p != "5432" {
			t.Errorf("%q: database %q, %v", tc.more, got, err)
		}
		if got := c.AdvertisedHTTP(); got != tc.http {
			t.Errorf("%q: http %q", tc.more, got)
		}
	}
	c := parse(t, "cluster: shop\nshare: /s/shop\ndatabase: {engine: postgres, ports: [{container: 5432, address: 127.0.0.1}]}\n")
	if got := c.AdvertisedDatabase(); got != "127.0.0.1:5432" {
		t.Errorf("database bound to loopback is advertised as %q", got)
	}
}

func TestWarningsAndEnvFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	text := "cluster: shop\nshare: /s/shop\ndatabase: {engine: postgres, env: {PW: topsecret}}\nretention: {grace: 1s}\n"
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	w := strings.Join(c.Warnings(), "\n")
	for _, want := range []string{"share_mount is not set", "can be read by everybody", "grace is short"} {
		if !strings.Contains(w, want) {
			t.Errorf("no warning %q in\n%s", want, w)
		}
	}
	if strings.Contains(w, "topsecret") {
		t.Error("a warning shows a secret")
	}
}
