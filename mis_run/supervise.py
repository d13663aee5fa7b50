"""One loop over descriptors: signals, guards, the shim, timers. No threads, no callbacks hell.

Everything that happens while an agent runs is a descriptor that becomes readable or a time that
comes.  Guards answer the agent from here, so nothing in here may block.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Callback = Callable[[], object]
FORWARDED: tuple[signal.Signals, ...] = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT),
)


class Loop:
    """A selector, a heap of timers, and the signals that arrived."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callback]] = []
        self._ticket = itertools.count()
        self.beat = 0  # turns of the loop, what the watchdog's heartbeat proves

    def add(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` is readable (or hung up)."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def remove(self, fd: int) -> None:
        """Forget ``fd``; unknown ones are fine (teardown after a half-done setup)."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def at(self, when: float, callback: Callback) -> None:
        """Call ``callback`` once, at ``time.monotonic()`` seconds ``when``."""
        heapq.heappush(self._timers, (when, next(self._ticket), callback))

    def after(self, seconds: float, callback: Callback) -> None:
        """Call ``callback`` once, ``seconds`` from now."""
        self.at(time.monotonic() + seconds, callback)

    def every(self, seconds: float, callback: Callback) -> None:
        """Call ``callback`` every ``seconds`` from now on; a late turn is not made up for."""

        def again() -> None:
            self.after(seconds, again)
            callback()

        self.after(seconds, again)

    def turn(self, limit: float = 3600.0) -> None:
        """Wait for the next thing, at most ``limit`` seconds, and handle all that is due."""
        self.beat += 1
        wait = limit
        if self._timers:
            wait = min(wait, max(0.0, self._timers[0][0] - time.monotonic()))
        for key, _ in self._selector.select(wait):
            key.data()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def until(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Turn until ``done()``; False when ``timeout`` seconds passed first."""
        end = None if timeout is None else time.monotonic() + timeout
        while not done():
            left = 3600.0 if end is None else end - time.monotonic()
            if left <= 0:
                return False
            self.turn(left)
        return True

    def close(self) -> None:
        """Release the selector."""
        self._selector.close()


@contextmanager
def loop() -> Iterator[Loop]:
    """A loop that is closed on the way out."""
    made = Loop()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def signals(loop: Loop, handle: Callable[[int], None]) -> Iterator[None]:
    """Deliver FORWARDED signals to ``handle`` from inside the loop, restored on the way out.

    ``set_wakeup_fd`` writes each signal's number into a socket, so a signal is just another
    readable descriptor and never interrupts a step halfway.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = {number: signal.getsignal(number) for number in FORWARDED}
    for number in FORWARDED:
        signal.signal(number, _ignore)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def arrived() -> None:
        for number in os.read(reader.fileno(), 512):
            if number in FORWARDED:
                handle(number)

    loop.add(reader.fileno(), arrived)
    try:
        yield
    finally:
        loop.remove(reader.fileno())
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


def _ignore(number: int, frame: object) -> None:
    """Python needs a handler before it writes to the wakeup descriptor."""


def come_first() -> None:
    """Run before ordinary processes: we answer for the agent, and beat for the watchdog.

    To be called when the runtime has started: the agent must not inherit it.
    """
    with suppress(PermissionError):  # not root: everybody is equal
        os.setpriority(os.PRIO_PROCESS, 0, -10)
