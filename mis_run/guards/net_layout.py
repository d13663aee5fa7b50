"""What the network guard shares with its BPF programs, byte by byte: bpf/mis.h in Python.

tests/kernel/test_abi.py compares the layouts with the BTF of the compiled header.
"""

from __future__ import annotations

import ipaddress
import struct

from mis_run import table

HOOKS = {
    "connect4": "connect",
    "connect6": "connect",
    "sendmsg4": "send",
    "sendmsg6": "send",
    "bind4": "bind",
    "bind6": "bind",
    "sock_create": "socket",
    "packet4": "packet",
    "packet6": "packet",
    "other": "packet",
    "egress": "route",
    "ingress": "bind",
}
"""Every hook, in the order of ``enum mis_hook`` → what its events are called."""

CALLS = tuple(HOOKS)[:7]
"""Hooks that see a system call; the others see packets."""

KEY = struct.Struct("=I16s")
PORT = struct.Struct("=4H")
ENTRY = struct.Struct("=2I")
SETTINGS = struct.Struct("=16s16s5I")
COUNTER = struct.Struct("=7Q")
EVENT = struct.Struct("=QII16s16sHHBBHII")

COUNTED = ("allowed", "denied", "audited", "allowed_bytes", "denied_bytes", "suppressed", "lost")
"""The fields of COUNTER."""


def entry(made: table.Entry) -> bytes:
    """``struct mis_entry``."""
    ports = b"".join(PORT.pack(p.low, p.high, p.protocols, p.rule) for p in made.ports)
    unused = PORT.size * table.MOST_PORTS
    return ENTRY.pack(len(made.ports), made.reason) + ports.ljust(unused, b"\0")


def settings(
    sources: tuple[str, str], *, enforce: bool, level: int, texts: int, spin: int
) -> bytes:
    """``struct mis_settings``; the last two of ``texts`` are "default" and the raised level's,
    ``spin`` the nanoseconds that a denied call waits in the kernel."""
    four, six = (ipaddress.ip_address(address).packed for address in sources)
    mapped = b"\0" * 10 + b"\xff\xff" + four
    return SETTINGS.pack(mapped, six, int(enforce), level, texts - 2, texts - 1, spin)


def counters(raw: bytes) -> dict[str, int]:
    """One hook's counters, summed over CPUs."""
    columns = zip(*COUNTER.iter_unpack(raw), strict=True)
    return dict(zip(COUNTED, map(sum, columns), strict=True))
