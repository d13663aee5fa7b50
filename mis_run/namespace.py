"""Network namespaces without names: a descriptor holds one, a thread works in it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from mis_run.errors import SetupError
from mis_run.hints import TypeVar
from mis_run.later import Later
from mis_run.linux import libc

T = TypeVar("T")


_ahead: list[Later[int]] = []  # made to see that it can be, and not used yet


def prepare() -> Later[int]:
    """Begin to make one, for the next `make`: trying it costs nothing then."""
    if not _ahead:
        _ahead.append(Later(_make))
    return _ahead[0]


def forget() -> None:
    """Give up what `prepare` made."""
    while _ahead:
        with suppress(OSError):
            os.close(_ahead.pop().result())


def make() -> int:
    """A new network namespace with loopback up; its descriptor. Raises SetupError."""
    try:
        return (_ahead.pop() if _ahead else Later(_make)).result()
    except OSError as error:
        raise SetupError(f"cannot make a network namespace: {error}", hint="mis doctor") from error


def _make() -> int:
    """In a thread that never comes back to our namespace: unshare(2) and setns(2) concern the
    calling thread alone, so the rest of the process does not move."""
    libc.unshare(libc.CLONE_NEWNET)
    loopback_up()
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def within(netns: int, function: Callable[[], T]) -> T:
    """Run ``function``, and the processes it starts, inside a namespace; raises what it raises."""

    def body() -> T:
        libc.setns(netns, libc.CLONE_NEWNET)
        return function()

    return Later(body).result()


def loopback_up() -> None:
    """SIOCSIFFLAGS IFF_UP on lo, netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))
