/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Which rights an agent has on a file: the rule of the nearest ancestor that names the right.
 *
 * From the dentry up to the root, across mounts; each inode on the way may have a rule of this
 * agent.  The first that allows or denies a right decides it, deny beats allow on one inode, and
 * what nothing decides is not allowed.  Names are never compared: a rule moves with its inode.
 *
 * The walk takes no lock.  A rename while it runs could only mix two places that the agent may both
 * change: moving needs DELETE here and CREATE there, and gives no right that was not there before.
 */
#ifndef MIS_POLICY_BPF_H
#define MIS_POLICY_BPF_H

#include "verdict.bpf.h"

#define HIGHEST 512 /* steps of a walk; what lies deeper is not allowed */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mis_place);
	__type(value, struct mis_rule);
} rules SEC(".maps");

/* Where a walk stands, and what it has found. */
struct walk {
	__u64 agent;
	struct dentry *dentry;
	struct mount *mount; /* NULL: not known, so the walk ends at the file system's root */
	struct dentry *top; /* the mount's root */
	__u32 device; /* of the file system it is in */
	__u32 undecided;
	__u32 granted;
	__u32 asked;
	__u32 number; /* rule that decided the asked rights, or the first that refused one */
	__u32 explicit; /* rights that a rule with MIS_EXPLICIT decided */
	__u32 workspace; /* the same with MIS_WORKSPACE */
	__u32 refused;
	__u32 marks; /* MIS_CANARY, MIS_FATAL: of the rules that refused */
};

static __always_inline void decide(struct walk *walk, const struct mis_rule *rule)
{
	__u32 decided = walk->undecided & (rule->allow | rule->deny);
	__u32 denied = decided & rule->deny;

	walk->undecided &= ~decided;
	walk->granted |= decided & ~denied;
	walk->refused |= denied;
	if (rule->flags & MIS_EXPLICIT)
		walk->explicit |= decided;
	if (rule->flags & MIS_WORKSPACE)
		walk->workspace |= decided;
	if (!(decided & walk->asked))
		return;
	if (denied & walk->asked)
		walk->marks |= rule->flags & (MIS_CANARY | MIS_FATAL);
	if (!(walk->refused & ~denied & walk->asked))
		walk->number = rule->number;
}

/* What the steps within one mount need of it, read once. */
static __always_inline void enter(struct walk *walk, struct mount *mount)
{
	struct dentry *dentry = walk->dentry;

	walk->mount = mount;
	walk->top = mount ? BPF_CORE_READ(mount, mnt.mnt_root) : NULL;
	walk->device = BPF_CORE_READ(dentry, d_sb, s_dev);
}

/* One step of bpf_loop: look at one dentry, go to the next; 1 ends the walk. */
static long climb(__u32 index, struct walk *walk)
{
	struct dentry *dentry = walk->dentry, *parent;
	struct inode *inode = BPF_CORE_READ(dentry, d_inode);
	struct mount *mount = walk->mount;

	(void)index;
	if (inode) {
		struct mis_place place = {
			.agent = walk->agent,
			.inode = BPF_CORE_READ(inode, i_ino),
			.device = walk->device,
		};
		struct mis_rule *rule = bpf_map_lookup_elem(&rules, &place);

		if (rule)
			decide(walk, rule);
		if (!walk->undecided)
			return 1;
	}
	if (mount && dentry == walk->top) {
		struct mount *above = BPF_CORE_READ(mount, mnt_parent);

		if (above == mount)
			return 1;
		walk->dentry = BPF_CORE_READ(mount, mnt_mountpoint);
		enter(walk, above);
		return 0;
	}
	parent = BPF_CORE_READ(dentry, d_parent);
	if (parent == dentry)
		return 1;
	walk->dentry = parent;
	return 0;
}

/* Look for `asked` rights at a place; the walk's fields are the answer. */
static __always_inline void look(struct walk *walk, __u64 agent, struct dentry *dentry,
				 struct mount *mount, __u32 asked)
{
	walk->agent = agent;
	walk->dentry = dentry;
	enter(walk, mount);
	walk->undecided = asked;
	walk->granted = 0;
	walk->asked = asked;
	walk->number = MIS_RULE_DEFAULT;
	walk->explicit = 0;
	walk->workspace = 0;
	walk->refused = 0;
	walk->marks = 0;
	bpf_loop(HIGHEST, climb, walk, 0);
}

/*
 * A mount that no mount namespace shows is the kernel's own.  Either what a process made without a
 * name (pipe, socket, memfd: fine to read and write, never to execute), or a layer below an overlay,
 * opened by overlayfs for a file that was judged on top.
 */
enum inner { VISIBLE, NAMELESS, LAYER };

static __always_inline enum inner inner_mount(struct mount *mount)
{
	if (BPF_CORE_READ(mount, mnt_ns) != MNT_NS_INTERNAL)
		return VISIBLE;
	if (BPF_CORE_READ(mount, mnt.mnt_sb, s_flags) & (SB_KERNMOUNT | SB_NOUSER))
		return NAMELESS;
	return LAYER;
}

/* What a level takes away from what the rules give, whose settings are in `of`. */
#define CLOSED(of, level, right, workspace)                                                        \
	((level) <= (of)->writes &&                                                                \
	 (right) & (MIS_WRITE | MIS_CREATE | MIS_DELETE) & ~(workspace))
#define RAISED(of, level, right, explicit, workspace)                                              \
	(((level) <= (of)->explicit_only && (right) & ~(explicit)) ||                              \
	 CLOSED(of, level, right, workspace))

/* Say which file an act is about. */
static __always_inline void about(struct act *act, struct dentry *dentry, struct mount *mount)
{
	act->dentry = dentry;
	act->mount = mount;
}

/* Whether the rules and the level give the act's right on its file. */
__noinline int permitted(struct act *act)
{
	struct walk walk;

	if (!act)
		return 0;
	if (act->mount) {
		enum inner inner = inner_mount(act->mount);

		if (inner != VISIBLE)
			return inner == LAYER || !(act->right & MIS_EXEC);
	}
	look(&walk, act->id, act->dentry, act->mount, act->right);
	act->rule = walk.number;
	act->marks = walk.marks;
	if ((walk.granted & act->right) != act->right)
		return 0;
	if (!RAISED(act, act->level, act->right, walk.explicit, walk.workspace))
		return 1;
	act->rule = MIS_RULE_RAISED;
	/* As of a mount that is read-only, which user space makes it now: no violation. */
	act->quiet = CLOSED(act, act->level, act->right, walk.workspace);
	return 0;
}

static __always_inline int may(struct act *act, struct dentry *dentry, struct mount *mount)
{
	about(act, dentry, mount);
	return permitted(act);
}

/* Judge an act by its right on a file. */
static __always_inline int judge(struct act *act, struct dentry *dentry, const struct vfsmount *mnt)
{
	return conclude(act, may(act, dentry, mount_of(mnt)));
}

static __always_inline int on_path(__u16 what, const struct path *path, __u32 right)
{
	struct act act = { .what = what, .right = right };

	if (!mine(&act))
		return 0;
	return judge(&act, BPF_CORE_READ(path, dentry), BPF_CORE_READ(path, mnt));
}

#endif
