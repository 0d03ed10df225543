package track

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// BenchmarkWrite writes 8 KiB blocks in place with and without the programs.
func BenchmarkWrite(b *testing.B) {
	for _, fs := range []string{ext4, xfs} {
		for _, tracked := range []bool{false, true, false, true} {
			b.Run(fmt.Sprintf("%s/tracked=%v", fs, tracked), func(b *testing.B) {
				v := newVolume(b, fs, 400)
				f, err := os.Create(v.path("f"))
				must(b, err)
				defer f.Close()
				block := make([]byte, BlockSize)
				for n := range int64(8 << 10) {
					_, err := f.WriteAt(block, n*BlockSize)
					must(b, err)
				}
				if tracked {
					exe, err := os.Executable()
					must(b, err)
					cmd := exec.CommandContext(b.Context(), exe)
					cmd.Env = append(os.Environ(), "TRACK_TEST_ROLE=agent", "TRACK_TEST_DIR="+v.root)
					out, err := cmd.StdoutPipe()
					must(b, err)
					must(b, cmd.Start())
					_, _ = bufio.NewReader(out).ReadString('\n')
					defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
				}
				r := rand.New(rand.NewPCG(1, 1))
				b.ResetTimer()
				for range b.N {
					_, _ = f.WriteAt(block, int64(r.IntN(8<<10))*BlockSize)
				}
			})
		}
	}
}

// BenchmarkDrain drains after so many single blocks, each in a MiB of its own, were changed.
func BenchmarkDrain(b *testing.B) {
	for _, dirty := range []int{0, 1000, 100000} {
		b.Run(fmt.Sprint(dirty), func(b *testing.B) {
			v := newVolume(b, xfs, 20000)
			tr := v.opened(b)
			var sum, longest time.Duration
			for range b.N {
				if dirty > 0 {
					// A sparse file's size is no matter; one byte in each MiB.
					sparseWrites(b, v.path("f"), dirty)
				}
				begin := time.Now()
				c := drain(b, tr)
				took := time.Since(begin)
				sum, longest = sum+took, max(longest, took)
				if dirty > 0 {
					if n := c.Inodes[v.ino(b, "f")]; c.Lost != "" || n == nil || blocks(n.Written) != dirty {
						b.Fatalf("lost %q, %d inodes, %d blocks", c.Lost, len(c.Inodes), blocks(n.Written))
					}
				}
				must(b, tr.Settle())
			}
			b.ReportMetric(0, "ns/op") // most of it is the writing
			b.ReportMetric(float64(sum.Microseconds())/float64(b.N), "mean-us")
			b.ReportMetric(float64(longest.Microseconds()), "longest-us")
		})
	}
}

func sparseWrites(b *testing.B, path string, n int) {
	b.Helper()
	exe, err := os.Executable()
	must(b, err)
	cmd := exec.CommandContext(b.Context(), exe)
	cmd.Env = append(os.Environ(), "TRACK_TEST_ROLE=sparse", "TRACK_TEST_DIR="+path, fmt.Sprint("TRACK_TEST_COUNT=", n))
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v %s", err, out)
	}
}

func sparseMain() int {
	n, _ := strconv.Atoi(os.Getenv("TRACK_TEST_COUNT"))
	f, err := os.OpenFile(os.Getenv("TRACK_TEST_DIR"), os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		err = f.Truncate(100000 << 20)
	}
	for i := 0; i < n && err == nil; i++ {
		_, err = f.WriteAt([]byte{1}, int64(i)<<20)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}
