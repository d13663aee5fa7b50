/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Which agent the current task belongs to.
 *
 * An agent is a cgroup and everything below.  A task remembers the answer for the cgroup it is in
 * and for the set of agents there was (`epoch`); a child inherits what its parent remembers
 * (lsm_exec.bpf.c, task_alloc).  A task that changes its cgroup, or meets a new epoch, looks again,
 * so fork, threads, late joiners and moves need no case of their own.
 *
 * Agents lie in an array, because the verifier inlines looking into one; their ids lead there by a
 * hash map, which only those who look again need.  A slot says whose it is: one that was given to
 * another agent since is not taken for the first.
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
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct mis_plane);
} plane SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MIS_SLOTS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct mis_agent);
} agents SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MIS_SLOTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u32);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mis_scope);
} scopes SEC(".maps");

struct nearest {
	__u64 agent; /* 0: none */
	__u32 slot;
	__u32 zero;
};

/* One step of bpf_loop along the cgroup's path from the root: the last agent met is the nearest. */
static long meet(__u32 level, struct nearest *nearest)
{
	__u64 id = bpf_get_current_ancestor_cgroup_id(level);
	struct mis_agent *agent;
	__u32 *slot;

	if (!id)
		return 1;
	slot = bpf_map_lookup_elem(&slots, &id);
	if (!slot)
		return 0;
	agent = bpf_map_lookup_elem(&agents, slot);
	if (!agent || agent->id != id) /* coming or going */
		return 0;
	nearest->agent = id;
	nearest->slot = *slot;
	return 0;
}

/* From the root and not from below, so that an agent may nest cgroups as deep as it likes. */
static __noinline __u64 search(struct mis_scope *scope, __u64 cgroup, __u64 epoch, __u32 *slot)
{
	struct nearest nearest = {};

	bpf_loop(DEEPEST + 1, meet, &nearest, 0);
	if (scope) {
		scope->agent = nearest.agent;
		scope->slot = nearest.slot;
		scope->cgroup = cgroup;
		scope->epoch = epoch;
	}
	*slot = nearest.slot;
	return nearest.agent;
}

/*
 * The agent of the current task, or NULL.  `scope` is what the task remembers; NULL when there was no
 * memory for it, or the storage is busy on this CPU.
 */
static __always_inline struct mis_agent *current_agent(struct mis_scope **scope, __u32 *slot)
{
	__u32 zero = 0;
	struct mis_plane *here = bpf_map_lookup_elem(&plane, &zero);
	struct mis_agent *agent;
	struct mis_scope *known;
	__u64 epoch, cgroup;

	if (!here || !here->agents)
		return NULL;
	epoch = here->epoch;
	cgroup = bpf_get_current_cgroup_id();
	known = bpf_task_storage_get(&scopes, bpf_get_current_task_btf(), 0,
				     BPF_LOCAL_STORAGE_GET_F_CREATE);
	*scope = known;
	if (known && known->cgroup == cgroup && known->epoch == epoch) {
		if (!known->agent)
			return NULL;
		*slot = known->slot;
		agent = bpf_map_lookup_elem(&agents, slot);
		if (agent && agent->id == known->agent)
			return agent;
	}
	if (!search(known, cgroup, epoch, slot))
		return NULL;
	return bpf_map_lookup_elem(&agents, slot);
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
