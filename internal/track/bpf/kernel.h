// SPDX-License-Identifier: GPL-2.0
// The little that track.c needs to know of the kernel: the fields that it reads (their
// places are looked up in the running kernel's BTF when the programs are loaded), helper
// functions by number, and the macros that describe maps.

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef _Bool bool;
#define true  1
#define false 0
#define NULL  ((void *)0)

#define SEC(name)       __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __noinline      __attribute__((noinline))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_ARRAY = 2, BPF_MAP_TYPE_LRU_HASH = 9 };
enum { BPF_F_MMAPABLE = 1 << 10 };
enum { BPF_ANY = 0 };

#define S_IFMT      0170000
#define S_IFREG     0100000
#define PF_MEMALLOC 0x00000800

#define IOMAP_WRITE   (1 << 0)
#define IOMAP_ZERO    (1 << 1)
#define IOMAP_FAULT   (1 << 3)
#define IOMAP_DIRECT  (1 << 4)
#define IOMAP_UNSHARE (1 << 7)

// Numbers of the kernel's helper functions: they never change.
static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static __u32 (*const bpf_get_smp_processor_id)(void) = (void *)8;
static __u64 (*const bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*const bpf_probe_read_kernel)(void *dst, __u32 size, const void *src) = (void *)113;
static struct task_struct *(*const bpf_get_current_task_btf)(void) = (void *)158;
static long (*const bpf_loop)(__u32 n, void *callback, void *ctx, __u64 flags) = (void *)181;

// Field accesses are recorded, to be adjusted to the running kernel.
#define bpf_core_field_exists(field)    __builtin_preserve_field_info(field, 2)
#define bpf_core_enum_value(type, value) __builtin_preserve_enum_value(*(typeof(type) *)value, 1)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

struct super_block {
	__u32 s_dev;
};

struct inode {
	__u16 i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	atomic_t i_count;
	atomic_t i_dio_count;
};

struct file {
	struct inode *f_inode;
};

struct kiocb {
	struct file *ki_filp;
	__s64 ki_pos;
};

struct iov_iter {
	bool data_source;
	unsigned long count;
};

struct address_space {
	struct inode *host;
};

struct folio {
	unsigned long index;
	unsigned int _nr_pages;
};

struct folio___before_6_15 {
	unsigned int _folio_nr_pages;
};

struct page {
	struct address_space *mapping;
};

struct buffer_head {
	struct page *b_page;
	__u64 b_size;
	char *b_data;
};

struct iomap {
	__u64 length;
};

struct iomap_iter {
	struct inode *inode;
	__s64 pos;
	__u64 len;
	__s64 iter_start_pos;
	int status;
	unsigned int flags;
	struct iomap iomap;
};

struct iomap_iter___before_6_15 {
	__s64 processed;
};

struct xfs_inode {
	struct inode i_vnode;
};

struct task_struct {
	unsigned int flags;
};

#pragma clang attribute pop

struct raw_args {
	__u64 args[1];
};

enum pageflags { PG_head = 1 };
