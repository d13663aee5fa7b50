"""Things that other threads hand to the loop's thread, which takes them in its own turn."""

from __future__ import annotations

import socket
from contextlib import suppress

from mis_run.hints import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """`put` from any thread; `fileno` is readable while there is something to `take`."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._box, self._bell = socket.socketpair()
        self._box.setblocking(False)
        self._bell.setblocking(False)

    def fileno(self) -> int:
        """For the loop."""
        return self._box.fileno()

    def put(self, item: T) -> None:
        """Leave one thing."""
        self._items.append(item)
        with suppress(BlockingIOError):  # enough rings are waiting
            self._bell.send(b"x")

    def take(self) -> list[T]:
        """Everything that was left so far."""
        self._box.recv(4096)
        count = len(self._items)  # another thread may append meanwhile
        items = self._items[:count]
        del self._items[:count]
        return items
