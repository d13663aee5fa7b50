// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, files: their content and attributes.
 *
 *   hook                        when                                       right
 *   file_open                   open(2) of all kinds, io_uring, execve(2)  READ, WRITE, LIST; EXEC
 *   file_receive                a descriptor arrives over a socket         READ, WRITE
 *                               one of a socket: see foreign.bpf.h
 *   mmap_file, file_mprotect    executable memory of a file                EXEC not denied
 *                               memory writable and executable             by level or flag
 *   file_ioctl, file_ioctl_compat   attributes by ioctl                    WRITE
 *   path_truncate, path_chmod, path_chown, inode_setattr (times),
 *   inode_setxattr, inode_removexattr, inode_set_acl, inode_remove_acl     WRITE
 *   path_notify                 inotify, fanotify                          READ
 *
 * path_* and not inode_*: they have the mount, so a walk crosses mounts; and overlayfs does not call
 * them for its layers.  The inode_* hooks here have no path_* sibling.
 */
#include "cache.bpf.h"
#include "foreign.bpf.h"

#define SOCK_STREAM 1
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define TIOCSTI 0x5412
#define TIOCLINUX 0x541C
#define FS_IOC_SETFLAGS 0x40086602
#define FS_IOC32_SETFLAGS 0x40046602
#define FS_IOC_FSSETXATTR 0x401c5820
#define ATTR_TIMES_ONLY(valid) (!((valid) & 0xf)) /* no ATTR_MODE, UID, GID, SIZE */

/*
 * A dentry alone: judged within its file system (lsm_policy.py gives the root of every mount a rule).
 * overlayfs does the same to its layers again, under the credentials of who mounted it.
 */
static __always_inline int on_dentry(__u16 what, struct dentry *dentry, __u32 right)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct act act = { .what = what, .right = right };

	if (!mine(&act) || BPF_CORE_READ(task, cred) != BPF_CORE_READ(task, real_cred))
		return 0;
	return judge(&act, dentry, NULL);
}

_Static_assert(FMODE_READ == MIS_READ && FMODE_WRITE == MIS_WRITE, "the same bits");

static __always_inline __u32 rights_of(const struct file *file)
{
	__u32 mode = file->f_mode, rights = mode & (FMODE_READ | FMODE_WRITE);

	if (file->f_flags & FMODE_EXEC)
		return MIS_EXEC;
	if (mode & FMODE_PATH) /* names a file, and opens nothing */
		return 0;
	if (rights & MIS_READ && (file->f_inode->i_mode & S_IFMT) == S_IFDIR)
		return rights ^ (MIS_READ | MIS_LIST);
	return rights ?: MIS_READ | MIS_WRITE; /* access mode 3: ioctl(2) alone, checked as both */
}

/* Linux 6.1's overlayfs opens the file below under the path on top: judged already. */
static __always_inline int is_below(const struct file *file)
{
	return file->f_inode != file->f_path.dentry->d_inode;
}

/*
 * Each hook that asks the cache first has its long way in a function of its own: the stack of all
 * functions that call each other is 512 bytes.
 */
static __noinline int judge_file(struct file *file, __u16 what, __u32 right)
{
	struct act act = { .what = what, .right = right };

	if (!mine(&act) || (what != MIS_ACT_RECEIVE && is_below(file)))
		return 0;
	return judge(&act, file->f_path.dentry, file->f_path.mnt);
}

SEC("lsm/file_open")
int BPF_PROG(mis_file_open, struct file *file)
{
	struct self self;
	__u32 right;

	if (!is_agent(&self))
		return 0;
	right = rights_of(file);
	if (is_known(&self, file->f_path.dentry, file->f_inode, file->f_path.mnt, right,
		     right == MIS_EXEC ? EXECUTED : OPENED))
		return 0;
	return judge_file(file, right == MIS_EXEC ? MIS_ACT_EXEC : MIS_ACT_OPEN, right);
}

/* A function of its own: with all in one the stack would be too small on 6.1. */
static __noinline int is_known_here(const struct self *self, struct file *file, __u32 right)
{
	return is_known(self, file->f_path.dentry, file->f_inode, file->f_path.mnt, right, CHANGED);
}

/* A socket is handed over: fine where all that it can do is to go on with a conversation. */
static __always_inline int on_handover(const struct file *file)
{
	struct socket *socket = file->private_data;
	struct sock *sock = BPF_CORE_READ(socket, sk);
	__u16 family = BPF_CORE_READ(sock, __sk_common.skc_family);
	__u8 state = BPF_CORE_READ(sock, __sk_common.skc_state);

	if (family == AF_UNIX || (BPF_CORE_READ(sock, sk_type) == SOCK_STREAM &&
				  state != TCP_CLOSE && state != TCP_LISTEN))
		return 0;
	return judge_foreign(BPF_CORE_READ(sock, sk_cgrp_data.cgroup), family);
}

SEC("lsm/file_receive")
int BPF_PROG(mis_file_receive, struct file *file)
{
	struct self self;
	__u32 right;

	if (!is_agent(&self))
		return 0;
	if ((file->f_inode->i_mode & S_IFMT) == S_IFSOCK && !(file->f_mode & FMODE_PATH))
		return on_handover(file);
	right = rights_of(file) & ~MIS_EXEC;
	if (is_known_here(&self, file, right))
		return 0;
	return judge_file(file, MIS_ACT_RECEIVE, right);
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
	look(&walk, act->id, act->dentry, act->mount, MIS_EXEC);
	act->rule = walk.number;
	act->marks = walk.marks;
	return !(walk.refused & MIS_EXEC);
}

static __noinline int judge_memory(struct file *file, unsigned long prot)
{
	struct act act = { .what = MIS_ACT_WX_MEMORY };

	if (!mine(&act))
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

SEC("lsm/mmap_file")
int BPF_PROG(mis_mmap_file, struct file *file, unsigned long reqprot, unsigned long prot)
{
	struct self self;
	__u64 given = 0;

	if (!(prot & PROT_EXEC) || !is_agent(&self))
		return 0;
	/* Memory of no file.  Until 6.13 the verifier takes it for granted that there is one, and a
	 * look at `file` alone for superfluous. */
	bpf_get_func_arg(ctx, 0, &given);
	if (given && file && !(prot & PROT_WRITE) &&
	    is_known(&self, file->f_path.dentry, file->f_inode, file->f_path.mnt, MIS_EXEC, MAPPED))
		return 0;
	return judge_memory((struct file *)given, prot);
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

static __noinline int judge_path(const struct path *path, __u16 what, __u32 right)
{
	return on_path(what, path, right);
}

/* on_path for what programs do often. */
static __always_inline int often_on_path(__u16 what, const struct path *path, __u32 right)
{
	struct self self;

	if (!is_agent(&self) ||
	    is_known(&self, path->dentry, path->dentry->d_inode, path->mnt, right, CHANGED))
		return 0;
	return judge_path(path, what, right);
}

SEC("lsm/path_truncate")
int BPF_PROG(mis_path_truncate, const struct path *path)
{
	return often_on_path(MIS_ACT_TRUNCATE, path, MIS_WRITE);
}

SEC("lsm/path_chmod")
int BPF_PROG(mis_path_chmod, const struct path *path)
{
	return often_on_path(MIS_ACT_CHMOD, path, MIS_WRITE);
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
