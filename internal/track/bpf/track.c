// SPDX-License-Identifier: GPL-2.0
// Records which blocks of which files change on one file system. See docs/TRACKING.md.
//
// All programs are BTF-enabled raw tracepoints: they read kernel structures directly, need
// no per-architecture registers and no kprobes. Each of them is optional to the loader.

#include "kernel.h"

char gpl[] SEC("license") = "GPL";

// Set by the loader.
const volatile __u32 device;     // s_dev of the file system
const volatile __u32 ring_slots; // entries of ring, a power of two
const volatile __u32 page_shift; // of the processor
const volatile __u32 ask_direct; // 1: nothing tells when direct writes have arrived

#define CHUNK_SHIFT 20 // bytes of a file that one slot describes: 1 MiB
#define BLOCK_SHIFT 13 // bytes of one bit: 8 KiB
#define WHOLE       0xffffffffU // "chunk" of the slot with the flags of a file
#define MAX_CHUNKS  4096        // a longer range makes the file "ranged"
#define CPUS        256

// ext4 came to have large folios in Linux 6.16.
#define LARGE_FOLIOS bpf_core_field_exists(((struct folio *)0)->_nr_pages)

#define FLAG_TOUCHED 1 // metadata changed
#define FLAG_RANGED  2 // content changed in ways that ranges don't tell
#define FLAG_DIRECT  4 // direct writes began; aux is the inode's address

// A slot is written by the program that took it from the ring, then only or-ed into.
struct slot {
	__u64 ino;
	__u32 chunk;
	__u32 epoch;
	__u64 written[2]; // of the flags slot: [0] is the flags
	__u64 dirtied[2];
	__u64 aux;
	__u64 unused;
};

struct key {
	__u64 ino;
	__u32 chunk;
	__u32 unused;
};

struct place {
	__u32 epoch;
	__u32 index;
};

// What programs and the agent share beside the ring. Each group has a cache line of its own.
struct control {
	__u64 epoch; // raised by flip; slots of earlier epochs change no more once busy is 0
	__u64 agent; // thread group whose write calls are not recorded
	__u64 head;  // first slot that is still needed
	__u64 user[5]; // of the agent
	__u64 tail; // next free slot; slot n is at n modulo ring_slots
	__u64 lost; // events that found the ring full
	__u64 whole; // ext4 maps blocks without telling of single buffers: report whole folios
	__u64 more[5]; // of the agent, too
	struct {
		__u64 busy;   // programs running now
		__u64 task;   // that dirties pages knowingly,
		__u64 object; // of this inode, or this folio
		__u64 pad[5];
	} cpu[CPUS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); // set by the loader
	__type(key, __u32);
	__type(value, struct slot);
} ring SEC(".maps");

// Finds the slot of a chunk again. A cache: what it forgets gets a second slot, and the
// agent merges them, so that evictions and failed updates cost space and lose nothing.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1); // set by the loader
	__type(key, struct key);
	__type(value, struct place);
} places SEC(".maps");

static __always_inline struct control *shared(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline bool ours(struct inode *inode)
{
	return inode->i_sb->s_dev == device && (inode->i_mode & S_IFMT) == S_IFREG;
}

// enter tells flip's caller that a program is running. It is a full barrier: whoever raised
// the epoch before sees busy, or we see the new epoch.
static __always_inline struct control *enter(__u32 *cpu)
{
	struct control *c = shared();
	if (!c)
		return NULL;
	*cpu = bpf_get_smp_processor_id() & (CPUS - 1);
	if (__sync_fetch_and_add(&c->cpu[*cpu].busy, 1) > 1ULL << 32)
		return NULL;
	return c;
}

static __always_inline void leave(struct control *c, __u32 cpu)
{
	cpu &= CPUS - 1;
	__sync_fetch_and_add(&c->cpu[cpu].busy, -1);
}

static __always_inline bool by_agent(struct control *c)
{
	return bpf_get_current_pid_tgid() >> 32 == c->agent;
}

static __noinline struct slot *take(struct control *c, __u64 ino, __u32 chunk, __u32 epoch)
{
	struct key key = {.ino = ino, .chunk = chunk};
	struct place place = {.epoch = epoch};
	struct slot *slot;
	__u64 n;

	if (!c)
		return NULL;
	n = *(volatile __u64 *)&c->tail;
	if (n - *(volatile __u64 *)&c->head >= ring_slots)
		goto full;
	n = __sync_fetch_and_add(&c->tail, 1);
	if (n - *(volatile __u64 *)&c->head >= ring_slots)
		goto full;
	place.index = n & (ring_slots - 1);
	slot = bpf_map_lookup_elem(&ring, &place.index);
	if (!slot)
		goto full;
	slot->ino = ino;
	slot->chunk = chunk;
	slot->epoch = epoch;
	slot->written[0] = slot->written[1] = 0;
	slot->dirtied[0] = slot->dirtied[1] = 0;
	slot->aux = 0;
	bpf_map_update_elem(&places, &key, &place, BPF_ANY);
	return slot;
full:
	__sync_fetch_and_add(&c->lost, 1);
	return NULL;
}

static __always_inline struct slot *find(struct control *c, __u64 ino, __u32 chunk)
{
	__u32 epoch = *(volatile __u64 *)&c->epoch;
	struct key key = {.ino = ino, .chunk = chunk};
	struct place *p = bpf_map_lookup_elem(&places, &key);
	if (p && p->epoch == epoch) {
		__u32 index = p->index;
		struct slot *slot = bpf_map_lookup_elem(&ring, &index);
		// The place may have been overwritten between our two reads of it.
		if (slot && slot->epoch == epoch && slot->ino == ino && slot->chunk == chunk)
			return slot;
	}
	return take(c, ino, chunk, epoch);
}

static __always_inline void set(__u64 *word, __u64 bits)
{
	if ((*(volatile __u64 *)word & bits) != bits)
		__sync_fetch_and_or(word, bits);
}

static __always_inline void flag(struct control *c, struct inode *inode, __u64 flags)
{
	struct slot *slot = find(c, inode->i_ino, WHOLE);
	if (!slot)
		return;
	if (flags & FLAG_DIRECT)
		slot->aux = (__u64)inode;
	set(&slot->written[0], flags);
}

// The bits first to last of a word, both of 0 to 63 after clamping; none if none is inside.
static __always_inline __u64 mask(__s64 first, __s64 last)
{
	if (last < 0 || first > 63)
		return 0;
	if (first < 0)
		first = 0;
	if (last > 63)
		last = 63;
	return (~0ULL << (first & 63)) & (~0ULL >> (63 - (last & 63)));
}

struct range {
	struct control *c;
	__u64 ino;
	__u64 first, last; // blocks, inclusive
	__u64 chunk;       // of first
	bool dirtied;
};

static long mark_chunk(__u32 i, struct range *r)
{
	__u64 chunk = r->chunk + i, base = chunk << (CHUNK_SHIFT - BLOCK_SHIFT);
	__s64 first = r->first > base ? r->first - base : 0;
	__s64 last = r->last - base < 128 ? r->last - base : 127;
	struct slot *slot = find(r->c, r->ino, chunk);
	__u64 *words;
	if (!slot)
		return 1;
	words = r->dirtied ? slot->dirtied : slot->written;
	if (mask(first, last))
		set(&words[0], mask(first, last));
	if (mask(first - 64, last - 64))
		set(&words[1], mask(first - 64, last - 64));
	return 0;
}

static __always_inline void mark(struct control *c, struct inode *inode, __u64 from, __u64 to, bool dirtied)
{
	struct range r = {.c = c, .ino = inode->i_ino, .dirtied = dirtied};
	__u64 chunks;
	if (to <= from || to > 1ULL << 51) {
		if (to > from)
			flag(c, inode, FLAG_RANGED);
		return;
	}
	r.first = from >> BLOCK_SHIFT;
	r.last = (to - 1) >> BLOCK_SHIFT;
	r.chunk = from >> CHUNK_SHIFT;
	chunks = ((to - 1) >> CHUNK_SHIFT) - r.chunk + 1;
	if (chunks > MAX_CHUNKS) {
		flag(c, inode, FLAG_RANGED);
		return;
	}
	if (chunks == 1)
		mark_chunk(0, &r);
	else
		bpf_loop(chunks, mark_chunk, &r, 0);
}

static __always_inline int record(struct inode *inode, __u64 from, __u64 to)
{
	struct control *c;
	__u32 cpu;
	if (!ours(inode))
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	if (!by_agent(c))
		mark(c, inode, from, to, false);
	leave(c, cpu);
	return 0;
}

static __always_inline int record_flag(struct inode *inode, __u64 flags)
{
	struct control *c;
	__u32 cpu;
	if (!ours(inode))
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	if (!by_agent(c))
		flag(c, inode, flags);
	leave(c, cpu);
	return 0;
}

// ---- pages: what becomes dirty in the page cache, by stores through mmap

// read is for what the verifier has no type of: of a union it takes the first member.
#define read(to, from) bpf_probe_read_kernel(&(to), sizeof(to), &(from))

static __always_inline __u64 folio_bytes(struct folio *folio)
{
	struct folio___before_6_15 *old = (void *)folio;
	__u64 flags = 0;
	__u32 pages = 1;
	bpf_probe_read_kernel(&flags, sizeof(flags), folio);
	if (flags & 1ULL << bpf_core_enum_value(enum pageflags, PG_head)) {
		if (bpf_core_field_exists(folio->_nr_pages))
			read(pages, folio->_nr_pages);
		else
			read(pages, old->_folio_nr_pages);
	}
	return (__u64)pages << page_shift;
}

// knows says that this task is dirtying an inode's pages, or a folio, and that the program
// that sees it do so records it more exactly than the folio: a write call that dirties a
// large folio changes little of it. The note is kept for the processor; if the task moves
// to another, or is interrupted by one that does the same, the whole folio is recorded.
static __always_inline void knows(struct control *c, __u32 cpu, void *object)
{
	cpu &= CPUS - 1;
	c->cpu[cpu].task = object ? (__u64)bpf_get_current_task_btf() : 0;
	c->cpu[cpu].object = (__u64)object;
}

static __always_inline bool known(struct control *c, __u32 cpu, void *object)
{
	cpu &= CPUS - 1;
	return c->cpu[cpu].object == (__u64)object &&
	       c->cpu[cpu].task == (__u64)bpf_get_current_task_btf();
}

// by_agent_here is for stores: reclaiming memory the agent may meet somebody else's.
static __always_inline bool by_agent_here(struct control *c)
{
	return by_agent(c) && !(bpf_get_current_task_btf()->flags & PF_MEMALLOC);
}

SEC("tp_btf/writeback_dirty_folio")
int dirty_folio(__u64 *ctx)
{
	struct folio *folio = (struct folio *)ctx[0];
	struct address_space *mapping = (struct address_space *)ctx[1];
	struct inode *inode;
	struct control *c;
	__u64 from, bytes;
	__u32 cpu;
	if (!mapping)
		return 0;
	inode = mapping->host;
	if (!inode || !ours(inode))
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	if (!by_agent_here(c) && !known(c, cpu, inode)) {
		from = (__u64)folio->index << page_shift;
		bytes = folio_bytes(folio);
		if (bytes <= 1 << BLOCK_SHIFT || c->whole || !known(c, cpu, folio))
			mark(c, inode, from, from + bytes, true);
	}
	leave(c, cpu);
	return 0;
}

// On ext4 a page is stored to only after all buffers of its folio have been dirtied here, in
// the page fault, whether they were dirty before or not; a write call dirties those that it
// changes. Used where ext4 has large folios.
SEC("tp_btf/block_dirty_buffer")
int dirty_buffer(__u64 *ctx)
{
	struct buffer_head *bh = (struct buffer_head *)ctx[0];
	struct folio *folio = (struct folio *)bh->b_page; // the first page of its folio
	struct address_space *mapping = bh->b_page->mapping;
	struct inode *inode;
	struct control *c;
	unsigned long index = 0;
	__u64 from, bytes;
	__u32 cpu;
	if (!mapping)
		return 0;
	inode = mapping->host;
	if (!inode || !ours(inode))
		return 0;
	bytes = folio_bytes(folio);
	if (bytes <= 1 << BLOCK_SHIFT)
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	if (!by_agent_here(c)) {
		// Folios are aligned to their size in memory.
		read(index, folio->index);
		from = ((__u64)index << page_shift) + ((__u64)bh->b_data & (bytes - 1));
		mark(c, inode, from, from + bh->b_size, true);
		knows(c, cpu, folio);
	}
	leave(c, cpu);
	return 0;
}

// ---- ext4: each write call ends once per folio, after the data has been copied

SEC("tp_btf/ext4_da_write_end")
int ext4_da_write_end(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	__s64 pos = (__s64)ctx[1];
	__u32 len = (__u32)ctx[2];
	return record(inode, pos, pos + len);
}

SEC("tp_btf/ext4_write_end")
int ext4_write_end(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	__s64 pos = (__s64)ctx[1];
	__u32 len = (__u32)ctx[2];
	struct control *c = shared();
	// Without delayed allocation (mounted so, or nearly full) a page fault need not touch
	// the buffers. What became dirty before may be stored to unseen.
	if (c && !c->whole && ours(inode)) {
		c->whole = 1;
		if (LARGE_FOLIOS)
			__sync_fetch_and_add(&c->lost, 1);
	}
	return record(inode, pos, pos + len);
}

SEC("tp_btf/ext4_journalled_write_end")
int ext4_journalled_write_end(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	__s64 pos = (__s64)ctx[1];
	__u32 len = (__u32)ctx[2];
	return record(inode, pos, pos + len);
}

// ---- iomap: buffered writes of XFS

SEC("tp_btf/iomap_iter")
int iomap_iter(__u64 *ctx)
{
	struct iomap_iter *iter = (struct iomap_iter *)ctx[0];
	struct iomap_iter___before_6_15 *old = (void *)iter;
	__u32 flags = iter->flags;
	struct inode *inode = iter->inode;
	struct control *c;
	__s64 from, to, left;
	__u32 cpu;
	bool first;

	if (!(flags & (IOMAP_WRITE | IOMAP_ZERO | IOMAP_UNSHARE)) || !ours(inode))
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	first = !iter->iomap.length;
	if (flags & IOMAP_FAULT) {
		// A page of XFS is stored to only after this, whether it was dirty or not.
		if (first && !by_agent_here(c))
			mark(c, inode, iter->pos, iter->pos + iter->len, true);
	} else if (flags & IOMAP_DIRECT) {
		// The whole range, before the first extent is looked up.
		if (first && ask_direct && !by_agent(c)) {
			flag(c, inode, FLAG_DIRECT);
			mark(c, inode, iter->pos, iter->pos + iter->len, false);
		}
	} else {
		// What was done since the last call, after it was done.
		from = to = iter->pos;
		left = iter->len;
		if (bpf_core_field_exists(iter->iter_start_pos))
			from = iter->iter_start_pos;
		if (bpf_core_field_exists(old->processed)) {
			if (!first && old->processed > 0) {
				to += old->processed;
				left -= old->processed;
			} else if (!first) {
				left = 0; // an error, which ends it
			}
		} else if (iter->status < 0) {
			left = 0;
		}
		if (!first && !by_agent(c))
			mark(c, inode, from, to, false);
		knows(c, cpu, left > 0 ? inode : NULL);
	}
	leave(c, cpu);
	return 0;
}

// ---- direct writes, after the data has arrived. Also in interrupts, whoever they hit, so
// that nothing is said of who wrote.

static __always_inline int direct(struct inode *inode, __s64 from, __s64 to)
{
	struct control *c;
	__u32 cpu;
	if (!ours(inode))
		return 0;
	c = enter(&cpu);
	if (!c)
		return 0;
	mark(c, inode, from, to, false);
	leave(c, cpu);
	return 0;
}

// The lengths of direct writes under way, by the address of their control block: reads
// complete in the same place and look the same there.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u64);
} writes SEC(".maps");

SEC("tp_btf/iomap_dio_rw_begin")
int dio_begin(__u64 *ctx)
{
	struct kiocb *iocb = (struct kiocb *)ctx[0];
	struct iov_iter *iter = (struct iov_iter *)ctx[1];
	__u64 key = (__u64)iocb, len = iter->count;
	struct control *c;
	if (!ours(iocb->ki_filp->f_inode))
		return 0;
	c = shared();
	if (!c)
		return 0;
	if (!iter->data_source || by_agent(c))
		bpf_map_delete_elem(&writes, &key);
	else if (bpf_map_update_elem(&writes, &key, &len, BPF_ANY))
		__sync_fetch_and_add(&c->lost, 1);
	return 0;
}

static __always_inline int dio_completed(__u64 *ctx, bool last)
{
	struct kiocb *iocb = (struct kiocb *)ctx[0];
	__s64 done = (__s64)ctx[2], end = iocb->ki_pos;
	struct inode *inode = iocb->ki_filp->f_inode;
	__u64 key = (__u64)iocb, *len;
	if (!ours(inode))
		return 0;
	len = bpf_map_lookup_elem(&writes, &key);
	if (!len)
		return 0;
	if (done > 0)
		direct(inode, end - done, end);
	else // whatever has arrived of it
		direct(inode, end, end + *len);
	if (last)
		bpf_map_delete_elem(&writes, &key);
	return 0;
}

SEC("tp_btf/iomap_dio_complete")
int dio_complete(__u64 *ctx)
{
	return dio_completed(ctx, false);
}

// The kernel leaves out a program that interrupts itself on one processor. Two never miss
// the same event. This one is attached, and so runs, after the other.
SEC("tp_btf/iomap_dio_complete")
int dio_complete_again(__u64 *ctx)
{
	return dio_completed(ctx, true);
}

// The same on XFS before Linux 6.6.
SEC("tp_btf/xfs_end_io_direct_write")
int xfs_end_io_direct_write(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	__s64 pos = (__s64)ctx[1], len = (__s64)ctx[2];
	return direct(&ip->i_vnode, pos, pos + len);
}

// ---- operations on ranges and sizes: ext4

SEC("tp_btf/ext4_mark_inode_dirty")
int ext4_mark_inode_dirty(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	return record_flag(inode, FLAG_TOUCHED);
}

// Truncating, punching, collapsing, inserting, moving and swapping extents all forget the
// extents they replace, under the inode's lock. So does evicting an inode from memory, which
// nobody holds then.
SEC("tp_btf/ext4_es_remove_extent")
int ext4_es_remove_extent(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	if (inode->i_count.counter == 0)
		return 0;
	return record_flag(inode, FLAG_RANGED);
}

SEC("tp_btf/ext4_truncate_enter")
int ext4_truncate_enter(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	if (inode->i_count.counter == 0)
		return 0;
	return record_flag(inode, FLAG_RANGED);
}

SEC("tp_btf/ext4_punch_hole")
int ext4_punch_hole(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	return record_flag(inode, FLAG_RANGED);
}

SEC("tp_btf/ext4_zero_range")
int ext4_zero_range(__u64 *ctx)
{
	struct inode *inode = (struct inode *)ctx[0];
	return record_flag(inode, FLAG_RANGED);
}

// ---- operations on ranges and sizes: XFS, all under the inode's lock

SEC("tp_btf/xfs_setattr")
int xfs_setattr(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_alloc_file_space")
int xfs_alloc_file_space(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_TOUCHED);
}

SEC("tp_btf/xfs_free_file_space")
int xfs_free_file_space(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_zero_file_space")
int xfs_zero_file_space(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_collapse_file_space")
int xfs_collapse_file_space(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_insert_file_space")
int xfs_insert_file_space(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_reflink_remap_range")
int xfs_reflink_remap_range(__u64 *ctx)
{
	struct xfs_inode *dst = (struct xfs_inode *)ctx[3];
	return record_flag(&dst->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_swap_extent_before")
int xfs_swap_extent_before(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

SEC("tp_btf/xfs_exchrange_before")
int xfs_exchrange_before(__u64 *ctx)
{
	struct xfs_inode *ip = (struct xfs_inode *)ctx[0];
	return record_flag(&ip->i_vnode, FLAG_RANGED);
}

// ---- called by the agent

// flip begins a new epoch, makes the caller the agent, and returns the epoch that ended.
SEC("raw_tp/flip")
int flip(void *ctx)
{
	struct control *c = shared();
	if (!c)
		return -1;
	c->agent = bpf_get_current_pid_tgid() >> 32;
	return __sync_fetch_and_add(&c->epoch, 1);
}

// in_flight returns 1 if direct writes to the inode at this address are under way. An inode
// with such writes can't be freed, so a stale address at worst says yes for nothing.
SEC("raw_tp/in_flight")
int in_flight(struct raw_args *ctx)
{
	struct inode *inode = (struct inode *)ctx->args[0];
	int count = 0;
	bpf_probe_read_kernel(&count, sizeof(count), &inode->i_dio_count.counter);
	return count > 0;
}
