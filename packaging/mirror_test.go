package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestMirrorComesFromApt(t *testing.T) {
	cases := []struct {
		name  string
		files map[string]string
		suite string
		want  string // "" = fails
	}{
		{"one line", map[string]string{
			"sources.list": "# deb http://no/ stable main\ndeb http://one/debian stable main contrib\n",
		}, "stable", "http://one/debian"},
		{"options and a trailing slash", map[string]string{
			"sources.list": "deb-src http://src/debian stable main\n deb [ arch=amd64 signed-by=/k.gpg ]\thttps://two/debian/ stable/ main\n",
		}, "stable", "https://two/debian"},
		{"another suite", map[string]string{
			"sources.list": "deb http://one/debian oldstable main\ndeb http://sec/x stable-security main\n",
		}, "stable", ""},
		{"part of the directory", map[string]string{
			"sources.list":        "",
			"sources.list.d/list": "deb http://not-read/ stable main\n",
			"sources.list.d/a.list": "deb http://three/debian stable main\n" +
				"deb http://four/debian stable main\n",
		}, "stable", "http://three/debian"},
		{"deb822", map[string]string{
			"sources.list.d/debian.sources": "Types: deb deb-src\nURIs: http://five/debian\nSuites: stable stable-updates\nComponents: main\n\n" +
				"Types: deb\nURIs: http://six/security\nSuites: stable-security\nComponents: main\n",
		}, "stable-security", "http://six/security"},
		{"deb822, folded, switched off, other order and case", map[string]string{
			"sources.list.d/d.sources": "Types: deb\nURIs: http://off/\nSuites: stable\nEnabled: no\n\n" +
				"Types: deb-src\nURIs: http://src/\nSuites: stable\n\n" +
				"# a comment\nsuites:\n stable\n stable-updates\nuris:\n http://seven/debian\n# another\nTypes: deb\nEnabled: yes\n",
		}, "stable-updates", "http://seven/debian"},
		{"a mirror list", map[string]string{
			"sources.list.d/d.sources": "Types: deb\nURIs: mirror+file:LIST\nSuites: stable\n",
			"LIST":                     "# best first\nhttp://eight/debian\tpriority:1\nhttp://nine/debian\n",
		}, "stable", "http://eight/debian"},
		{"not for debootstrap", map[string]string{
			"sources.list": "deb cdrom:[Debian]/ stable main\ndeb tor+http://onion/ stable main\n",
		}, "stable", ""},
		{"nothing", nil, "stable", ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range c.files {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				text = strings.ReplaceAll(text, "LIST", filepath.Join(dir, "LIST"))
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("images/mirror.sh", c.suite)
			cmd.Env = append(os.Environ(), "APT_DIR="+dir)
			out, err := cmd.Output()
			if got := strings.TrimSpace(string(out)); got != c.want || (err == nil) != (c.want != "") {
				t.Errorf("got %q (%v), want %q", got, err, c.want)
			}
		})
	}
}
