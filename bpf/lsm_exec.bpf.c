// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, programs: what may be executed.
 *
 *   hook                  when                                                  denies by
 *   bprm_check_security   the program, and again each interpreter of a script   EPERM
 *   bprm_creds_from_file  it would run as another user or group                 EPERM
 *
 * Every file that the kernel opens to execute (program, script, interpreter, ELF interpreter) is
 * judged in file_open (lsm_file.bpf.c), which also makes the event.  The look here is on the object
 * that will run: the rules may have changed in between, binfmt_misc may run a file that was opened
 * long ago, and only here it is known what is new at a raised level.
 */
#include "cache.bpf.h"

/* Programs that ran before: what is not "new" at a raised level. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mis_place);
	__type(value, __u8);
} ran SEC(".maps");

static __noinline int has_run(const struct dentry *dentry, __u64 agent, int from_now_on)
{
	struct mis_place place = {
		.agent = agent,
		.inode = dentry->d_inode->i_ino,
		.device = dentry->d_sb->s_dev,
	};
	__u8 once = 1;

	if (from_now_on)
		bpf_map_update_elem(&ran, &place, &once, BPF_ANY);
	return bpf_map_lookup_elem(&ran, &place) != NULL;
}

/* The long way; a function of its own, for the sake of the 512 bytes of stack. */
static __noinline int judge_program(const struct file *file, int ran_before)
{
	struct act act = { .what = MIS_ACT_EXEC, .right = MIS_EXEC };
	int allowed;

	if (!mine(&act))
		return 0;
	allowed = may(&act, file->f_path.dentry, mount_of(file->f_path.mnt));
	/* In audit the file was told of when it was opened. */
	if (!allowed && !(act.flags & MIS_ENFORCE))
		return 0;
	if (allowed && in_force(&act, binaries) && !ran_before) {
		act.rule = MIS_RULE_RAISED;
		allowed = 0;
	}
	if (allowed && !ran_before)
		has_run(file->f_path.dentry, act.id, 1);
	return conclude(&act, allowed);
}

SEC("lsm/bprm_check_security")
int BPF_PROG(mis_bprm_check_security, struct linux_binprm *bprm)
{
	struct file *file;
	struct self self;
	int ran_before;

	if (!is_agent(&self))
		return 0;
	file = bprm->file;
	ran_before = has_run(file->f_path.dentry, self.agent->id, 0);
	if (ran_before &&
	    is_known(&self, file->f_path.dentry, file->f_inode, file->f_path.mnt, MIS_EXEC, EXECUTED))
		return 0;
	return judge_program(file, ran_before);
}

/* A set-user-ID program, where its bits count: no mount and no flag of the task takes them away. */
SEC("lsm/bprm_creds_from_file")
int BPF_PROG(mis_bprm_creds_from_file, struct linux_binprm *bprm, const struct file *file)
{
	const struct cred *before = bpf_get_current_task_btf()->cred, *now = bprm->cred;
	struct act act = { .what = MIS_ACT_SET_ID };

	if (now->euid.val == before->euid.val && now->egid.val == before->egid.val)
		return 0;
	if (!mine(&act))
		return 0;
	act.detail = now->euid.val;
	about(&act, file->f_path.dentry, mount_of(file->f_path.mnt));
	return conclude(&act, 0);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
