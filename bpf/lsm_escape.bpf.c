// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, escape: what changes or leaves the container, or reaches the kernel.
 *
 *   sb_mount, sb_remount, sb_umount, sb_pivotroot, move_mount, path_chroot    refused
 *   fs_context_parse_param, sb_kern_mount: fsopen(2) and what follows         refused
 *   inode_init_security_anon                 userfaultfd(2): refused
 *   userns_create, bpf, bpf_map, bpf_prog, perf_event_open, _read, _write     refused
 *   kernel_read_file, kernel_load_data, kernel_module_request                 refused
 *   key_alloc, key_permission, uring_sqpoll, uring_override_creds, uring_cmd  refused
 *   settime, syslog, quotactl, quota_on, locked_down, tun_dev_create, _open   refused
 *   capable                                  a capability the agent is not given: refused
 *   ptrace_access_check, ptrace_traceme, task_kill, task_setnice, task_setscheduler,
 *   task_setioprio, task_setpgid, task_setrlimit, task_movememory
 *                                            a task of another agent or of none: refused
 *
 * Only the agent is judged: a debugger of the host may trace it.
 */
#include "verdict.bpf.h"

#define CAP_OPT_NOAUDIT 2
#define PTRACE_MODE_NOAUDIT 4

static __always_inline int refuse(__u16 what, __u32 detail)
{
	struct act act = { .what = what, .detail = detail };

	return mine(&act) ? conclude(&act, 0) : 0;
}

/* Hooks whose arguments do not matter, and those whose first is worth telling. */
#define REFUSED(hook, what)                                                                        \
	SEC("lsm/" #hook) int mis_##hook(void *ctx)                                                \
	{                                                                                          \
		(void)ctx;                                                                         \
		return refuse(what, 0);                                                            \
	}
#define REFUSED_TELLING(hook, what)                                                                \
	SEC("lsm/" #hook) int mis_##hook(unsigned long long *ctx)                                  \
	{                                                                                          \
		return refuse(what, ctx[0]);                                                       \
	}

REFUSED(sb_mount, MIS_ACT_MOUNT)
REFUSED(sb_remount, MIS_ACT_REMOUNT)
REFUSED(sb_kern_mount, MIS_ACT_FSCONFIG)
REFUSED(sb_umount, MIS_ACT_UMOUNT)
REFUSED(sb_pivotroot, MIS_ACT_PIVOT_ROOT)
REFUSED(move_mount, MIS_ACT_MOVE_MOUNT)
REFUSED(path_chroot, MIS_ACT_CHROOT)
REFUSED(userns_create, MIS_ACT_USERNS)
REFUSED_TELLING(bpf, MIS_ACT_BPF)
REFUSED(bpf_map, MIS_ACT_BPF)
REFUSED(bpf_prog, MIS_ACT_BPF)
REFUSED(perf_event_open, MIS_ACT_PERF)
REFUSED(perf_event_read, MIS_ACT_PERF)
REFUSED(perf_event_write, MIS_ACT_PERF)
REFUSED(kernel_read_file, MIS_ACT_KERNEL_FILE)
REFUSED_TELLING(kernel_load_data, MIS_ACT_KERNEL_DATA)
REFUSED(kernel_module_request, MIS_ACT_MODULE)
REFUSED(key_alloc, MIS_ACT_KEY)
REFUSED(key_permission, MIS_ACT_KEY)
REFUSED(uring_sqpoll, MIS_ACT_URING)
REFUSED(uring_override_creds, MIS_ACT_URING)
REFUSED(uring_cmd, MIS_ACT_URING)
REFUSED(settime, MIS_ACT_CLOCK)
REFUSED_TELLING(syslog, MIS_ACT_SYSLOG)
REFUSED_TELLING(quotactl, MIS_ACT_QUOTA)
REFUSED(quota_on, MIS_ACT_QUOTA)
REFUSED_TELLING(locked_down, MIS_ACT_LOCKDOWN)
REFUSED(tun_dev_create, MIS_ACT_TUN)
REFUSED(tun_dev_open, MIS_ACT_TUN)
REFUSED(tun_dev_attach_queue, MIS_ACT_TUN)

/*
 * Settings of a file system to be mounted, before it reads what they name.  The kernel's own mounts
 * (an automount, a file system that some driver needs) come this way as well.
 */
SEC("lsm/fs_context_parse_param")
int BPF_PROG(mis_fs_context_parse_param, struct fs_context *context)
{
	if (context->sb_flags & (SB_KERNMOUNT | SB_SUBMOUNT) ||
	    BPF_CORE_READ_BITFIELD_PROBED(context, purpose) == FS_CONTEXT_FOR_SUBMOUNT)
		return 0;
	return refuse(MIS_ACT_FSCONFIG, 0);
}

/* Memory whose faults a program answers: it stops the kernel in the middle of what it does. */
SEC("lsm/inode_init_security_anon")
int BPF_PROG(mis_inode_init_security_anon, struct inode *inode, const struct qstr *name)
{
	char word[16] = {};

	bpf_probe_read_kernel_str(word, sizeof(word), name->name);
#pragma unroll
	for (int n = 0; n < 13; n++)
		if (word[n] != "[userfaultfd]"[n])
			return 0;
	return refuse(MIS_ACT_USERFAULTFD, 0);
}

/*
 * Called only for what the caller's credentials do have: the capability module comes before us.
 * Where the kernel works under other credentials than the task's own (overlayfs under those of who
 * mounted it), it is not the agent who asks.
 */
SEC("lsm/capable")
int BPF_PROG(mis_capable, const struct cred *cred, void *namespace, int capability,
	     unsigned int options)
{
	struct act act = { .what = MIS_ACT_CAPABILITY, .detail = capability };

	if (!mine(&act))
		return 0;
	if (act.capabilities >> (capability & 63) & 1)
		return conclude(&act, 1);
	if (cred != BPF_CORE_READ(bpf_get_current_task_btf(), real_cred))
		return 0;
	/* The kernel asks whether it may be generous; nobody tried anything. */
	act.quiet = (options & CAP_OPT_NOAUDIT) != 0;
	return conclude(&act, 0);
}

/* An act on a task: fine within the agent. */
static __always_inline int across(__u16 what, const struct task_struct *task, __u32 detail,
				  __u8 quiet)
{
	struct act act = { .what = what, .detail = detail, .quiet = quiet };

	if (!mine(&act))
		return 0;
	return conclude(&act, belongs(task, act.id, act.depth));
}

SEC("lsm/ptrace_access_check")
int BPF_PROG(mis_ptrace_access_check, struct task_struct *child, unsigned int mode)
{
	/* ps(1) asks for every process it sees. */
	return across(MIS_ACT_PTRACE, child, mode, (mode & PTRACE_MODE_NOAUDIT) != 0);
}

SEC("lsm/ptrace_traceme")
int BPF_PROG(mis_ptrace_traceme, struct task_struct *parent)
{
	return across(MIS_ACT_PTRACE, parent, 0, 0);
}

SEC("lsm/task_kill")
int BPF_PROG(mis_task_kill, struct task_struct *task, void *info, int signal)
{
	return across(MIS_ACT_KILL, task, signal, 0);
}

SEC("lsm/task_setnice")
int BPF_PROG(mis_task_setnice, struct task_struct *task)
{
	return across(MIS_ACT_SCHEDULER, task, 0, 0);
}

SEC("lsm/task_setscheduler")
int BPF_PROG(mis_task_setscheduler, struct task_struct *task)
{
	return across(MIS_ACT_SCHEDULER, task, 0, 0);
}

SEC("lsm/task_setioprio")
int BPF_PROG(mis_task_setioprio, struct task_struct *task)
{
	return across(MIS_ACT_SCHEDULER, task, 0, 0);
}

SEC("lsm/task_setpgid")
int BPF_PROG(mis_task_setpgid, struct task_struct *task)
{
	return across(MIS_ACT_SCHEDULER, task, 0, 0);
}

SEC("lsm/task_setrlimit")
int BPF_PROG(mis_task_setrlimit, struct task_struct *task)
{
	return across(MIS_ACT_SCHEDULER, task, 0, 0);
}

SEC("lsm/task_movememory")
int BPF_PROG(mis_task_movememory, struct task_struct *task)
{
	return across(MIS_ACT_MOVE_MEMORY, task, 0, 0);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
