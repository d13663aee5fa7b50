"""DEFCON: how violations of one agent add up to its threat level. Pure but for the clock.

One tracker per cgroup: forks, threads, exec, setsid, cgroup moves inside it and reused PIDs share
it by construction, and nothing but time and an operator lowers it.  docs/defcon.md has the levels
and the counting in words.  Out of scope: carrying out an effect (guards read `Tracker.effects`) and
killing (`follow`, `cgroup_kill`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mis_run.dataclass import dataclass
from mis_run.events import Event, Verdict
from mis_run.model import Defcon

NORMAL, WARNING, ELEVATED, CRITICAL, EMERGENCY = 5, 4, 3, 2, 1
NAMES = {5: "normal", 4: "warning", 3: "elevated", 2: "critical", 1: "emergency"}

BURST = 0.010
"""Seconds in which identical acts of one thread may be one violation."""
RETRIES = 3
"""How many of them: a library tries a few times, a loop is an attack and counts from then on."""
MOST_BURSTS = 1024

SPIN = 0.0002
"""Seconds that a denial may wait inside the kernel, where the CPU is nobody else's meanwhile."""

NEVER = 0
TAINT = "taint"
"""Cause of a change that no violation made."""
EFFECTS: Mapping[str, int] = {
    "writes": 3,
    "binaries": 3,
    "destinations": 3,
    "wx_memory": 3,
    "explicit": 2,
    "kill": 1,
}
"""Effect → level at which it begins, in force below too. A profile may move each (0: never)."""


@dataclass(frozen=True)
class Effects:
    """What the present level means for verdicts; every field False is business as usual.

    ``writes``: writes outside the workspace are denied.  ``binaries``: executing what was not
    executed before in this run.  ``destinations``: peers not talked to before.  ``wx_memory``:
    memory writable and executable at once.  ``explicit``: all that no rule names explicitly (rules
    of a named set or a pattern do not count).  ``kill``: kill, prove empty.
    """

    writes: bool = False
    binaries: bool = False
    destinations: bool = False
    wx_memory: bool = False
    explicit: bool = False
    kill: bool = False


CALM = Effects()


def effects_at(level: int, begins: Mapping[str, int] = EFFECTS) -> Effects:
    """The effects at ``level``, where ``begins`` overrides entries of EFFECTS."""
    first = {**EFFECTS, **begins}
    return Effects(**{name: level <= first[name] for name in EFFECTS})


@dataclass(frozen=True)
class Stance:
    """How a guard carries out its denials now; asked at every one of them.

    ``enforce`` false only records.  ``delay`` gives the seconds by which an answer is late,
    ``marked`` whether the agent is marked (`Tracker.mark`).
    """

    enforce: bool = True
    delay: Callable[[], float] = lambda: 0.0
    effects: Callable[[], Effects] = lambda: CALM
    marked: Callable[[], bool] = lambda: False


ENFORCING = Stance()


@dataclass(frozen=True)
class Change:
    """The level changed: to ``level``, at ``time.monotonic()`` seconds ``at``, as ``event`` says.

    ``at`` is when the deciding violation was counted, from which the time to an empty cgroup runs;
    ``kills`` whether the agent must be killed now.
    """

    level: int
    event: Event
    at: float = 0.0
    kills: bool = False


class Tracker:
    """Counts violations; `level` is 5 (normal) to 1 (emergency), `count` what it follows from.

    Invariants (tests/unit/test_defcon.py): violations alone never raise the level's number; the
    level is the one that `count` has in the thresholds, or that of a mark if that is lower, unless
    a rule marked ``kill`` or an operator set it; level 1 is final as long as no operator changes
    it.  With ``act`` false levels are counted and shown, but there is no delay, no effect and no
    `Change` that kills.
    """

    def __init__(self, settings: Defcon, clock: Callable[[], float] = time.monotonic) -> None:
        self.level = NORMAL
        self.count = 0
        self.marked = False  # it has opened what the profile taints
        self._calmest = NORMAL  # how far a level may rise again by itself
        self._settings = settings
        self._clock = clock
        self._last = clock()
        self._recent: dict[tuple[object, ...], tuple[float, int]] = {}
        self._effects = {level: effects_at(level, settings.effects) for level in NAMES}

    @property
    def effects(self) -> Effects:
        """What the present level means for verdicts."""
        return self._effects[self.level] if self._settings.act else CALM

    def delay(self) -> float:
        """Seconds by which a denial is answered late at the present level."""
        if not self._settings.act:
            return 0.0
        return (0.0, 0.0, *reversed(self._settings.delays), 0.0)[self.level]

    def stance(self, *, enforce: bool) -> Stance:
        """What guards that follow this tracker are attached with."""
        return Stance(enforce, self.delay, lambda: self.effects, lambda: self.marked)

    def violation(self, event: Event) -> Change | None:
        """Count one violation. A rule marked ``kill`` goes to level 1 at once.

        Events that are no violation, and acts that `_is_retry` takes for one already counted,
        add nothing.
        """
        if not event.violation:
            return None
        now = self._clock()
        before = self.level
        self._decay(now)
        added = weight(event.kind, self._settings.weights)
        if event.verdict is Verdict.KILL:
            added = max(added, self._settings.thresholds[3] - self.count)
        elif self._is_retry(event, now):
            added = 0
        if added:
            self._last = now
            self.count += added
            self.level = min(self.level, self._level_of(self.count))
        return self._changed(before, event.kind if self.level < before else "decay", now)

    def set(self, level: int, cause: str = "operator") -> Change | None:
        """Set the level by hand; the count follows, so that decay and thresholds go on from it."""
        now = self._clock()
        before, self.level = self.level, level
        self.count = (0, *self._settings.thresholds)[NORMAL - level]
        self._last = now
        self._recent.clear()
        if level > self._calmest:
            self._calmest = NORMAL  # an operator has lifted what the mark does
        return self._changed(before, cause, now)

    def mark(self, level: int) -> Change | None:
        """The agent has read what it must not carry away: from now on its level is at most
        ``level`` (NEVER: as it is), until an operator sets a higher one.  It counts nothing.
        """
        now, before = self._clock(), self.level
        self.marked = True
        self._calmest = min(self._calmest, level or NORMAL)
        self.level = min(self.level, self._calmest)
        return self._changed(before, TAINT, now)

    def tick(self) -> Change | None:
        """Let time pass: to be called at `next_deadline`, so that levels fall by themselves."""
        now = self._clock()
        before = self.level
        self._decay(now)
        return self._changed(before, "decay", now)

    def next_deadline(self) -> float | None:
        """When the count halves next (the clock's seconds); None when there is nothing to halve."""
        if self.count == 0 or self._final:
            return None
        return self._last + self._settings.decay

    @property
    def _final(self) -> bool:
        """Level 1 is an end: what is being killed does not recover."""
        return self.level == EMERGENCY and self._settings.act

    def _decay(self, now: float) -> None:
        """Halve once per ``decay`` seconds without a violation."""
        halvings = int((now - self._last) / self._settings.decay)
        if halvings <= 0 or self._final:
            return
        self.count >>= min(halvings, 64)
        self._last += halvings * self._settings.decay
        self.level = max(self.level, min(self._level_of(self.count), self._calmest))

    def _is_retry(self, event: Event, now: float) -> bool:
        """The same thread repeating the same act: the first RETRIES within BURST are one act."""
        if event.repeated is not None:  # the kernel looked, when it was done
            return event.repeated
        if event.pid == 0:  # a packet: the wire already tells each destination once a second
            return False
        key = (event.kind, event.pid, tuple(sorted(map(str, event.subject.items()))))
        began, seen = self._recent.get(key, (float("-inf"), 0))
        if now - began >= BURST:
            began, seen = now, 0
        self._recent[key] = (began, seen + 1)
        if len(self._recent) > MOST_BURSTS:
            self._recent = {k: v for k, v in self._recent.items() if now - v[0] < BURST}
        return 0 < seen <= RETRIES

    def _level_of(self, count: int) -> int:
        return NORMAL - sum(count >= threshold for threshold in self._settings.thresholds)

    def _changed(self, before: int, cause: str, now: float) -> Change | None:
        if self.level == before:
            return None
        subject = {"from": before, "to": self.level, "violations": self.count, "cause": cause}
        if not self._settings.act:
            subject["acts"] = False
        event = Event(kind="defcon.change", subject=subject)
        return Change(self.level, event, now, kills=self.effects.kill)


def spin(delay: float) -> int:
    """Nanoseconds of a ``delay`` (seconds) that a program in the kernel waits; the rest of it the
    agent is frozen (`pauses`), for which this gives the supervisor time."""
    return int(min(delay, SPIN) * 1e9)


def weight(kind: str, weights: Mapping[str, int]) -> int:
    """How much a violation of ``kind`` counts: by its kind, by its area (``net.*``), else 1."""
    area = kind.partition(".")[0] + ".*"
    return weights.get(kind, weights.get(area, 1))
