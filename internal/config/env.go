package config

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// envFile checks the file of secrets without keeping or showing its values.
func (v *validator) envFile(path string) {
	if path == "" || !v.absolute("database.env_file", path) {
		return
	}
	const key = "database.env_file"
	st, err := os.Stat(path)
	if err != nil {
		v.need(false, key, errText(err), "create "+path+" with KEY=VALUE lines, mode 0600")
		return
	}
	v.need(st.Mode().Perm()&0o004 == 0, key, path+" can be read by everybody", "chmod 600 "+path)
	if _, err := ReadEnvFile(path); err != nil {
		v.need(false, key, err.Error(), "write one KEY=VALUE per line; lines that begin with # are left out")
	}
}

// ReadEnvFile reads KEY=VALUE lines. Empty lines and lines that begin with # are left
// out; values are taken as they are, quotes included. Errors name the line, not the value.
func ReadEnvFile(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read env file: %w", err)
	}
	defer f.Close()
	env := map[string]string{}
	sc := bufio.NewScanner(f)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		k, val, ok := strings.Cut(line, "=")
		if !ok || !matches(`^[A-Za-z_][A-Za-z0-9_.-]*$`, k) {
			return nil, fmt.Errorf("read env file: %s:%d is no KEY=VALUE line", path, n)
		}
		env[k] = val
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read env file %s: %w", path, err)
	}
	return env, nil
}

// Environment is what the container gets: env, then env_file on top of it.
func (d *Database) Environment() (map[string]string, error) {
	env := map[string]string{}
	for k, v := range d.Env {
		env[k] = v
	}
	if d.EnvFile == "" {
		return env, nil
	}
	more, err := ReadEnvFile(d.EnvFile)
	if err != nil {
		return nil, err
	}
	for k, v := range more {
		env[k] = v
	}
	return env, nil
}

// Warnings are remarks that do not keep the agent from running.
func (c *Config) Warnings() []string {
	var w []string
	if c.ShareMount == "" {
		w = append(w, "share_mount is not set: a share that is not mounted is only noticed by what is missing in it")
	}
	if c.src != nil {
		st, err := os.Stat(c.src.file)
		if err == nil && st.Mode().Perm()&0o004 != 0 && len(c.Database.Env) > 0 {
			w = append(w, fmt.Sprintf("%s can be read by everybody and sets database.env; put secrets into database.env_file", filepath.Base(c.src.file)))
		}
	}
	if c.Retention.Grace < time.Minute {
		w = append(w, "retention.grace is short: a slow restore of an old snapshot may lose its files under way")
	}
	return w
}
