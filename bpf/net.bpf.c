// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/*
 * The network guard of one agent: the same rules at two places.
 *
 *   hook                     when                                   denies by
 *   cgroup/connect4,6        connect(2) and TCP Fast Open           EPERM
 *   cgroup/sendmsg4,6        sendto(2), sendmsg(2) of UDP           EPERM
 *   cgroup/bind4,6           bind(2)                                EPERM
 *   cgroup/sock_create       socket(2) of AF_INET, AF_INET6         EPERM
 *   cgroup_skb/egress        every packet of the agent's sockets    EPERM, drop
 *   cgroup_skb/ingress       every packet to the agent's sockets    drop
 *   xdp                      every frame the agent's veth emits     drop
 *
 * The cgroup programs see who asks and make the events; XDP sees what really goes out, so a packet
 * that came around the socket calls meets the same table.
 *
 * The skb hooks close what the calls leave open, above all where there is no veth (host mode).
 * Egress refuses packets with IP options or a routing header: they are sent to their first hop and
 * not to the address that was judged, however the agent asked for them (setsockopt, ancillary
 * data).  Ingress refuses callers of a socket that listens where no rule allows: listen(2) on a
 * socket that is unbound, or bound to port 0, meets no hook of its own.
 *
 * Maps belong to this one agent: programs attached to its cgroup run for nobody else, and the XDP
 * program only on its veth.
 *
 * Other socket families (packet, vsock, netlink) never come here: seccomp refuses them.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "mis.h"

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define QUIET_NS 1000000000ULL /* between two events of XDP for one destination */
#define CANARY4 0xc0000008 /* 192.0.0.8; with 100::1 these are rules.CANARIES */
#define CANARY_OUT 0x7fc00008 /* 127.192.0.8: refused by egress */
#define CANARY_IN 0x7fc00009 /* 127.192.0.9: refused by ingress */
#define IP_FRAGMENT 0x3fff /* more-fragments bit and offset, network order below */

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mis_key);
	__type(value, struct mis_entry);
} rules SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mis_key);
	__type(value, struct mis_entry);
} listen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mis_settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MIS_HOOKS);
	__type(key, __u32);
	__type(value, struct mis_counter);
} counters SEC(".maps");

struct destination {
	__u8 address[16];
	__u16 port;
	__u16 protocol;
};

/* Destinations that were allowed once: what "new" means from DEFCON 3 on. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct destination);
	__type(value, __u64);
} seen SEC(".maps");

/* When XDP last made an event for a destination. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct destination);
	__type(value, __u64);
} quiet SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} events SEC(".maps");

/* As many elements as turns of `be_late`: a loop for kernels before 5.17, which have no bpf_loop. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 8192);
	__type(key, __u32);
	__type(value, __u32);
} turns SEC(".maps");

/* One act on its way to a verdict. */
struct act {
	struct destination to; /* port in host order */
	enum mis_hook hook;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 rule;
	__u32 bytes;
};

static __always_inline struct mis_settings *configured(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}

static __always_inline void map4(__u8 *address, __be32 ip4)
{
	__builtin_memset(address, 0, 10);
	address[10] = 0xff;
	address[11] = 0xff;
	__builtin_memcpy(address + 12, &ip4, 4);
}

static __always_inline int same(const __u8 *one, const __u8 *other)
{
	const __u64 *a = (const __u64 *)one, *b = (const __u64 *)other;

	return a[0] == b[0] && a[1] == b[1];
}

/* Keep a value out of the compiler's sight, so that it makes no branch of it. */
#define opaque(value) asm volatile("" : "+r"(value))

/* 1 for 0, 0 for any other 32-bit value, without a branch. */
static __always_inline __u64 zero(__u64 value)
{
	opaque(value);
	return (value - 1) >> 63;
}

/* Without a branch, as `allowed_by`: every packet and call is judged behind this. */
static __always_inline int is_canary(const __u8 *address)
{
	const __u32 *word = (const __u32 *)address;
	__u64 mapped = zero(word[0] | word[1] | (word[2] ^ bpf_htonl(0xffff)));
	__u64 four = zero(word[3] ^ bpf_htonl(CANARY4)) | zero(word[3] ^ bpf_htonl(CANARY_OUT)) |
		     zero(word[3] ^ bpf_htonl(CANARY_IN));
	__u64 six = zero((word[0] ^ bpf_htonl(0x01000000)) | word[1] | word[2] |
			 (word[3] ^ bpf_htonl(1))); /* 100::1 */

	return (mapped & four) | six;
}

static __always_inline void tell(const struct act *act, enum mis_verdict verdict, int packet,
				 struct mis_counter *counter)
{
	struct mis_net_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event) {
		if (counter)
			counter->lost++;
		return;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time = bpf_ktime_get_boot_ns();
	__builtin_memcpy(event->address, act->to.address, 16);
	event->port = act->to.port;
	event->rule = act->rule;
	event->hook = act->hook;
	event->verdict = verdict;
	event->protocol = act->protocol;
	event->family = act->family;
	event->type = act->type;
	if (!packet) {
		event->pid = bpf_get_current_pid_tgid() >> 32;
		event->uid = bpf_get_current_uid_gid();
		bpf_get_current_comm(event->comm, sizeof(event->comm));
	}
	bpf_ringbuf_submit(event, 0);
}

/*
 * The same destination within a second: count, do not tell.  A listener is told once only: it is
 * one act of the agent, however often strangers knock.
 */
static __always_inline int told_lately(const struct destination *to, enum mis_hook hook)
{
	__u64 now = bpf_ktime_get_ns(), *last = bpf_map_lookup_elem(&quiet, to);

	if (last && (hook == MIS_INGRESS || now - *last < QUIET_NS))
		return 1;
	bpf_map_update_elem(&quiet, to, &now, BPF_ANY);
	return 0;
}

static long is_over(void *map, __u32 *key, __u32 *value, __u64 *end)
{
	(void)map;
	(void)key;
	(void)value;
	return bpf_ktime_get_ns() >= *end;
}

/*
 * A denied call waits as its level says, actively: nobody may sleep here, so it is short
 * (defcon.SPIN), and the supervisor, which has been told, freezes the agent for the rest.
 */
static __always_inline void be_late(const struct mis_settings *set)
{
	__u64 end = bpf_ktime_get_ns() + set->spin;

	if (set->spin)
		bpf_for_each_map_elem(&turns, is_over, &end, 0);
}

/* Count, tell, and say whether the act may go on. */
static __always_inline int conclude(const struct act *act, int allowed, int packet)
{
	struct mis_settings *set = configured();
	__u32 hook = act->hook;
	struct mis_counter *counter = bpf_map_lookup_elem(&counters, &hook);
	int audit = set && !set->enforce && !is_canary(act->to.address);
	int pass = allowed || audit;

	if (counter) {
		if (allowed)
			counter->allowed++;
		else if (audit)
			counter->audited++;
		else
			counter->denied++;
		if (pass)
			counter->allowed_bytes += act->bytes;
		else
			counter->denied_bytes += act->bytes;
	}
	if (allowed)
		return 1;
	/* The agent's own kernel sends these unasked (ARP, MLD with its hop-by-hop header, IGMP). */
	if (packet && (hook == MIS_PACKET_OTHER || act->protocol == IPPROTO_ICMPV6 ||
		       act->protocol == IPPROTO_HOPOPTS || act->protocol == IPPROTO_IGMP))
		return pass;
	if (packet && told_lately(&act->to, hook)) {
		if (counter)
			counter->suppressed++;
		return pass;
	}
	tell(act, pass ? MIS_AUDIT : MIS_DENY, packet, counter);
	if (set && !pass && !packet)
		be_late(set);
	return pass;
}

/*
 * Whether the table allows the act; names the deciding rule in it.
 *
 * Without a branch inside the loop: the verifier walks every path, and sixteen comparisons in a
 * row are one path this way (loading all programs: 8 ms instead of 25). Unused ports have no
 * protocols and match nothing.
 */
static __always_inline int allowed_by(void *table, struct act *act)
{
	struct mis_key key = { .length = 128 };
	struct mis_settings *set = configured();
	struct mis_entry *entry;
	__u64 hit = 0, rule;
	__u64 shift = act->protocol == IPPROTO_TCP ? 0 : act->protocol == IPPROTO_UDP ? 1 : 2;
	__u64 wanted = act->to.port;

	if (!set)
		return 0;
	act->rule = set->unlisted;
	__builtin_memcpy(key.address, act->to.address, 16);
	entry = bpf_map_lookup_elem(table, &key);
	if (!entry)
		return 0;
	rule = entry->reason;
	opaque(wanted);
	opaque(shift);
#pragma unroll
	for (int n = 0; n < MIS_PORTS; n++) {
		__u64 low = entry->ports[n].low, high = entry->ports[n].high;
		__u64 has = (entry->ports[n].protocols >> shift) & 1;
		/* Bit 63 of a difference is its sign: 1 where low <= wanted and wanted <= high. */
		__u64 in = ~((wanted - low) | (high - wanted)) >> 63;
		__u64 now = in & has, mask;

		opaque(now);
		mask = -now;
		rule = (rule & ~mask) | (entry->ports[n].rule & mask);
		hit |= now;
	}
	act->rule = rule;
	return hit != 0;
}

static __always_inline int destination_allowed(struct act *act)
{
	struct mis_settings *set = configured();
	__u64 now;

	act->to.protocol = act->protocol;
	if (!allowed_by(&rules, act))
		return 0;
	if (set && set->level <= 3 && !bpf_map_lookup_elem(&seen, &act->to)) {
		act->rule = set->raised;
		return 0;
	}
	now = bpf_ktime_get_ns();
	bpf_map_update_elem(&seen, &act->to, &now, BPF_ANY);
	return 1;
}

static __always_inline void address_of(struct bpf_sock_addr *ctx, struct act *act)
{
	if (act->family == AF_INET) {
		map4(act->to.address, ctx->user_ip4);
	} else {
		__u32 *word = (__u32 *)act->to.address;

		word[0] = ctx->user_ip6[0];
		word[1] = ctx->user_ip6[1];
		word[2] = ctx->user_ip6[2];
		word[3] = ctx->user_ip6[3];
	}
	act->to.port = bpf_ntohs(ctx->user_port);
	act->protocol = ctx->protocol;
	act->type = ctx->type;
}

static __always_inline int goes_out(struct bpf_sock_addr *ctx, enum mis_hook hook, __u32 family)
{
	struct act act = { .hook = hook, .family = family };

	address_of(ctx, &act);
	return conclude(&act, destination_allowed(&act), 0);
}

/* As goes_out, of a message that may have no address: then it goes to the socket's peer. */
static __always_inline int sends(struct bpf_sock_addr *ctx, enum mis_hook hook, __u32 family)
{
	struct act act = { .hook = hook, .family = family };
	struct bpf_sock *sk = ctx->sk;

	address_of(ctx, &act);
	/*
	 * Ancillary data brings a connected socket here, without an address.  The port tells it: with
	 * an address, port 0 is EINVAL before this.  The family does not: udp_sendmsg goes where an
	 * address of AF_UNSPEC says.
	 */
	if (act.to.port == 0 && sk) {
		if (family == AF_INET) {
			map4(act.to.address, sk->dst_ip4);
		} else {
			__u32 *word = (__u32 *)act.to.address;

			word[0] = sk->dst_ip6[0];
			word[1] = sk->dst_ip6[1];
			word[2] = sk->dst_ip6[2];
			word[3] = sk->dst_ip6[3];
		}
		act.to.port = bpf_ntohs(sk->dst_port);
	}
	return conclude(&act, destination_allowed(&act), 0);
}

static __always_inline int listens(struct bpf_sock_addr *ctx, enum mis_hook hook, __u32 family)
{
	struct act act = { .hook = hook, .family = family };

	address_of(ctx, &act);
	/* Port 0 is a client's: the kernel picks one, and what it sends is judged when sent. */
	if (act.to.port == 0 && !is_canary(act.to.address))
		return 1;
	return conclude(&act, allowed_by(&listen, &act), 0);
}

SEC("cgroup/connect4")
int mis_connect4(struct bpf_sock_addr *ctx)
{
	return goes_out(ctx, MIS_CONNECT4, AF_INET);
}

SEC("cgroup/connect6")
int mis_connect6(struct bpf_sock_addr *ctx)
{
	return goes_out(ctx, MIS_CONNECT6, AF_INET6);
}

SEC("cgroup/sendmsg4")
int mis_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sends(ctx, MIS_SENDMSG4, AF_INET);
}

SEC("cgroup/sendmsg6")
int mis_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sends(ctx, MIS_SENDMSG6, AF_INET6);
}

SEC("cgroup/bind4")
int mis_bind4(struct bpf_sock_addr *ctx)
{
	return listens(ctx, MIS_BIND4, AF_INET);
}

SEC("cgroup/bind6")
int mis_bind6(struct bpf_sock_addr *ctx)
{
	return listens(ctx, MIS_BIND6, AF_INET6);
}

SEC("cgroup/sock_create")
int mis_socket(struct bpf_sock *ctx)
{
	struct mis_settings *set = configured();
	struct act act = {
		.hook = MIS_SOCKET,
		.family = ctx->family,
		.type = ctx->type,
		.protocol = ctx->protocol,
		.rule = set ? set->unlisted : 0,
	};
	int good = (ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP) ||
		   (ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP);

	return conclude(&act, good, 0);
}

/*
 * Packets of the agent's sockets. ctx begins with the network header.
 */

/* Reads both addresses; whether the packet goes where it says: no options, no routing header. */
static __always_inline int straight(struct __sk_buff *ctx, struct act *act, __u8 *from)
{
	struct iphdr four;
	struct ipv6hdr six;
	__u8 next;

	act->bytes = ctx->len;
	if (bpf_skb_load_bytes(ctx, 0, &four, sizeof(four)))
		return 0;
	act->protocol = four.protocol;
	if (four.version == 4) {
		act->family = AF_INET;
		map4(act->to.address, four.daddr);
		map4(from, four.saddr);
		return four.ihl == 5;
	}
	if (four.version != 6 || bpf_skb_load_bytes(ctx, 0, &six, sizeof(six)))
		return 0;
	act->family = AF_INET6;
	__builtin_memcpy(act->to.address, &six.daddr, 16);
	__builtin_memcpy(from, &six.saddr, 16);
	next = six.nexthdr;
	/* The kernel's own for packets above 64 KiB (BIG TCP): one hop-by-hop header. */
	if (next == IPPROTO_HOPOPTS && bpf_skb_load_bytes(ctx, sizeof(six), &next, 1))
		return 0;
	act->protocol = next;
	return next == IPPROTO_TCP || next == IPPROTO_UDP || next == IPPROTO_ICMPV6;
}

static __always_inline int is4(const __u8 *address, __u32 ip4)
{
	__u8 other[16];

	map4(other, bpf_htonl(ip4));
	return same(address, other);
}

/* What no rule is about; the settings are looked up only here, not for each packet. */
static __always_inline int refuse(struct act *act)
{
	struct mis_settings *set = configured();

	act->rule = set ? set->unlisted : 0;
	act->to.protocol = act->protocol;
	return conclude(act, 0, 1);
}

SEC("cgroup_skb/egress")
int mis_egress(struct __sk_buff *ctx)
{
	struct act act = { .hook = MIS_EGRESS };
	__u8 from[16] = {};

	if (straight(ctx, &act, from) && !is4(act.to.address, CANARY_OUT))
		return 1;
	return refuse(&act);
}

SEC("cgroup_skb/ingress")
int mis_ingress(struct __sk_buff *ctx)
{
	struct act act = { .hook = MIS_INGRESS };
	struct bpf_sock *sk = ctx->sk;
	__u8 from[16] = {};

	if (!sk)
		return 1;
	straight(ctx, &act, from);
	if (is4(from, CANARY_IN)) {
		__builtin_memcpy(act.to.address, from, 16);
		return refuse(&act);
	}
	if (sk->state != BPF_TCP_LISTEN)
		return 1;
	act.protocol = IPPROTO_TCP; /* whatever headers the caller put before it */
	act.to.port = sk->src_port;
	return allowed_by(&listen, &act) || refuse(&act);
}

/*
 * XDP on our end of the agent's veth: its egress is our ingress.
 */

static __always_inline int packet_verdict(struct act *act, int good)
{
	return conclude(act, good, 1) ? XDP_PASS : XDP_DROP;
}

/* Dropped in every mode, and counted: what cannot be read cannot be judged. */
static __always_inline int unreadable(struct act *act)
{
	conclude(act, 0, 1);
	return XDP_DROP;
}

/* TCP or UDP at `cursor`, to act->to.address; anything else is not allowed. */
static __always_inline int transport(struct act *act, void *cursor, void *end)
{
	struct udphdr *ports = cursor; /* TCP begins with the same two ports */

	if (act->protocol != IPPROTO_TCP && act->protocol != IPPROTO_UDP)
		return 0;
	if ((void *)(ports + 1) > end)
		return 0;
	act->to.port = bpf_ntohs(ports->dest);
	return destination_allowed(act);
}

static __always_inline int packet4(void *cursor, void *end, struct act *act)
{
	struct mis_settings *set = configured();
	struct iphdr *ip = cursor;
	__u8 from[16];
	int good;

	if ((void *)(ip + 1) > end || !set)
		return unreadable(act);
	act->hook = MIS_PACKET4;
	act->family = AF_INET;
	act->protocol = ip->protocol;
	act->rule = set->unlisted;
	map4(act->to.address, ip->daddr);
	map4(from, ip->saddr);
	/* No options and no fragments: a later fragment has no ports to judge. */
	good = ip->version == 4 && ip->ihl == 5 && !(ip->frag_off & bpf_htons(IP_FRAGMENT)) &&
	       same(from, set->source) && transport(act, ip + 1, end);
	return packet_verdict(act, good);
}

static __always_inline int packet6(void *cursor, void *end, struct act *act)
{
	struct mis_settings *set = configured();
	struct ipv6hdr *ip = cursor;
	__u8 from[16];
	int good;

	if ((void *)(ip + 1) > end || !set)
		return unreadable(act);
	act->hook = MIS_PACKET6;
	act->family = AF_INET6;
	act->protocol = ip->nexthdr; /* an extension header is not TCP or UDP: dropped */
	act->rule = set->unlisted;
	__builtin_memcpy(act->to.address, &ip->daddr, 16);
	__builtin_memcpy(from, &ip->saddr, 16);
	good = ip->version == 6 && same(from, set->source6) && transport(act, ip + 1, end);
	return packet_verdict(act, good);
}

SEC("xdp")
int mis_xdp(struct xdp_md *ctx)
{
	void *cursor = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = cursor;
	struct act act = { .hook = MIS_PACKET_OTHER, .bytes = ctx->data_end - ctx->data };

	if ((void *)(ethernet + 1) > end)
		return unreadable(&act);
	if (ethernet->h_proto == bpf_htons(ETH_P_IP))
		return packet4(ethernet + 1, end, &act);
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6))
		return packet6(ethernet + 1, end, &act);
	/* ARP included: both ends have permanent neighbour entries. */
	return unreadable(&act);
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
