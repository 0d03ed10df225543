package proxy

import (
	"fmt"
	"net"
	"testing"
	"time"
)

// listen is something that should not be there.
func listen(t *testing.T, port int) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	must(t, err)
	return l
}

// reach says whether a port takes connections.
func reach(port int) error {
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 2*time.Second)
	if err == nil {
		_ = c.Close()
	}
	return err
}
