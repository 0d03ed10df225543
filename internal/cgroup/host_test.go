package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const id = "405b9baf861d21b4aaab8a17f92de469089a5cbaf37a52531facd89cb038547b"

// fakeHost is a machine made of files: its hierarchies are directories below root.
func fakeHost(t *testing.T, mountinfo, cgroups string, dirs ...string) (Host, string) {
	t.Helper()
	root := t.TempDir()
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(root, "proc/self/mountinfo"), strings.ReplaceAll(mountinfo, "ROOT", root))
	put(filepath.Join(root, "proc/77/cgroup"), cgroups)
	for _, d := range dirs {
		dir := filepath.Join(root, d)
		if strings.Contains(d, "v2") {
			put(filepath.Join(dir, "cgroup.kill"), "")
			put(filepath.Join(dir, "cgroup.freeze"), "0\n")
			put(filepath.Join(dir, "cgroup.events"), "populated 1\nfrozen 0\n")
		} else {
			put(filepath.Join(dir, "freezer.state"), "THAWED\n")
		}
		put(filepath.Join(dir, "cgroup.procs"), "")
	}
	return Host{Proc: filepath.Join(root, "proc")}, root
}

const (
	mountV2     = "30 23 0:26 / ROOT/v2 rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
	mountV1     = "31 23 0:27 / ROOT/v1 rw shared:5 master:2 - cgroup cgroup rw,freezer\n"
	mountMemory = "32 23 0:28 / ROOT/mem rw - cgroup cgroup rw,memory\n"
)

func TestOf(t *testing.T) {
	for _, c := range []struct {
		name, mounts, cgroups string
		dirs                  []string
		want                  Group // paths relative to the fake machine's root
		none                  bool
	}{
		{
			name: "version 2, systemd driver", mounts: mountMemory + mountV2,
			cgroups: "0::/system.slice/docker-" + id + ".scope\n",
			dirs:    []string{"v2/system.slice/docker-" + id + ".scope"},
			want:    Group{2, "v2/system.slice/docker-" + id + ".scope", "v2/system.slice/docker-" + id + ".scope"},
		}, {
			name: "version 2, cgroupfs driver", mounts: mountV2,
			cgroups: "0::/docker/" + id + "\n",
			dirs:    []string{"v2/docker/" + id},
			want:    Group{2, "v2/docker/" + id, "v2/docker/" + id},
		}, {
			name: "version 1", mounts: mountV1,
			cgroups: "4:memory:/docker/" + id + "\n3:cpu,freezer:/docker/" + id + "\n",
			dirs:    []string{"v1/docker/" + id},
			want:    Group{1, "v1/docker/" + id, ""},
		}, {
			name: "both, container has a group in each", mounts: mountV2 + mountV1,
			cgroups: "3:freezer:/docker/" + id + "\n0::/docker/" + id + "\n",
			dirs:    []string{"v1/docker/" + id, "v2/docker/" + id},
			want:    Group{1, "v1/docker/" + id, "v2/docker/" + id},
		}, {
			name: "both, version 2 has only the daemon's group", mounts: mountV2 + mountV1,
			cgroups: "3:freezer:/docker/" + id + "\n0::/system.slice/docker.service\n",
			dirs:    []string{"v1/docker/" + id, "v2/system.slice/docker.service"},
			want:    Group{1, "v1/docker/" + id, ""},
		}, {
			name: "both, process is in version 2 only", mounts: mountV2 + mountV1,
			cgroups: "3:freezer:/\n0::/docker/" + id + "\n",
			dirs:    []string{"v1", "v2/docker/" + id},
			want:    Group{2, "v2/docker/" + id, "v2/docker/" + id},
		}, {
			name: "a part of the hierarchy is mounted, at a path with a blank",
			mounts: "30 23 0:26 /docker ROOT/v2\\040part rw - cgroup2 cgroup2 rw\n" +
				"29 23 0:26 /other ROOT/v2other rw - cgroup2 cgroup2 rw\n",
			cgroups: "0::/docker/" + id + "\n",
			dirs:    []string{"v2 part/" + id},
			want:    Group{2, "v2 part/" + id, "v2 part/" + id},
		},
		{name: "root of everything", mounts: mountV2 + mountV1, cgroups: "3:freezer:/\n0::/\n", dirs: []string{"v1", "v2"}, none: true},
		{name: "mounted part is the process's very group", mounts: "30 23 0:26 /docker ROOT/v2 rw - cgroup2 c rw\n", cgroups: "0::/docker\n", dirs: []string{"v2"}, none: true},
		{name: "outside of our namespace", mounts: mountV2, cgroups: "0::/../docker/" + id + "\n", dirs: []string{"docker/" + id, "v2"}, none: true},
		{name: "group is not visible here", mounts: mountV2, cgroups: "0::/docker/" + id + "\n", dirs: []string{"v2"}, none: true},
		{name: "nothing mounted", mounts: mountMemory, cgroups: "0::/docker/" + id + "\n", none: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, root := fakeHost(t, c.mounts, c.cgroups, c.dirs...)
			got, err := h.Of(77)
			if c.none {
				if !errors.Is(err, ErrNoGroup) {
					t.Fatalf("got %+v, %v; want ErrNoGroup", got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got.FreezerPath = strings.TrimPrefix(got.FreezerPath, root+"/")
			got.KillPath = strings.TrimPrefix(got.KillPath, root+"/")
			if got != c.want {
				t.Fatalf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
	h, _ := fakeHost(t, mountV2, "")
	if _, err := h.Of(78); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("process that does not exist: %v", err)
	}
}

func TestFind(t *testing.T) {
	other := strings.Repeat("ab", 32)
	h, root := fakeHost(t, mountV2+mountV1+mountMemory, "",
		"v1/docker/"+id, "v1/docker/"+other,
		"v2/docker/"+id, "v2/docker/"+id+"/init",
		"v2/system.slice/docker-"+id+".scope",
		"mem/docker/"+id)
	got, err := h.Find(id)
	if err != nil {
		t.Fatal(err)
	}
	want := []Group{
		{1, root + "/v1/docker/" + id, root + "/v2/docker/" + id},
		{2, root + "/v2/system.slice/docker-" + id + ".scope", root + "/v2/system.slice/docker-" + id + ".scope"},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got  %+v\nwant %+v", got, want)
	}
	if got, err := h.Find(strings.Repeat("cd", 32)); err != nil || len(got) != 0 {
		t.Fatalf("unknown container: %+v, %v", got, err)
	}
	for _, short := range []string{"", "docker", "405b9baf861"} {
		if got, err := h.Find(short); err == nil {
			t.Fatalf("short id %q gave %+v", short, got)
		}
	}
}

func TestWithin(t *testing.T) {
	for _, c := range []struct {
		name string
		in   Group
		id   string
		want Group
	}{
		{"exact", Group{1, "/f/docker/" + id, "/u/docker/" + id}, id, Group{1, "/f/docker/" + id, "/u/docker/" + id}},
		{"init moved itself", Group{2, "/u/docker-" + id + ".scope/init/x", ""}, id, Group{2, "/u/docker-" + id + ".scope", ""}},
		{"kill path is another's", Group{1, "/f/docker/" + id, "/u/docker.service"}, id, Group{1, "/f/docker/" + id, ""}},
		{"another container", Group{1, "/f/docker/" + strings.Repeat("0", 64), ""}, id, Group{}},
		{"no id", Group{1, "/f/docker/" + id, ""}, "", Group{}},
		{"short id", Group{1, "/f/docker/" + id, ""}, "docker", Group{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.in.Within(c.id)
			if got != c.want || (err == nil) != (c.want != Group{}) || err != nil && !errors.Is(err, ErrNoGroup) {
				t.Fatalf("got %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}
