package track

import (
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
)

// Supported says whether the volume at root can be tracked here. If not, the error wraps
// ErrUnsupported and is one sentence for the operator.
func Supported(root string) error {
	mount, err := identify(root)
	if err != nil {
		return err
	}
	if lockedDown() {
		return fmt.Errorf("%w: the kernel is locked down (confidentiality), which forbids reading its structures", ErrUnsupported)
	}
	if err := mountOptions(mount); err != nil {
		return err
	}
	if _, err := available(btf.NewCache(), mount.fsType); err != nil {
		return err
	}
	if err := features.HaveProgramType(ebpf.RawTracepoint); err != nil {
		return loadError(err)
	}
	return nil
}

// mountOptions refuses those under which data changes without the page cache or the
// tracepoints taking part.
func mountOptions(mount mountID) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("read mount options: %w", err)
	}
	return checkOptions(string(b), mount.dev)
}

func checkOptions(mountinfo string, dev uint64) error {
	want := devString(dev)
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 3 || fields[2] != want || len(super) < 3 {
			continue
		}
		for _, o := range strings.Split(super[2], ",") {
			switch o {
			case "data=journal":
				return fmt.Errorf("%w: the file system is mounted with data=journal", ErrUnsupported)
			case "dax", "dax=always", "dax=inode":
				return fmt.Errorf("%w: the file system is mounted with %s, so that stores do not pass the page cache", ErrUnsupported, o)
			}
		}
	}
	return nil
}
