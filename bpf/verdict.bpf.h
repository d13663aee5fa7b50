/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * From an act to the hook's return value: mode, deadline, level, count, event.  The only place that
 * knows about them; a hook says what is done, and whether the policy allows it.
 *
 * An earlier refusal needs no thought: the trampoline calls no further program after one that
 * returned an error.
 */
#ifndef MIS_VERDICT_BPF_H
#define MIS_VERDICT_BPF_H

#include "event.bpf.h"

/* mis_state as the verifier must see it. */
struct state {
	struct bpf_spin_lock lock;
	__u32 count;
	__u64 last;
	__u64 denied;
	__u64 audited;
	__u64 killed;
	__u64 canaries;
	__u64 asked;
	__u64 walks;
	__u64 tick;
	__u64 now;
	__u32 lost[MIS_MOST_ACTS];
};

_Static_assert(sizeof(struct state) == sizeof(struct mis_state), "see mis.h");
_Static_assert(MIS_ACTS <= MIS_MOST_ACTS, "each has its count");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY); /* by slot */
	__uint(max_entries, MIS_SLOTS);
	__type(key, __u32);
	__type(value, struct state);
} states SEC(".maps");

/*
 * One act on its way to a verdict.  Functions that are not static are verified once for a program
 * and not once for each call; they see this as bytes, so it holds a copy of what counts of the
 * agent's settings, has no padding, and may be NULL as far as the verifier knows.
 */
struct act {
	__u64 id;
	struct dentry *dentry; /* what it is about; NULL: no file */
	struct mount *mount; /* NULL: not known */
	struct dentry *into; /* directory that `dentry` gets a place in */
	__u64 capabilities; /* this and the next seven: of struct mis_agent */
	__u32 flags;
	__u32 depth;
	__u8 writes;
	__u8 binaries;
	__u8 wx_memory;
	__u8 explicit_only;
	__u8 kill;
	__u8 level; /* DEFCON */
	__u8 late; /* past the deadline */
	__u8 quiet; /* refused, but nothing to count or tell */
	__u32 right;
	__u32 rule;
	__u32 detail;
	__u32 what;
	__u32 marks; /* MIS_CANARY, MIS_FATAL: of the rules that refused; MIS_REPEATED */
	__u32 slot;
};

static __always_inline __u32 decayed(const struct state *state, const struct mis_agent *agent,
				     __u64 now)
{
	__u64 halvings = agent->decay && now > state->last ? (now - state->last) / agent->decay : 0;

	return halvings > 31 ? 0 : state->count >> halvings;
}

static __always_inline __u8 level_at(__u32 count, const struct mis_agent *agent)
{
	__u8 level = 5 - (count >= agent->thresholds[0]) - (count >= agent->thresholds[1]) -
		     (count >= agent->thresholds[2]) - (count >= agent->thresholds[3]);

	return level < agent->level ? level : agent->level;
}

/* Level 1 is an end: what is being killed does not recover. */
static __noinline __u8 level_of(const struct state *state, const struct mis_agent *agent,
				     __u64 now)
{
	if (state->count >= agent->thresholds[3])
		return 1;
	return level_at(decayed(state, agent, now), agent);
}

/* Whether an effect that begins at level `begins` is in force. */
#define in_force(act, begins) ((act)->level <= (act)->begins)

/*
 * CLOCK_MONOTONIC, read once a tick and agent: at most ten milliseconds old, and no deadline, decay or
 * lifetime is that exact.  Jiffies are one load, the clock is a hundred instructions.
 */
static __always_inline __u64 clock_of(struct state *state)
{
	__u64 tick = bpf_jiffies64();

	if (ONCE(state->tick) != tick) {
		ONCE(state->now) = bpf_ktime_get_ns();
		ONCE(state->tick) = tick;
	}
	return ONCE(state->now);
}

/* The current task's agent, and how it stands. */
struct self {
	struct mis_agent *agent;
	struct state *state;
};

static __always_inline int is_agent(struct self *self)
{
	__u32 slot = 0;

	self->agent = current_agent(&slot);
	if (!self->agent)
		return 0;
	self->state = bpf_map_lookup_elem(&states, &slot);
	return 1;
}

/*
 * Whether what the policy allows may go on without more ado: the agent is alive, and not to be
 * killed.  If not, or the policy does not allow it, the act goes the long way (`mine`, `refused`).
 */
static __always_inline int is_calm(const struct self *self, __u32 *level, __u64 *now)
{
	struct mis_agent *agent = self->agent;
	struct state *state = self->state;

	if (!state)
		return 0;
	*now = clock_of(state);
	if (agent->deadline && *now > agent->deadline)
		return 0;
	/* Thresholds rise: below the first there is nothing to decay. */
	if (state->count < agent->thresholds[0])
		*level = agent->level < 5 ? agent->level : 5;
	else
		*level = level_of(state, agent, *now);
	return *level > agent->kill;
}

/* Whether an act needs no more thought: nobody judges it, or it is allowed and its agent calm. */
static __always_inline int goes_on(int allowed)
{
	struct self self;
	__u32 level;
	__u64 now;

	return !is_agent(&self) || (allowed && is_calm(&self, &level, &now));
}

/* Begin of the long way: whether the current task belongs to an agent, and how that agent stands. */
__noinline int mine(struct act *act)
{
	struct mis_agent *agent;
	struct state *state;
	__u32 slot = 0;
	__u64 now;

	if (!act)
		return 0;
	agent = current_agent(&slot);
	if (!agent)
		return 0;
	state = bpf_map_lookup_elem(&states, &slot);
	now = state ? clock_of(state) : bpf_ktime_get_ns();
	act->id = agent->id;
	act->slot = slot;
	act->capabilities = agent->capabilities;
	act->flags = agent->flags;
	act->depth = agent->depth;
	act->writes = agent->writes;
	act->binaries = agent->binaries;
	act->wx_memory = agent->wx_memory;
	act->explicit_only = agent->explicit_only;
	act->kill = agent->kill;
	act->level = state ? level_of(state, agent, now) : 5;
	act->late = agent->deadline && now > agent->deadline;
	return 1;
}

/* Whether there was room for the event. */
__noinline int tell(struct act *act, __u32 verdict)
{
	struct mis_lsm_event *event;
	struct dentry *dentry;
	__u64 id;
	void *ring;

	if (!act)
		return 0;
	id = act->id;
	dentry = act->dentry;
	ring = bpf_map_lookup_elem(&rings, &id);
	if (!ring)
		return 0;
	event = bpf_ringbuf_reserve(ring, sizeof(*event), 0);
	if (!event)
		return 0;
	event->time = bpf_ktime_get_boot_ns();
	event->agent = act->id;
	event->inode = dentry ? BPF_CORE_READ(dentry, d_inode, i_ino) : 0;
	event->device = dentry ? BPF_CORE_READ(dentry, d_sb, s_dev) : 0;
	event->pid = bpf_get_current_pid_tgid() >> 32; /* asked twice: there is no stack left to keep it */
	event->thread = bpf_get_current_pid_tgid();
	event->rule = act->rule;
	event->right = act->right;
	event->detail = act->detail;
	event->what = act->what;
	event->verdict = verdict;
	event->level = act->level;
	event->repeated = act->marks & MIS_REPEATED ? 1 : 0;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	event->path_at = MIS_PATH;
	if (dentry)
		write_path(event, dentry, act->mount);
	bpf_ringbuf_submit(event, 0);
	return 1;
}

/*
 * Whether the task repeats its last violation: a library tries a few times, a loop is an attack.
 * defcon.py counts by the same rule; it also knows acts that take turns.
 */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mis_burst);
} bursts SEC(".maps");

#define BURST 10000000ULL /* nanoseconds, defcon.BURST */
#define RETRIES 3 /* defcon.RETRIES */

__noinline int is_retry(struct act *act)
{
	struct mis_burst *burst = bpf_task_storage_get(&bursts, bpf_get_current_task_btf(), 0,
						       BPF_LOCAL_STORAGE_GET_F_CREATE);
	struct dentry *dentry;
	__u64 key, now = bpf_ktime_get_ns();

	if (!act || !burst || act->marks & MIS_FATAL)
		return 0;
	dentry = act->dentry;
	key = ((__u64)act->what << 48) + ((__u64)act->detail << 16) + act->right + 1;
	if (dentry)
		key ^= (__u64)dentry ^ BPF_CORE_READ(dentry, d_inode, i_ino) << 20;
	if (burst->act != key || now - burst->began >= BURST) {
		burst->act = key;
		burst->began = now;
		burst->times = 0;
		return 0;
	}
	return ++burst->times <= RETRIES;
}

/* Count a violation; the level that follows is the act's own. */
static __always_inline void count(struct act *act, struct state *state,
				  const struct mis_agent *agent)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 added = !is_retry(act), least = act->marks & MIS_FATAL ? agent->thresholds[3] : 0;

	bpf_spin_lock(&state->lock);
	if (state->count < agent->thresholds[3])
		state->count = decayed(state, agent, now);
	state->count += added;
	if (state->count < least)
		state->count = least;
	if (added)
		state->last = now;
	bpf_spin_unlock(&state->lock);
	if (!added)
		act->marks |= MIS_REPEATED;
	act->level = level_of(state, agent, now);
}

/* A turn takes some ten nanoseconds or more, and a wait at most defcon.SPIN. */
#define TURNS 32768

static long is_over(__u32 turn, const __u64 *end)
{
	(void)turn;
	return bpf_ktime_get_ns() >= *end;
}

/*
 * The denial is late as its level says.  Active, since nobody may sleep here, and so short: for the
 * rest of a longer delay user space freezes the agent, which this gives it the time to do.
 */
static __always_inline void be_late(const struct mis_agent *agent, __u32 level)
{
	__u32 spin = level < 5 ? agent->spins[(4 - level) & 3] : 0;
	__u64 end;

	if (!spin)
		return;
	end = bpf_ktime_get_ns() + spin;
	bpf_loop(TURNS, is_over, &end, 0);
}

/* Whether an act is refused, with all that follows when the policy does not allow it. */
__noinline int refused(struct act *act, int allowed)
{
	struct mis_agent *agent;
	struct state *state;
	int enforce, dead = 0;
	__u32 slot;

	if (!act)
		return 1;
	enforce = act->flags & MIS_ENFORCE;
	if (act->late && act->flags & MIS_LOSS_OPEN) {
		enforce = 0;
	} else if (act->late) {
		act->rule = MIS_RULE_LOSS;
		enforce = dead = 1;
	} else if (enforce && in_force(act, kill)) {
		act->rule = MIS_RULE_RAISED;
		dead = 1;
	}
	if (!dead && (allowed || act->quiet))
		return !allowed && enforce;
	slot = act->slot;
	agent = bpf_map_lookup_elem(&agents, &slot);
	state = bpf_map_lookup_elem(&states, &slot);
	if (!agent || !state || agent->id != act->id) /* being removed: its tasks are gone, or should be */
		return 1;
	if (!dead && act->marks & MIS_CANARY && act->flags & MIS_TRYING) {
		__sync_fetch_and_add(&state->canaries, 1);
		return enforce != 0;
	}
	if (!dead) {
		count(act, state, agent);
		dead = enforce && in_force(act, kill);
	}
	if (dead) {
		__sync_fetch_and_add(&state->killed, 1);
		bpf_send_signal(SIGKILL);
	} else if (enforce) {
		__sync_fetch_and_add(&state->denied, 1);
	} else {
		__sync_fetch_and_add(&state->audited, 1);
	}
	if (!tell(act, dead ? MIS_KILL : enforce ? MIS_DENY : MIS_AUDIT))
		__sync_fetch_and_add(&state->lost[act->what & (MIS_MOST_ACTS - 1)], 1);
	if (enforce && !dead)
		be_late(agent, act->level);
	return enforce != 0;
}

/* A hook's return value.  Opaque to the compiler, which would compute what the verifier must see. */
static __always_inline int error_of(int refused, int error)
{
	if (!refused)
		return 0;
	asm volatile("" : "+r"(error));
	return error;
}

static __always_inline int conclude(struct act *act, int allowed)
{
	int no = refused(act, allowed);

	return error_of(no, act->quiet && act->rule == MIS_RULE_RAISED ? -EROFS : -EPERM);
}

#endif
