/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * What a walk found, remembered on the inode of the directory where it began.
 *
 * A file without a rule of its own has the rights of its directory, so one entry serves all files in
 * it.  The directory and not the file: a file may have several places, and a dentry's address or an
 * inode's number another owner later; but a directory has one place, and what is stored on its inode
 * is freed with the inode.
 *
 * An entry counts as long as all is as it was before the walk:
 *   the agent's rules            by its generation, which is never used twice
 *   every directory's place      by the sequence of rename_lock, which every d_move writes
 *   every mount's place          by that of mount_lock; a mount is attached, moved, detached and, if
 *                                it ever was attached or not, freed under it, so that with an equal
 *                                sequence its address is enough to know it by
 * Both are the kernel's own, for all of the machine: whoever moves anything, the agent or not, makes
 * all entries void.  Where one cannot be read nothing is remembered.  The lifetimes only
 * bound what nobody thought of, and keep the sequences, of 32 bits, from coming round.
 *
 * File systems whose names are looked up anew each time (network, FUSE, proc) are left out: there a
 * directory may be moved by others, without a lock of this machine.
 *
 * Only "allowed" is taken from here.  Level, deadline and mode are judged in each act; whatever is
 * not plainly allowed is judged the long way, which has the rule for the event.
 *
 * x86 only: the reader's loads must stay in their order, and BPF has no barrier for it.
 */
#ifndef MIS_CACHE_BPF_H
#define MIS_CACHE_BPF_H

#include "policy.bpf.h"

#define SECONDS 1000000000ULL

/* Why we ask: how long an answer lasts, and what it needs. */
enum use { OPENED, CHANGED, EXECUTED, MAPPED };

extern const void rename_lock __ksym __weak;
extern const void mount_lock __ksym __weak;

struct cached {
	struct bpf_spin_lock lock; /* of those who write */
	__u32 version; /* odd: being written */
	__u64 generation;
	__u64 mount; /* the vfsmount */
	__u64 since;
	__u32 moves;
	__u32 mounts;
	__u32 found; /* FOUND_* */
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct cached);
} directories SEC(".maps");

/* Four sets of rights in one word. */
#define FOUND_GRANTED(found) ((found) & 255)
#define FOUND_REFUSED(found) ((found) >> 8 & 255)
#define FOUND_EXPLICIT(found) ((found) >> 16 & 255)
#define FOUND_WORKSPACE(found) ((found) >> 24 & 255)

#define BARRIER() asm volatile("" ::: "memory")

extern void *bpf_rdonly_cast(const void *address, __u32 type) __ksym __weak;

/* How often a lock was taken for writing and released; odd: it is taken, or we cannot know. */
static __always_inline __u32 sequence(const void *lock)
{
#ifdef __TARGET_ARCH_x86
	const void *place = lock + bpf_core_field_offset(seqlock_t, seqcount.seqcount);
	__u32 now;

	if (!lock || !bpf_core_field_exists(seqlock_t, seqcount.seqcount.sequence))
		return 1;
	/* A load where the kernel gives an address a type (6.2), a guarded copy before. */
	if (bpf_core_enum_value_exists(enum special_kfunc_type, KF_bpf_rdonly_cast)) {
		struct seqcount *count =
			bpf_rdonly_cast(place, bpf_core_type_id_kernel(struct seqcount));

		return ONCE(count->sequence);
	}
	if (!bpf_probe_read_kernel(&now, sizeof(now),
				   place + bpf_core_field_offset(struct seqcount, sequence)))
		return now;
#endif
	return 1;
}

static __always_inline __u32 revalidated(void)
{
	if (bpf_core_enum_value_exists(enum dentry_flags, DCACHE_OP_REVALIDATE) &&
	    bpf_core_enum_value_exists(enum dentry_flags, DCACHE_OP_WEAK_REVALIDATE))
		return bpf_core_enum_value(enum dentry_flags, DCACHE_OP_REVALIDATE) |
		       bpf_core_enum_value(enum dentry_flags, DCACHE_OP_WEAK_REVALIDATE);
	return DCACHE_OP_REVALIDATE | DCACHE_OP_WEAK_REVALIDATE;
}

/* Whether an inode may have a rule: the bitmap says "surely not" without a look into the map. */
static __always_inline int may_have_rule(const struct mis_agent *agent, __u64 number)
{
	__u32 bit = number * 0x9E3779B97F4A7C15ULL >> 54;

	return agent->own[bit >> 6 & (MIS_OWN - 1)] >> (bit & 63) & 1;
}

static __noinline int has_rule(const struct mis_agent *agent, const struct dentry *dentry)
{
	struct mis_place place = {
		.agent = agent->id,
		.inode = dentry->d_inode->i_ino,
		.device = dentry->d_sb->s_dev,
	};

	return bpf_map_lookup_elem(&rules, &place) != NULL;
}

/* What is remembered of a directory under a mount, or -1. */
static __always_inline __s64 recall(struct cached *cached, __u64 generation, __u64 mount, __u64 now,
				    __u64 lifetime)
{
	__u32 version = ONCE(cached->version), found, moves, mounts;

	BARRIER();
	if (cached->generation != generation || cached->mount != mount ||
	    now > cached->since + lifetime)
		return -1;
	found = cached->found;
	moves = cached->moves;
	mounts = cached->mounts;
	BARRIER();
	if (version & 1 || version != ONCE(cached->version) || moves != sequence(&rename_lock) ||
	    mounts != sequence(&mount_lock))
		return -1;
	return found;
}

/* Walk from a directory, for all rights. Not static: verified once, and the walk sees no types. */
struct start {
	__u64 agent;
	struct dentry *dentry;
	struct mount *mount;
};

#define BELOW -2 /* what overlayfs opens for a file that was judged on top */

__noinline int survey(struct start *start)
{
	struct walk walk;
	enum inner inner;

	if (!start)
		return -1;
	inner = inner_mount(start->mount);
	if (inner != VISIBLE)
		return inner == LAYER ? BELOW : -1;
	look(&walk, start->agent, start->dentry, start->mount, MIS_ALL);
	return walk.granted | walk.refused << 8 | walk.explicit << 16 | walk.workspace << 24;
}

/* What a walk from a file's directory finds now, and is remembered; else -1 or BELOW. */
static __noinline __s64 learn(struct dentry *dentry, struct vfsmount *mnt,
			      const struct mis_agent *agent, struct state *state)
{
	__u32 moves = sequence(&rename_lock), mounts = sequence(&mount_lock);
	__u64 generation = ONCE(agent->generation);
	struct dentry *dir = dentry->d_parent;
	struct inode *inode = dir->d_inode;
	struct start start = { .agent = agent->id, .dentry = dir, .mount = mount_of(mnt) };
	struct cached *cached;
	int found;

	if ((moves | mounts) & 1 || dir->d_flags & revalidated())
		return -1;
	found = survey(&start);
	if (found < 0)
		return found;
	__sync_fetch_and_add(&state->walks, 1);
	cached = bpf_inode_storage_get(&directories, inode, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!cached)
		return found;
	/*
	 * Nobody holds the directory for us.  If the file was moved out of it meanwhile, the inode may
	 * be on its way out, and past the point where what is stored on it is freed.  Where the file
	 * is in it still, it was alive all the time.
	 */
	if (dentry->d_parent != dir || dir->d_inode != inode) {
		bpf_inode_storage_delete(&directories, inode);
		return -1;
	}
	bpf_spin_lock(&cached->lock);
	ONCE(cached->version)++;
	BARRIER();
	cached->generation = generation;
	cached->mount = (__u64)mnt;
	cached->since = state->now;
	cached->moves = moves;
	cached->mounts = mounts;
	cached->found = found;
	BARRIER();
	ONCE(cached->version)++;
	bpf_spin_unlock(&cached->lock);
	return found;
}

/*
 * Whether an act is allowed by what is remembered, or now found and remembered, of the file's
 * directory.  0: judge it the long way.  MAPPED needs no right, but EXEC must not be denied.
 */
static __always_inline int is_known(const struct self *self, struct dentry *dentry,
				    const struct inode *inode, struct vfsmount *mnt, __u32 right,
				    enum use use)
{
	__u64 lifetime = use == OPENED ? 180 * SECONDS : use == CHANGED ? 60 * SECONDS :
									  300 * SECONDS;
	struct mis_agent *agent = self->agent;
	struct cached *cached;
	struct dentry *dir;
	__s64 found = -1;
	__u64 now = 0;
	__u32 level = 0;

	if (!is_calm(self, &level, &now) || agent->flags & MIS_NO_CACHE)
		goto unknown;
	dir = dentry->d_parent;
	if (dir == dentry || mnt->mnt_root == dentry || !inode ||
	    (may_have_rule(agent, inode->i_ino) && has_rule(agent, dentry)))
		goto unknown;
	cached = bpf_inode_storage_get(&directories, dir->d_inode, 0, 0);
	if (cached)
		found = recall(cached, ONCE(agent->generation), (__u64)mnt, now, lifetime);
	if (found < 0) {
		found = learn(dentry, mnt, agent, self->state);
		if (found == BELOW)
			return 1;
		if (found < 0)
			goto unknown;
	}
	if (use == MAPPED) {
		if (!(FOUND_REFUSED(found) & MIS_EXEC))
			return 1;
	} else if ((FOUND_GRANTED(found) & right) == right &&
		   !RAISED(agent, level, right, FOUND_EXPLICIT(found), FOUND_WORKSPACE(found))) {
		return 1;
	}
unknown:
	if (self->state)
		__sync_fetch_and_add(&self->state->asked, 1);
	return 0;
}

#endif
