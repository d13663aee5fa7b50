/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The fields we read of the kernel's own structs, by name; CO-RE finds where they are in the
 * running kernel.  Ten lines a struct instead of a generated vmlinux.h of three megabytes, so that
 * the objects can be built on a machine without BTF.
 */
#ifndef MIS_KERNEL_BPF_H
#define MIS_KERNEL_BPF_H

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	__u32 s_dev;
	unsigned long s_flags;
};

struct inode {
	__u16 i_mode;
	unsigned long i_ino;
	struct super_block *i_sb;
};

struct qstr {
	__u32 len;
	const unsigned char *name;
};

struct dentry {
	unsigned int d_flags;
	struct dentry *d_parent;
	struct qstr d_name;
	struct inode *d_inode;
	struct super_block *d_sb;
};

struct vfsmount {
	struct dentry *mnt_root;
	struct super_block *mnt_sb;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
	void *mnt_ns;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct file {
	__u32 f_mode;
	unsigned int f_flags;
	struct path f_path;
	struct inode *f_inode;
	void *private_data;
};

struct vm_area_struct {
	unsigned long vm_flags;
	struct file *vm_file;
};

struct backing_file {
	struct path user_path; /* 6.5 */
};

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct cred {
	kuid_t euid;
	kgid_t egid;
};

struct linux_binprm {
	struct file *file;
	struct cred *cred;
};

enum fs_context_purpose {
	FS_CONTEXT_FOR_MOUNT,
	FS_CONTEXT_FOR_SUBMOUNT,
};

struct fs_context {
	unsigned int sb_flags;
	enum fs_context_purpose purpose : 8;
};

struct iattr {
	unsigned int ia_valid;
};

struct seqcount {
	unsigned int sequence;
};

typedef struct seqcount seqcount_t;

struct seqcount_spinlock {
	seqcount_t seqcount;
};

typedef struct seqcount_spinlock seqcount_spinlock_t;

typedef struct {
	seqcount_spinlock_t seqcount;
} seqlock_t;

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[]; /* 6.1 */
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct sock_common {
	unsigned short skc_family;
	unsigned char skc_state;
};

struct sock {
	struct sock_common __sk_common;
	struct sock_cgroup_data sk_cgrp_data;
	__u16 sk_type;
};

struct socket {
	struct sock *sk;
};

struct unix_sock {
	void *addr;
	struct path path;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct task_struct {
	const struct cred *real_cred;
	const struct cred *cred;
	struct css_set *cgroups;
};

#pragma clang attribute pop

/* An enum in the newest kernels, of the same numbers; macros before, which CO-RE cannot see. */
enum dentry_flags {
	DCACHE_OP_REVALIDATE = 1 << 2,
	DCACHE_OP_WEAK_REVALIDATE = 1 << 11,
};

/* The verifier's list of functions that it knows. */
enum special_kfunc_type {
	KF_bpf_rdonly_cast = 8,
};

/* Numbers of the kernel's own that no uapi header has; all older than the kernels we run on. */
#define EPERM 1
#define EXDEV 18
#define EROFS 30
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFDIR 0040000
#define S_IFCHR 0020000
#define S_IFBLK 0060000
#define FMODE_READ 0x1
#define FMODE_WRITE 0x2
#define FMODE_PATH 0x4000
#define FMODE_EXEC 0x20 /* in f_flags: opened to be executed */
#define PROT_WRITE 0x2
#define PROT_EXEC 0x4
#define VM_EXEC 0x4
#define SB_KERNMOUNT (1UL << 22)
#define SB_SUBMOUNT (1UL << 26)
#define SB_NOUSER (1UL << 31)
#define MNT_NS_INTERNAL ((void *)-22L) /* ERR_PTR(-EINVAL), fs/mount.h */
#define SIGKILL 9

#endif
