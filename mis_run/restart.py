"""``--restart on-failure[:N]``: run the agent again when it failed by itself, ever more slowly."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from mis_run.follow import Ending

FIRST, LONGEST = 1.0, 60.0  # seconds before the first new attempt; doubled each time up to


def run(
    launch: Callable[[], Ending], most: int, *, sleep: Callable[[float], None] = time.sleep
) -> Ending:
    """``launch`` until it ends well, was ended on purpose, or ``most`` new attempts are used up.

    Ended on purpose is all that was not the agent's own doing: a signal that we passed on,
    ``mis kill``, its timeout, DEFCON 1, a lost guard.  Only what it did itself is tried again.
    """
    ending, attempt = launch(), 0
    while ending.code and ending.own and attempt != most:
        wait = min(FIRST * 2**attempt, LONGEST)
        attempt += 1
        print(f"mis-run: {ending.how}; attempt {attempt + 1} in {wait:g} s", file=sys.stderr)
        sleep(wait)
        ending = launch()
    return ending
