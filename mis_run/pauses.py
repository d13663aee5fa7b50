"""The agent stands still: for a limit that was hit, for our want of CPU, for denials.

The last is how denials that the kernel gives at once are made late.  What a guard of ours answers
it answers late itself (`late`), and only the thread that asked waits.  The network's rules and the
kernel plane refuse in the kernel, where nobody may sleep for long; so the cgroup is frozen
for as long as the denials would have taken, from when we hear of them.  docs/defcon.md has what
that means and how exact it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from mis_run.events import Event, Verdict


def denials(events: Iterable[Event]) -> int:
    """How many denials follow one another: those of one thread. Threads wait side by side."""
    found = Counter(
        event.subject.get("thread", event.pid) for event in events if event.verdict is Verdict.DENY
    )
    return max(found.values(), default=0)


class Pauses:
    """Stops the agent for several reasons at once; it goes on when the last one is gone.

    ``freeze`` must not wait for the kernel's word: a task inside may be waiting for our answer.
    ``at`` calls something at a ``time.monotonic()``.  ``tell``, once set, hears it before the agent
    is frozen and when it goes on.
    """

    def __init__(
        self,
        freeze: Callable[[bool], object],
        at: Callable[[float, Callable[[], object]], None],
    ) -> None:
        self.tell: Callable[[bool], object] = lambda on: None
        self._freeze = freeze
        self._at = at
        self._reasons: set[str] = set()
        self._until = 0.0  # time.monotonic() seconds: of `hold`

    def set(self, reason: str, on: bool) -> bool:
        """Begin or end one reason; whether that is news."""
        if on == (reason in self._reasons):
            return False
        before = bool(self._reasons)
        self._reasons ^= {reason}
        if on and not before:
            self.tell(True)
            self._freeze(True)
        elif before and not self._reasons:
            self._freeze(False)
            self.tell(False)
        return True

    def hold(self, seconds: float) -> None:
        """Denials were given that should have taken ``seconds``, more than those before."""
        self.set("denials", on=True)
        self._until = max(self._until, time.monotonic()) + seconds
        self._at(self._until, self._release)

    def _release(self) -> None:
        if time.monotonic() >= self._until:
            self.set("denials", on=False)

    def end(self) -> None:
        """Every reason is gone."""
        for reason in tuple(self._reasons):
            self.set(reason, on=False)
