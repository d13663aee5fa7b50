"""The agent's network: a namespace of its own, one veth pair, NAT. No rules are judged here.

The namespace has no name: it is held by a descriptor and by the container, and takes the veth
pair with it when the last of them goes.  What outlives a killed launcher is an index file and rows
of one nftables table, which `gc` removes.  docs/decisions/network-plumbing.md argues the choices.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from mis_run import namespace, nft, rules, shared
from mis_run.dataclass import dataclass, replace
from mis_run.errors import SetupError
from mis_run.later import Later
from mis_run.linux.spawn import run
from mis_run.model import NetMode, NetPlan
from mis_run.state import ID

GOES_WITHIN = 0.05  # seconds that a namespace gets to end by itself, with its interfaces
MAC_HOST, MAC_AGENT = "02:6d:69:73:00:01", "02:6d:69:73:00:02"


@dataclass(frozen=True)
class Link:
    """The agent's network. Addresses are empty in mode ``none``."""

    netns: int  # descriptor
    interface: str = ""  # our end of the veth pair
    address4: str = ""
    address6: str | None = None
    connected: Later[int] | None = None  # our end's index, being connected in the background
    leave: Callable[[], None] = lambda: None
    """Begin to disconnect, and let go of the namespace: the kernel takes its time, and other things
    can be undone meanwhile. For when the agent has ended."""

    def ifindex(self) -> int:
        """The index of our end, once the namespace is connected. Raises SetupError."""
        return self.connected.result() if self.connected else 0

    def wait(self) -> None:
        """Until it is connected, or that has failed."""
        if self.connected:
            self.connected.wait()

    @property
    def path(self) -> str:
        """The namespace as a path, for the container runtime."""
        return f"/proc/{os.getpid()}/fd/{self.netns}"


@dataclass(frozen=True)
class Reserved:
    """A run's addresses, by their index, and what must be finished before they are another's."""

    index: int
    leaving: list[Later[None]]


@contextmanager
def reserve(plan: NetPlan, run_id: str) -> Iterator[Reserved]:
    """The run's addresses, its own until the interface that has them is gone.

    To be entered first: the kernel takes its time, in which everything else can be undone.
    Raises SetupError.
    """
    if plan.mode is not NetMode.GUARDED:
        yield Reserved(0, [])
        return
    with ExitStack() as stack:
        held = Reserved(shared.claim(run_id), [])
        stack.callback(shared.release, {run_id})
        stack.callback(lambda: [one.result() for one in held.leaving])
        stack.callback(_see_gone, f"mis-{run_id}")
        yield held


@contextmanager
def create(plan: NetPlan, run_id: str, held: Reserved) -> Iterator[Link | None]:
    """The agent's network; None in host mode. Raises SetupError."""
    if plan.mode is NetMode.HOST:
        namespace.forget()
        yield None
        return
    with ExitStack() as stack:
        netns = namespace.make()
        stack.callback(os.close, netns)
        if plan.mode is NetMode.NONE:
            yield Link(netns)
            return
        link = _connect(plan, run_id, held.index, netns)
        stack.callback(link.wait)

        def leave() -> None:
            link.wait()
            if plan.forwards and not held.leaving:
                unshare = partial(_unshare, link.interface, run_id, local=bool(_services(plan)))
                held.leaving.append(Later(unshare))
            stack.close()

        try:
            yield replace(link, leave=leave)
        finally:
            leave()


def _connect(plan: NetPlan, run_id: str, index: int, netns: int) -> Link:
    """Connect the namespace, in the background: `Link.ifindex` waits for it."""
    gateway4, address4, gateway6, address6 = shared.addresses(index)
    interface = f"mis-{run_id}"
    inside = [
        f"link add eth0 address {MAC_AGENT} type veth peer name {interface} "
        f"address {MAC_HOST} netns /proc/{os.getpid()}/ns/net",
        f"addr add {address4}/30 dev eth0",
        "link set eth0 up",
        # Neighbours are permanent on both ends: XDP passes neither ARP nor neighbour discovery.
        f"neigh add {gateway4} lladdr {MAC_HOST} dev eth0 nud permanent",
    ]
    outside = [
        f"addr add {gateway4}/30 dev {interface}",
        f"link set {interface} up",
        f"neigh add {address4} lladdr {MAC_AGENT} dev {interface} nud permanent",
    ]
    routes = [f"route add default via {gateway4}"]
    if plan.ipv6:
        inside += [
            f"addr add {address6}/64 dev eth0 nodad",
            f"neigh add {gateway6} lladdr {MAC_HOST} dev eth0 nud permanent",
        ]
        outside += [
            f"addr add {gateway6}/64 dev {interface} nodad",
            f"neigh add {address6} lladdr {MAC_AGENT} dev {interface} nud permanent",
        ]
        routes += [f"route add ::/0 via {gateway6}"]

    def connect() -> int:
        sharing = Later(lambda: shared.share(ipv6=plan.ipv6)) if plan.forwards else None
        try:
            namespace.within(netns, lambda: _settle(inside + routes, ipv6=plan.ipv6))
            _distrust(interface, ipv6=plan.ipv6)
            _batch(outside)
            found = socket.if_nametoindex(interface)
        finally:
            if sharing:
                sharing.result()
        if services := _services(plan):
            with shared.locked() as lock:
                nft.allow_local(interface, services, [lock])
        return found

    link_address6 = address6 if plan.ipv6 else None
    return Link(netns, interface, address4, link_address6, Later(connect))


def _unshare(interface: str, run_id: str, *, local: bool) -> None:
    """Take back what the agent has of the shared table; all of that, if we are the last.

    The kernel needs 20 ms for either.  The address index stays taken meanwhile.
    """
    with shared.locked() as lock:
        if set(shared.indices().values()) == {run_id}:
            shared.unshare(lock)
        elif local:
            nft.forget_local(interface, [lock])


def _see_gone(interface: str) -> None:
    """Our end goes with the namespace, whose last descriptor was just closed, in a few ms; being
    asked to delete it the kernel lets one wait for an RCU barrier, 25 ms.

    Where something keeps the namespace (a connection whose last bytes are still unsent) it is
    asked.  Returns when the interface is gone.
    """
    end = time.monotonic() + GOES_WITHIN
    while _there(interface):
        if time.monotonic() > end:
            _run(["ip", "link", "del", interface])
            return
        time.sleep(0.0005)


def _there(interface: str) -> bool:
    """By its name, and by its place in sysfs, which goes a moment later."""
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return Path("/sys/class/net", interface).exists()
    return True


def _settle(commands: Sequence[str], *, ipv6: bool) -> None:
    """Inside the namespace: no IPv6 unless wanted, never autoconfigured; then ``ip`` commands."""
    for which in ("all", "default"):
        shared.turn(shared.CONF6 / which / "accept_ra", "0")
        if not ipv6:
            shared.turn(shared.CONF6 / which / "disable_ipv6", "1")
    # No link-local address: nothing to solicit with, and none of ours to be reached by.
    shared.turn(shared.CONF6 / "default" / "addr_gen_mode", "1")
    _batch(commands)


def _distrust(interface: str, *, ipv6: bool) -> None:
    """Our end, before it is up: the agent cannot configure this machine (ip-sysctl.rst).

    XDP drops such packets too; this holds without it.
    """
    shared.turn(shared.CONF4 / interface / "accept_redirects", "0")
    shared.turn(shared.CONF4 / interface / "rp_filter", "1")
    for switch in ("accept_ra", "accept_redirects"):
        shared.turn(shared.CONF6 / interface / switch, "0")
    shared.turn(shared.CONF6 / interface / "addr_gen_mode", "1")
    if not ipv6:
        shared.turn(shared.CONF6 / interface / "disable_ipv6", "1")


def _batch(commands: Sequence[str]) -> None:
    """``ip -batch -``: one process, stopping at the first command that fails."""
    _run(["ip", "-batch", "-"], "\n".join(commands) + "\n", check=True)


def _run(argv: list[str], text: str = "", *, check: bool = False) -> None:
    try:
        done = run(argv, text)
    except OSError as error:
        raise SetupError(
            f"cannot run {argv[0]}: {error.strerror}", hint="apt-get install iproute2"
        ) from error
    if check and done.code:
        raise SetupError(
            f"{' '.join(argv)}: {done.err.strip()[-300:]}\n{text}".rstrip(), hint="mis doctor"
        )


def _services(plan: NetPlan) -> list[nft.Service]:
    """Those of the host that a rule names by the host's own address."""
    found = []
    for text in plan.allow:
        rule = rules.parse(text)
        if rule.network is None or rule.network.num_addresses != 1:
            continue
        address = str(rule.network.network_address)
        if address in plan.host_addresses:
            family = "ip" if rule.network.version == 4 else "ip6"
            for bit, protocol in ((rules.TCP, "tcp"), (rules.UDP, "udp")):
                if rule.protocols & bit:
                    found.append((family, protocol, address, f"{max(rule.low, 1)}-{rule.high}"))
    return found


def gc(live: set[str]) -> list[str]:
    """Remove indices, table rows and interfaces of runs that are not live; what was removed."""
    if not shared.NET.is_dir():
        return []
    removed = []
    for _, interface in socket.if_nameindex():
        run_id = interface.removeprefix("mis-")
        if run_id != interface and ID.fullmatch(run_id) and run_id not in live:
            _run(["ip", "link", "del", interface])
            removed.append(interface)
    with shared.locked() as lock:
        dead = set(shared.indices().values()) - live
        if dead or not shared.indices():
            shared.forget(dead, lock)
        nft.gc({f"mis-{run_id}" for run_id in live}, [lock])
    return removed + sorted(f"address of {run_id}" for run_id in dead)
