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

#define NAMES 16 /* components of a path that an event shows, from its end; a power of two */

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

/* The components of a path, the last one first. */
struct names {
	struct dentry *dentry;
	struct mount *mount;
	__u64 name[NAMES];
	__u16 length[NAMES]; /* 0: where a mount was crossed */
};

/* One step of bpf_loop: note one component, go to the one before; 1 ends the loop. */
static long note(__u32 index, struct names *names)
{
	struct dentry *dentry = names->dentry;
	struct mount *mount = names->mount;

	if (mount && dentry == BPF_CORE_READ(mount, mnt.mnt_root)) {
		names->dentry = BPF_CORE_READ(mount, mnt_mountpoint);
		names->mount = BPF_CORE_READ(mount, mnt_parent);
		return names->mount == mount;
	}
	names->dentry = BPF_CORE_READ(dentry, d_parent);
	if (mount && names->dentry == dentry)
		return 1;
	asm volatile("%0 &= %1" : "+r"(index) : "i"(NAMES - 1)); /* as the verifier wants to see it */
	names->name[index] = (__u64)BPF_CORE_READ(dentry, d_name.name);
	names->length[index] = BPF_CORE_READ(dentry, d_name.len);
	return names->dentry == dentry;
}

/*
 * The path of a dentry, written from the end of the first half of event->path backwards.  The
 * second half is never used: a name of 255 bytes at offset 255 still lies inside, which spares the
 * verifier a relation between the two.
 */
static __noinline void write_path(struct mis_lsm_event *event, struct dentry *dentry,
				  struct mount *mount)
{
	struct names names = { .dentry = dentry, .mount = mount };
	__u32 at = MIS_PATH;

	bpf_loop(NAMES, note, &names, 0);
	for (int n = 0; n < NAMES; n++) {
		__u32 length = names.length[n];

		if (!length)
			continue;
		if (length >= at || length > 255)
			break;
		at -= length + 1;
		asm volatile("%0 &= 255" : "+r"(at));
		asm volatile("%0 &= 255" : "+r"(length));
		event->path[at] = '/';
		bpf_probe_read_kernel(&event->path[at + 1], length, (void *)names.name[n]);
	}
	event->path_at = at;
}

#endif
