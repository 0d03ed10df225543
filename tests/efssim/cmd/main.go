// Command cmd mounts a directory through a file system that breaks on demand (package
// efssim), until it is interrupted or unmounted:
//
//	go run ./tests/efssim/cmd [-efs] -backing A -mount B -control S
//
// and controls it from elsewhere:
//
//	go run ./tests/efssim/cmd -control S hang [OP...]
//	go run ./tests/efssim/cmd -control S fail ERRNO [OP...]
//	go run ./tests/efssim/cmd -control S readonly | heal | stats | forget | unmount
//	go run ./tests/efssim/cmd -control S stale DIRECTORY
//	go run ./tests/efssim/cmd -control S nospace [BYTES]
//	go run ./tests/efssim/cmd -control S slow LOOK CHANGE [BYTES_PER_SECOND]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"dbsupervisor/tests/efssim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "share:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("share", flag.ContinueOnError)
	backing := flags.String("backing", "", "directory to pass through to")
	mount := flags.String("mount", "", "empty directory to mount at")
	efs := flags.Bool("efs", false, "cache as an NFS client does and be as slow as EFS")
	control := flags.String("control", "", "unix socket for the control commands")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *control == "" {
		return errors.New("-control is required")
	}
	if *mount != "" {
		var o efssim.Options
		if *efs {
			o = efssim.EFS()
		}
		return efssim.Serve(ctx, efssim.ServeConfig{Backing: *backing, Mountpoint: *mount, Control: *control, Options: o}, out)
	}
	return command(efssim.Dial(*control), flags.Args(), out)
}

func command(r *efssim.Remote, args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("no command given")
	}
	cmd, args := args[0], args[1:]
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return "0"
	}
	switch cmd {
	case "hang":
		return r.Hang(ops(args)...)
	case "fail":
		errno, err := errorNumber(arg(0))
		if err != nil {
			return err
		}
		return r.Fail(errno, ops(args[1:])...)
	case "readonly":
		return r.ReadOnly()
	case "nospace":
		n, err := strconv.ParseInt(arg(0), 10, 64)
		if err != nil {
			return err
		}
		return r.NoSpace(n)
	case "slow":
		look, err := time.ParseDuration(arg(0))
		if err != nil {
			return err
		}
		change, err := time.ParseDuration(arg(1))
		if err != nil {
			return err
		}
		rate, err := strconv.ParseInt(arg(2), 10, 64)
		if err != nil {
			return err
		}
		return r.Slow(look, change, rate)
	case "stale":
		return r.StaleListings(arg(0))
	case "forget":
		return r.Forget()
	case "heal", "resume":
		return r.Heal()
	case "unmount":
		return r.Unmount()
	case "stats":
		s, err := r.Stats()
		if err != nil {
			return err
		}
		var names []string
		for op := range s.Ops {
			names = append(names, string(op))
		}
		slices.Sort(names)
		for _, n := range names {
			if _, err := fmt.Fprintf(out, "%-10s %d\n", n, s.Ops[efssim.Op(n)]); err != nil {
				return err
			}
		}
		_, err = fmt.Fprintf(out, "read       %d bytes\nwritten    %d bytes\nheld       %d\nNFSv4.1    %v\n", s.Read, s.Written, s.Held, s.NFS)
		return err
	}
	return fmt.Errorf("unknown command %q", cmd)
}

func ops(args []string) []efssim.Op {
	var list []efssim.Op
	for _, a := range args {
		list = append(list, efssim.Op(a))
	}
	return list
}

// errorNumber takes EIO as well as 5.
func errorNumber(s string) (syscall.Errno, error) {
	if n, err := strconv.Atoi(s); err == nil && n > 0 {
		return syscall.Errno(n), nil
	}
	for n := syscall.Errno(1); n < 200; n++ {
		if unix.ErrnoName(n) == strings.ToUpper(s) {
			return n, nil
		}
	}
	return 0, fmt.Errorf("unknown error number %q", s)
}
