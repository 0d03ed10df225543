package sync

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// bulkNice is the niceness of work that is long and can wait: about a tenth of what the
// database gets where both want all processors.
const bulkNice = 10

// gently makes work run on a thread of its own that leaves the processors to the database
// while that runs too. The thread ends with the goroutine.
func gently(work func() error) func() error {
	return func() error {
		runtime.LockOSThread() // for good: the niceness goes with the thread
		// Not worth an error: it only takes more of the processors then.
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, bulkNice)
		return work()
	}
}
