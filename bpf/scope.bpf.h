/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Which agent the current task belongs to.
 *
 * An agent is a cgroup and everything below.  A task remembers the answer for the cgroup it is in
 * and for the set of agents there was (`epoch`); a child inherits what its parent remembers
 * (lsm_exec.bpf.c, task_alloc).  A task that changes its cgroup, or meets a new epoch, looks again,
 * so fork, threads, late joiners and moves need no case of their own.
 *
 * The maps are shared by all objects of the plane: pinned by name.
 */
#ifndef MIS_SCOPE_BPF_H
#define MIS_SCOPE_BPF_H

#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "kernel.bpf.h"
#include "mis.h"

/* A hook's arguments are the kernel's, not ours to choose. */
#pragma clang diagnostic ignored "-Wunused-parameter"

#define DEEPEST 32 /* an agent's own cgroup lies at most this deep: lsm.py refuses others */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mis_plane);
} plane SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct mis_agent);
} agents SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mis_scope);
} scopes SEC(".maps");

/* One step of bpf_loop along the cgroup's path from the root: the last agent met is the nearest. */
static long meet(__u32 level, __u64 *nearest)
{
	__u64 id = bpf_get_current_ancestor_cgroup_id(level);

	if (!id)
		return 1;
	if (bpf_map_lookup_elem(&agents, &id))
		*nearest = id;
	return 0;
}

/* From the root and not from below, so that an agent may nest cgroups as deep as it likes. */
static __always_inline __u64 nearest_agent(void)
{
	__u64 nearest = 0;

	bpf_loop(DEEPEST + 1, meet, &nearest, 0);
	return nearest;
}

static __noinline __u64 current_agent(void)
{
	__u32 zero = 0;
	struct mis_plane *here = bpf_map_lookup_elem(&plane, &zero);
	struct mis_scope *scope;
	__u64 epoch, cgroup;

	if (!here || !here->agents)
		return 0;
	epoch = here->epoch;
	cgroup = bpf_get_current_cgroup_id();
	scope = bpf_task_storage_get(&scopes, bpf_get_current_task_btf(), 0,
				     BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!scope) /* no memory, or the storage is busy on this CPU */
		return nearest_agent();
	if (scope->cgroup != cgroup || scope->epoch != epoch) {
		scope->agent = nearest_agent();
		scope->cgroup = cgroup;
		scope->epoch = epoch;
	}
	return scope->agent;
}

/* Whether a cgroup is the agent's or below, by its path from the root. */
static __always_inline int is_inside(struct cgroup *cgroup, __u64 id, __u32 depth)
{
	struct cgroup *ancestor = NULL;

	if (BPF_CORE_READ(cgroup, level) < (int)depth)
		return 0;
	bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
			      (void *)cgroup + bpf_core_field_offset(struct cgroup, ancestors) +
				      depth * sizeof(ancestor));
	return BPF_CORE_READ(ancestor, kn, id) == id;
}

/* Whether another task belongs to the agent, whatever it remembers. */
static __always_inline int belongs(const struct task_struct *task, __u64 id, __u32 depth)
{
	return is_inside(BPF_CORE_READ(task, cgroups, dfl_cgrp), id, depth);
}

#endif
