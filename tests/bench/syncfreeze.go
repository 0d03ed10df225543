package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"dbsupervisor/internal/cgroup"
	"dbsupervisor/internal/fence"
	"dbsupervisor/tests/efssim"
)

// dirtied is how much the writer has dirtied before each snapshot.
const dirtied = 16 * mib

// freezeTime is how long the quick form goes on at most; n tells how many it came to.
const freezeTime = 3 * time.Minute

// freezes measures how long a writer at full speed stands still.
func (r *syncRun) freezes(ctx context.Context, s *section) error {
	s.how = fmt.Sprintf(`%d files of 20 KiB on XFS in a file. A process in a container overwrites 16 MiB in pages of 8 KiB,
chosen at random among all files, again and again at full speed; before each of %d snapshots (or
as many as can be taken in %s, unless all is measured) it is given another 16 MiB and has been through all of them once. *Freeze* is from the request to
freeze until the thaw. *Freezer alone* is the least that it can be here: the same with nothing done
in between, while the writer runs. *Noise* is what this machine does to a sleep of 1 ms at the same time.
The share does not delay, sync.max_freeze is 250 ms; what would take longer is not taken.`, r.files, r.freezeCount, freezeTime)
	disk, err := r.loop(ctx, "xfs", int64(r.files)*32<<10+2<<30)
	if err != nil {
		return err
	}
	sh, err := r.share("freeze", efssim.Options{DirMin: time.Minute, DirMax: time.Minute, AttrMin: time.Minute, AttrMax: time.Minute})
	if err != nil {
		return err
	}
	w, _, err := startWorker(OpenArgs{Share: sh.at, Local: filepath.Join(disk, "instance")})
	if err != nil {
		return err
	}
	r.cleanups = append(r.cleanups, w.close)
	volume := filepath.Join(disk, "instance", "volume")
	if err := makeFiles(volume, r.files); err != nil {
		return err
	}
	if _, err := w.snapshot(SnapshotArgs{}); err != nil {
		return err
	}
	wr, err := r.startWriter(ctx, volume)
	if err != nil {
		return err
	}
	if err := freezerAlone(ctx, s, wr.group); err != nil {
		return err
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	late := &figure{what: "noise: a sleep of 1 ms is late by", unit: "ms", tail: true}
	go func() {
		defer close(stopped)
		runtime.LockOSThread()
		noise(stop, func(d time.Duration) { late.samples = append(late.samples, millis(d)) })
	}()
	failed := 0
	err = func() error {
		began := time.Now()
		for range r.freezeCount {
			if !r.full && time.Since(began) > freezeTime {
				break
			}
			if err := wr.next(); err != nil {
				return err
			}
			var rep SnapshotReply
			wire, _, err := sh.count(func() (err error) {
				rep, err = w.snapshot(SnapshotArgs{Group: wr.group, MaxFreeze: 250 * time.Millisecond})
				return err
			})
			if err != nil {
				return err
			}
			if rep.TooLong {
				failed++
				continue
			}
			s.tier(rep.Tier)
			s.addTail("freeze", "ms", millis(rep.Freeze))
			s.addTail("snapshot: time", "ms", millis(rep.Took))
			s.add("snapshot: changed blocks", "MiB", float64(rep.Store.ChangedBytes)/mib)
			s.add("snapshot: read in the freeze", "MiB", float64(rep.Capture.FrozenBytes)/mib)
			s.addTail("snapshot: operations on the share", "", float64(wire.Total()))
		}
		return nil
	}()
	close(stop)
	<-stopped
	if err := errors.Join(err, r.resident(s, "dbsupervisor", w)); err != nil {
		return err
	}
	if f := s.find("freeze"); f != nil {
		s.add("freeze: median", "ms", f.median()).atMost(10)
		s.add("freeze: p99", "ms", f.at(0.99)).atMost(25)
	}
	s.add("not taken because the freeze would have been too long", "", float64(failed))
	s.figures = append(s.figures, late)
	return nil
}

// freezerAlone measures what a freeze takes in which nothing is done.
func freezerAlone(ctx context.Context, s *section, g cgroup.Group) error {
	for range 200 {
		f := fence.NewFreezer(fence.FreezerConfig{Group: g, Budget: time.Second})
		began := time.Now()
		if err := errors.Join(f.Freeze(ctx), f.Thaw()); err != nil {
			return err
		}
		s.addTail("freezer alone: freeze and thaw, nothing in between", "ms", millis(time.Since(began)))
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// makeFiles makes files of 20 KiB in directories of 500.
func makeFiles(dir string, n int) error {
	random := mathrand.NewChaCha8([32]byte{7})
	data := make([]byte, fileBytes)
	for k := range n {
		p := writerFile(dir, k)
		if k%500 == 0 {
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				return err
			}
		}
		_, _ = random.Read(data) // never fails
		if err := os.WriteFile(p, data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

const fileBytes = 20 << 10

func writerFile(dir string, k int) string {
	return filepath.Join(dir, strconv.Itoa(k/500), strconv.Itoa(k))
}

// writer is the process in the container.
type writer struct {
	group cgroup.Group
	in    io.Writer
	out   *bufio.Reader
}

const writerEnv = "DBSUPERVISOR_BENCH_WRITER"

func (r *syncRun) startWriter(ctx context.Context, volume string) (*writer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	name := "dbsupervisor-bench-writer-" + strconv.Itoa(os.Getpid())
	cmd := exec.CommandContext(ctx, "docker", "run", "-i", "--rm", "--name", name, "--network", "none",
		"-v", volume+":/volume", "-v", self+":/bench:ro", "-e", writerEnv+"="+strconv.Itoa(r.files), "--entrypoint", "/bench", r.image)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r.cleanups = append(r.cleanups, func() error {
		err := command(context.WithoutCancel(ctx), nil, "docker", "rm", "-f", name)
		_ = cmd.Wait() // says that it was killed
		return err
	})
	w := &writer{in: in, out: bufio.NewReader(out)}
	if err := w.next(); err != nil { // it runs
		return nil, err
	}
	id, err := output(ctx, nil, "docker", "inspect", "-f", "{{.Id}}", name)
	if err != nil {
		return nil, err
	}
	w.group, err = groupOf(lastLine(id))
	return w, err
}

// next has it write elsewhere, and waits until it has been through all of that once.
func (w *writer) next() error {
	if _, err := io.WriteString(w.in, "next\n"); err != nil {
		return err
	}
	_, err := w.out.ReadString('\n')
	return err
}

// writeIfAsked writes if this process is the writer; it ends when it is killed.
func writeIfAsked() (asked bool, err error) {
	n := os.Getenv(writerEnv)
	if n == "" {
		return false, nil
	}
	files, err := strconv.Atoi(n)
	if err != nil {
		return true, err
	}
	wish := make(chan struct{})
	go func() {
		defer close(wish)
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			wish <- struct{}{}
		}
	}()
	random := mathrand.NewChaCha8([32]byte{8})
	data := make([]byte, page)
	type place struct {
		f  *os.File
		at int64
	}
	var places []place
	for {
		fresh := false
		select {
		case _, ok := <-wish:
			if !ok {
				return true, nil
			}
			fresh = true
		default:
		}
		if fresh {
			for _, p := range places {
				_ = p.f.Close() // written data is the kernel's
			}
			places = places[:0]
			for range dirtied / page {
				f, err := os.OpenFile(writerFile("/volume", int(random.Uint64()%uint64(files))), os.O_WRONLY, 0) //nolint:gosec // small
				if err != nil {
					return true, err
				}
				places = append(places, place{f, int64(random.Uint64()%2) * page}) //nolint:gosec // 0 or 1
			}
		}
		for _, p := range places {
			_, _ = random.Read(data) // never fails
			if _, err := p.f.WriteAt(data, p.at); err != nil {
				return true, err
			}
		}
		if fresh {
			fmt.Println("written")
		}
		if places == nil {
			time.Sleep(time.Millisecond)
		}
	}
}
