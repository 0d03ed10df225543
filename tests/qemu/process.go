package qemu

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// Process is a child that ends with this program, however this program ends. Stop it at the
// end.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // what Wait returned, once done is closed
}

// StartProcess starts a command, which must not have been started.
func StartProcess(cmd *exec.Cmd) (*Process, error) {
	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	go func() {
		// The kernel sends the signal at the end of the thread that started the child.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how it ended; only after Done.
func (p *Process) Err() error { return p.err }

// Signal sends a signal; to a process that has ended it does nothing.
func (p *Process) Signal(sig os.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
		return p.cmd.Process.Signal(sig)
	}
}

// Stop kills it and waits for its end.
func (p *Process) Stop() {
	_ = p.cmd.Process.Kill()
	<-p.done
}
