"""Sizes, times and counts as people write them. Raises UsageError for anything else."""

from __future__ import annotations

import re

from mis_run.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE | re.ASCII)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MOST_BYTES = 1 << 50
MOST_SECONDS = 365 * 86400.0
MOST_COUNT = 4_194_304  # the kernel's largest pid_max


def size(text: str) -> int:
    """``512M``, ``2G``, ``1.5GiB`` → bytes (powers of 1024)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size", hint="use a number with K, M, G or T, as 512M")
    value = float(match[1]) * 1024 ** _POWERS[match[2].lower()]
    if value > MOST_BYTES:
        raise UsageError(f"{text!r} is more than any machine has")
    return int(value)


def duration(text: str) -> float:
    """``100ms``, ``30s``, ``10m``, ``2h`` → seconds; a bare number is seconds."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no time", hint="use a number with ms, s, m, h or d, as 30m")
    value = float(match[1]) * _SECONDS[match[2]]
    if not 0 < value <= MOST_SECONDS:
        raise UsageError(f"{text!r}: a time is more than 0 and at most a year")
    return value


def cores(text: str) -> float:
    """``1.5`` → CPU cores."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no number of cores", hint="use a number, as 1.5") from None
    if not 0.01 <= value <= 65536:
        raise UsageError(f"{text!r}: cores go from 0.01 up")
    return value


def count(text: str) -> int:
    """``256`` → a number of processes."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise UsageError(f"{text!r} is no count", hint="use a whole number, as 256")
    value = int(text)
    if not 1 <= value <= MOST_COUNT:
        raise UsageError(f"{text!r}: a count goes from 1 to {MOST_COUNT}")
    return value
