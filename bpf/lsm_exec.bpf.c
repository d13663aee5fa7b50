// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, programs: what may be executed; and what a new task remembers.
 *
 *   hook                  when                                                  denies by
 *   bprm_check_security   the program, and again each interpreter of a script   EPERM
 *   task_alloc            fork(2), clone(2) of all kinds, io_uring workers      never
 *
 * Every file that the kernel opens to execute (program, script, interpreter, ELF interpreter) is
 * judged in file_open (lsm_file.bpf.c), which also makes the event.  The look here is on the object
 * that will run: the rules may have changed in between, binfmt_misc may run a file that was opened
 * long ago, and only here it is known what is new at a raised level.
 */
#include "policy.bpf.h"

/* Programs that ran before: what is not "new" at a raised level. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mis_place);
	__type(value, __u8);
} ran SEC(".maps");

SEC("lsm/bprm_check_security")
int BPF_PROG(mis_bprm_check_security, struct linux_binprm *bprm)
{
	struct act act = { .what = MIS_ACT_EXEC, .right = MIS_EXEC };
	struct mis_place place = {};
	struct file *file;
	struct dentry *dentry;
	__u8 once = 1;
	int allowed;

	if (!mine(&act))
		return 0;
	file = BPF_CORE_READ(bprm, file);
	dentry = BPF_CORE_READ(file, f_path.dentry);
	allowed = may(&act, dentry, mount_of(BPF_CORE_READ(file, f_path.mnt)));
	/* In audit the file was told of when it was opened. */
	if (!allowed && !(act.flags & MIS_ENFORCE))
		return 0;
	place.agent = act.id;
	place.inode = BPF_CORE_READ(dentry, d_inode, i_ino);
	place.device = BPF_CORE_READ(dentry, d_sb, s_dev);
	if (allowed && in_force(&act, binaries) && !bpf_map_lookup_elem(&ran, &place)) {
		act.rule = MIS_RULE_RAISED;
		allowed = 0;
	}
	if (allowed)
		bpf_map_update_elem(&ran, &place, &once, BPF_ANY);
	return conclude(&act, allowed);
}

SEC("lsm/task_alloc")
int BPF_PROG(mis_task_alloc, struct task_struct *task)
{
	struct mis_scope *from, *to;
	__u32 zero = 0;
	struct mis_plane *here = bpf_map_lookup_elem(&plane, &zero);

	if (!here || !here->agents)
		return 0;
	from = bpf_task_storage_get(&scopes, bpf_get_current_task_btf(), 0, 0);
	if (!from)
		return 0;
	to = bpf_task_storage_get(&scopes, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (to) { /* without it the child looks for itself */
		*to = *from;
		to->act = 0; /* it has repeated nothing yet */
		to->hits = 0;
	}
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
