// Command probe is the only program in the container image that tests of Docker, control
// groups and the firewall run: a stand-in for a database, small enough to be built anywhere
// without an image registry.
package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	mode, arg := "sleep", ""
	if len(args) > 0 {
		mode = args[0]
	}
	if len(args) > 1 {
		arg = args[1]
	}
	switch mode {
	case "sleep": // until SIGTERM
		return untilSignal(syscall.SIGTERM, syscall.SIGINT)
	case "stubborn": // until SIGKILL
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
		fmt.Println("ready")
		forever()
	case "usr1": // until SIGUSR1: a stop signal of its own
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ready")
		return untilSignal(syscall.SIGUSR1)
	case "count": // append a byte to a file every 2 ms: a writer
		return count(arg)
	case "serve": // answer each line on a TCP address with the same line; "sleep 1s" after that time
		return serve(arg)
	case "family": // children and grandchildren
		return family(arg)
	case "churn": // fork and die without end
		return churn()
	case "hop": // never the same process for longer than a fork takes
		return hop()
	case "churn-child": // becomes the next parent half of the time, so that no process is the root
		if os.Getpid()%2 == 0 {
			c := exec.Command("/proc/self/exe", "churn-child")
			_ = c.Start()
		}
		time.Sleep(5 * time.Millisecond)
		return 0
	case "exit":
		n, err := strconv.Atoi(arg)
		if err != nil {
			return 2
		}
		fmt.Println("last words")
		fmt.Fprintln(os.Stderr, "and of what it died")
		return n
	case "env":
		for _, e := range os.Environ() {
			fmt.Println(e)
		}
		return 0
	case "cat":
		b, err := os.ReadFile(arg)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Print(string(b))
		return 0
	case "facts":
		return facts(args[1:])
	}
	fmt.Fprintln(os.Stderr, "unknown mode", mode)
	return 2
}

// forever is select{} without the runtime's finding out that nobody can wake it.
func forever() {
	for {
		time.Sleep(time.Hour)
	}
}

func untilSignal(s ...os.Signal) int {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, s...)
	<-ch
	return 0
}

func count(path string) int {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		if _, err := f.Write([]byte{'x'}); err != nil {
			return 1
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func serve(addr string) int {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			return 1
		}
		go func() {
			defer c.Close()
			in := bufio.NewScanner(c)
			for in.Scan() {
				fmt.Println("got", in.Text())
				if d, ok := strings.CutPrefix(in.Text(), "sleep "); ok {
					wait, _ := time.ParseDuration(d)
					time.Sleep(wait)
				}
				if _, err := fmt.Fprintln(c, in.Text()); err != nil {
					break
				}
			}
			if err := in.Err(); err != nil {
				fmt.Println("connection lost:", err)
			}
		}()
	}
}

func family(arg string) int {
	n, _ := strconv.Atoi(arg)
	if n > 0 {
		for range 2 {
			c := exec.Command("/proc/self/exe", "family", strconv.Itoa(n-1))
			if err := c.Start(); err != nil {
				return 1
			}
		}
	}
	signal.Ignore(syscall.SIGTERM)
	fmt.Println("ready")
	forever()
	return 0
}

func churn() int {
	signal.Ignore(syscall.SIGTERM, syscall.SIGCHLD)
	for {
		c := exec.Command("/proc/self/exe", "churn-child")
		if c.Start() == nil {
			_ = c.Process.Release()
		}
	}
}

// hop forks and lets the child go on, by nothing but raw system calls, which is all that the
// child of a program with threads may do.
func hop() int {
	for {
		pid, _, _ := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
		if pid > 0 {
			_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}

// facts prints what the kernel says of this process: limits, sysctls, capabilities, user.
func facts(paths []string) int {
	fmt.Printf("uid=%d gid=%d\n", os.Getuid(), os.Getgid())
	var lim syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim) == nil {
		fmt.Printf("nofile=%d/%d\n", lim.Cur, lim.Max)
	}
	var st syscall.Statfs_t
	if syscall.Statfs("/dev/shm", &st) == nil {
		fmt.Printf("shm=%d\n", int64(st.Blocks)*st.Bsize)
	}
	if b, err := os.ReadFile("/proc/self/status"); err == nil {
		for _, l := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(l, "CapBnd:") {
				fmt.Println("capbnd=" + strings.TrimSpace(strings.TrimPrefix(l, "CapBnd:")))
			}
		}
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		fmt.Printf("%s=%s %v\n", p, strings.TrimSpace(string(b)), err)
	}
	return 0
}
