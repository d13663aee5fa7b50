/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Events: each agent has a ring buffer of its own, found by its id.
 *
 * Of its own, because a ring buffer has one reader, each agent has a supervisor of its own, and one
 * that floods its buffer must not cost another agent its events.
 */
#ifndef MIS_EVENT_BPF_H
#define MIS_EVENT_BPF_H

#include "scope.bpf.h"

#define NAMES 16 /* components of a path that an event shows, from its end */

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__array(values, struct ring);
} rings SEC(".maps");

/* The mount that a vfsmount is the public part of. */
static __always_inline struct mount *mount_of(const struct vfsmount *mnt)
{
	return mnt ? (void *)mnt - bpf_core_field_offset(struct mount, mnt) : NULL;
}

/*
 * The path of a dentry, written from the end of the first half of event->path backwards.  The
 * second half is never used: a name of 255 bytes at offset 255 still lies inside, which spares the
 * verifier a relation between the two.
 */
static __noinline void write_path(struct mis_lsm_event *event, struct dentry *dentry,
				  struct mount *mount)
{
	__u32 at = MIS_PATH;

	for (int n = 0; n < NAMES && dentry; n++) {
		struct dentry *parent = BPF_CORE_READ(dentry, d_parent);
		const unsigned char *name;
		__u32 length;

		if (mount && dentry == BPF_CORE_READ(mount, mnt.mnt_root)) {
			struct mount *above = BPF_CORE_READ(mount, mnt_parent);

			if (above == mount)
				break;
			dentry = BPF_CORE_READ(mount, mnt_mountpoint);
			mount = above;
			continue;
		}
		if (parent == dentry && mount)
			break;
		length = BPF_CORE_READ(dentry, d_name.len);
		name = BPF_CORE_READ(dentry, d_name.name);
		if (length >= at || length > 255)
			break;
		at -= length + 1;
		asm volatile("%0 &= 255" : "+r"(at));
		asm volatile("%0 &= 255" : "+r"(length));
		event->path[at] = parent == dentry ? ' ' : '/';
		bpf_probe_read_kernel(&event->path[at + 1], length, name);
		if (parent == dentry) /* not a place in a tree: a memfd, a pipe */
			break;
		dentry = parent;
	}
	event->path_at = at;
}

#endif
