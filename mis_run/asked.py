"""The agent's side of name resolution: port 53 on its own loopback, and bytes that it may forge.

`Desk` turns datagrams and connections into `Question`s and takes the replies; what is answered is
decided in `names`.  Nothing here blocks on the agent, and nothing it sends raises.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from mis_run import namespace
from mis_run.dataclass import dataclass, field
from mis_run.errors import SetupError
from mis_run.hints import Any

OWN = "127.0.0.1"  # where an agent finds its resolver
MOST_CLIENTS = 32  # TCP connections at once
CLIENT_TIME = 5.0  # seconds from a connection to its question
AT_ONCE = 64  # datagrams read before others get their turn
WINDOW, MOST_ASKED = 0.1, 200  # seconds, and questions in them: a flood costs us little


@dataclass(frozen=True)
class Question:
    """One well-formed question. ``name`` is lower-case, without the last dot."""

    query: Any  # dns.message.Message
    name: str
    send: Callable[[bytes], None]
    limit: int = 65535  # bytes of the answer

    def answer(self, addresses: Sequence[str] = (), ttl: int = 0, rcode: str = "NOERROR") -> None:
        """Send those addresses that are of the kind asked for."""
        self.send(response(self.query, addresses, ttl, rcode, limit=self.limit))


def response(
    query: Any,
    addresses: Sequence[str] = (),
    ttl: int = 0,
    rcode: str = "NOERROR",
    *,
    limit: int = 65535,
) -> bytes:
    """The wire form of an answer; what is larger than ``limit`` says: ask by TCP."""
    import dns.exception
    import dns.flags
    import dns.message
    import dns.rcode
    import dns.rdatatype
    import dns.rrset

    made = dns.message.make_response(query, recursion_available=True)
    made.set_rcode(dns.rcode.from_text(rcode))
    asked = query.question[0]
    version = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(asked.rdtype)
    fitting = [text for text in addresses if ipaddress.ip_address(text).version == version]
    if fitting:
        kind = dns.rdatatype.to_text(asked.rdtype)
        made.answer.append(dns.rrset.from_text(asked.name, ttl, "IN", kind, *fitting))
    wire: bytes
    try:
        wire = made.to_wire(max_size=limit)
    except dns.exception.TooBig:
        made.answer.clear()
        made.flags |= dns.flags.TC
        wire = made.to_wire(max_size=65535)
    return wire


def question(data: bytes, send: Callable[[bytes], None], *, datagram: bool) -> Question | None:
    """What these bytes ask; None when they are no question, or none that can be answered."""
    import dns.message
    import dns.opcode
    import dns.rdataclass

    try:
        query = dns.message.from_wire(data)
        if len(query.question) != 1 or query.opcode() != dns.opcode.QUERY or query.flags & 0x8000:
            return None
        asked = query.question[0]
        refusal = response(query, rcode="REFUSED")  # whatever fails here would fail later
        name = str(asked.name).rstrip(".").lower()
    except Exception:  # noqa: BLE001 - whatever a parser of forged bytes raises: no question
        return None
    if asked.rdclass != dns.rdataclass.IN:  # ``version.bind`` and the like: none of our names
        send(refusal)
        return None
    # Without EDNS 512 bytes, RFC 1035 4.2.1.
    limit = min(max(query.payload, 512), 4096) if datagram else 65535
    return Question(query, name, send, limit)


def backwards(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address whose name this asks for; None when it is no such question."""
    import dns.exception
    import dns.name
    import dns.reversename

    if not name.endswith((".in-addr.arpa", ".ip6.arpa")):
        return None
    try:
        return ipaddress.ip_address(dns.reversename.to_address(dns.name.from_text(name)))
    except (dns.exception.DNSException, ValueError):
        return None


@dataclass
class _Client:
    """A TCP connection on which one question arrives, RFC 1035 4.2.2."""

    sock: socket.socket
    until: float
    data: bytearray = field(default_factory=bytearray)


class Desk:
    """The sockets, in somebody's selector: registered with a callback as data."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        sockets: Sequence[socket.socket],
        handle: Callable[[Question], None],
    ) -> None:
        self._selector = selector
        self._sockets = list(sockets)
        self._handle = handle
        self._clients: dict[socket.socket, _Client] = {}
        self._window, self._count = 0.0, 0
        for sock in sockets:
            sock.setblocking(False)
            act = self._datagrams if sock.type == socket.SOCK_DGRAM else self._accept
            selector.register(sock, selectors.EVENT_READ, partial(act, sock))

    def close(self) -> None:
        """Close everything."""
        for sock in (*self._sockets, *self._clients):
            sock.close()

    def next(self) -> float | None:
        """When `expire` has something to do, in monotonic seconds."""
        return min((client.until for client in self._clients.values()), default=None)

    def expire(self) -> None:
        """Hang up on clients that asked nothing in time."""
        now = time.monotonic()
        for client in [one for one in self._clients.values() if one.until <= now]:
            self._forget(client)
            client.sock.close()

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, peer = sock.recvfrom(4096)
            except OSError:
                return
            self._pace()
            if asked := question(data, partial(_send_to, sock, peer), datagram=True):
                self._handle(asked)

    def _accept(self, sock: socket.socket) -> None:
        try:
            client, _ = sock.accept()
        except OSError:
            return
        self._pace()
        if len(self._clients) >= MOST_CLIENTS:
            client.close()
            return
        client.setblocking(False)
        made = _Client(client, time.monotonic() + CLIENT_TIME)
        self._clients[client] = made
        self._selector.register(client, selectors.EVENT_READ, partial(self._receive, made))

    def _receive(self, client: _Client) -> None:
        try:
            more = client.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        client.data += more
        size = int.from_bytes(client.data[:2], "big")
        if more and (len(client.data) < 2 or len(client.data) < size + 2):
            return
        self._forget(client)
        send = partial(_send_and_close, client.sock)
        asked = question(bytes(client.data[2 : size + 2]), send, datagram=False) if more else None
        if asked is None:
            client.sock.close()
        else:
            self._handle(asked)

    def _pace(self) -> None:
        """At most MOST_ASKED in a WINDOW: the rest waits in, or falls out of, the agent's socket.

        We run outside the agent's CPU limit.
        """
        now = time.monotonic()
        if now - self._window >= WINDOW:
            self._window, self._count = now, 0
        self._count += 1
        if self._count > MOST_ASKED:
            time.sleep(self._window + WINDOW - now)

    def _forget(self, client: _Client) -> None:
        self._selector.unregister(client.sock)
        del self._clients[client.sock]


def _send_to(sock: socket.socket, peer: Any, answer: bytes) -> None:
    with suppress(OSError):  # the agent does not read: its loss
        sock.sendto(answer, peer)


def _send_and_close(sock: socket.socket, answer: bytes) -> None:
    with suppress(OSError):  # as above; an answer fits into the socket's buffer
        sock.send(len(answer).to_bytes(2, "big") + answer)
    sock.close()


def sockets(netns: int, address: str = OWN) -> list[socket.socket]:
    """UDP and TCP sockets on port 53 of ``address``, on a namespace's loopback.

    Raises SetupError.
    """

    def make() -> list[socket.socket]:
        with ExitStack() as stack:
            made = []
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
                sock.bind((address, 53))
                made.append(sock)
            made[1].listen(16)
            stack.pop_all()
        return made

    try:
        return namespace.within(netns, make)
    except OSError as error:
        raise SetupError(f"cannot make the agent's resolver: {error.strerror}") from error
