"""Which sockets an agent gets as its standard streams."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from mis_run.stdio import leads_on


def _listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def _bound() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("")  # a name that the kernel chooses
    return sock


def _datagrams() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", 9))
    return sock


FREE: dict[str, Callable[[], socket.socket]] = {
    "listens": _listening,
    "unconnected": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "unix, unconnected": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "unix, bound": _bound,
    "connected datagrams": _datagrams,
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
}


@pytest.mark.parametrize("name", FREE)
def test_sockets_that_lead_on(name: str) -> None:
    """By each of these an agent could reach somebody whom no guard has judged."""
    with FREE[name]() as sock:
        assert leads_on(sock.fileno())


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_pairs_are_passed(kind: socket.SocketKind) -> None:
    """What ssh and service managers make for their children leads to them alone."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        assert not leads_on(one.fileno())
        one.send(b"still open")
        assert other.recv(20) == b"still open"


def test_connections_are_passed() -> None:
    """A stream that is connected was chosen by who handed it over."""
    with _listening() as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            assert not leads_on(client.fileno())
            assert not leads_on(accepted.fileno())
