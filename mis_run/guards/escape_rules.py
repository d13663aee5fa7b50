"""Which calls the escape guard sees, and its verdict on each: pure data and pure functions.

Two halves that agree (tests/unit/test_escape_rules.py proves it on the compiled filter):
`notify_rules` is what the kernel's filter does, `judge` what we answer to the calls it hands over.
The filter *allows* only what is good; everything else it hands over or, should no rule match,
refuses.  Both look at argument registers only.  docs/decisions/escape-guard.md has the reasons.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from stat import S_ISGID, S_ISUID

from mis_run.dataclass import dataclass, field
from mis_run.defcon import CALM, Effects
from mis_run.hints import Any
from mis_run.linux import abi

Args = tuple[int, int, int, int, int, int]
Rule = dict[str, Any]

DENIED = """
    mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr
    pivot_root chroot setns
    ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd
    bpf perf_event_open userfaultfd fanotify_init lookup_dcookie
    add_key request_key keyctl
    init_module finit_module delete_module kexec_load kexec_file_load
    io_uring_enter io_uring_register
    swapon swapoff reboot syslog acct quotactl quotactl_fd nfsservctl vhangup
    settimeofday clock_settime sethostname setdomainname iopl ioperm
    name_to_handle_at open_by_handle_at
""".split()
"""Denied whatever their arguments, with EPERM: what an unprivileged caller gets from the kernel."""

ABSENT = ("io_uring_setup",)
"""Answered ENOSYS, as on a kernel without them, and not a violation: libuv (so every node) tries
io_uring when a loop starts and carries on without it.  `io_uring_enter` and `io_uring_register`
have no honest use without a ring and are denied as violations."""

# linux/sched.h. CLONE_NEWTIME is a signal number to clone(2) and a flag only to unshare(2).
NAMESPACES: Mapping[str, int] = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
NEWTIME = 0x00000080
PER_HARMLESS = frozenset({0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF})
"""personality(2) as moby allows it: Linux, Linux32, UNAME26, both, and asking."""
FILTER_NEW_LISTENER = 0x8
MFD_NOEXEC_SEAL, MFD_EXEC = 0x8, 0x10
PROT_WX = 0x2 | 0x4
SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_TYPE = 1, 2, 3, 0xF
NETLINK_ROUTE, NETLINK_AUDIT = 0, 9
# linux/socket.h: every number up to 45.
FAMILIES = dict(
    enumerate(
        "unspec unix inet ax25 ipx appletalk netrom bridge atmpvc x25 inet6 rose decnet netbeui "
        "security key netlink packet ash econet atmsvc rds sna irda pppox wanpipe llc ib mpls can "
        "tipc bluetooth iucv rxrpc isdn phonet ieee802154 caif alg nfc vsock kcm qipcrtr smc xdp "
        "mctp".split()
    )
)
TYPES = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}

WX = ("mmap", "mprotect", "pkey_mprotect", "shmat")
MODE_AT = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}
"""Which argument of these calls is the mode.  Governed only where `mode_rules` are given."""
CONDITIONAL = (
    *("clone", "unshare", "socket", "socketpair", "personality", "seccomp", "memfd_create"),
    *WX,
)
NAMES = frozenset({*DENIED, *ABSENT, *CONDITIONAL, "clone3"})
"""Every call these rules govern; a base profile must not mention any of them."""


# ---- the filter's half ----------------------------------------------------------------------


def _rule(action: str, names: Iterable[str], *args: Rule) -> Rule:
    return {"names": list(names), "action": f"SCMP_ACT_{action}", "args": list(args)}


def _is(index: int, value: int, operator: str = "EQ") -> Rule:
    return {"index": index, "value": value, "op": f"SCMP_CMP_{operator}"}


def _bits(index: int, mask: int, value: int) -> Rule:
    """Argument & mask == value; bits outside the mask, also above the 32nd, do not matter."""
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def _flags(name: str, index: int, flags: Iterable[int]) -> list[Rule]:
    """Allowed without any of ``flags``, handed over with one."""
    every = list(flags)
    mask = 0
    for flag in every:
        mask |= flag
    return [
        _rule("ALLOW", [name], _bits(index, mask, 0)),
        *(_rule("NOTIFY", [name], _bits(index, flag, flag)) for flag in every),
    ]


def _socket_rules() -> list[Rule]:
    """Good families and types allowed; the complement, in disjoint pieces, handed over.

    libseccomp knows no "otherwise", so the pieces are spelled out.  One that were missing would be
    denied all the same, by the default action, and only not be counted.
    """
    good = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
    rules = [
        _rule("ALLOW", ["socket"], _is(0, AF_UNIX)),
        _rule("ALLOW", ["socket"], _is(0, AF_NETLINK), _is(2, NETLINK_ROUTE)),
        _rule("NOTIFY", ["socket"], _is(0, AF_NETLINK), _is(2, NETLINK_ROUTE, "NE")),
        _rule("NOTIFY", ["socket"], _is(0, AF_NETLINK, "GT")),
        *(_rule("NOTIFY", ["socket"], _is(0, n)) for n in range(AF_NETLINK) if n not in good),
    ]
    for family in (AF_INET, AF_INET6):
        for kind in (SOCK_STREAM, SOCK_DGRAM):
            rules.append(_rule("ALLOW", ["socket"], _is(0, family), _bits(1, SOCK_TYPE, kind)))
        # The other fourteen types: 0, 3, 4-7, 8-15.
        for mask, value in ((15, 0), (15, SOCK_RAW), (12, 4), (8, 8)):
            rules.append(_rule("NOTIFY", ["socket"], _is(0, family), _bits(1, mask, value)))
    return rules


def notify_rules(
    arch: str | None = None, *, sealed_memfds: bool = False, wx: bool = True
) -> list[Rule]:
    """The OCI seccomp rules for all of `NAMES`, complete: no other rule may name these calls.

    ``sealed_memfds``: the pid namespace has ``vm.memfd_noexec`` set (`memfd.seal`), so that
    a plain memfd_create(2) makes no executable file and may pass.  ``wx``: hand over mappings that
    are writable and executable at once, for DEFCON to deny; without it they pass the filter.
    """
    rules = [
        # Its flags lie in memory, so it cannot be judged; libc falls back to clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        _rule("NOTIFY", [*DENIED, *ABSENT, "personality"]),
        *_flags("clone", 0, NAMESPACES.values()),
        *_flags("unshare", 0, (*NAMESPACES.values(), NEWTIME)),
        *_flags("seccomp", 1, [FILTER_NEW_LISTENER]),
        _rule("ALLOW", ["socketpair"], _is(0, AF_UNIX)),
        _rule("NOTIFY", ["socketpair"], _is(0, AF_UNIX, "NE")),
        *_socket_rules(),
        *_memfd_rules(sealed_memfds),
        *(_wx_rules() if wx else [_rule("ALLOW", WX)]),
    ]
    known = abi.numbers(arch or abi.machine())
    for rule in rules:
        rule["names"] = [name for name in rule["names"] if name in known]
    return [rule for rule in rules if rule["names"]]


def mode_rules(uid: int) -> list[Rule]:
    """Further rules for all of `MODE_AT`: no file on the host will run as its owner.

    The container's mounts are nosuid; the host sees the same files on mounts that are not, and
    there anybody could run what an agent of ``uid`` left.  A user's agent may mark a file for its
    own group, as programs do with folders; root's could join any group first, so it may not.
    Setting the mode while creating a file needs no rule: without CAP_FSETID the first write takes
    the mark away (inode(7)).
    """
    known = abi.numbers(abi.machine())
    marks = [S_ISUID] if uid else [S_ISUID, S_ISGID]
    return [
        rule
        for name, index in MODE_AT.items()
        if name in known
        for rule in _flags(name, index, marks)
    ]


def _memfd_rules(sealed: bool) -> list[Rule]:
    if sealed:
        return _flags("memfd_create", 1, [MFD_EXEC])
    return [
        _rule("ALLOW", ["memfd_create"], _bits(1, MFD_NOEXEC_SEAL | MFD_EXEC, MFD_NOEXEC_SEAL)),
        _rule("NOTIFY", ["memfd_create"], _bits(1, MFD_NOEXEC_SEAL, 0)),
        _rule("NOTIFY", ["memfd_create"], _bits(1, MFD_EXEC, MFD_EXEC)),
    ]


def _wx_rules() -> list[Rule]:
    rules = []
    for name in WX[:-1]:
        for value in (0, 0x2, 0x4):
            rules.append(_rule("ALLOW", [name], _bits(2, PROT_WX, value)))
        rules.append(_rule("NOTIFY", [name], _bits(2, PROT_WX, PROT_WX)))
    both = SHM_EXEC | SHM_RDONLY
    return [
        *rules,
        _rule("ALLOW", ["shmat"], _bits(2, SHM_EXEC, 0)),
        _rule("ALLOW", ["shmat"], _bits(2, both, both)),
        _rule("NOTIFY", ["shmat"], _bits(2, both, SHM_EXEC)),
    ]


# ---- our half -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Why a call must fail: with which error, and how the record tells it.

    ``absent``: the call is merely not offered; it fails also in audit and is no violation.
    """

    error: int
    kind: str
    subject: Mapping[str, Any] = field(default_factory=dict)
    rule: str = "builtin escape"
    absent: bool = False


def judge(name: str, args: Args, effects: Effects = CALM) -> Judgement | None:
    """The verdict on a call that the filter handed over; None lets it run as its registers say.

    An unknown name is a call of an architecture or kernel that these rules do not know: denied.
    """
    if name in ABSENT:
        return Judgement(errno.ENOSYS, f"escape.{name}", absent=True)
    if decide := _DECIDE.get(name):
        return decide(name, args, effects)
    return Judgement(errno.EPERM, f"escape.{name}", {"arguments": _hex(args)})


def _hex(args: Iterable[int]) -> str:
    return " ".join(f"{value:#x}" for value in args)


def _int(value: int) -> int:
    """What the kernel sees of a register that it takes as a 32-bit argument."""
    return value & 0xFFFFFFFF


def _namespaces(name: str, args: Args, effects: Effects) -> Judgement | None:
    wanted = [space for space, flag in NAMESPACES.items() if args[0] & flag]
    if name == "unshare" and args[0] & NEWTIME:
        wanted.append("time")
    if not wanted:
        return None
    return Judgement(errno.EPERM, f"escape.{name}", {"namespaces": " ".join(wanted)})


def _personality(name: str, args: Args, effects: Effects) -> Judgement | None:
    if _int(args[0]) in PER_HARMLESS:
        return None
    return Judgement(errno.EPERM, "escape.personality", {"persona": hex(_int(args[0]))})


def _seccomp(name: str, args: Args, effects: Effects) -> Judgement | None:
    if not args[1] & FILTER_NEW_LISTENER:
        return None
    # What the kernel itself answers while a listener exists (seccomp(2)).
    return Judgement(errno.EBUSY, "escape.seccomp", {"flags": "new-listener"})


def _memfd(name: str, args: Args, effects: Effects) -> Judgement | None:
    flags = _int(args[1])
    if flags & MFD_NOEXEC_SEAL and not flags & MFD_EXEC:
        return None
    # The error of vm.memfd_noexec = 2 (Documentation/userspace-api/mfd_noexec.rst).
    return Judgement(errno.EACCES, "escape.memfd_create", {"flags": hex(flags)})


def _socket(name: str, args: Args, effects: Effects) -> Judgement | None:
    family, kind, protocol = _int(args[0]), args[1] & SOCK_TYPE, _int(args[2])
    if name == "socketpair" or family not in (AF_INET, AF_INET6, AF_NETLINK):
        error = 0 if family == AF_UNIX else errno.EAFNOSUPPORT
    elif family == AF_NETLINK:
        # EPROTONOSUPPORT is what libaudit, and so PAM and sudo, take for "not in this kernel".
        error = 0 if protocol == NETLINK_ROUTE else errno.EPROTONOSUPPORT
    elif kind in (SOCK_STREAM, SOCK_DGRAM):
        error = 0
    else:
        error = errno.EPERM if kind == SOCK_RAW else errno.ESOCKTNOSUPPORT
    if not error:
        return None
    subject = {
        "family": FAMILIES.get(family, str(family)),
        "type": TYPES.get(kind, str(kind)),
        "protocol": protocol,
    }
    # PAM and with it su, sudo, cron and useradd ask for audit: a kernel may well lack it.
    return Judgement(
        error, "net.socket", subject, absent=family == AF_NETLINK and protocol == NETLINK_AUDIT
    )


def _wx(name: str, args: Args, effects: Effects) -> Judgement | None:
    if not effects.wx_memory:
        return None
    if name == "shmat":
        bad = args[2] & (SHM_EXEC | SHM_RDONLY) == SHM_EXEC
    else:
        bad = args[2] & PROT_WX == PROT_WX
    if not bad:
        return None
    rule = "defcon: memory writable and executable at once is denied"
    return Judgement(errno.EACCES, f"escape.{name}", {"memory": "write+exec"}, rule)


def _mode(name: str, args: Args, effects: Effects) -> Judgement | None:
    mode = args[MODE_AT[name]] & 0o7777
    if not mode & (S_ISUID | S_ISGID):
        return None
    return Judgement(errno.EPERM, f"escape.{name}", {"mode": f"{mode:04o}"})


_DECIDE: Mapping[str, Callable[[str, Args, Effects], Judgement | None]] = {
    "clone": _namespaces,
    "unshare": _namespaces,
    "personality": _personality,
    "seccomp": _seccomp,
    "memfd_create": _memfd,
    "socket": _socket,
    "socketpair": _socket,
    **dict.fromkeys(WX, _wx),
    **dict.fromkeys(MODE_AT, _mode),
}
