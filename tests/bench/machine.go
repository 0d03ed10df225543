package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what this machine does without any of our programs' help, measured before and
// after each benchmark: a figure that moves no more than these is noise.
type machine struct {
	hash, disk, fsync, timer, load figure
}

func newMachine() machine {
	return machine{
		hash:  figure{what: "machine: SHA-256 on one processor", unit: "MiB/s"},
		disk:  figure{what: "machine: write and fsync 32 MiB", unit: "MiB/s"},
		fsync: figure{what: "machine: write and fsync 4 KiB", unit: "ms", tail: true},
		timer: figure{what: "machine: a sleep of 1 ms is late by", unit: "ms", tail: true},
		load:  figure{what: "machine: load average of a minute", unit: ""},
	}
}

func (m *machine) figures() []*figure {
	return []*figure{&m.hash, &m.disk, &m.fsync, &m.timer, &m.load}
}

const (
	hashSize = 16 * mib
	diskSize = 32 * mib
)

// probe takes about two seconds. dir is on the file system that the benchmark uses.
func (m *machine) probe(dir string) error {
	block := make([]byte, diskSize)
	if _, err := rand.Read(block); err != nil {
		return err
	}
	for range 3 {
		began := time.Now()
		_ = sha256.Sum256(block[:hashSize])
		m.hash.samples = append(m.hash.samples, perSecond(hashSize, time.Since(began)))
	}
	path := filepath.Join(dir, "probe")
	for range 2 {
		took, err := timedWrite(path, block)
		if err != nil {
			return err
		}
		m.disk.samples = append(m.disk.samples, perSecond(diskSize, took))
	}
	for range 20 {
		took, err := timedWrite(path, block[:4096])
		if err != nil {
			return err
		}
		m.fsync.samples = append(m.fsync.samples, millis(took))
	}
	for range 200 {
		began := time.Now()
		time.Sleep(time.Millisecond)
		m.timer.samples = append(m.timer.samples, millis(time.Since(began)-time.Millisecond))
	}
	var one float64
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if _, err := fmt.Sscan(string(b), &one); err == nil {
			m.load.samples = append(m.load.samples, one)
		}
	}
	return nil
}

// timedWrite makes a file, and takes it away after the clock has stopped.
func timedWrite(path string, data []byte) (took time.Duration, err error) {
	defer func() { err = errors.Join(err, os.Remove(path)) }()
	began := time.Now()
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	return time.Since(began), err
}

// describe says in one line what the machine is.
func describe(ctx context.Context, dir string) string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				cpu = strings.TrimSpace(v)
				break
			}
		}
	}
	memory := "?"
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		memory = fmt.Sprintf("%.0f GiB", float64(si.Totalram)*float64(si.Unit)/(1<<30))
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fs := "?"
	if out, err := exec.CommandContext(ctx, "df", "--output=fstype", dir).Output(); err == nil {
		fs = lastLine(string(out))
	}
	return fmt.Sprintf("%d x %s, %s of memory, Linux %s, file system %s",
		runtime.NumCPU(), cpu, memory, strings.TrimSpace(string(kernel)), fs)
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndex(s, "\n")+1:]
}

// room fails when the file system has less than need bytes left.
func room(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need { //nolint:gosec // no disk is that large
		return fmt.Errorf("%s has %d MiB left, this needs %d: give another directory with -dir, or a smaller -volume", dir, free/mib, need/mib)
	}
	return nil
}

const mib = 1 << 20

func perSecond(bytes int64, took time.Duration) float64 {
	return float64(bytes) / mib / max(took.Seconds(), 1e-9)
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
