"""The network guard of one agent: rules in a BPF table, judged at the cgroup and at the wire.

``supported`` → ``attach`` → ``attach_xdp`` → ``verify``; detaching is the context's end (and, if we
are killed, the cgroup's).  bpf/net.bpf.c has the programs, `rules` the meaning of a rule.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mis_run import rules, table
from mis_run.build import built
from mis_run.errors import VerifyError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.guards import net_frames
from mis_run.linux import libbpf, libc
from mis_run.model import Finding, NetMode, NetPlan

HOOKS = (
    *("connect4", "connect6", "sendmsg4", "sendmsg6", "bind4", "bind6", "sock_create"),
    *("packet4", "packet6", "other"),
)
PROGRAMS = {kind: f"mis_{kind}" for kind in HOOKS[:6]} | {"sock_create": "mis_socket"}
KINDS = (
    "connect",
    "connect",
    "send",
    "send",
    "bind",
    "bind",
    "socket",
    "packet",
    "packet",
    "packet",
)

# bpf/mis.h; tests/kernel/test_abi.py compares them with its BTF.
KEY = struct.Struct("=I16s")
PORT = struct.Struct("=4H")
ENTRY = struct.Struct("=2I")
SETTINGS = struct.Struct("=16s16s4I")
COUNTER = struct.Struct("=7Q")
EVENT = struct.Struct("=QII16s16sHHBBHII")

EPERM = 1
XDP_TIME = 0.5  # seconds until a frame is counted: under load ksoftirqd takes it later
RAISED = "defcon: new destinations are denied"
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
Probe = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Counts:
    """What the guard counted so far; bytes are of packets at the veth, headers included."""

    allowed: int
    denied: int
    packets_out: int
    packets_dropped: int
    bytes_out: int
    bytes_dropped: int
    events_lost: int


def supported() -> dict[str, Finding]:
    """Load a one-instruction program of each kind; nothing is attached."""
    found = {}
    # enum bpf_prog_type and bpf_attach_type of linux/bpf.h.
    for name, kind, attach in (("cgroup-bpf", 18, 10), ("xdp", 6, 0)):
        try:
            os.close(_load_trivial(kind, attach))
        except OSError as error:
            fix = "run as root, on a kernel with CONFIG_CGROUP_BPF and CONFIG_BPF_JIT"
            found[name] = Finding(False, f"bpf(BPF_PROG_LOAD): {error.strerror}", fix)
        else:
            found[name] = Finding(True, "a program of this kind loads")
    return found


def _load_trivial(kind: int, attach: int) -> int:
    """``return 1`` as a program of ``kind``, by bpf(2) without libbpf."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    buffer = ctypes.create_string_buffer(code)
    licence = ctypes.create_string_buffer(b"GPL")
    # union bpf_attr: type, count, insns, licence, log (4, 4, 8), version, flags, name, ifindex,
    # expected_attach_type.
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        *(kind, len(code) // 8, ctypes.addressof(buffer), ctypes.addressof(licence)),
        *(0, 0, 0, 0, 0, b"mis_probe", 0, attach),
    )
    return libc.bpf(5, attributes)


class NetGuard:
    """One agent's guard. ``update`` changes its table, ``read`` its events."""

    def __init__(self, plan: NetPlan, *, enforce: bool) -> None:
        self._plan = plan
        self._parsed = [rules.parse(text) for text in plan.allow]
        self._listen = [rule for text in plan.listen for rule in rules.parse_listen(text)]
        self._enforce = enforce
        self._level = 5
        self._configuring = threading.Lock()
        self._sources = ("0.0.0.0", "::")
        self._object = libbpf.Object(built("net.bpf.o"))
        self._maps = {
            name: self._object.map(name) for name in ("rules", "listen", "settings", "counters")
        }
        self._ring = libbpf.Ring(self._object.map("events"))
        self._cpus = libbpf.possible_cpus()
        self._installed: set[tuple[int, bytes]] = set()
        self._resolved: Mapping[str, tuple[str, ...]] = {}
        self._texts: tuple[str, ...] = ()
        self._base = (0,) * len(fields(Counts))
        self.canary_pid = 0  # the process that tries forbidden acts for us
        self.xdp_mode = ""
        self._install_listen()
        self.update({})

    # ---- rules ----------------------------------------------------------------------------

    def update(self, resolved: Mapping[str, tuple[str, ...]]) -> None:
        """Judge by these addresses of names from now on; what stays allowed is never denied."""
        self._resolved = resolved
        compiled = table.compile(
            self._parsed,
            resolved=resolved,
            own_addresses=self._plan.host_addresses,
            own_loopback=self._plan.mode is not NetMode.HOST,
        )
        self._texts = (*compiled.texts, RAISED)
        self._configure()
        for place, entry in compiled.entries.items():
            self._maps["rules"].update(KEY.pack(*place), _entry(entry))
        for place in self._installed - set(compiled.entries):
            self._maps["rules"].delete(KEY.pack(*place))
        self._installed = set(compiled.entries)

    def close_new(self, closed: bool) -> None:
        """DEFCON: whether only destinations that were used before are still allowed."""
        self._level = 3 if closed else 5
        self._configure()

    def _install_listen(self) -> None:
        # Nothing but the canaries is denied by itself: an address to listen on is the agent's own.
        compiled = table.compile(self._listen, special={})
        for place, entry in compiled.entries.items():
            self._maps["listen"].update(KEY.pack(*place), _entry(entry))

    def _configure(self) -> None:
        with self._configuring:  # names come from their own thread, DEFCON from the loop
            four, six = (ipaddress.ip_address(address) for address in self._sources)
            raised = len(self._texts) - 1
            values = (int(self._enforce), self._level, raised - 1, raised)
            source = b"\0" * 10 + b"\xff\xff" + four.packed
            self._maps["settings"].update(bytes(4), SETTINGS.pack(source, six.packed, *values))

    # ---- attaching ------------------------------------------------------------------------

    def attach(self, cgroup_fd: int) -> None:
        """Attach the cgroup programs, beside whatever others have attached there."""
        for kind, name in PROGRAMS.items():
            libbpf.attach_cgroup(cgroup_fd, self._object.program(name), kind)

    def attach_xdp(self, ifindex: int, address4: str, address6: str | None) -> None:
        """Judge every frame that arrives on our end of the agent's veth.

        The program goes with the interface.
        """
        self._sources = (address4, address6 or "::")
        self._configure()
        self.xdp_mode = libbpf.attach_xdp(ifindex, self._object.program("mis_xdp"))

    def close(self) -> None:
        """Release descriptors."""
        self._ring.close()
        self._object.close()

    # ---- events ---------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._ring.fileno()

    def read(self) -> list[Event]:
        """All events so far, without those of our own canaries."""
        found = []
        for sample in self._ring.drain():
            event = self._event(sample)
            if event is not None:
                found.append(event)
        return found

    def _event(self, sample: bytes) -> Event | None:
        if len(sample) != EVENT.size:
            return Event(kind="net.malformed", subject={"bytes": len(sample)})
        _, pid, _, comm, packed, port, rule, hook, verdict, family, kind, protocol = EVENT.unpack(
            sample
        )
        if pid == self.canary_pid != 0:
            return None  # the shim, on our request; it makes no socket of its own accord
        if hook >= len(HOOKS):
            return Event(kind="net.malformed", subject={"hook": hook})
        subject: dict[str, Any]
        if HOOKS[hook] == "sock_create":
            subject = {
                "family": FAMILIES.get(family, family),
                "type": TYPES.get(kind, kind),
                "protocol": PROTOCOLS.get(protocol, protocol),
            }
        else:
            address = ipaddress.ip_address(packed)
            shown = f"[{address}]"
            if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
                address = address.ipv4_mapped
                shown = str(address)
            if str(address) in (rules.CANARY4, rules.CANARY6):
                return None
            subject = {
                "destination": f"{shown}:{port}",
                "protocol": PROTOCOLS.get(protocol, protocol),
            }
        return Event(
            kind=f"net.{KINDS[hook]}",
            verdict=Verdict.AUDIT if verdict == 2 else Verdict.DENY,
            guard=Guarantee.NET,
            pid=pid,
            comm=comm.split(b"\0")[0].decode(errors="replace"),
            subject=subject,
            rule=self._rule(hook, rule),
        )

    def _rule(self, hook: int, index: int) -> str:
        if KINDS[hook] in ("bind", "socket"):
            return "default"
        return self._texts[index] if index < len(self._texts) else "default"

    def hook_counts(self) -> dict[str, dict[str, int]]:
        """Each hook's counters, summed over CPUs."""
        found = {}
        names = (
            "allowed",
            "denied",
            "audited",
            "allowed_bytes",
            "denied_bytes",
            "suppressed",
            "lost",
        )
        for index, hook in enumerate(HOOKS):
            raw = self._maps["counters"].lookup(struct.pack("=I", index), COUNTER.size * self._cpus)
            columns = zip(*COUNTER.iter_unpack(raw or bytes(COUNTER.size)), strict=True)
            found[hook] = dict(zip(names, map(sum, columns), strict=True))
        return found

    def counts(self) -> Counts:
        """The agent's totals: what was tried to verify the guard is not the agent's."""
        return Counts(
            *(now - before for now, before in zip(self._totals(), self._base, strict=True))
        )

    def _totals(self) -> tuple[int, ...]:
        """The fields of Counts since the guard was loaded. A socket made is no connection yet."""
        hooks = self.hook_counts()
        calls = [hooks[name] for name in HOOKS[:7]]
        packets = [hooks[name] for name in HOOKS[7:]]
        return (
            sum(one["allowed"] for one in calls[:6]),
            sum(one["denied"] + one["audited"] for one in calls),
            sum(one["allowed"] + one["audited"] for one in packets),
            sum(one["denied"] for one in packets),
            sum(one["allowed_bytes"] for one in packets),
            sum(one["denied_bytes"] for one in packets),
            sum(one["lost"] for one in (*calls, *packets)),
        )

    # ---- proof ----------------------------------------------------------------------------

    def verify(self, probe: Probe) -> None:
        """One forbidden act per hook, from inside the agent's cgroup: refused *and* counted.

        Raises VerifyError.
        """
        four, six = rules.CANARY4, rules.CANARY6
        stream, dgram = int(socket.SOCK_STREAM), int(socket.SOCK_DGRAM)
        acts = {
            "connect4": f"connect 2 {stream} {four} 9",
            "connect6": f"connect 10 {stream} {six} 9",
            "sendmsg4": f"send 2 {dgram} {four} 9",
            "sendmsg6": f"send 10 {dgram} {six} 9",
            "bind4": f"bind 2 {dgram} {four} 9",
            "bind6": f"bind 10 {dgram} {six} 9",
        }
        before = self.hook_counts()
        for hook, act in acts.items():
            error = probe(act)
            if error == _NO_IPV6 and hook.endswith("6"):
                continue  # a kernel without IPv6 has no IPv6 to guard
            if error != EPERM:
                met = os.strerror(error) if error else "it succeeded"
                raise VerifyError(f"network guard {hook}: the forbidden act was not refused: {met}")
        after = self.hook_counts()
        for hook in acts:
            if after[hook]["denied"] == before[hook]["denied"] and not hook.endswith("6"):
                raise VerifyError(f"network guard {hook}: the refusal was not counted")
        self._verify_socket(probe)
        self._forget_trials()

    def _forget_trials(self) -> None:
        """What was tried so far was tried by us."""
        self.read()
        self._base = self._totals()

    def _verify_socket(self, probe: Probe) -> None:
        """A socket that is neither TCP nor UDP."""
        # UDP-Lite (136) and MPTCP (262): whichever this kernel has reaches the hook.
        before = self.hook_counts()["sock_create"]
        tried = [probe(f"socket 2 {kind} {protocol}") for kind, protocol in ((2, 136), (1, 262))]
        after = self.hook_counts()["sock_create"]
        refused = after["denied"] + after["audited"] - before["denied"] - before["audited"]
        if 0 in tried and self._enforce:
            raise VerifyError("network guard sock_create: a forbidden socket was made")
        if not refused and EPERM in tried:
            raise VerifyError("network guard sock_create: the refusal was not counted")

    def verify_xdp(self, netns: int) -> None:
        """Frames sent in the agent's namespace, around every socket hook: dropped *and* counted.

        Raises VerifyError.
        """
        before = self.hook_counts()
        net_frames.inject(netns, net_frames.canaries(self._sources))
        hooks = ("packet4", "packet6")
        end = time.monotonic() + XDP_TIME
        while True:
            after = self.hook_counts()
            missed = [hook for hook in hooks if after[hook]["denied"] <= before[hook]["denied"]]
            if not missed or time.monotonic() > end:
                break
            time.sleep(0.001)
        for hook in missed:
            raise VerifyError(f"network guard xdp: a forbidden {hook} was not dropped")
        self._forget_trials()


_NO_IPV6 = 97  # EAFNOSUPPORT


def _entry(entry: table.Entry) -> bytes:
    ports = b"".join(PORT.pack(p.low, p.high, p.protocols, p.rule) for p in entry.ports)
    return ENTRY.pack(len(entry.ports), entry.reason) + ports.ljust(
        PORT.size * table.MOST_PORTS, b"\0"
    )


@contextmanager
def attach(cgroup: Path, guard: NetGuard) -> Iterator[NetGuard]:
    """Attach a loaded guard to ``cgroup`` (a v2 directory) and everything below.

    The attachment ends with the cgroup, or here.  XDP comes later, when there is an interface:
    `NetGuard.attach_xdp`.
    """
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        guard.attach(fd)
        yield guard
    finally:
        os.close(fd)
        guard.close()


def load(plan: NetPlan, *, enforce: bool) -> NetGuard:
    """Load the programs and fill their tables; nothing is attached. Raises SetupError."""
    return NetGuard(plan, enforce=enforce)
