"""The threat level as a pure function of violations and time."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mis_run.dataclass import replace
from mis_run.defcon import BURST, EFFECTS, RETRIES, Effects, Tracker, effects_at, weight
from mis_run.events import Event, Verdict
from mis_run.model import Defcon


@dataclass
class Clock:
    """A clock that moves only when told."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def denied(
    pid: int = 1, kind: str = "file.open", path: str = "/etc/shadow", **more: object
) -> Event:
    """A violation by ``pid``."""
    return Event(kind=kind, verdict=Verdict.DENY, pid=pid, subject={"path": path, **more})


def tracker(**settings: object) -> tuple[Tracker, Clock]:
    """A tracker and its clock."""
    clock = Clock()
    return Tracker(Defcon(**settings), clock), clock  # type: ignore[arg-type]


def levels(found: Tracker, events: list[Event]) -> list[tuple[int, int]]:
    """(count, level) of every change that the events cause."""
    changes = [found.violation(event) for event in events]
    return [(c.event.subject["violations"], c.level) for c in changes if c]


def test_each_level_begins_exactly_at_its_threshold() -> None:
    """Levels 4, 3, 2 and 1 begin at the 3rd, 6th, 10th and 15th violation and at no other."""
    found, _ = tracker()
    assert levels(found, [denied(pid) for pid in range(1, 30)]) == [
        (3, 4),
        (6, 3),
        (10, 2),
        (15, 1),
    ]


def test_thresholds_are_exact_when_sixteen_violate_at_once() -> None:
    """However 16 violators interleave, each level begins at its own count, once."""
    found, _ = tracker()
    lock, changes = threading.Lock(), []

    def violate(pid: int) -> None:
        for turn in range(5):
            with lock:  # the supervisor's one loop
                changes.append(found.violation(denied(pid, path=f"/{turn}")))

    threads = [threading.Thread(target=violate, args=(pid,)) for pid in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [(c.event.subject["violations"], c.level) for c in changes if c]
    assert seen == [(3, 4), (6, 3), (10, 2), (15, 1)]
    assert found.count == 80


@pytest.mark.parametrize(
    "events",
    [
        [denied(100 + n) for n in range(20)],
        [denied(100, thread=100 + n) for n in range(20)],
        [denied(100 + n, path=f"/tmp/{n}") for n in range(20)],
        [denied(100) for _ in range(20)],
    ],
    ids=["children", "threads", "grandchildren", "one-loop"],
)
def test_twenty_denials_reach_level_one_whoever_makes_them(events: list[Event]) -> None:
    """Twenty denials at one instant reach DEFCON 1: of children, of threads, of a loop."""
    found, _ = tracker()
    for event in events:
        found.violation(event)
    assert found.level == 1


def test_a_librarys_retries_are_one_violation() -> None:
    """The identical act of one thread counts once for its first retries within the window."""
    found, clock = tracker()
    for _ in range(1 + RETRIES):
        found.violation(denied())
        clock.now += BURST / 10
    assert found.count == 1
    found.violation(denied(path="/etc/gshadow"))
    assert found.count == 2  # negative control: another object is another act


def test_the_kernel_has_seen_whether_it_was_a_retry() -> None:
    """What it says of an act holds, however late and close together its events are read."""
    found, _ = tracker()
    for repeated in (False, False, True, False):
        found.violation(replace(denied(), repeated=repeated))
    assert found.count == 3


def test_a_retry_after_the_window_counts() -> None:
    """The same act 10 ms later is a new violation."""
    found, clock = tracker()
    found.violation(denied())
    clock.now += 1.01 * BURST
    found.violation(denied())
    assert found.count == 2


def test_the_count_halves_after_each_quiet_period() -> None:
    """14 violations are 7 after 60 s, 3 after 120 s, and the levels follow."""
    found, clock = tracker()
    for pid in range(1, 15):
        found.violation(denied(pid))
    assert found.next_deadline() == clock.now + 60
    clock.now += 59.9
    assert found.tick() is None and found.level == 2
    clock.now += 0.1
    change = found.tick()
    assert change and (found.count, change.level, change.event.subject["cause"]) == (7, 3, "decay")
    clock.now += 60
    assert found.tick() and (found.count, found.level) == (3, 4)
    clock.now += 600
    assert found.tick() and (found.count, found.level) == (0, 5)
    assert found.next_deadline() is None


def test_a_violation_puts_the_halving_off() -> None:
    """Only time without a violation heals."""
    found, clock = tracker()
    for pid in range(1, 40):
        found.violation(denied(pid))
        clock.now += 59
        if found.level == 1:
            break
    assert found.count == 15


def test_level_one_does_not_heal() -> None:
    """What is being killed stays at level 1 until an operator says otherwise."""
    found, clock = tracker()
    for pid in range(1, 16):
        found.violation(denied(pid))
    clock.now += 3600
    assert found.tick() is None and found.level == 1 and found.next_deadline() is None
    change = found.set(5)
    assert change and found.level == 5 and found.count == 0


def test_a_kill_rule_goes_to_level_one_at_once() -> None:
    """One violation of a rule marked kill is enough, also in the shadow of a retry."""
    found, _ = tracker()
    found.violation(denied())
    change = found.violation(Event(kind="file.open", verdict=Verdict.KILL, pid=1))
    assert change and change.level == 1 and change.kills


def test_setting_a_level_moves_the_count_along() -> None:
    """After `set 3` four more violations reach level 2, as from any level 3."""
    found, _ = tracker()
    change = found.set(3)
    assert change and change.event.subject["cause"] == "operator" and found.count == 6
    assert levels(found, [denied(pid) for pid in range(1, 6)]) == [(10, 2)]


def test_counting_without_acting() -> None:
    """With act = false levels are counted and reported, but nothing is late, denied or killed."""
    found, clock = tracker(act=False)
    changes = [found.violation(denied(pid)) for pid in range(1, 20)]
    assert [c.level for c in changes if c] == [4, 3, 2, 1]
    assert not any(c.kills for c in changes if c)
    assert found.delay() == 0 and found.effects == Effects()
    clock.now += 60
    assert found.tick() and found.level == 3  # and it heals, since nothing ended


def test_a_mark_is_no_violation_and_does_not_fade() -> None:
    """A marked agent is at 3 with nothing counted; neither time nor decay lifts it, and what it
    violates counts on from what it had; without a mark, the control, it comes back to 5."""
    for mark in (True, False):
        found, clock = tracker()
        found.violation(denied())
        change = found.mark(3) if mark else None
        if mark:
            assert (
                change
                and not change.kills
                and change.event.subject
                == {
                    "from": 5,
                    "to": 3,
                    "violations": 1,
                    "cause": "taint",
                }
            )
            assert found.mark(3) is None and found.marked and found.effects.destinations
        assert levels(found, [denied(pid) for pid in range(2, 12)])[-1] == (10, 2)
        clock.now += 600
        change = found.tick()
        assert change and (found.count, found.level) == (0, 3 if mark else 5)
        assert change.event.subject["cause"] == "decay"


def test_only_an_operator_lifts_a_mark() -> None:
    """A higher level than the mark's lifts it for good; a lower one leaves it where it was."""
    found, clock = tracker()
    found.mark(3)
    found.set(2)
    clock.now += 3600
    assert found.tick() and found.level == 3
    change = found.set(4)
    assert change and change.event.subject["cause"] == "operator" and found.marked
    clock.now += 3600
    assert found.tick() and found.level == 5


def test_marks_of_other_levels() -> None:
    """0 only records; a mark never makes an agent calmer; 1 kills; nothing acts without act."""
    found, _ = tracker()
    assert found.mark(0) is None and (found.marked, found.level) == (True, 5)
    found, clock = tracker()
    found.set(2)
    assert found.mark(3) is None and found.level == 2
    clock.now += 3600
    assert found.tick() and found.level == 3
    found, _ = tracker()
    change = found.mark(1)
    assert change and change.kills
    found, _ = tracker(act=False)
    change = found.mark(1)
    assert change and not change.kills and change.event.subject["acts"] is False
    assert found.level == 1 and found.effects == Effects()


def test_delays_follow_the_level() -> None:
    """Answers are late by 0, 0.1, 1 and 10 ms at levels 5, 4, 3 and 2."""
    found, _ = tracker()
    seen = []
    for level in (5, 4, 3, 2, 1):
        found.set(level)
        seen.append(found.delay())
    assert seen == [0.0, 0.0001, 0.001, 0.01, 0.0]


def test_effects_begin_at_their_level_and_stay() -> None:
    """Each effect begins at its level, holds at every lower one, and not above."""
    for name, first in EFFECTS.items():
        for level in range(1, 6):
            assert getattr(effects_at(level), name) == (level <= first)


def test_a_profile_moves_an_effect() -> None:
    """`effects = {wx_memory = 0, writes = 4}` switches one off and brings one forward."""
    found, _ = tracker(effects={"wx_memory": 0, "writes": 4})
    found.set(4)
    assert found.effects == Effects(writes=True)
    found.set(1)
    assert not found.effects.wx_memory and found.effects.kill


def test_weights_by_kind_and_area() -> None:
    """A weight names a kind or a whole area; zero records without counting or delaying decay."""
    weights = {"net.*": 0, "net.send": 5}
    assert [weight(kind, weights) for kind in ("net.send", "net.connect", "file.open")] == [5, 0, 1]
    found, _ = tracker(weights=weights)
    found.violation(denied(kind="net.connect"))
    assert (found.count, found.level) == (0, 5)
    change = found.violation(denied(kind="net.send"))
    assert change and (found.count, change.level) == (5, 4)


def test_what_is_no_violation_does_not_count() -> None:
    """Allowed acts and notes leave the count alone."""
    found, _ = tracker()
    for verdict in (None, Verdict.ALLOW):
        found.violation(Event(kind="file.open", verdict=verdict, pid=1))
    assert found.count == 0


ACTS = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.sampled_from(["file.open", "net.connect", "escape.mount"]),
        st.floats(0, 30),
    ),
    max_size=60,
)


@given(ACTS, st.integers(0, 4))
def test_violations_alone_never_lower_the_threat(
    acts: list[tuple[int, str, float]], heavy: int
) -> None:
    """Between decays the level's number only falls, and it is the one its count demands."""
    clock = Clock()
    settings = Defcon(decay=1e9, weights={"net.connect": heavy})
    found = Tracker(settings, clock)
    for pid, kind, wait in acts:
        clock.now += wait
        before, count = found.level, found.count
        change = found.violation(denied(pid, kind))
        assert found.level <= before and found.count >= count
        assert found.level == 5 - sum(found.count >= limit for limit in settings.thresholds)
        assert (change is None) == (found.level == before)


@given(ACTS, st.integers(1, 4), st.integers(0, 60))
def test_nothing_but_an_operator_lifts_a_mark(
    acts: list[tuple[int, str, float]], level: int, when: int
) -> None:
    """Whatever it does and however long it waits, a marked agent is at its level or below."""
    found, clock = tracker(decay=10.0)
    for number, (pid, kind, wait) in enumerate([*acts, (1, "file.open", 100.0)]):
        if number == min(when, len(acts)):
            found.mark(level)
        clock.now += wait
        found.violation(denied(pid, kind))
        found.tick()
        assert not found.marked or found.level <= level


@given(ACTS)
def test_only_time_and_the_operator_heal(acts: list[tuple[int, str, float]]) -> None:
    """A level's number rises only in a change whose cause is decay, after a quiet period."""
    found, clock = tracker(decay=10.0)
    for pid, kind, wait in acts:
        clock.now += wait
        before = found.level
        change = found.violation(denied(pid, kind))
        if found.level > before:
            assert change and change.event.subject["cause"] == "decay"
            assert wait >= 10 - BURST  # retries that counted nothing may lie in between


@given(st.lists(st.integers(1, 1000), max_size=3000))
def test_memory_is_bounded(pids: list[int]) -> None:
    """An agent cannot make the tracker grow by being many."""
    found, clock = tracker()
    for number, pid in enumerate(pids):
        clock.now += 0.02
        found.violation(denied(pid, path=f"/{number}"))
    assert len(found._recent) <= 1025
