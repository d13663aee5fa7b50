"""Answers given on purpose late: how DEFCON slows an agent down without using its or our CPU.

A heap of due answers and one timer descriptor for the event loop.  The timer is set `LEAD` before
the answer is due and the rest is waited out actively, because waking a Python process takes tens
of microseconds that vary.  So at most `LEAD` at a time is spent not serving anybody else; the
agent's other threads wait that much longer, other agents have a supervisor of their own.
docs/defcon.md has the precision measured.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mis_run.linux import timerfd

LEAD = 0.0002
"""Seconds before an answer is due at which we wake up and wait actively."""

Callback = Callable[[], None]


class Late:
    """Callbacks with a due time, run from an event loop that watches `fileno`."""

    def __init__(self) -> None:
        self._timer = timerfd.create()
        self._heap: list[tuple[float, int, Callback]] = []
        self._ticket = itertools.count()
        self._armed = 0.0

    def fileno(self) -> int:
        """Readable when `run` has something to do."""
        return self._timer

    def __len__(self) -> int:
        """How many callbacks wait."""
        return len(self._heap)

    def push(self, due: float, callback: Callback) -> None:
        """Call ``callback`` at ``time.monotonic()`` seconds ``due``, from inside `run`."""
        heapq.heappush(self._heap, (due, next(self._ticket), callback))
        self._arm()

    def run(self) -> None:
        """Call what is due, waiting actively for what is due within LEAD from now.

        Call it when `fileno` is readable, and after `push` when the loop's turn ends: what is due
        sooner than a wake-up takes is then in time.  Never longer than LEAD beyond its callbacks.
        """
        if not self._heap:
            return
        limit = time.monotonic() + LEAD
        while self._heap and self._heap[0][0] <= limit:
            due, _, callback = heapq.heappop(self._heap)
            while time.monotonic() < due:
                pass
            callback()
        timerfd.drain(self._timer)
        self._armed = 0.0
        self._arm()

    def flush(self) -> None:
        """Call everything that waits, now."""
        while self._heap:
            heapq.heappop(self._heap)[2]()

    def _arm(self) -> None:
        if self._heap and self._heap[0][0] != self._armed:
            self._armed = self._heap[0][0]
            timerfd.arm(self._timer, self._armed - LEAD)


@contextmanager
def late() -> Iterator[Late]:
    """A `Late` that gives every outstanding answer, and its descriptor back, on the way out."""
    made = Late()
    try:
        yield made
    finally:
        made.flush()
        os.close(made.fileno())
