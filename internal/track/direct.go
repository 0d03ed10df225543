package track

import "github.com/cilium/ebpf"

// directWrites are ranges of direct writes to one inode that may not have arrived. Only
// where the kernel doesn't say when they do (ext4 before Linux 6.6).
type directWrites struct {
	ino  uint64
	addr uint64
	data []chunk // written
}

// directs reports the ranges of direct writes again for as long as such writes to the inode
// are under way, and once after.
func (t *Tracker) directs(now files) {
	var carry []directWrites
	for _, d := range t.direct {
		f := now.file(d.ino)
		if f.addr == 0 {
			f.addr, f.flags = d.addr, f.flags|flagDirect
		}
		f.chunks = append(f.chunks, d.data...)
	}
	for ino, f := range now {
		if f.flags&flagDirect == 0 || !t.kernel.inFlight(f.addr) {
			continue
		}
		d := directWrites{ino: ino, addr: f.addr}
		for _, c := range f.chunks {
			d.data = append(d.data, chunk{n: c.n, written: c.written})
		}
		carry = append(carry, d)
	}
	t.direct = carry
}

// inFlight asks the inode at an address of the kernel for direct writes under way.
func (k *kernel) inFlight(addr uint64) bool {
	n, err := k.progs["in_flight"].Run(&ebpf.RunOptions{Context: []uint64{addr}})
	return err != nil || n != 0
}
