"""A timer as a descriptor with nanosecond resolution: epoll_wait(2) rounds to milliseconds.

timerfd_create(2); Python has its own only from 3.13 on.  Expiry is not subject to the 50 µs timer
slack that poll and sleep have (PR_SET_TIMERSLACK(2const)).
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
TFD_NONBLOCK = os.O_NONBLOCK
TFD_CLOEXEC = os.O_CLOEXEC


class _Spec(ctypes.Structure):
    """struct itimerspec on 64-bit machines."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


def create() -> int:
    """A non-blocking descriptor that is readable after the time of `arm`. Raises OSError."""
    fd: int = _libc().timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
    return _checked(fd, "timerfd_create")


def arm(fd: int, when: float) -> None:
    """Expire once at ``time.monotonic()`` seconds ``when`` (at once if past); 0 disarms."""
    seconds = int(when)
    spec = _Spec(0, 0, seconds, int((when - seconds) * 1e9))
    result: int = _libc().timerfd_settime(fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None)
    _checked(result, "timerfd_settime")


def drain(fd: int) -> None:
    """Make ``fd`` unreadable until it expires again."""
    with suppress(BlockingIOError):  # it had not expired
        os.read(fd, 8)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
