"""Names in network rules: resolved by us, refreshed by their TTL, answered to the agent by us.

A thread of the supervisor owns two things: a resolver inside the agent's network namespace that
answers only what a rule names, and the queries that keep those answers fresh.  The BPF table is
updated before an answer leaves, so an address the agent learns is already allowed; an address that
left an answer stays allowed for a grace, for connections that still use it.

A name can never make the host reachable: `rules.compile` ignores addresses inside denied prefixes,
and they are left out of the answers too (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from mis_run import rules
from mis_run.errors import SetupError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.linux import libc
from mis_run.model import NetMode, NetPlan
from mis_run.resolve import TIMEOUT, TTL_CEILING, TTL_FLOOR, resolve, response, upstream

GRACE = 60.0  # seconds an address stays allowed after it left the answer, at least
RETRY = 5.0  # seconds until a failed name is tried again
PATIENCE = 4.0  # seconds an agent's query waits for a name that is being resolved
MOST_WAITING = 64
OWN = "127.0.0.1"  # where the agent finds our resolver, in its own namespace

Resolved = dict[str, tuple[str, ...]]


@dataclass
class _Name:
    """One allowed name: what it resolves to and until when.

    It is resolved, and kept fresh, from the agent's first question on: a profile may name a dozen
    registries that a run never uses.
    """

    wanted: bool = False
    addresses: tuple[str, ...] = ()
    expires: float = 0.0
    known: bool = False  # resolved at least once
    leaving: dict[str, float] = field(default_factory=dict)  # address → allowed until


@dataclass
class _Waiting:
    """A query of the agent for a name that is not resolved yet."""

    query: Any
    until: float
    reply: Callable[[bytes], None]


class Names:
    """The thread. ``on_change`` and ``on_event`` are called from it."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        sockets: Sequence[socket.socket],
        resolvers: Sequence[tuple[str, int]],
        denied: Sequence[tuple[int, bytes]],
        ipv6: bool,
        on_change: Callable[[Resolved], None],
        on_event: Callable[[Event], None],
    ) -> None:
        # Without sockets the agent asks somebody else, so every name is wanted from the start.
        self._names = {name: _Name(wanted=not sockets) for name in names}
        self._resolvers = list(resolvers)
        self._denied = list(denied)
        self._ipv6 = ipv6
        self._on_change = on_change
        self._on_event = on_event
        self._waiting: list[_Waiting] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._stop = False
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        for sock in sockets:
            sock.setblocking(False)
            act = self._datagram if sock.type == socket.SOCK_DGRAM else self._accept
            self._selector.register(sock, selectors.EVENT_READ, act)
        self._sockets = list(sockets)
        self._done: list[tuple[str, tuple[str, ...] | None, float]] = []
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)

    def start(self) -> None:
        """Begin to resolve and to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering; waits for the thread."""
        self._stop = True
        self._waker.send(b"x")
        self._thread.join(TIMEOUT + 1)
        for sock in (*self._sockets, self._wake, self._waker):
            sock.close()
        self._selector.close()

    # ---- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            self._refresh()
            for key, _ in self._selector.select(self._next()):
                if key.data is None:
                    self._wake.recv(64)
                else:
                    key.data(key.fileobj)
            self._take_results()
            self._expire()

    def _next(self) -> float:
        times = [
            name.expires
            for text, name in self._names.items()
            if name.wanted and text not in self._busy
        ]
        times += [until for name in self._names.values() for until in name.leaving.values()]
        times += [waiting.until for waiting in self._waiting]
        return max(0.0, min(times, default=time.monotonic() + 60) - time.monotonic())

    def _refresh(self) -> None:
        """Start a query for each name that is due; one short thread each, so none blocks."""
        now = time.monotonic()
        for text, name in self._names.items():
            if name.wanted and name.expires <= now and text not in self._busy:
                self._busy.add(text)
                threading.Thread(target=self._query, args=(text,), daemon=True).start()

    def _query(self, text: str) -> None:
        found, ttl = resolve(text, self._resolvers, ipv6=self._ipv6)
        with self._lock:
            self._done.append((text, found, ttl))
        with suppress(OSError):  # closed meanwhile
            self._waker.send(b"x")

    def _take_results(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for text, found, ttl in done:
            self._busy.discard(text)
            self._learn(text, found, ttl)
        if done:
            self._on_change(self._allowed())
            self._answer_waiting()

    def _learn(self, text: str, found: tuple[str, ...] | None, ttl: float) -> None:
        name, now = self._names[text], time.monotonic()
        if found is None:
            name.expires = now + RETRY
            if not name.known:
                self._tell(text, None, "no server answered")
            return
        good = tuple(address for address in found if not self._is_denied(address))
        for address in set(found) - set(good):
            self._tell(text, address, "a name may not point there")
        for address in set(name.addresses) - set(good):
            name.leaving[address] = now + max(ttl, GRACE)
        for address in good:
            name.leaving.pop(address, None)
        name.addresses, name.known = good, True
        name.expires = now + min(max(ttl, TTL_FLOOR), TTL_CEILING)

    def _is_denied(self, address: str) -> bool:
        place = rules.key(ipaddress.ip_network(address))
        return any(rules.covers(prefix, place) for prefix in self._denied)

    def _allowed(self) -> Resolved:
        return {text: (*name.addresses, *name.leaving) for text, name in self._names.items()}

    def _expire(self) -> None:
        now = time.monotonic()
        changed = False
        for name in self._names.values():
            for address, until in list(name.leaving.items()):
                if until <= now:
                    del name.leaving[address]
                    changed = True
        if changed:
            self._on_change(self._allowed())
        late = [waiting for waiting in self._waiting if waiting.until <= now]
        self._waiting = [waiting for waiting in self._waiting if waiting.until > now]
        for waiting in late:
            waiting.reply(response(waiting.query, rcode="SERVFAIL"))

    # ---- the agent's queries --------------------------------------------------------------

    def _datagram(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                data, peer = sock.recvfrom(4096)
            except OSError:
                return

            def reply(answer: bytes, peer: Any = peer) -> None:
                with suppress(OSError):
                    sock.sendto(answer, peer)

            self._handle(data, reply)

    def _accept(self, sock: socket.socket) -> None:
        """DNS over TCP: one query, one answer; a slow client is not waited for."""
        try:
            client, _ = sock.accept()
        except OSError:
            return
        client.settimeout(0.5)

        def reply(answer: bytes) -> None:
            with suppress(OSError):
                client.sendall(len(answer).to_bytes(2, "big") + answer)
            client.close()

        try:
            size = int.from_bytes(client.recv(2), "big")
            data = client.recv(size)
        except OSError:
            client.close()
            return
        self._handle(data, reply)

    def _handle(self, data: bytes, reply: Callable[[bytes], None]) -> None:
        import dns.exception
        import dns.message
        import dns.opcode

        try:
            query = dns.message.from_wire(data)
            good = len(query.question) == 1 and query.opcode() == dns.opcode.QUERY
        except (dns.exception.DNSException, ValueError):
            return  # not a query: nobody to answer
        if not good or query.flags & 0x8000:
            return
        text = str(query.question[0].name).rstrip(".").lower()
        if text in ("localhost", "agent"):
            reply(response(query, ("127.0.0.1", "::1"), 60))
            return
        name = self._names.get(text)
        if name is None:
            self._on_event(
                Event(
                    kind="net.resolve",
                    verdict=Verdict.DENY,
                    guard=Guarantee.NET,
                    subject={"name": text},
                    rule="default",
                )
            )
            reply(response(query, rcode="REFUSED"))
            return
        name.wanted = True
        if not name.known and len(self._waiting) < MOST_WAITING:
            self._waiting.append(_Waiting(query, time.monotonic() + PATIENCE, reply))
        else:
            self._reply(query, name, reply)

    def _reply(self, query: Any, name: _Name, reply: Callable[[bytes], None]) -> None:
        left = max(1, int(name.expires - time.monotonic()))
        reply(response(query, name.addresses, left))

    def _answer_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            name = self._names[str(one.query.question[0].name).rstrip(".").lower()]
            if name.known:
                self._reply(one.query, name, one.reply)
            else:
                self._waiting.append(one)

    def _tell(self, text: str, address: str | None, why: str) -> None:
        subject = {"name": text, "why": why}
        if address is not None:
            subject["address"] = address
        self._on_event(Event(kind="net.unresolved", guard=Guarantee.NET, subject=subject))


def _inside(netns: int, address: str) -> list[socket.socket]:
    """UDP and TCP sockets on port 53 of the namespace's own loopback."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def body() -> None:
        try:
            libc.setns(netns, libc.CLONE_NEWNET)
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
                made.append(sock)
                sock.bind((address, 53))
            made[1].listen(16)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed:
        for sock in made:
            sock.close()
        raise SetupError(f"cannot make the agent's resolver: {failed[0].strerror}") from failed[0]
    return made


@contextmanager
def serve(
    names: Sequence[str],
    *,
    netns: int | None,
    resolvers: Sequence[str],
    own_addresses: Sequence[str],
    ipv6: bool,
    on_change: Callable[[Resolved], None],
    on_event: Callable[[Event], None],
    address: str = OWN,
) -> Iterator[Names]:
    """Resolve ``names`` and answer the agent inside ``netns`` until the context ends."""
    prefixes = {**rules.SPECIAL, **dict.fromkeys(own_addresses, "")}
    denied = [rules.key(ipaddress.ip_network(prefix)) for prefix in prefixes]
    served = Names(
        names,
        sockets=_inside(netns, address) if netns is not None else (),
        resolvers=upstream(resolvers),
        denied=denied,
        ipv6=ipv6,
        on_change=on_change,
        on_event=on_event,
    )
    served.start()
    try:
        yield served
    finally:
        served.close()


@contextmanager
def serve_plan(
    plan: NetPlan,
    netns: int | None,
    on_change: Callable[[Resolved], None],
    on_event: Callable[[Event], None],
    address: str = OWN,
) -> Iterator[None]:
    """`serve` what a plan needs: a resolver in the agent's namespace, or only fresh addresses.

    In host mode (no ``netns``) the agent asks the host's resolver, which a rule must allow.
    ``address`` is where in its namespace we answer.
    """
    wanted = of(plan.allow)
    if plan.mode is NetMode.NONE or (netns is None and not wanted):
        yield
        return
    with serve(
        wanted,
        netns=netns,
        resolvers=plan.resolvers,
        own_addresses=plan.host_addresses,
        ipv6=plan.ipv6 or plan.mode is NetMode.HOST,
        on_change=on_change,
        on_event=on_event,
        address=address,
    ):
        yield


def of(plan_rules: Sequence[str]) -> tuple[str, ...]:
    """The names in network rules, each once."""
    found = [rules.parse(text).name for text in plan_rules]
    return tuple(dict.fromkeys(name for name in found if name))


def resolv_conf(address: str = OWN) -> str:
    """The agent's /etc/resolv.conf."""
    return f"nameserver {address}\noptions timeout:5 attempts:1\n"
