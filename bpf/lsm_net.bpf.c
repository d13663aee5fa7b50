// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, sockets: what the cgroup and XDP programs of net.bpf.c do not see.
 *
 *   socket_create         families but unix, inet, inet6 and netlink; raw inet            refused
 *   unix_stream_connect,  a socket that somebody outside the agent made:
 *   unix_may_send           bound to a path: judged as writing to it
 *                           bound to an abstract name: refused
 *
 * connect(2) to a path asks no file hook, so without this a service's socket in a bound folder could
 * be used by an agent that may not write there.  Sockets without a name were handed over as a pair by
 * whoever had both ends, and pass.
 */
#include "policy.bpf.h"

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define AF_NETLINK 16
#define SOCK_RAW 3

SEC("lsm/socket_create")
int BPF_PROG(mis_socket_create, int family, int type, int protocol, int kernel)
{
	struct act act = { .what = MIS_ACT_SOCKET, .detail = family };
	int allowed = family == AF_UNIX || family == AF_NETLINK ||
		      ((family == AF_INET || family == AF_INET6) && type != SOCK_RAW);

	if (kernel || !mine(&act))
		return 0;
	return conclude(&act, allowed);
}

static __always_inline int reaches(struct sock *other)
{
	struct act act = { .what = MIS_ACT_UNIX, .right = MIS_WRITE };
	struct unix_sock *socket = (struct unix_sock *)other;
	struct dentry *dentry;

	if (!mine(&act))
		return 0;
	if (!BPF_CORE_READ(socket, addr) ||
	    is_inside(BPF_CORE_READ(other, sk_cgrp_data.cgroup), act.id, act.depth))
		return conclude(&act, 1);
	dentry = BPF_CORE_READ(socket, path.dentry);
	if (!dentry)
		return conclude(&act, 0);
	return judge(&act, dentry, BPF_CORE_READ(socket, path.mnt));
}

SEC("lsm/unix_stream_connect")
int BPF_PROG(mis_unix_stream_connect, struct sock *sock, struct sock *other)
{
	return reaches(other);
}

SEC("lsm/unix_may_send")
int BPF_PROG(mis_unix_may_send, struct socket *sock, struct socket *other)
{
	return reaches(BPF_CORE_READ(other, sk));
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
