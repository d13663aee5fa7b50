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
#define ONCE(field) (*(volatile typeof(field) *)&(field))

/* How often a lock was taken for writing and released; odd: it is taken, or we cannot know. */
static __always_inline __u32 sequence(const void *lock)
{
#ifdef __TARGET_ARCH_x86
	__u32 now;

	if (lock && bpf_core_field_exists(seqlock_t, seqcount.seqcount.sequence) &&
	    !bpf_probe_read_kernel(&now, sizeof(now),
				   lock + bpf_core_field_offset(seqlock_t,
								seqcount.seqcount.sequence)))
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

/* The current task's agent, and how it stands. */
struct self {
	struct mis_agent *agent;
	struct mis_scope *scope;
	struct state *state;
};

/* What is looked for in the memory of a directory. */
struct wanted {
	__u64 agent;
	__u64 generation;
	__u64 now;
};

/* Whether the task belongs to an agent; if so and `self->scope` is NULL, nothing more is known. */
static __always_inline int is_agent(struct self *self)
{
	__u32 slot = 0;

	self->scope = NULL;
	self->agent = current_agent(&self->scope, &slot);
	if (!self->agent)
		return 0;
	self->state = bpf_map_lookup_elem(&states, &slot);
	if (!self->state)
		self->scope = NULL;
	return 1;
}

/* Whether this act may be allowed by what is remembered: the agent is alive, and not to be killed. */
static __always_inline int is_calm(const struct self *self, struct wanted *wanted, __u32 *level)
{
	struct mis_agent *agent = self->agent;

	if (!self->scope || agent->flags & MIS_NO_CACHE)
		return 0;
	wanted->agent = agent->id;
	wanted->generation = ONCE(agent->generation);
	wanted->now = clock_of(self->scope);
	if (agent->deadline && wanted->now > agent->deadline)
		return 0;
	/* Thresholds rise: below the first there is nothing to decay. */
	if (self->state->count < agent->thresholds[0])
		*level = agent->level < 5 ? agent->level : 5;
	else
		*level = level_of(self->state, agent, wanted->now);
	return *level > agent->kill;
}

/* Whether an inode has a rule; the bitmap says "surely not" without a look into the map. */
static __always_inline int has_rule(const struct mis_agent *agent, __u64 number, __u32 device)
{
	__u32 bit = (number ^ (__u64)device << 40) * 0x9E3779B97F4A7C15ULL >> 54;
	struct mis_place place = { .agent = agent->id, .inode = number, .device = device };

	if (!(agent->own[bit >> 6 & (MIS_OWN - 1)] >> (bit & 63) & 1))
		return 0;
	return bpf_map_lookup_elem(&rules, &place) != NULL;
}

/* What is remembered of a directory under a mount, or -1. */
static __always_inline __s64 recall(struct cached *cached, const struct wanted *wanted, __u64 mount,
				    __u64 lifetime)
{
	__u32 version = ONCE(cached->version), found, moves, mounts;

	BARRIER();
	if (cached->generation != wanted->generation || cached->mount != mount ||
	    wanted->now > cached->since + lifetime)
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

__noinline int survey(struct start *start)
{
	struct walk walk;

	if (!start || inner_mount(start->mount) != VISIBLE)
		return -1;
	look(&walk, start->agent, start->dentry, start->mount, MIS_ALL);
	return walk.granted | walk.refused << 8 | walk.explicit << 16 | walk.workspace << 24;
}

/* What a walk from a file's directory finds now, or -1; it is remembered. */
static __noinline __s64 learn(struct dentry *dentry, struct dentry *dir, struct inode *inode,
				   struct vfsmount *mnt, const struct wanted *wanted)
{
	struct start start = { .agent = wanted->agent, .dentry = dir, .mount = mount_of(mnt) };
	__u32 moves = sequence(&rename_lock), mounts = sequence(&mount_lock);
	struct cached *cached;
	int found;

	if ((moves | mounts) & 1 || dir->d_flags & revalidated())
		return -1;
	found = survey(&start);
	if (found < 0)
		return -1;
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
	cached->generation = wanted->generation;
	cached->mount = (__u64)mnt;
	cached->since = wanted->now;
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
static __noinline int is_known(struct self *self, struct dentry *dentry, struct vfsmount *mnt,
			       __u32 right, enum use use)
{
	__u64 lifetime = use == OPENED ? 180 * SECONDS : use == CHANGED ? 60 * SECONDS :
									  300 * SECONDS;
	struct dentry *dir = dentry->d_parent;
	struct inode *inode = dentry->d_inode, *folder;
	struct wanted wanted;
	struct cached *cached;
	__s64 found = -1;
	__u32 level;

	if (!is_calm(self, &wanted, &level) || dir == dentry || mnt->mnt_root == dentry || !inode ||
	    has_rule(self->agent, inode->i_ino, dentry->d_sb->s_dev))
		return 0;
	folder = dir->d_inode;
	cached = bpf_inode_storage_get(&directories, folder, 0, 0);
	if (cached)
		found = recall(cached, &wanted, (__u64)mnt, lifetime);
	if (found >= 0) {
		if (!(++self->scope->hits & (MIS_LOT - 1)))
			__sync_fetch_and_add(&self->state->hits, MIS_LOT);
	} else {
		found = learn(dentry, dir, folder, mnt, &wanted);
		if (found < 0)
			return 0;
		__sync_fetch_and_add(&self->state->walks, 1);
	}
	if (use == MAPPED)
		return !(FOUND_REFUSED(found) & MIS_EXEC);
	return (FOUND_GRANTED(found) & right) == right &&
	       !RAISED(self->agent, level, right, FOUND_EXPLICIT(found),
		       FOUND_WORKSPACE(found));
}

#endif
