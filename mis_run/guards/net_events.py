"""The network guard's events: bytes from the ring buffer → what happened, in words."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from mis_run import rules
from mis_run.events import Event, Guarantee, Verdict
from mis_run.guards.net_layout import EVENT, HOOKS
from mis_run.hints import Any

PROTOCOLS = {
    1: "icmp",
    6: "tcp",
    17: "udp",
    58: "icmpv6",
    132: "sctp",
    136: "udplite",
    255: "raw",
    262: "mptcp",
}
FAMILIES = {2: "inet", 10: "inet6"}
TYPES = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket", 6: "dccp"}
NAMES = tuple(HOOKS)
AUDIT = 2  # enum mis_verdict


def read(sample: bytes, texts: Sequence[str], canary_pid: int = 0) -> Event | None:
    """One event; None when it is about a canary, by address or by the process that tried it."""
    if len(sample) != EVENT.size:
        return Event(kind="net.malformed", subject={"bytes": len(sample)})
    _, pid, _, comm, packed, port, rule, hook, verdict, family, kind, protocol = EVENT.unpack(
        sample
    )
    if pid == canary_pid != 0:
        return None  # the shim, on our request; it makes no socket of its own accord
    if hook >= len(NAMES):
        return Event(kind="net.malformed", subject={"hook": hook})
    subject: dict[str, Any] = {"protocol": PROTOCOLS.get(protocol, protocol)}
    what = HOOKS[NAMES[hook]]
    if what == "socket":
        subject["family"] = FAMILIES.get(family, family)
        subject["type"] = TYPES.get(kind, kind)
    else:
        address = ipaddress.IPv6Address(packed)
        if str(address.ipv4_mapped or address) in rules.CANARIES:
            return None
        subject["destination"] = f"{address.ipv4_mapped or f'[{address}]'}:{port}"
    return Event(
        kind=f"net.{what}",
        verdict=Verdict.AUDIT if verdict == AUDIT else Verdict.DENY,
        guard=Guarantee.NET,
        pid=pid,
        comm=comm.split(b"\0")[0].decode(errors="replace"),
        subject=subject,
        rule=_rule(what, rule, texts),
    )


def _rule(what: str, index: int, texts: Sequence[str]) -> str:
    if what == "route":
        return "builtin: no IP options, no routing header"
    # What binds is judged by another table, sockets by none.
    return texts[index] if index < len(texts) and what not in ("bind", "socket") else "default"
