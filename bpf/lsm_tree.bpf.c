// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, directories: what is made, removed and moved.
 *
 *   hook                                                     right
 *   path_mkdir, path_symlink, path_mknod (O_CREAT, bind too) CREATE in the directory
 *   path_unlink, path_rmdir                                  DELETE, and nothing hangs on it
 *   path_link     CREATE in the directory, and no right that was not there before
 *   path_rename   the same, and DELETE of what is moved and of what is replaced
 *
 * A device node is never made.
 */
#include "policy.bpf.h"

#define RENAME_EXCHANGE 2

SEC("lsm/path_mkdir")
int BPF_PROG(mis_path_mkdir, const struct path *dir)
{
	return on_path(MIS_ACT_MKDIR, dir, MIS_CREATE);
}

SEC("lsm/path_symlink")
int BPF_PROG(mis_path_symlink, const struct path *dir)
{
	return on_path(MIS_ACT_SYMLINK, dir, MIS_CREATE);
}

SEC("lsm/path_mknod")
int BPF_PROG(mis_path_mknod, const struct path *dir, struct dentry *dentry, __u16 mode,
	     unsigned int device)
{
	struct act act = { .what = MIS_ACT_MKNOD, .right = MIS_CREATE, .detail = device };

	if (!mine(&act))
		return 0;
	/* Character device 0:0 is how overlayfs says "removed"; it opens to nothing. */
	if ((mode & S_IFMT) == S_IFBLK || ((mode & S_IFMT) == S_IFCHR && device)) {
		act.what = MIS_ACT_DEVICE_NODE;
		return conclude(&act, 0);
	}
	return judge(&act, BPF_CORE_READ(dir, dentry), BPF_CORE_READ(dir, mnt));
}

static __always_inline int is_anchor(struct act *act, struct dentry *dentry)
{
	struct inode *inode = BPF_CORE_READ(dentry, d_inode);
	struct mis_place place = { .agent = act->id };
	struct mis_rule *rule;

	if (!inode)
		return 0;
	place.inode = BPF_CORE_READ(inode, i_ino);
	place.device = BPF_CORE_READ(inode, i_sb, s_dev);
	rule = bpf_map_lookup_elem(&rules, &place);
	if (!rule || !(rule->flags & MIS_ANCHOR))
		return 0;
	act->rule = MIS_RULE_ANCHOR;
	return 1;
}

/* What a removal takes: the right, and no rule below that would lose its place. */
static __always_inline int removable(struct act *act, struct dentry *dentry, struct mount *mount)
{
	act->right = MIS_DELETE;
	return may(act, dentry, mount) && !is_anchor(act, dentry);
}

static __always_inline int on_removal(__u16 what, const struct path *dir, struct dentry *dentry)
{
	struct act act = { .what = what };

	if (!mine(&act))
		return 0;
	return conclude(&act, removable(&act, dentry, mount_of(BPF_CORE_READ(dir, mnt))));
}

SEC("lsm/path_unlink")
int BPF_PROG(mis_path_unlink, const struct path *dir, struct dentry *dentry)
{
	return on_removal(MIS_ACT_UNLINK, dir, dentry);
}

SEC("lsm/path_rmdir")
int BPF_PROG(mis_path_rmdir, const struct path *dir, struct dentry *dentry)
{
	return on_removal(MIS_ACT_RMDIR, dir, dentry);
}

/* Rights on the act's file that it would get by lying in `into`, and does not have now. */
__noinline __u32 gained(struct act *act)
{
	struct walk walk; /* one for both: the stack is 512 bytes for all calls together */
	__u32 here;

	if (!act)
		return MIS_ALL;
	look(&walk, act->id, act->dentry, act->mount, MIS_ALL);
	here = walk.granted;
	act->rule = walk.number;
	look(&walk, act->id, act->into, act->mount, MIS_ALL);
	return walk.granted & ~here;
}

/*
 * A thing gets a second place, or another.  Where it could be read only there, that is an attack.
 * Any other new right is refused as if the places were on two file systems: programs copy then,
 * and each step of copying is judged.
 */
static __always_inline int placed(struct act *act, struct dentry *thing, struct dentry *dir,
				  struct mount *mount)
{
	__u32 more;

	about(act, thing, mount);
	act->into = dir;
	more = gained(act);
	if (!more)
		return conclude(act, 1);
	act->right = more;
	act->quiet = !(more & MIS_READ);
	return error_of(refused(act, 0), act->quiet ? -EXDEV : -EPERM);
}

SEC("lsm/path_link")
int BPF_PROG(mis_path_link, struct dentry *old, const struct path *dir)
{
	struct mount *mount = mount_of(BPF_CORE_READ(dir, mnt));
	struct act act = { .what = MIS_ACT_LINK, .right = MIS_CREATE };
	struct dentry *into = BPF_CORE_READ(dir, dentry);

	if (!mine(&act))
		return 0;
	if (!may(&act, into, mount))
		return conclude(&act, 0);
	return placed(&act, old, into, mount);
}

/* The half of a rename that moves `thing` into `dir`; RENAME_EXCHANGE has two. */
static __always_inline int moved(struct act *act, struct dentry *thing, struct dentry *dir,
				 struct mount *mount)
{
	if (!removable(act, thing, mount))
		return conclude(act, 0);
	act->right = MIS_CREATE;
	if (!may(act, dir, mount))
		return conclude(act, 0);
	return placed(act, thing, dir, mount);
}

SEC("lsm/path_rename")
int BPF_PROG(mis_path_rename, const struct path *old_dir, struct dentry *old,
	     const struct path *new_dir, struct dentry *new, unsigned int flags)
{
	struct mount *mount = mount_of(BPF_CORE_READ(new_dir, mnt));
	struct act act = { .what = MIS_ACT_RENAME };

	if (!mine(&act))
		return 0;
	if (flags & RENAME_EXCHANGE) {
		int error = moved(&act, new, BPF_CORE_READ(old_dir, dentry), mount);

		if (error)
			return error;
	} else if (BPF_CORE_READ(new, d_inode) && !removable(&act, new, mount)) {
		return conclude(&act, 0); /* what is replaced is removed */
	}
	return moved(&act, old, BPF_CORE_READ(new_dir, dentry), mount);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
