/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Which agent the current task belongs to.
 *
 * An agent is a cgroup and everything below.  The answer is remembered for each cgroup, and for the
 * set of agents there was (`epoch`).  A task asks with the cgroup it is in now, so fork, threads,
 * late joiners and moves need no case of their own.  In an array and not with the task: the verifier
 * inlines looking into one, and a task's storage costs as much as all the rest of a hook.
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

#define HOMES 4096 /* cgroups that are remembered at a time; a power of two */

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HOMES);
	__type(key, __u32);
	__type(value, struct mis_home);
} homes SEC(".maps");

#define ONCE(field) (*(volatile typeof(field) *)&(field))

struct nearest {
	struct cgroup *cgroup;
	__u64 agent; /* 0: none */
	__u32 slot;
	__u32 zero;
};

static __always_inline struct cgroup *current_cgroup(void)
{
	return bpf_get_current_task_btf()->cgroups->dfl_cgrp;
}

static __always_inline struct cgroup *ancestor_of(struct cgroup *cgroup, __u32 level)
{
	struct cgroup *ancestor = NULL;

	bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
			      (void *)cgroup + bpf_core_field_offset(struct cgroup, ancestors) +
				      level * sizeof(ancestor));
	return ancestor;
}

/* One step of bpf_loop along the cgroup's path from the root: the last agent met is the nearest. */
static long meet(__u32 level, struct nearest *nearest)
{
	struct cgroup *ancestor = ancestor_of(nearest->cgroup, level);
	__u64 id = BPF_CORE_READ(ancestor, kn, id);
	struct mis_agent *agent;
	__u32 *slot;

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

/* Two words are written without a lock; any two that do not belong together have another sum. */
static __always_inline __u64 sum_of(__u64 agent, __u64 cgroup, __u64 epoch)
{
	return cgroup + epoch * 0x9E3779B97F4A7C15ULL + agent * 0xC2B2AE3D27D4EB4FULL;
}

/*
 * From the root and not from below, so that an agent may nest cgroups as deep as it likes.  By the one
 * cgroup that was read, not by the task: it may be moved meanwhile, and the answer is for all in there.
 */
static __noinline __u64 search(struct mis_home *home, struct cgroup *cgroup, __u64 epoch)
{
	struct nearest nearest = { .cgroup = cgroup };
	__u32 level = cgroup->level;
	__u64 agent;

	bpf_loop(level < DEEPEST ? level + 1 : DEEPEST + 1, meet, &nearest, 0);
	agent = nearest.agent ? nearest.agent * MIS_SLOTS | (nearest.slot & (MIS_SLOTS - 1)) : 0;
	if (home && nearest.agent < 1ULL << 52) {
		ONCE(home->agent) = agent;
		ONCE(home->sum) = sum_of(agent, cgroup->kn->id, epoch);
	}
	return agent;
}

/* The agent whose id and slot are in one word, or NULL when it is gone. */
static __always_inline struct mis_agent *agent_of(__u64 word, __u32 *slot)
{
	struct mis_agent *agent;

	*slot = word & (MIS_SLOTS - 1);
	agent = bpf_map_lookup_elem(&agents, slot);
	return agent && agent->id == word / MIS_SLOTS ? agent : NULL;
}

/* The agent of the current task and its slot, or NULL. */
static __always_inline struct mis_agent *current_agent(__u32 *slot)
{
	__u32 zero = 0, index;
	struct mis_plane *here = bpf_map_lookup_elem(&plane, &zero);
	struct mis_agent *agent;
	struct mis_home *home;
	struct cgroup *cgroup;
	__u64 epoch, id, found;

	if (!here || !here->agents)
		return NULL;
	epoch = ONCE(here->epoch);
	cgroup = current_cgroup();
	id = cgroup->kn->id;
	index = id & (HOMES - 1);
	home = bpf_map_lookup_elem(&homes, &index);
	if (home) {
		found = ONCE(home->agent);
		if (ONCE(home->sum) == sum_of(found, id, epoch)) {
			if (!found)
				return NULL;
			agent = agent_of(found, slot);
			if (agent)
				return agent;
		}
	}
	found = search(home, cgroup, epoch);
	return found ? agent_of(found, slot) : NULL;
}

/* Whether a cgroup is the agent's or below, by its path from the root. */
static __always_inline int is_inside(struct cgroup *cgroup, __u64 id, __u32 depth)
{
	struct cgroup *ancestor;

	if (BPF_CORE_READ(cgroup, level) < (int)depth)
		return 0;
	ancestor = ancestor_of(cgroup, depth);
	return BPF_CORE_READ(ancestor, kn, id) == id;
}

/* Whether another task belongs to the agent, whatever it remembers. */
static __always_inline int belongs(const struct task_struct *task, __u64 id, __u32 depth)
{
	return is_inside(BPF_CORE_READ(task, cgroups, dfl_cgrp), id, depth);
}

#endif
