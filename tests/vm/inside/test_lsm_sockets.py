"""The kernel plane, sockets: families, and the sockets of others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mis_run.guards import lsm, lsm_abi

OK, EPERM = 0, errno.EPERM
STREAM, DGRAM, RAW, SEQPACKET = (
    socket.SOCK_STREAM,
    socket.SOCK_DGRAM,
    socket.SOCK_RAW,
    socket.SOCK_SEQPACKET,
)
pytestmark = pytest.mark.parametrize("tree", ["tmpfs"], indirect=True, scope="module")

FAMILIES = {
    # name: (family, type, protocol, refused)
    "unix": (socket.AF_UNIX, STREAM, 0, False),
    "tcp": (socket.AF_INET, STREAM, 0, False),
    "udp 6": (socket.AF_INET6, DGRAM, 0, False),
    "netlink": (socket.AF_NETLINK, RAW, 0, False),
    "netlink, packet filters": (socket.AF_NETLINK, RAW, 12, True),
    "raw": (socket.AF_INET, RAW, 1, True),
    "raw 6": (socket.AF_INET6, RAW, 58, True),
    "packet": (socket.AF_PACKET, RAW, 0, True),
    "crypto": (38, SEQPACKET, 0, True),
    "vsock": (40, STREAM, 0, True),
    "xdp": (44, RAW, 0, True),
    "bluetooth": (31, RAW, 1, True),
}


@pytest.fixture(scope="module")
def mighty(tree: Any, cgroups: Any) -> Iterator[tuple[Path, lsm.LsmGuard]]:
    """An agent with all capabilities, so that the hook and not a capability decides."""
    folder = cgroups()
    policy = tree.policy(capabilities=lsm_abi.CAPABILITIES, defcon=lsm.Defcon(act=False))
    with lsm.attach(folder, policy) as guard:
        yield folder, guard


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tree: Any, mighty: tuple[Path, lsm.LsmGuard], neighbour: Path) -> None:
    """Kinds of sockets that no network rule could speak of are refused, and told."""
    family, kind, protocol, refused = FAMILIES[name]
    group, guard = mighty
    guard.read()

    def act() -> None:
        socket.socket(family, kind, protocol).close()

    assert (lsm.in_cgroup(group, act) == EPERM) == refused
    assert [event.kind for event in guard.read()] == (["net.socket"] if refused else [])
    assert lsm.in_cgroup(neighbour, act) != EPERM


@pytest.fixture
def server(tree: Any) -> Iterator[Callable[[str | bytes, int], None]]:
    """Makes sockets of somebody outside."""
    made: list[socket.socket] = []

    def make(name: str | bytes, kind: int) -> None:
        if isinstance(name, str):
            Path(name).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.bind(name)
        if kind != DGRAM:
            sock.listen(16)
        made.append(sock)

    yield make
    for sock in made:
        sock.close()


def use(name: str | bytes, kind: int, how: str) -> Callable[[], object]:
    def act() -> None:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            if how == "send":
                sock.sendto(b"x", name)
            else:
                sock.connect(name)

    return act


@pytest.mark.parametrize(("place", "expected"), [("open", OK), ("ro", EPERM), ("hidden", EPERM)])
@pytest.mark.parametrize(
    ("kind", "how"),
    [(STREAM, "connect"), (SEQPACKET, "connect"), (DGRAM, "connect"), (DGRAM, "send")],
)
def test_a_service_by_path(
    place: str,
    expected: int,
    kind: int,
    how: str,
    tree: Any,
    guarded: tuple[Path, lsm.LsmGuard],
    neighbour: Path,
    server: Any,
) -> None:
    """A socket of the host in a folder of the agent: to be used by whoever may write there."""
    path = str(getattr(tree, place) / "service")
    server(path, kind)
    group, guard = guarded
    guard.read()
    assert lsm.in_cgroup(group, use(path, kind, how)) == expected
    events = guard.read()
    assert [event.kind for event in events] == (["net.unix"] if expected else [])
    if expected:
        assert events[0].subject["path"] == path
    assert lsm.in_cgroup(neighbour, use(path, kind, how)) == OK


@pytest.mark.parametrize(("kind", "how"), [(STREAM, "connect"), (DGRAM, "send")])
def test_a_service_by_abstract_name(
    kind: int,
    how: str,
    tree: Any,
    guarded: tuple[Path, lsm.LsmGuard],
    neighbour: Path,
    server: Any,
) -> None:
    """An abstract name of the host, where the agent shares its network namespace."""
    server(b"\0mis-test", kind)
    group, guard = guarded
    guard.read()
    assert lsm.in_cgroup(group, use(b"\0mis-test", kind, how)) == EPERM
    assert [event.kind for event in guard.read()] == ["net.unix"]
    assert lsm.in_cgroup(neighbour, use(b"\0mis-test", kind, how)) == OK


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_within_the_agent(kind: int, tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """Its own sockets, by path, by abstract name and without a name, are its own business."""
    group, guard = guarded
    path = tree.open / "own"
    path.unlink(missing_ok=True)

    def act() -> None:
        for name in (str(path), b"\0mis-own"):
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.bind(name)
                if kind != DGRAM:
                    sock.listen(1)
                use(name, kind, "connect")()
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        one.send(b"x")
        other.recv(1)

    guard.read()
    assert lsm.in_cgroup(group, act) == OK
    assert guard.read() == []


@pytest.mark.parametrize("kind", [STREAM, DGRAM, SEQPACKET])
def test_an_inherited_pair(kind: int, tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """A pair that the launcher made and the agent got one end of."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    assert lsm.in_cgroup(guarded[0], lambda: os.write(one.fileno(), b"x")) == OK
    assert other.recv(1) == b"x"


# ---- sockets of the internet that somebody outside made ---------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A service of the host, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


PLACES: dict[str, Callable[[socket.socket, Any], object]] = {
    "connect": lambda sock, to: sock.connect(to),
    "bind": lambda sock, to: sock.bind(("127.0.0.1", 0)),
    "listen": lambda sock, to: sock.listen(1),
}


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("how", PLACES)
def test_a_socket_of_somebody_else(
    how: str, family: int, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path,
    listener: socket.socket,
) -> None:  # fmt: skip
    """Inherited from outside it goes nowhere that nobody judged; one of its own does."""
    group, guard = guarded
    address = listener.getsockname()

    def act(sock: socket.socket) -> None:
        if family == socket.AF_INET:
            PLACES[how](sock, address)
        elif how == "listen":
            sock.listen(1)
        else:
            getattr(sock, how)(("::ffff:127.0.0.1", address[1] if how == "connect" else 0))

    guard.read()
    with socket.socket(family, STREAM) as sock:
        assert lsm.in_cgroup(group, lambda: act(sock)) == EPERM
        assert [event.kind for event in guard.read()] == ["net.foreign"]
        assert lsm.in_cgroup(neighbour, lambda: act(sock)) == OK
    assert lsm.in_cgroup(group, lambda: act(socket.socket(family, STREAM))) == OK
    assert guard.read() == []


def test_a_connection_of_somebody_else(
    tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path, listener: socket.socket
) -> None:
    """It goes on where it is, as standard input may be one; it is not led elsewhere."""
    group, guard = guarded

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"x")

    def elsewhere(sock: socket.socket) -> None:
        dissolve(sock)
        sock.connect(listener.getsockname())

    guard.read()
    for place, expected in ((group, EPERM), (neighbour, OK)):
        with socket.create_connection(listener.getsockname()) as sock:
            other, _ = listener.accept()
            assert lsm.in_cgroup(place, lambda sock=sock: talk(sock)) == OK
            assert other.recv(1) == b"x"
            assert lsm.in_cgroup(place, lambda sock=sock: elsewhere(sock)) == expected
            other.close()
    assert [event.kind for event in guard.read()] == ["net.foreign"]


def dissolve(sock: socket.socket) -> None:
    """connect(2) to no family: the connection ends, the socket can have another."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), "connect")


@pytest.mark.parametrize(
    ("what", "arrives"),
    [("udp", False), ("tcp", False), ("listening", False), ("netlink", False), ("packet", False),
     ("connected", True), ("unix", True)],
)  # fmt: skip
def test_handed_over(
    what: str, arrives: bool, tree: Any, guarded: tuple[Path, lsm.LsmGuard], neighbour: Path,
    listener: socket.socket,
) -> None:  # fmt: skip
    """Over a UNIX socket comes only what can do no more than go on with a conversation."""
    group, guard = guarded
    made = {
        "udp": lambda: socket.socket(socket.AF_INET, DGRAM),
        "tcp": lambda: socket.socket(socket.AF_INET, STREAM),
        "listening": listener.dup,
        "netlink": lambda: socket.socket(socket.AF_NETLINK, RAW, 0),
        "packet": lambda: socket.socket(socket.AF_PACKET, RAW, 0),
        "connected": lambda: socket.create_connection(listener.getsockname()),
        "unix": lambda: socket.socket(socket.AF_UNIX, DGRAM),
    }[what]
    guard.read()
    for place, expected in ((group, arrives), (neighbour, True)):
        here, there = socket.socketpair()
        with here, there, made() as sock:
            socket.send_fds(here, [b"x"], [sock.fileno()])

            def receive(there: socket.socket = there) -> None:
                _, fds, _, _ = socket.recv_fds(there, 1, 1)
                if not fds:
                    raise OSError(EPERM, "it did not arrive")

            assert (lsm.in_cgroup(place, receive) == OK) == expected
    assert [event.kind for event in guard.read()] == ([] if arrives else ["net.foreign"])


def test_one_of_its_own_comes_back(tree: Any, guarded: tuple[Path, lsm.LsmGuard]) -> None:
    """What the agent made itself it hands to its own as it likes."""
    group, guard = guarded

    def act() -> None:
        here, there = socket.socketpair()
        with socket.socket(socket.AF_INET, DGRAM) as sock:
            socket.send_fds(here, [b"x"], [sock.fileno()])
        _, fds, _, _ = socket.recv_fds(there, 1, 1)
        socket.socket(fileno=fds[0]).connect(("127.0.0.1", 9))

    guard.read()
    assert lsm.in_cgroup(group, act) == OK
    assert guard.read() == []
