// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, files: what may be read, written, made and removed.
 *
 *   hook                        when                                       right
 *   file_open                   open(2) of all kinds, io_uring, execve(2)  READ, WRITE; EXEC
 *   file_receive                a descriptor arrives over a socket         READ, WRITE
 *   mmap_file, file_mprotect    executable memory of a file                EXEC not denied
 *                               memory writable and executable             by level or flag
 *   file_ioctl, file_ioctl_compat   attributes by ioctl                    WRITE
 *   path_truncate, path_chmod, path_chown, inode_setattr (times),
 *   inode_setxattr, inode_removexattr, inode_set_acl, inode_remove_acl     WRITE
 *   path_mkdir, path_mknod (open with O_CREAT too), path_symlink           CREATE in the directory
 *   path_unlink, path_rmdir                                                DELETE
 *   path_link                   CREATE in the directory, and no right that was not there before
 *   path_rename                 the same, and DELETE of what is moved and of what is replaced
 *   path_notify                 inotify, fanotify                          READ
 *
 * path_* and not inode_*: they have the mount, so a walk crosses mounts; and overlayfs does not call
 * them for its layers.  The inode_* hooks here have no path_* sibling.
 */
#include "policy.bpf.h"

#define TIOCSTI 0x5412
#define TIOCLINUX 0x541C
#define FS_IOC_SETFLAGS 0x40086602
#define FS_IOC32_SETFLAGS 0x40046602
#define FS_IOC_FSSETXATTR 0x401c5820
#define RENAME_EXCHANGE 2
#define ATTR_TIMES_ONLY(valid) (!((valid) & 0xf)) /* no ATTR_MODE, UID, GID, SIZE */

static __always_inline int on_path(__u16 what, const struct path *path, __u32 right)
{
	struct act act = { .what = what, .right = right };

	if (!mine(&act))
		return 0;
	return judge(&act, BPF_CORE_READ(path, dentry), BPF_CORE_READ(path, mnt));
}

/* A dentry in a directory whose mount is known. */
static __always_inline int on_entry(__u16 what, const struct path *dir, struct dentry *dentry,
				    __u32 right)
{
	struct act act = { .what = what, .right = right };

	if (!mine(&act))
		return 0;
	return judge(&act, dentry, BPF_CORE_READ(dir, mnt));
}

/* A dentry alone: judged within its file system. */
static __always_inline int on_dentry(__u16 what, struct dentry *dentry, __u32 right)
{
	struct act act = { .what = what, .right = right };

	if (!mine(&act))
		return 0;
	return judge(&act, dentry, NULL);
}

static __always_inline __u32 rights_of(const struct file *file)
{
	__u32 mode = BPF_CORE_READ(file, f_mode), rights = 0;

	if (BPF_CORE_READ(file, f_flags) & FMODE_EXEC)
		return MIS_EXEC;
	if (mode & FMODE_READ)
		rights |= MIS_READ;
	if (mode & FMODE_WRITE)
		rights |= MIS_WRITE;
	return rights ?: MIS_READ | MIS_WRITE; /* access mode 3: ioctl(2) alone, checked as both */
}

/* Linux 6.1's overlayfs opens the file below under the path on top: judged already. */
static __always_inline int is_below(const struct file *file)
{
	return BPF_CORE_READ(file, f_inode) != BPF_CORE_READ(file, f_path.dentry, d_inode);
}

SEC("lsm/file_open")
int BPF_PROG(mis_file_open, struct file *file)
{
	struct act act = { .what = MIS_ACT_OPEN };

	if (!mine(&act) || is_below(file))
		return 0;
	act.right = rights_of(file);
	if (act.right == MIS_EXEC)
		act.what = MIS_ACT_EXEC;
	return judge(&act, BPF_CORE_READ(file, f_path.dentry), BPF_CORE_READ(file, f_path.mnt));
}

SEC("lsm/file_receive")
int BPF_PROG(mis_file_receive, struct file *file)
{
	struct act act = { .what = MIS_ACT_RECEIVE };

	if (!mine(&act))
		return 0;
	act.right = rights_of(file) & (MIS_READ | MIS_WRITE);
	return judge(&act, BPF_CORE_READ(file, f_path.dentry), BPF_CORE_READ(file, f_path.mnt));
}

/*
 * Memory writable and executable: counted at once where forbidden, else left alone.
 */
static __always_inline int is_wx(const struct act *act, unsigned long prot)
{
	if ((prot & (PROT_WRITE | PROT_EXEC)) != (PROT_WRITE | PROT_EXEC))
		return 0;
	return act->flags & MIS_NO_WX || in_force(act, wx_memory);
}

/*
 * Executable memory of a file.  Libraries are not in the table of what may be executed, so only an
 * outright denial counts: no way around it by `ld.so /bin/denied`.
 */
__noinline int executable(struct act *act)
{
	struct walk walk;

	if (!act)
		return 0;
	if (inner_mount(act->mount) != VISIBLE)
		return 1;
	look(&walk, act, act->dentry, act->mount, MIS_EXEC);
	act->rule = walk.number;
	return !(walk.refused & MIS_EXEC);
}

SEC("lsm/mmap_file")
int BPF_PROG(mis_mmap_file, struct file *file, unsigned long reqprot, unsigned long prot)
{
	struct act act = { .what = MIS_ACT_WX_MEMORY };

	if (!(prot & PROT_EXEC) || !mine(&act))
		return 0;
	if (is_wx(&act, prot))
		return conclude(&act, 0);
	if (!file)
		return conclude(&act, 1);
	act.what = MIS_ACT_MMAP;
	act.right = MIS_EXEC;
	about(&act, BPF_CORE_READ(file, f_path.dentry), mount_of(BPF_CORE_READ(file, f_path.mnt)));
	return conclude(&act, executable(&act));
}

/* The path a mapped file was opened by: from 6.5 on overlayfs maps the file below. */
static __always_inline void path_of(struct file *file, struct path *path)
{
	struct backing_file *backing = (void *)file;

	BPF_CORE_READ_INTO(path, file, f_path);
	if (bpf_core_type_exists(struct backing_file) &&
	    inner_mount(mount_of(path->mnt)) == LAYER)
		BPF_CORE_READ_INTO(path, backing, user_path);
}

SEC("lsm/file_mprotect")
int BPF_PROG(mis_file_mprotect, struct vm_area_struct *vma, unsigned long reqprot,
	     unsigned long prot)
{
	struct act act = { .what = MIS_ACT_WX_MEMORY };
	struct file *file;
	struct path path = {};

	if (!(prot & PROT_EXEC) || !mine(&act))
		return 0;
	if (is_wx(&act, prot))
		return conclude(&act, 0);
	file = BPF_CORE_READ(vma, vm_file);
	if (!file || BPF_CORE_READ(vma, vm_flags) & VM_EXEC)
		return conclude(&act, 1);
	act.what = MIS_ACT_MMAP;
	act.right = MIS_EXEC;
	path_of(file, &path);
	about(&act, path.dentry, mount_of(path.mnt));
	return conclude(&act, executable(&act));
}

static __always_inline int on_ioctl(struct file *file, unsigned int command)
{
	struct act act = { .what = MIS_ACT_IOCTL, .right = MIS_WRITE, .detail = command };

	switch (command) {
	case TIOCSTI: /* type into the terminal as if the user did */
	case TIOCLINUX:
		act.what = MIS_ACT_TTY;
		return mine(&act) ? conclude(&act, 0) : 0;
	case FS_IOC_SETFLAGS:
	case FS_IOC32_SETFLAGS:
	case FS_IOC_FSSETXATTR:
		if (!mine(&act))
			return 0;
		return judge(&act, BPF_CORE_READ(file, f_path.dentry),
			     BPF_CORE_READ(file, f_path.mnt));
	}
	return 0;
}

SEC("lsm/file_ioctl")
int BPF_PROG(mis_file_ioctl, struct file *file, unsigned int command)
{
	return on_ioctl(file, command);
}

SEC("?lsm/file_ioctl_compat") /* 6.12 */
int BPF_PROG(mis_file_ioctl_compat, struct file *file, unsigned int command)
{
	return on_ioctl(file, command);
}

SEC("lsm/path_truncate")
int BPF_PROG(mis_path_truncate, const struct path *path)
{
	return on_path(MIS_ACT_TRUNCATE, path, MIS_WRITE);
}

SEC("lsm/path_chmod")
int BPF_PROG(mis_path_chmod, const struct path *path)
{
	return on_path(MIS_ACT_CHMOD, path, MIS_WRITE);
}

SEC("lsm/path_chown")
int BPF_PROG(mis_path_chown, const struct path *path)
{
	return on_path(MIS_ACT_CHOWN, path, MIS_WRITE);
}

SEC("lsm/path_notify")
int BPF_PROG(mis_path_notify, const struct path *path)
{
	return on_path(MIS_ACT_NOTIFY, path, MIS_READ);
}

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

SEC("lsm/path_unlink")
int BPF_PROG(mis_path_unlink, const struct path *dir, struct dentry *dentry)
{
	return on_entry(MIS_ACT_UNLINK, dir, dentry, MIS_DELETE);
}

SEC("lsm/path_rmdir")
int BPF_PROG(mis_path_rmdir, const struct path *dir, struct dentry *dentry)
{
	struct act act = { .what = MIS_ACT_RMDIR };

	if (!mine(&act))
		return 0;
	return conclude(&act, removable(&act, dentry, mount_of(BPF_CORE_READ(dir, mnt))));
}

/* Rights on the act's file that it would get by lying in `into`, and does not have now. */
__noinline __u32 gained(struct act *act)
{
	struct walk here, there;

	if (!act)
		return MIS_ALL;
	look(&here, act, act->dentry, act->mount, MIS_ALL);
	look(&there, act, act->into, act->mount, MIS_ALL);
	return there.granted & ~here.granted;
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

/* Times; mode, owner and size come by path_chmod, path_chown and path_truncate. */
SEC("lsm/inode_setattr")
int mis_inode_setattr(unsigned long long *ctx)
{
	__u64 count = bpf_get_func_arg_cnt(ctx), dentry = 0, attr = 0;

	/* The last two arguments; before Linux 6.9 there is nothing in front of them. */
	if (bpf_get_func_arg(ctx, count - 2, &dentry) || bpf_get_func_arg(ctx, count - 1, &attr))
		return 0;
	if (!ATTR_TIMES_ONLY(BPF_CORE_READ((struct iattr *)attr, ia_valid)))
		return 0;
	return on_dentry(MIS_ACT_SETATTR, (struct dentry *)dentry, MIS_WRITE);
}

SEC("lsm/inode_setxattr")
int BPF_PROG(mis_inode_setxattr, void *idmap, struct dentry *dentry)
{
	return on_dentry(MIS_ACT_SETXATTR, dentry, MIS_WRITE);
}

SEC("lsm/inode_removexattr")
int BPF_PROG(mis_inode_removexattr, void *idmap, struct dentry *dentry)
{
	return on_dentry(MIS_ACT_SETXATTR, dentry, MIS_WRITE);
}

SEC("?lsm/inode_set_acl") /* 6.2; setxattr(2) before */
int BPF_PROG(mis_inode_set_acl, void *idmap, struct dentry *dentry)
{
	return on_dentry(MIS_ACT_ACL, dentry, MIS_WRITE);
}

SEC("?lsm/inode_remove_acl") /* 6.2 */
int BPF_PROG(mis_inode_remove_acl, void *idmap, struct dentry *dentry)
{
	return on_dentry(MIS_ACT_ACL, dentry, MIS_WRITE);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
