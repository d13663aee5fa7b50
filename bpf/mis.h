/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The words both sides of the kernel boundary share. mis_run/guards/net_layout.py mirrors them;
 * tests/kernel/test_abi.py compares them with the BTF of abi.bpf.o.
 */
#ifndef MIS_H
#define MIS_H

#define MIS_PORTS 16 /* table.MOST_PORTS */

/* Bits of mis_port.protocols. */
#define MIS_TCP 1
#define MIS_UDP 2

/* Indices of the counters, and `hook` of an event. */
enum mis_hook {
	MIS_CONNECT4,
	MIS_CONNECT6,
	MIS_SENDMSG4,
	MIS_SENDMSG6,
	MIS_BIND4,
	MIS_BIND6,
	MIS_SOCKET,
	MIS_PACKET4,
	MIS_PACKET6,
	MIS_PACKET_OTHER, /* not IP, or IP we do not read: always dropped */
	MIS_EGRESS, /* a packet that may go elsewhere than it was judged for */
	MIS_INGRESS, /* a caller of a listener that no rule allows */
	MIS_HOOKS,
};

enum mis_verdict {
	MIS_ALLOW,
	MIS_DENY,
	MIS_AUDIT,
};

/* An address in the trie; IPv4 as ::ffff:a.b.c.d, so that both spellings meet one entry. */
struct mis_key {
	__u32 length; /* bits of the prefix, 0 to 128 */
	__u8 address[16];
};

struct mis_port {
	__u16 low;
	__u16 high;
	__u16 protocols;
	__u16 rule;
};

struct mis_entry {
	__u32 count; /* ports in use */
	__u32 reason; /* rule to name in a denial */
	struct mis_port ports[MIS_PORTS];
};

struct mis_settings {
	__u8 source[16]; /* the agent's own address, IPv4 mapped; XDP drops others */
	__u8 source6[16];
	__u32 enforce; /* 0: audit, nothing is denied but canaries */
	__u32 level; /* DEFCON; at 3 and below only destinations used before */
	__u32 unlisted; /* rule to name where the trie has no entry */
	__u32 raised; /* rule to name where the level denied */
};

struct mis_counter {
	__u64 allowed;
	__u64 denied;
	__u64 audited;
	__u64 allowed_bytes;
	__u64 denied_bytes;
	__u64 suppressed; /* events not sent: the same destination within a second */
	__u64 lost; /* events not sent: the ring buffer was full */
};

struct mis_net_event {
	__u64 time; /* nanoseconds since boot */
	__u32 pid; /* 0 for packets */
	__u32 uid;
	__u8 comm[16];
	__u8 address[16];
	__u16 port;
	__u16 rule;
	__u8 hook;
	__u8 verdict;
	__u16 family; /* AF_*; for MIS_SOCKET the family asked for */
	__u32 type; /* SOCK_*, for MIS_SOCKET only */
	__u32 protocol; /* IPPROTO_*; for MIS_SOCKET the protocol asked for */
};

#endif
