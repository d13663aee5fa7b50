"""What ``mis top|kill|inspect|defcon`` ask of a live run, answered by its supervisor."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

from mis_run.errors import UsageError
from mis_run.follow import Ending, Follower
from mis_run.hints import Any

Request = Mapping[str, Any]


def handler(follower: Follower) -> Callable[[Request], Request]:
    """The function that `control.serve` calls. It raises UsageError for what it cannot answer."""
    do: dict[str, Callable[[Request], Request]] = {
        "top": lambda request: follower.measurements(),
        "inspect": lambda request: {"plan": follower.plan.json(), **follower.measurements()},
        "kill": lambda request: _kill(follower, request),
        "defcon": lambda request: _defcon(follower, request),
    }

    def answer(request: Request) -> Request:
        wanted = request.get("do")
        if not isinstance(wanted, str) or wanted not in do:
            raise UsageError(f"request {wanted!r}: unknown")
        return do[wanted](request)

    return answer


def _kill(follower: Follower, request: Request) -> Request:
    number = request.get("signal")
    if number is None:
        follower.kill(Ending("killed by mis kill", 128 + signal.SIGKILL))
    elif isinstance(number, int) and 1 <= number <= 64:
        follower.send(number)
    else:
        raise UsageError(f"signal {number!r}: not a signal number")
    return {"killed": True}


def _defcon(follower: Follower, request: Request) -> Request:
    level = request.get("level")
    if level is not None:
        if level not in (1, 2, 3, 4, 5):
            raise UsageError(f"level {level!r}: use 1 to 5")
        follower.set_level(level)
    return {"level": follower.tracker.level, "violations": follower.tracker.count}
