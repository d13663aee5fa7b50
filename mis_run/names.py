"""Names in network rules: resolved by us, refreshed by their TTL, answered to the agent by us.

A thread of the supervisor answers the agent's questions for what a rule names and nothing else, and
keeps those answers fresh.  The BPF table is updated before an answer leaves, so an address the
agent learns is already allowed; an address that left an answer stays allowed for a grace, for
connections that still use it.  The sockets are in `asked`, the upstream questions in `resolve`,
what an answer means for a name in `known`.

A name can never make the host reachable: `table.compile` ignores addresses inside denied prefixes,
and they are left out of the answers too (DNS rebinding), unless a rule names the address itself.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from mis_run import asked, rules, table
from mis_run.errors import MisError
from mis_run.events import Event, Guarantee, Verdict
from mis_run.known import Name
from mis_run.model import NetMode, NetPlan
from mis_run.resolve import resolve, upstream

RETRY_ASKED = 1.0  # seconds until a failed name is tried again while the agent asks for it
PATIENCE = 4.0  # seconds an agent's question waits for a name that is being resolved
MOST_WAITING = 64
MOST_UNLISTED = 256  # names that no rule has, in audit mode

Resolved = dict[str, tuple[str, ...]]


class Names:
    """The thread. ``on_change`` and ``on_event`` are called from it."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        sockets: Sequence[socket.socket],
        resolvers: Sequence[tuple[str, int]],
        is_denied: Callable[[str], bool],
        ipv6: bool,
        on_change: Callable[[Resolved], None],
        on_event: Callable[[Event], None],
        enforce: bool = True,
    ) -> None:
        # Without sockets the agent asks somebody else, so every name is wanted from the start.
        self._names = {name: Name(wanted=not sockets) for name in names}
        self._resolvers = list(resolvers)
        self._is_denied = is_denied
        self._ipv6 = ipv6
        self._on_change = on_change
        self._on_event = on_event
        self._enforce = enforce
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._stop = False
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(64))
        self._desk = asked.Desk(self._selector, sockets, self._asked)
        self._done: list[tuple[str, tuple[str, ...] | None, float]] = []
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)

    def start(self) -> None:
        """Begin to resolve and to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering, once; waits for the thread, which never blocks for long."""
        if self._stop:
            return
        self._stop = True
        self._waker.send(b"x")
        self._thread.join()
        self._desk.close()
        self._wake.close()
        self._waker.close()
        self._selector.close()

    # ---- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop:
            self._refresh()
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._take_results()
            self._expire()
            self._desk.expire()

    def _pause(self) -> float:
        """Seconds until something is due."""
        times = [self._desk.next() or time.monotonic() + 60]
        for text, name in self._names.items():
            times += [name.expires] if name.wanted and text not in self._busy else []
            times += name.leaving.values()
            times += [until for until, _ in name.waiting]
        return max(0.0, min(times) - time.monotonic())

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
            name = self._names[text]
            if found is None:
                if name.failures == 0:
                    self._tell(text, "no server answered")
                name.fail()
            elif self._learn(text, name, found, ttl):
                name.reply_waiting()

    def _learn(self, text: str, name: Name, found: tuple[str, ...], ttl: float) -> bool:
        """Take an answer over, into the BPF table first; False when that refuses it."""
        good = tuple(address for address in found if not self._is_denied(address))
        for address in found:
            if address not in good and address not in name.addresses:
                self._tell(text, "a name may not point there", address)
        before = (name.addresses, dict(name.leaving), name.known)
        name.learn(good if self._enforce else found, ttl)
        try:
            self._publish()
        except (MisError, OSError) as error:
            name.addresses, name.leaving, name.known = before
            name.fail()
            self._tell(text, f"its addresses cannot be allowed: {error}")
            return False
        return True

    def _publish(self) -> None:
        self._on_change(
            {
                text: (*name.addresses, *name.leaving)
                for text, name in self._names.items()
                if name.listed
            }
        )

    def _expire(self) -> None:
        now = time.monotonic()
        left = [name.expire(now) for name in self._names.values()]
        if any(left):
            try:
                self._publish()
            except (MisError, OSError) as error:
                self._tell("", f"addresses that left cannot be taken back: {error}")

    # ---- the agent's questions ------------------------------------------------------------

    def _asked(self, question: asked.Question) -> None:
        text = question.name
        if text in ("localhost", "agent") or text.endswith(".localhost"):  # RFC 6761, 6.3
            question.answer(("127.0.0.1", "::1") if self._ipv6 else ("127.0.0.1",), 60)
            return
        name = self._names.get(text)
        if name is None and self._tells_nothing(text):
            question.answer(rcode="NXDOMAIN")
            return
        if name is None or not name.listed:
            self._deny(text)
            if name is None and (self._enforce or len(self._names) >= MOST_UNLISTED):
                question.answer(rcode="REFUSED")
                return
        if name is None:
            name = self._names[text] = Name(listed=False)
        if name.known:
            name.wanted = True
            name.reply(question)
        elif sum(len(one.waiting) for one in self._names.values()) < MOST_WAITING:
            if name.wanted:
                name.expires = min(name.expires, time.monotonic() + RETRY_ASKED)
            name.wanted = True
            name.waiting.append((time.monotonic() + PATIENCE, question))
        else:
            question.answer(rcode="SERVFAIL")

    def _tells_nothing(self, text: str) -> bool:
        """Whether this asks backwards for an address that the agent may have anyway.

        Libraries do, to log a peer's name: no violation, but no answer either.
        """
        found = asked.backwards(text)
        if found is None:
            return False
        own = (ipaddress.ip_network(pool) for pool in (rules.POOL4, rules.POOL6))
        known = (one for name in self._names.values() for one in (*name.addresses, *name.leaving))
        return (
            found.is_loopback
            or any(found in pool for pool in own)
            or any(found == ipaddress.ip_address(one) for one in known)
        )

    def _deny(self, text: str) -> None:
        self._on_event(
            Event(
                kind="net.resolve",
                verdict=Verdict.DENY if self._enforce else Verdict.AUDIT,
                guard=Guarantee.NET,
                subject={"name": text},
                rule="default",
            )
        )

    def _tell(self, text: str, why: str, address: str = "") -> None:
        subject = {"name": text, "why": why} | ({"address": address} if address else {})
        self._on_event(Event(kind="net.unresolved", guard=Guarantee.NET, subject=subject))


@contextmanager
def serve_plan(
    plan: NetPlan,
    netns: int | None,
    on_change: Callable[[Resolved], None],
    on_event: Callable[[Event], None],
    *,
    enforce: bool,
    address: str = asked.OWN,
) -> Iterator[Callable[[], None]]:
    """Resolve a plan's names, and answer the agent inside ``netns``, until the context ends or what
    it gives is called.

    In host mode (no ``netns``) the agent asks the host's resolver, which a rule must allow.
    ``enforce`` false: names that no rule has are resolved for the agent too, with an event.
    ``address`` is where in its namespace we answer.  Raises SetupError, UsageError.
    """
    wanted = of(plan.allow)
    if plan.mode is NetMode.NONE or (netns is None and not wanted):
        yield lambda: None
        return
    resolvers = upstream(plan.resolvers)
    served = Names(
        wanted,
        sockets=asked.sockets(netns, address) if netns is not None else (),
        resolvers=resolvers,
        is_denied=table.denier(map(rules.parse, plan.allow), plan.host_addresses),
        ipv6=plan.ipv6 or plan.mode is NetMode.HOST,
        on_change=on_change,
        on_event=on_event,
        enforce=enforce,
    )
    served.start()
    try:
        yield served.close
    finally:
        served.close()


def of(plan_rules: Sequence[str]) -> tuple[str, ...]:
    """The names in network rules, each once."""
    found = [rules.parse(text).name for text in plan_rules]
    return tuple(dict.fromkeys(name for name in found if name))


def resolv_conf(address: str = asked.OWN) -> str:
    """The agent's /etc/resolv.conf."""
    return f"nameserver {address}\noptions timeout:5 attempts:1\n"
