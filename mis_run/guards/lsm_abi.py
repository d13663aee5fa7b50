"""The kernel plane's words and structs, as bpf/mis.h has them (tests/kernel/test_lsm_abi.py).

Events become `Event` here.  Out of scope: who may do what (`lsm_policy`), attaching (`lsm`).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag

from mis_run.events import Event, Guarantee, Verdict
from mis_run.hints import Any

PLACE = struct.Struct("=QQII")
RULE = struct.Struct("=HHII")
OWN = 16  # words of mis_agent.own, its last
AGENT = struct.Struct(f"=QQQQQII4I6BH4I{OWN}Q")
MOST_ACTS = 64
STATE = struct.Struct(f"=II9Q{MOST_ACTS}I")
SLOTS = 4096
PLANE = struct.Struct("=QQ")
EVENT = struct.Struct("=QQQIIIIIIIBBBB16s512s")
PATH = 256


class Right(IntFlag):
    """What a rule allows or denies on a file and, for a directory, on all below."""

    READ = 1
    WRITE = 2
    EXEC = 4
    CREATE = 8
    DELETE = 16
    LIST = 32
    ALL = 63


class RuleFlag(IntFlag):
    """WORKSPACE: writing is no risk at a raised level. EXPLICIT: named in the profile itself, not
    by a set or a pattern. ANCHOR: a denial hangs on it or below, so it is not moved or removed.
    CANARY: what we try ourselves, no violation while we do (`AgentFlag.TRYING`). FATAL: its denial
    is DEFCON 1."""

    WORKSPACE = 1
    EXPLICIT = 2
    ANCHOR = 4
    CANARY = 8
    FATAL = 16


class AgentFlag(IntFlag):
    """ENFORCE: deny, not only tell. LOSS_OPEN: past the deadline audit. NO_WX: no memory writable
    and executable, at any level. NO_CACHE: every act is judged by a walk. TRYING: the canary is
    tried by us now."""

    ENFORCE = 1
    LOSS_OPEN = 2
    NO_WX = 4
    NO_CACHE = 8
    TRYING = 16


# Rule numbers with a meaning of their own.
WORDS: Mapping[int, str] = {
    0: "default",
    0xFFFFFFFF: "defcon: the level denies it",
    0xFFFFFFFE: "liveness: the deadline passed",
    0xFFFFFFFD: "a rule hangs on it or below",
}

FILE_ACTS = """
    open receive mmap wx_memory ioctl unlink rmdir mkdir mknod symlink link rename truncate chmod
    chown setattr setxattr acl notify
""".split()
ESCAPE_ACTS = """
    mknod tty mount umount remount move_mount pivot_root chroot userns ptrace kill scheduler
    move_memory bpf perf_event_open kernel_file kernel_data module key io_uring capability clock
    syslog quota lockdown tun fsconfig userfaultfd set_id
""".split()
NET_ACTS = ("socket", "unix", "foreign")
ACTS = (*FILE_ACTS, "exec", *ESCAPE_ACTS, *NET_ACTS)
"""Words for enum mis_act, in its order."""
EXEC = len(FILE_ACTS)
LAYOUT = (*(one.format for one in (PLACE, RULE, AGENT, STATE, PLANE, EVENT)), *ACTS)
"""Of the maps and events: a plane of another layout is not ours to write to."""

# What `detail` of an act is; for the others it says nothing.
DETAILS: Mapping[str, str] = {
    "ioctl": "command",
    "tty": "command",
    "kill": "signal",
    "ptrace": "mode",
    "capability": "capability",
    "bpf": "command",
    "lockdown": "reason",
    "syslog": "action",
    "quota": "command",
    "kernel_data": "kind",
    "socket": "family",
    "foreign": "family",
    "set_id": "uid",
}

# linux/capability.h.
CAPABILITIES = """
    chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
    net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio
    sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time
    sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog
    wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore
""".split()


def own_words(places: Iterable[tuple[int, int]]) -> list[int]:
    """mis_agent.own for inodes (device, number) that have a rule: what cache.bpf.h looks in."""
    words = [0] * OWN
    for _, inode in places:
        bit = (inode * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 54
        words[bit >> 6] |= 1 << (bit & 63)
    return words


def capability_mask(names: Sequence[str]) -> int:
    """Bits of capabilities by their names without ``CAP_``."""
    return sum(1 << CAPABILITIES.index(name.lower().removeprefix("cap_")) for name in names)


def kind_of(what: int) -> tuple[str, Guarantee]:
    """An act as events call it, and the guarantee that it is about."""
    act = ACTS[what]
    if what < EXEC:
        return f"file.{act}", Guarantee.FILE
    if what == EXEC:
        return "exec.run", Guarantee.EXEC
    if act in NET_ACTS:
        return f"net.{act}", Guarantee.NET
    return f"escape.{act}", Guarantee.ESCAPE


def event(sample: bytes, texts: Sequence[str]) -> Event:
    """One event of the ring buffer; ``texts`` are the profile lines by number, 1 the first."""
    if len(sample) != EVENT.size:
        return Event(kind="lsm.malformed", subject={"bytes": len(sample)})
    (at, _, inode, device, pid, thread, rule, right, detail, path_at, *rest) = EVENT.unpack(sample)
    what, verdict, level, repeated, comm, path = rest
    if what >= len(ACTS) or verdict > 3:
        return Event(kind="lsm.malformed", subject={"act": what, "verdict": verdict})
    act = ACTS[what]
    subject: dict[str, Any] = {}
    if path_at < PATH:
        subject["path"] = path[path_at:PATH].decode(errors="replace").strip()
    if inode:
        subject |= {"device": f"{device >> 20}:{device & 0xFFFFF}", "inode": inode}
    if right:
        subject["rights"] = " ".join(r.name.lower() for r in Right(right & Right.ALL) if r.name)
    if act in DETAILS:
        known = act == "capability" and detail < len(CAPABILITIES)
        subject[DETAILS[act]] = CAPABILITIES[detail] if known else detail
    if level < 5:
        subject["level"] = level
    if thread != pid:
        subject["thread"] = thread
    kind, guard = kind_of(what)
    return Event(
        kind=kind,
        verdict=(Verdict.ALLOW, Verdict.DENY, Verdict.AUDIT, Verdict.KILL)[verdict],
        guard=guard,
        pid=pid,
        comm=comm.split(b"\0")[0].decode(errors="replace"),
        subject=subject,
        rule=texts[rule - 1] if 0 < rule <= len(texts) else WORDS.get(rule, "default"),
        repeated=bool(repeated),
        # It may have lain there for hours: until a new supervisor came.
        time=time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - at) / 1e9,
    )
