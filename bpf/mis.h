/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The words both sides of the kernel boundary share. mis_run/guards/net_layout.py mirrors the
 * structs of the network guard, mis_run/guards/lsm_abi.py those of the kernel plane;
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
	MIS_KILL, /* denied, and the process ended */
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
	__u32 spin; /* nanoseconds that a denied call waits */
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

/*
 * The kernel plane: lsm_*.bpf.c and mis_run/guards/lsm*.py.
 */

/* Rights of a rule. */
#define MIS_READ 1
#define MIS_WRITE 2
#define MIS_EXEC 4
#define MIS_CREATE 8 /* in a directory */
#define MIS_DELETE 16
#define MIS_LIST 32 /* read a directory */
#define MIS_ALL 63

/* mis_rule.flags */
#define MIS_WORKSPACE 1 /* writes here are no risk at a raised level */
#define MIS_EXPLICIT 2 /* named in the profile itself, not by a set or a pattern */
#define MIS_ANCHOR 4 /* a rule lies below: neither moved nor removed */
#define MIS_CANARY 8 /* what we try ourselves: counted apart while we do, see MIS_TRYING */
#define MIS_FATAL 16 /* a denial goes to level 1 at once */
#define MIS_REPEATED 32 /* of an act, no rule: mis_lsm_event.repeated */

/* mis_agent.flags */
#define MIS_ENFORCE 1
#define MIS_LOSS_OPEN 2 /* past the deadline: audit instead of deny and kill */
#define MIS_NO_WX 4 /* no memory writable and executable, at any level */
#define MIS_NO_CACHE 8 /* every act is judged by a walk: to compare */
#define MIS_TRYING 16 /* we try the canary now: it is no violation */

#define MIS_SLOTS 4096 /* agents at a time; a power of two */
#define MIS_OWN 16 /* words of mis_agent.own */

/* Rule numbers with a meaning of their own, from the top. */
#define MIS_RULE_DEFAULT 0 /* no rule named the object */
#define MIS_RULE_RAISED 0xffffffff /* the level denied */
#define MIS_RULE_LOSS 0xfffffffe /* the deadline passed */
#define MIS_RULE_ANCHOR 0xfffffffd /* a rule lies below */

/* What was tried; `what` of an event. lsm_abi.ACTS has the words. */
enum mis_act {
	MIS_ACT_OPEN,
	MIS_ACT_RECEIVE,
	MIS_ACT_MMAP,
	MIS_ACT_WX_MEMORY,
	MIS_ACT_IOCTL,
	MIS_ACT_UNLINK,
	MIS_ACT_RMDIR,
	MIS_ACT_MKDIR,
	MIS_ACT_MKNOD,
	MIS_ACT_SYMLINK,
	MIS_ACT_LINK,
	MIS_ACT_RENAME,
	MIS_ACT_TRUNCATE,
	MIS_ACT_CHMOD,
	MIS_ACT_CHOWN,
	MIS_ACT_SETATTR,
	MIS_ACT_SETXATTR,
	MIS_ACT_ACL,
	MIS_ACT_NOTIFY,
	MIS_ACT_EXEC,
	MIS_ACT_DEVICE_NODE,
	MIS_ACT_TTY,
	MIS_ACT_MOUNT,
	MIS_ACT_UMOUNT,
	MIS_ACT_REMOUNT,
	MIS_ACT_MOVE_MOUNT,
	MIS_ACT_PIVOT_ROOT,
	MIS_ACT_CHROOT,
	MIS_ACT_USERNS,
	MIS_ACT_PTRACE,
	MIS_ACT_KILL,
	MIS_ACT_SCHEDULER,
	MIS_ACT_MOVE_MEMORY,
	MIS_ACT_BPF,
	MIS_ACT_PERF,
	MIS_ACT_KERNEL_FILE,
	MIS_ACT_KERNEL_DATA,
	MIS_ACT_MODULE,
	MIS_ACT_KEY,
	MIS_ACT_URING,
	MIS_ACT_CAPABILITY,
	MIS_ACT_CLOCK,
	MIS_ACT_SYSLOG,
	MIS_ACT_QUOTA,
	MIS_ACT_LOCKDOWN,
	MIS_ACT_TUN,
	MIS_ACT_FSCONFIG,
	MIS_ACT_USERFAULTFD,
	MIS_ACT_SET_ID,
	MIS_ACT_SOCKET,
	MIS_ACT_UNIX,
	MIS_ACT_FOREIGN,
	MIS_ACTS,
};

#define MIS_MOST_ACTS 64 /* a power of two */

/* An inode with an agent's rule. `device` is the kernel's own s_dev: major << 20 | minor. */
struct mis_place {
	__u64 agent;
	__u64 inode;
	__u32 device;
	__u32 zero;
};

struct mis_rule {
	__u16 allow;
	__u16 deny; /* beats allow */
	__u32 number; /* the line of the profile, for events */
	__u32 flags;
};

/*
 * What user space says of an agent; never written by the kernel.  It is written a word of eight bytes
 * at a time, through a mapping of the map's memory, so that no reader sees half a number; a field
 * never crosses such a word.
 */
struct mis_agent {
	__u64 id; /* of its cgroup; 0: the slot is free */
	__u64 generation; /* of its rules; never used twice, by any agent */
	__u64 deadline; /* CLOCK_MONOTONIC nanoseconds; 0: none */
	__u64 decay; /* nanoseconds after which the count of violations halves; 0: never */
	__u64 capabilities; /* that may be used */
	__u32 flags;
	__u32 depth; /* of its cgroup below the root */
	__u32 thresholds[4]; /* of levels 4, 3, 2, 1 */
	/* The level at which an effect begins; 0: never. */
	__u8 writes;
	__u8 binaries;
	__u8 wx_memory;
	__u8 explicit_only;
	__u8 kill;
	__u8 level; /* set by an operator: the level is at most this */
	__u16 zero;
	__u32 spins[4]; /* nanoseconds that a denial at level 4, 3, 2 waits; the last is 0 */
	/* The bit of an inode is set: it may have a rule of its own.  Not set: it surely has none. */
	__u64 own[MIS_OWN];
};

/* What the kernel says of an agent. `lock` is a bpf_spin_lock. */
struct mis_state {
	__u32 lock;
	__u32 count; /* of violations, decaying: what the level follows from */
	__u64 last; /* when it last grew or halved */
	__u64 denied;
	__u64 audited;
	__u64 killed;
	__u64 canaries; /* denials of what MIS_CANARY marks */
	__u64 asked; /* acts on files that what is remembered did not allow */
	__u64 walks; /* from a directory to the root, to remember what they found */
	__u64 tick; /* of the machine's clock, and the time when it was first read in it */
	__u64 now;
	__u32 lost[MIS_MOST_ACTS]; /* events, by act: the ring buffer was full */
};

/* One for the machine. */
struct mis_plane {
	__u64 epoch; /* grows whenever an agent comes or goes: what is remembered of tasks is void */
	__u64 agents;
};

/*
 * Which agent the tasks of a cgroup belong to.  `sum` is over the agent, the cgroup and the epoch: what is
 * out of date, or half of it another's, does not add up.
 */
struct mis_home {
	__u64 agent; /* its id, and its slot in the lowest bits; 0: none */
	__u64 sum;
};

/* What a task remembers of its last violation: when that began to repeat, and how often it did. */
struct mis_burst {
	__u64 act;
	__u64 began;
	__u64 times;
};

#define MIS_PATH 256

struct mis_lsm_event {
	__u64 time; /* nanoseconds since boot */
	__u64 agent;
	__u64 inode;
	__u32 device;
	__u32 pid;
	__u32 thread;
	__u32 rule;
	__u32 right; /* asked for */
	__u32 detail; /* of an act: a capability, a signal, an ioctl, a lockdown reason */
	__u32 path_at; /* where in `path` it begins; MIS_PATH: there is none */
	__u8 what;
	__u8 verdict;
	__u8 level;
	__u8 repeated; /* the thread repeats itself: not counted */
	__u8 comm[16];
	__u8 path[2 * MIS_PATH]; /* the first half, filled from its end; see event.bpf.h */
};

#endif
