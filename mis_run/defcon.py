"""DEFCON: how violations of one agent add up to its threat level. Pure but for the clock.

One tracker per cgroup: forks, threads, exec and setsid share it by construction, and nothing but
time and an operator lowers it.  docs/defcon.md has the levels and the counting in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mis_run.events import Event, Verdict
from mis_run.model import Defcon

BURST = 0.010  # seconds in which the identical act of the same process counts once
MOST_BURSTS = 1024


@dataclass(frozen=True, slots=True)
class Change:
    """The level changed, and the event that says so."""

    level: int
    event: Event


class Tracker:
    """Counts violations; `level` is 5 (normal) to 1 (emergency)."""

    def __init__(self, settings: Defcon, clock: Callable[[], float] = time.monotonic) -> None:
        self.level = 5
        self.count = 0
        self._settings = settings
        self._clock = clock
        self._last = clock()
        self._recent: dict[tuple[object, ...], float] = {}

    def violation(self, event: Event) -> Change | None:
        """Count one violation. A rule marked ``kill`` goes to level 1 at once."""
        now = self._clock()
        self._decay(now)
        if self._is_burst(event, now):
            return None
        self._last = now
        self.count += self._settings.weights.get(event.kind, 1)
        wanted = 1 if event.verdict is Verdict.KILL else self._level_of(self.count)
        return self._to(min(wanted, self.level), event.kind) if self._settings.act else None

    def delay(self) -> float:
        """Seconds by which a denial is answered late at the present level."""
        return (0.0, 0.0, *reversed(self._settings.delays), 0.0, 0.0)[self.level]

    def set(self, level: int) -> Change | None:
        """Set the level by hand; the count follows, so that decay and thresholds go on from it."""
        bounds = (0, *self._settings.thresholds)
        self.count = bounds[5 - level]
        self._last = self._clock()
        return self._to(level, "operator")

    def tick(self) -> Change | None:
        """Let time pass: called now and then, so that levels fall without a violation."""
        self._decay(self._clock())
        wanted = self._level_of(self.count)
        return self._to(wanted, "decay") if wanted > self.level else None

    def _decay(self, now: float) -> None:
        halvings = int((now - self._last) / self._settings.decay)
        if halvings > 0:
            self.count >>= min(halvings, 64)
            self._last += halvings * self._settings.decay

    def _is_burst(self, event: Event, now: float) -> bool:
        """The same process repeating the same act within BURST: a retry loop, one violation."""
        key = (event.kind, event.pid, tuple(sorted(map(str, event.subject.items()))))
        last = self._recent.get(key)
        self._recent[key] = now
        if len(self._recent) > MOST_BURSTS:
            self._recent = {k: t for k, t in self._recent.items() if now - t < BURST}
        # pid 0 is a packet: XDP already tells each destination once a second.
        return last is not None and now - last < BURST and event.pid != 0

    def _level_of(self, count: int) -> int:
        return 5 - sum(count >= threshold for threshold in self._settings.thresholds)

    def _to(self, level: int, cause: str) -> Change | None:
        if level == self.level:
            return None
        subject = {"from": self.level, "to": level, "violations": self.count, "cause": cause}
        self.level = level
        return Change(level, Event(kind="defcon.change", subject=subject))
