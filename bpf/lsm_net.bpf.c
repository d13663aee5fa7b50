// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The kernel plane, sockets: what the cgroup and XDP programs of net.bpf.c do not see.
 *
 *   socket_create         families but unix, inet, inet6 and netlink; raw inet; netlink
 *                         but for routes                                                  refused
 *   socket_connect,       a socket that somebody outside the agent made, but UNIX         refused
 *   socket_bind,            (foreign.bpf.h; file_receive in lsm_file.bpf.c is its other half)
 *   socket_listen
 *   unix_stream_connect,  a socket that somebody outside the agent made:
 *   unix_may_send           bound to a path: judged as writing to it
 *                           bound to an abstract name: refused
 *
 * connect(2) to a path asks no file hook, so without this a service's socket in a bound folder could
 * be used by an agent that may not write there.  Sockets without a name were handed over as a pair by
 * whoever had both ends, and pass.
 */
#include "foreign.bpf.h"
#include "policy.bpf.h"

#define AF_INET 2
#define AF_INET6 10
#define AF_NETLINK 16
#define NETLINK_ROUTE 0
#define SOCK_RAW 3

static __noinline int judge_family(int family, int allowed)
{
	struct act act = { .what = MIS_ACT_SOCKET, .detail = family };

	return mine(&act) ? conclude(&act, allowed) : 0;
}

SEC("lsm/socket_create")
int BPF_PROG(mis_socket_create, int family, int type, int protocol, int kernel)
{
	int allowed = family == AF_UNIX || (family == AF_NETLINK && protocol == NETLINK_ROUTE) ||
		      ((family == AF_INET || family == AF_INET6) && type != SOCK_RAW);

	if (kernel || goes_on(allowed))
		return 0;
	return judge_family(family, allowed);
}

/* The long way to a verdict on who made a socket, and where it lies. */
static __noinline int judge_reach(struct unix_sock *socket, struct cgroup *maker)
{
	struct act act = { .what = MIS_ACT_UNIX, .right = MIS_WRITE };
	struct dentry *dentry;

	if (!mine(&act))
		return 0;
	if (!BPF_CORE_READ(socket, addr) || is_inside(maker, act.id, act.depth))
		return conclude(&act, 1);
	dentry = BPF_CORE_READ(socket, path.dentry);
	if (!dentry)
		return conclude(&act, 0);
	return judge(&act, dentry, BPF_CORE_READ(socket, path.mnt));
}

/* What is made in the cgroup of who uses it needs no look at cgroups above. */
static __always_inline int reaches(struct sock *other, struct cgroup *maker)
{
	if (goes_on(maker == current_cgroup()))
		return 0;
	return judge_reach((struct unix_sock *)other, maker);
}

SEC("lsm/unix_stream_connect")
int BPF_PROG(mis_unix_stream_connect, struct sock *sock, struct sock *other)
{
	return reaches(other, other->sk_cgrp_data.cgroup);
}

SEC("lsm/unix_may_send")
int BPF_PROG(mis_unix_may_send, struct socket *sock, struct socket *other)
{
	struct sock *to = BPF_CORE_READ(other, sk);

	return reaches(to, BPF_CORE_READ(to, sk_cgrp_data.cgroup));
}

/* A socket gets an address.  UNIX: judged by whom it reaches, and its name by the file system. */
static __always_inline int on_socket(const struct socket *socket)
{
	const struct sock *sock = socket->sk;

	if (!sock || sock->__sk_common.skc_family == AF_UNIX)
		return 0;
	if (goes_on(sock->sk_cgrp_data.cgroup == current_cgroup()))
		return 0;
	return judge_foreign(sock->sk_cgrp_data.cgroup, sock->__sk_common.skc_family);
}

SEC("lsm/socket_connect")
int BPF_PROG(mis_socket_connect, struct socket *socket)
{
	return on_socket(socket);
}

SEC("lsm/socket_bind")
int BPF_PROG(mis_socket_bind, struct socket *socket)
{
	return on_socket(socket);
}

SEC("lsm/socket_listen")
int BPF_PROG(mis_socket_listen, struct socket *socket)
{
	return on_socket(socket);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
