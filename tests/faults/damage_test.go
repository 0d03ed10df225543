package faults

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dbsupervisor/tests/cluster"
)

// TestDamage: a pack or manifest is truncated or a bit flips. Verify names the file; a
// restore of what it spoils is refused and says which snapshot is whole.
func TestDamage(t *testing.T) {
	c, ctx := start(t, 1, func(o *cluster.Options) { o.Schedule = "@every 1h" })
	a := c.Instances[0]
	must(t, second(a.Exec(ctx, "psql", "-U", "postgres", "-c", "create table x as select generate_series(1,100000)")))
	must(t, second(a.CLI(ctx, "sync")))
	must(t, second(a.CLI(ctx, "snapshots", "verify")))
	for _, kind := range []string{"packs", "manifests"} {
		file := newest(t, filepath.Join(c.Share, kind))
		whole, err := os.ReadFile(file)
		must(t, err)
		for name, bad := range map[string][]byte{
			"truncated": whole[:len(whole)/2],
			"bit flip":  flip(whole, len(whole)/2),
		} {
			t.Run(kind+" "+name, func(t *testing.T) {
				must(t, os.WriteFile(file, bad, 0o600))
				defer func() { must(t, os.WriteFile(file, whole, 0o600)) }()
				out, err := a.CLI(ctx, "snapshots", "verify")
				if err == nil {
					t.Fatalf("verify is content with a damaged store:\n%s", out)
				}
				text := out + err.Error()
				if !strings.Contains(text, filepath.Base(file)) {
					t.Errorf("verify does not name %s:\n%s", filepath.Base(file), text)
				}
				dir := filepath.Join(c.Root, "restored-"+strings.ReplaceAll(kind+name, " ", ""))
				out, err = a.CLI(ctx, "restore", "--to", dir)
				if err == nil {
					t.Fatalf("restore of a damaged snapshot succeeded:\n%s", out)
				}
			})
		}
	}
	must(t, second(a.CLI(ctx, "snapshots", "verify")))
	dir := filepath.Join(c.Root, "restored")
	must(t, second(a.CLI(ctx, "restore", "--to", dir)))
	if b, err := os.ReadFile(filepath.Join(dir, "PG_VERSION")); err != nil || !bytes.HasPrefix(b, []byte("1")) {
		t.Errorf("restored directory is no PostgreSQL cluster: %q %v", b, err)
	}
}

func flip(b []byte, at int) []byte {
	out := bytes.Clone(b)
	out[at] ^= 0x10
	return out
}

func newest(t *testing.T, dir string) string {
	t.Helper()
	var best string
	var at int64
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err == nil && fi.ModTime().UnixNano() > at {
			best, at = p, fi.ModTime().UnixNano()
		}
		return err
	}))
	return best
}
