"""Our own starvation, and new attempts after a failure: decisions without waiting for them."""

from __future__ import annotations

import pytest

from mis_run import options, restart
from mis_run.errors import UsageError
from mis_run.events import Event
from mis_run.follow import Ending
from mis_run.model import ALWAYS, Liveness
from mis_run.starvation import Starvation


class Run:
    """A supervisor whose clock is ours."""

    def __init__(self, action: str) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.frozen: list[bool] = []
        self.killed: list[str] = []
        self.starvation = Starvation(
            Liveness(deadline=1.0, beat=0.1, on_starved=action),
            emit=self.events.append,
            freeze=self.frozen.append,
            kill=self.killed.append,
            clock=lambda: self.now,
        )

    def beats(self, *intervals: float) -> None:
        for interval in intervals:
            self.now += interval
            self.starvation.beat()


@pytest.mark.parametrize(
    ("action", "violation", "killed", "frozen"),
    [
        ("log", False, 0, []),
        ("defcon", True, 0, []),
        ("kill", False, 1, []),
        ("freeze", False, 0, [True, False]),
    ],
)
def test_a_late_beat_does_what_the_profile_says(
    action: str, violation: bool, killed: int, frozen: list[bool]
) -> None:
    """Late by more than half the deadline: told, and acted upon; five good ones recover."""
    run = Run(action)
    run.beats(0.1, 0.12, 0.5)
    assert run.events == []
    run.beats(0.7)
    assert [event.violation for event in run.events] == [violation]
    assert len(run.killed) == killed
    run.beats(0.1, 0.1, 0.1, 0.1)
    assert len(run.events) == 1
    run.beats(0.1)
    assert run.events[-1].kind == "supervisor.recovered"
    assert run.frozen == frozen
    run.beats(*[0.1] * 20)
    assert len(run.events) == 2


def test_a_second_late_beat_does_not_thaw() -> None:
    """While beats stay late the agent stays frozen, and is frozen once."""
    run = Run("freeze")
    run.beats(0.8, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1)
    assert run.frozen == [True]
    run.beats(0.1)
    assert run.frozen == [True, False]


@pytest.mark.parametrize(("text", "most"), [("no", 0), ("on-failure", ALWAYS), ("on-failure:3", 3)])
def test_restart_words(text: str, most: int) -> None:
    assert options._attempts(text) == most


@pytest.mark.parametrize("text", ["always", "on-failure:", "on-failure:0", "on-failure:x", "no:1"])
def test_wrong_restart_words(text: str) -> None:
    """Told with what is possible."""
    with pytest.raises(UsageError):
        options._attempts(text)


def attempts(most: int, *endings: Ending) -> tuple[Ending, list[float], int]:
    left, waits = list(endings), list[float]()
    last = restart.run(lambda: left.pop(0), most, sleep=waits.append)
    return last, waits, len(endings) - len(left)


def test_failures_are_tried_again_ever_more_slowly() -> None:
    """Until one ends well; the pause doubles up to a minute."""
    bad, good = Ending("exited with code 3", 3, own=True), Ending("exited with code 0", 0, own=True)
    last, waits, used = attempts(ALWAYS, *[bad] * 8, good)
    assert (last.code, used) == (0, 9)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    last, waits, used = attempts(2, *[bad] * 5)
    assert (last.code, used, waits) == (3, 3, [1, 2])


def test_what_was_ended_on_purpose_stays_ended() -> None:
    """DEFCON 1, a kill, a timeout: not the agent's own failure."""
    last, waits, used = attempts(ALWAYS, Ending("DEFCON 1", 119))
    assert (last.code, used, waits) == (119, 1, [])
