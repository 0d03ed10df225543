package container

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSessions(t *testing.T) {
	const head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	for name, tc := range map[string]struct {
		text string
		want int
	}{
		"established":            {"0: 030011AC:1538 010011AC:D3E2 01 0:0\n1: 030011AC:1538 050011AC:D3E2 08 0:0\n", 2},
		"on their way":           {"0: 030011AC:1538 010011AC:D3E2 03 0:0\n1: 030011AC:1538 050011AC:D3E2 04 0:0\n", 2},
		"listening, others":      {"0: 00000000:1538 00000000:0000 0A 0:0\n1: 030011AC:1539 010011AC:D3E2 01 0:0\n2: 030011AC:1538 010011AC:D3E2 06 0:0\n", 0},
		"loopback":               {"0: 0100007F:1538 0100007F:D3E2 01 0:0\n", 0},
		"loopback, IPv6":         {"0: 00000000000000000000000001000000:1538 00000000000000000000000001000000:D3E2 01 0:0\n", 0},
		"IPv4 on an IPv6 socket": {"0: 0000000000000000FFFF0000030011AC:1538 0000000000000000FFFF0000010011AC:D3E2 01 0:0\n1: 0000000000000000FFFF00000100007F:1538 0000000000000000FFFF00000100007F:D3E2 01 0:0\n", 1},
	} {
		path := filepath.Join(t.TempDir(), "tcp")
		if err := os.WriteFile(path, []byte(head+tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := sessionsIn(path, []int{5432}); err != nil || got != tc.want {
			t.Errorf("%s: %d, %v, want %d", name, got, err, tc.want)
		}
	}
	if n, err := Sessions(1<<22+1, []int{5432}); n != 0 || err != nil {
		t.Errorf("a process that is gone: %d, %v", n, err)
	}
}
