"""Late answers: in order, on time, none forgotten."""

from __future__ import annotations

import select
import time

from mis_run.late import LEAD, Late, late


def turn(slow: Late, seconds: float = 2.0) -> None:
    """An event loop that watches only ``slow`` until nothing waits."""
    poll = select.epoll()
    poll.register(slow.fileno(), select.EPOLLIN)
    end = time.monotonic() + seconds
    slow.run()
    while len(slow) and time.monotonic() < end:
        poll.poll(0.5)
        slow.run()
    poll.close()


def test_answers_come_in_the_order_they_are_due() -> None:
    """Whatever the order of asking, the earlier due comes first, and none before its time."""
    came: list[tuple[int, float]] = []
    with late() as slow:
        now = time.monotonic()
        for number in (3, 1, 2, 0):
            due = now + number * 0.005
            slow.push(due, lambda number=number: came.append((number, time.monotonic())))
        turn(slow)
    assert [number for number, _ in came] == [0, 1, 2, 3]
    assert all(at >= now + number * 0.005 for number, at in came)


def test_run_does_not_wait_for_what_is_far() -> None:
    """Serving returns at once while the next answer is further away than LEAD."""
    with late() as slow:
        slow.push(time.monotonic() + 5, lambda: None)
        began = time.monotonic()
        for _ in range(10):
            slow.run()
        assert time.monotonic() - began < 10 * LEAD and len(slow) == 1


def test_the_end_gives_every_answer() -> None:
    """What still waits when the guard goes is answered then, not dropped."""
    came: list[int] = []
    with late() as slow:
        for number in range(5):
            slow.push(time.monotonic() + 100, lambda number=number: came.append(number))
    assert sorted(came) == [0, 1, 2, 3, 4]


def test_an_answer_may_ask_for_another() -> None:
    """A callback that pushes again is served too."""
    came: list[float] = []
    with late() as slow:

        def again() -> None:
            came.append(time.monotonic())
            if len(came) < 3:
                slow.push(time.monotonic() + 0.002, again)

        slow.push(time.monotonic(), again)
        turn(slow)
    assert len(came) == 3
