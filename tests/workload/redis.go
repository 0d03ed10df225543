package workload

import (
	"fmt"
	"strconv"
)

func redis() Engine {
	return Engine{
		Name: "redis", Image: "dbsupervisor/redis:7", Port: 6379,
		Env: "REDIS_PASSWORD=%s", Password: "REDISCLI_AUTH",
		Client: func(port int) []string {
			return []string{"redis-cli", "-h", "127.0.0.1", "-p", strconv.Itoa(port)}
		},
		Setup: "PING\n",
		Write: func(n int64) string { return fmt.Sprintf("RPUSH acked %d\n", n) },
		Acked: func(line string, _ int64) bool { // the list's length
			_, err := strconv.Atoi(line)
			return err == nil
		},
		Read:     "LRANGE acked 0 -1\n",
		DataPath: "/data",
		// It reads the base file and all that was appended.
		Check:  "redis-check-aof appendonlydir/appendonly.aof.manifest",
		Damage: "appendonlydir/*.incr.aof", DamageAt: 100, DamageBytes: 20,
		Undo: func(int) string {
			return "CONFIG SET replica-read-only no\nREPLICAOF NO ONE\nSLAVEOF NO ONE\nEVAL \"return redis.call('config', 'set', 'replica-read-only', 'no')\" 0\n"
		},
	}
}
