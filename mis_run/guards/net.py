"""The network guard of one agent: rules in a BPF table, judged at the cgroup and at the wire.

``supported`` → ``attach`` → ``attach_xdp`` → ``verify``; detaching is the context's end (and, if we
are killed, the cgroup's).  bpf/net.bpf.c has the programs, `rules` the meaning of a rule.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from mis_run import defcon, rules, table
from mis_run.build import built
from mis_run.dataclass import dataclass, fields
from mis_run.defcon import ENFORCING, Stance
from mis_run.events import Event, Guarantee
from mis_run.guards import net_events, net_layout, net_trials
from mis_run.guards.net_layout import CALLS, COUNTER, HOOKS, KEY
from mis_run.later import Later
from mis_run.linux import libbpf, libc
from mis_run.model import Finding, NetMode, NetPlan

PROGRAMS = {kind: f"mis_{kind}" for kind in (*CALLS[:6], "egress", "ingress")}
PROGRAMS["sock_create"] = "mis_socket"
RAISED = "defcon: new destinations are denied"
BATCH = 128  # events of one turn: about ten milliseconds, then others get theirs


@dataclass(frozen=True)
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


MAPS = ("rules", "listen", "settings", "counters", "events")


class NetGuard:
    """One agent's guard. ``update`` changes its table, ``read`` its events."""

    def __init__(
        self,
        plan: NetPlan,
        *,
        enforce: bool,
        maps: Mapping[str, int] | None = None,
        sources: tuple[str, str] = ("0.0.0.0", "::"),
        stance: Stance = ENFORCING,
    ) -> None:
        self._plan = plan
        self._parsed = [rules.parse(text) for text in plan.allow]
        self._listen = [rule for text in plan.listen for rule in rules.parse_listen(text)]
        self._enforce = enforce
        self._stance = stance
        self._configuring = threading.Lock()
        self._sources = sources
        self._object = None if maps else (_ahead.pop().result() if _ahead else _programs())
        self._maps = {name: self._map(name, maps or {}) for name in MAPS}
        self._ring = libbpf.Ring(self._maps["events"])
        self._cpus = libbpf.possible_cpus()
        self._installed: dict[rules.Place, table.Entry] = {}  # always what the map has
        self._texts: tuple[str, ...] = ()
        self._base = (0,) * len(fields(Counts))
        self._told_lost = 0
        self.canary_pid = 0  # the process that tries forbidden acts for us
        self.xdp_mode = ""
        self._wire = 0  # the interface's index
        self._letting_go: Later[None] | None = None
        self._install_listen()
        self.update({})
        if maps:
            self._base = self._totals()  # what was counted before was told before

    def _map(self, name: str, maps: Mapping[str, int]) -> libbpf.Map:
        return self._object.map(name) if self._object else libbpf.Map(maps[name])

    def maps(self) -> dict[str, int]:
        """Descriptors by which `adopt` finds this guard again when we are gone."""
        return {name: found.fd for name, found in self._maps.items()}

    # ---- rules ----------------------------------------------------------------------------

    def update(self, resolved: Mapping[str, tuple[str, ...]]) -> None:
        """Judge by these addresses of names from now on; what stays allowed is never denied."""
        compiled = table.compile(
            self._parsed,
            resolved=resolved,
            own_addresses=self._plan.host_addresses,
            own_loopback=self._plan.mode is not NetMode.HOST,
        )
        self._texts = (*compiled.texts, RAISED)
        self._configure()
        for place, entry in compiled.entries.items():
            if self._installed.get(place) != entry:
                self._maps["rules"].update(KEY.pack(*place), net_layout.entry(entry))
                self._installed[place] = entry
        for place in set(self._installed) - set(compiled.entries):
            self._maps["rules"].delete(KEY.pack(*place))
            del self._installed[place]

    def follow(self, stance: Stance) -> None:
        """Do as DEFCON says now: whether only destinations that were used before are still
        allowed, and how late calls are denied.  To be called at every change of the level."""
        self._stance = stance
        self._configure()

    def _install_listen(self) -> None:
        # Nothing but the canaries is denied by itself: an address to listen on is the agent's own.
        compiled = table.compile(self._listen, special={})
        for place, entry in compiled.entries.items():
            self._maps["listen"].update(KEY.pack(*place), net_layout.entry(entry))

    def _configure(self) -> None:
        with self._configuring:  # names come from their own thread, DEFCON from the loop
            settings = net_layout.settings(
                self._sources,
                enforce=self._enforce,
                level=3 if self._stance.effects().destinations else 5,
                texts=len(self._texts),
                spin=defcon.spin(self._stance.delay()),
            )
            self._maps["settings"].update(bytes(4), settings)

    # ---- attaching ------------------------------------------------------------------------

    def attach(self, cgroup: Path) -> None:
        """Attach the cgroup programs to ``cgroup`` (a v2 directory) and everything below, beside
        whatever others have attached there.  The attachment ends with the cgroup.
        """
        assert self._object is not None
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for kind, name in PROGRAMS.items():
                libbpf.attach_cgroup(fd, self._object.program(name), kind)
        finally:
            os.close(fd)

    def attach_xdp(self, ifindex: int, address4: str, address6: str | None) -> None:
        """Judge every frame that arrives on our end of the agent's veth.

        The program goes with the interface.
        """
        self._wire = ifindex
        self._sources = (address4, address6 or "::")
        self._configure()
        assert self._object is not None
        self.xdp_mode = libbpf.attach_xdp(ifindex, self._object.program("mis_xdp"))

    def detach_xdp(self) -> None:
        """Begin to take the program off, when nobody is left to send: the kernel needs 8 ms, and
        would need them before the interface can go."""
        if self.xdp_mode:
            self._letting_go = Later(lambda: libbpf.detach_xdp(self._wire, self.xdp_mode))

    def close(self) -> None:
        """Release descriptors."""
        if self._letting_go:
            self._letting_go.wait()  # fails where the interface has gone already
        self._ring.close()
        if self._object is not None:
            self._object.close()

    # ---- events ---------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._ring.fileno()

    def read(self) -> list[Event]:
        """The oldest BATCH events, without those of our own canaries; the others stay for later."""
        samples = self._ring.drain(BATCH)
        events = [event for sample in samples if (event := self._event(sample))]
        return events + self._lost() if len(samples) == BATCH else events

    def rest(self) -> Iterator[Event]:
        """Every event there is. Only for an agent that has ended: one that lives makes more."""
        while samples := self._ring.drain(BATCH):
            yield from (event for sample in samples if (event := self._event(sample)))
        yield from self._lost()

    def _lost(self) -> list[Event]:
        """How many events found the ring buffer full since this was last asked."""
        lost = self.counts().events_lost - self._told_lost
        self._told_lost += lost
        return [Event(kind="net.lost", guard=Guarantee.NET, subject={"events": lost})] * bool(lost)

    def _event(self, sample: bytes) -> Event | None:
        return net_events.read(sample, self._texts, self.canary_pid)

    def hook_count(self, hook: str) -> dict[str, int]:
        """One hook's counters, summed over CPUs."""
        size, key = COUNTER.size * self._cpus, struct.pack("=I", (*HOOKS,).index(hook))
        return net_layout.counters(self._maps["counters"].lookup(key, size) or bytes(COUNTER.size))

    def counts(self) -> Counts:
        """The agent's totals: what was tried to verify the guard is not the agent's."""
        return Counts(
            *(now - before for now, before in zip(self._totals(), self._base, strict=True))
        )

    def _totals(self) -> tuple[int, ...]:
        """The fields of Counts since the guard was loaded. A socket made is no connection yet."""
        hooks = {hook: self.hook_count(hook) for hook in HOOKS}
        calls = [hooks.pop(name) for name in CALLS]
        packets = list(hooks.values())
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

    def answers_late(self, delay: float) -> bool:
        """As long as a call may wait in the kernel."""
        return delay <= defcon.SPIN

    def verify(self, probe: net_trials.Probe, together: net_trials.Probes | None = None) -> None:
        """One forbidden act per hook, from inside the agent's cgroup: refused *and* counted.

        ``together`` tries several acts at once, where the prober can. Raises VerifyError.
        """
        probes = together or (lambda acts: [probe(act) for act in acts])
        net_trials.calls(probes, self.hook_count)
        net_trials.sockets(probes, self.hook_count, enforce=self._enforce)
        net_trials.packets(probes, self.hook_count, self._canaries_pass)
        self._forget_trials()

    def beat(self, probe: net_trials.Probe) -> None:
        """One forbidden connection of the container's init, as heartbeat. Raises VerifyError."""
        denied = self._base[1] + net_trials.beat(probe, self.hook_count, enforce=self._enforce)
        self._base = (self._base[0], denied, *self._base[2:])  # it was ours, not the agent's

    def verify_xdp(self, netns: int) -> None:
        """Frames sent in the agent's namespace: dropped *and* counted. Raises VerifyError."""
        net_trials.frames(netns, self._sources, self.hook_count)
        self._forget_trials()

    @contextmanager
    def _canaries_pass(self) -> Iterator[None]:
        """Let the canaries of the packet hooks pass those of the system calls."""
        open_port = table.Entry((table.Port(9, 9, rules.TCP | rules.UDP, 0),), 0)
        places = [
            rules.key(ipaddress.ip_network(address))
            for address in (rules.CANARY_OUT, rules.CANARY_IN)
        ]
        try:
            for place in places:
                self._maps["rules"].update(KEY.pack(*place), net_layout.entry(open_port))
            yield
        finally:
            for place in places:
                closed = net_layout.entry(self._installed[place])
                self._maps["rules"].update(KEY.pack(*place), closed)

    def _forget_trials(self) -> None:
        """What was tried so far was tried by us."""
        for _ in self.rest():
            pass
        self._base, self._told_lost = self._totals(), 0


@contextmanager
def attach(cgroup: Path, guard: NetGuard) -> Iterator[NetGuard]:
    """Attach a loaded guard, and close it on the way out: `NetGuard.attach`."""
    with closing(guard):
        guard.attach(cgroup)
        yield guard


_ahead: list[Later[libbpf.Object]] = []


def _programs() -> libbpf.Object:
    return libbpf.Object(built("net.bpf.o"))


def load_ahead() -> None:
    """Begin to load the programs, which are the same for every plan: the kernel's verifier takes
    15 ms, and nobody else needs the other CPU while a launch imports its modules."""
    _ahead.append(Later(_programs))


def load(plan: NetPlan, *, enforce: bool) -> NetGuard:
    """Load the programs and fill their tables; nothing is attached. Raises SetupError."""
    return NetGuard(plan, enforce=enforce)


@contextmanager
def adopt(
    plan: NetPlan,
    maps: Mapping[str, int],
    sources: tuple[str, str],
    *,
    enforce: bool,
    stance: Stance,
) -> Iterator[NetGuard]:
    """The guard of a run whose supervisor is gone, by the descriptors of its maps.

    The programs stay attached as they are; ``sources`` are the agent's addresses.
    """
    with closing(
        NetGuard(plan, enforce=enforce, maps=maps, sources=sources, stance=stance)
    ) as guard:
        yield guard
