package track

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// hook is a program of the object and the tracepoint that it has the name of.
type hook struct {
	program string
	point   string
	fs      string // file system that needs it; empty: both
	// optional says what is not there on kernels without the tracepoint; empty: required.
	optional string
}

// hooks are all programs that are attached. What a kernel lacks is left out, unless it is
// required.
func hooks() []hook {
	return []hook{
		{program: "dirty_folio", point: "writeback_dirty_folio"},
		{program: "iomap_iter", point: "iomap_iter"},
		{program: "dio_begin", point: "iomap_dio_rw_begin", optional: "before Linux 6.6, see asksDirect"},
		{program: "dio_complete", point: "iomap_dio_complete", optional: "the same"},
		{program: "dio_complete_again", point: "iomap_dio_complete", optional: "the same"},

		{program: "dirty_buffer", point: "block_dirty_buffer", fs: ext4, optional: "whole folios are reported"},
		{program: "ext4_da_write_end", point: "ext4_da_write_end", fs: ext4},
		{program: "ext4_write_end", point: "ext4_write_end", fs: ext4},
		{program: "ext4_journalled_write_end", point: "ext4_journalled_write_end", fs: ext4},
		{program: "ext4_mark_inode_dirty", point: "ext4_mark_inode_dirty", fs: ext4},
		{program: "ext4_es_remove_extent", point: "ext4_es_remove_extent", fs: ext4},
		{program: "ext4_truncate_enter", point: "ext4_truncate_enter", fs: ext4},
		{program: "ext4_punch_hole", point: "ext4_punch_hole", fs: ext4},
		{program: "ext4_zero_range", point: "ext4_zero_range", fs: ext4},

		{program: "xfs_end_io_direct_write", point: "xfs_end_io_direct_write", fs: xfs},
		{program: "xfs_setattr", point: "xfs_setattr", fs: xfs},
		{program: "xfs_alloc_file_space", point: "xfs_alloc_file_space", fs: xfs},
		{program: "xfs_free_file_space", point: "xfs_free_file_space", fs: xfs},
		{program: "xfs_zero_file_space", point: "xfs_zero_file_space", fs: xfs, optional: "zeroing frees and allocates, both of which are seen"},
		{program: "xfs_collapse_file_space", point: "xfs_collapse_file_space", fs: xfs},
		{program: "xfs_insert_file_space", point: "xfs_insert_file_space", fs: xfs},
		{program: "xfs_reflink_remap_range", point: "xfs_reflink_remap_range", fs: xfs},
		{program: "xfs_swap_extent_before", point: "xfs_swap_extent_before", fs: xfs},
		{program: "xfs_exchrange_before", point: "xfs_exchrange_before", fs: xfs, optional: "exchange-range came with Linux 6.10"},
	}
}

// available returns the hooks that fsType needs and the running kernel has.
func available(cache *btf.Cache, fsType string) ([]hook, error) {
	kernel, err := cache.Kernel()
	if err != nil {
		if errors.Is(err, btf.ErrNotSupported) || errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: this kernel has no type information (CONFIG_DEBUG_INFO_BTF, /sys/kernel/btf/vmlinux)", ErrUnsupported)
		}
		return nil, fmt.Errorf("read the kernel's type information: %w", err)
	}
	specs := []*btf.Spec{kernel}
	// A file system that is a module has type information of its own. It is loaded, for the
	// root is mounted.
	for _, module := range []string{fsType, "iomap"} {
		if spec, err := cache.Module(module); err == nil {
			specs = append(specs, spec)
		}
	}
	var found []hook
	var missing []string
	for _, h := range hooks() {
		if h.fs != "" && h.fs != fsType {
			continue
		}
		switch {
		case hasTracepoint(specs, h.point):
			found = append(found, h)
		case h.optional == "":
			missing = append(missing, h.point)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%w: this kernel lacks the tracepoints %s for %s; Linux 6.1 and later have them", ErrUnsupported, strings.Join(missing, ", "), fsType)
	}
	return found, nil
}

func hasTracepoint(specs []*btf.Spec, point string) bool {
	for _, s := range specs {
		var t *btf.Typedef
		if s.TypeByName("btf_trace_"+point, &t) == nil {
			return true
		}
	}
	return false
}
