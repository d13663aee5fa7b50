/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Sockets that the agent did not make.
 *
 * The cgroup programs of net.bpf.c judge a socket by the cgroup that it was made in, and XDP sees the
 * agent's own network.  A socket from outside is judged by neither: it may lie in another network
 * namespace, and in no agent at all.  What it is connected to was chosen by who handed it over; where
 * else it might go is nobody's to choose.
 */
#ifndef MIS_FOREIGN_BPF_H
#define MIS_FOREIGN_BPF_H

#include "verdict.bpf.h"

#define AF_UNIX 1

static __noinline int judge_foreign(struct cgroup *maker, int family)
{
	struct act act = { .what = MIS_ACT_FOREIGN, .detail = family };

	return mine(&act) ? conclude(&act, is_inside(maker, act.id, act.depth)) : 0;
}

#endif
