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

// flows says whether data may still be on their way to a client in a state of /proc/net/tcp:
// not where nothing was ever connected (listening, closed), nor where all has been acknowledged
// (FIN_WAIT2, TIME_WAIT).
func flows(state string) bool {
	switch state {
	case "01", "03", "04", "08", "09", "0B", "0C": // ESTABLISHED, SYN_RECV, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING, NEW_SYN_RECV
		return true
	}
	return false
}

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
		if len(col) < 4 || !flows(col[3]) {
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
