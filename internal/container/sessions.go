package container

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Sessions counts the TCP connections that others have to these ports in the network
// namespace of a process (Info.Pid). Connections from inside of the container over loopback
// don't count. A process that is gone has none.
func Sessions(pid int, ports []int) (int, error) {
	n := 0
	for _, file := range []string{"tcp", "tcp6"} {
		k, err := sessionsIn(fmt.Sprintf("/proc/%d/net/%s", pid, file), ports)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("count sessions: %w", err)
		}
		n += k
	}
	return n, nil
}

// The states of /proc/net/tcp in which data may still flow to a client.
const (
	tcpEstablished = "01"
	tcpCloseWait   = "08"
)

func sessionsIn(path string, ports []int) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n := 0
	in := bufio.NewScanner(f)
	for in.Scan() {
		// "0: 0100007F:1538 0100007F:A2B4 01 ...", addresses in hexadecimal.
		col := strings.Fields(in.Text())
		if len(col) < 4 || col[3] != tcpEstablished && col[3] != tcpCloseWait {
			continue
		}
		_, port, _ := strings.Cut(col[1], ":")
		p, err := strconv.ParseUint(port, 16, 16)
		if err != nil || !slices.Contains(ports, int(p)) || isLoopback(col[2]) {
			continue
		}
		n++
	}
	return n, in.Err()
}

// isLoopback understands 127.0.0.0/8 and ::1 in the kernel's notation: words of four bytes in
// the machine's order.
func isLoopback(remote string) bool {
	addr, _, _ := strings.Cut(remote, ":")
	const mapped = "0000000000000000FFFF0000"
	addr = strings.TrimPrefix(addr, mapped)
	return len(addr) == 8 && strings.HasSuffix(addr, "7F") || addr == "00000000000000000000000001000000"
}
