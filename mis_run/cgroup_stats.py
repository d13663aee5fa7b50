"""What a cgroup used and which limits it hit, from cgroup v2 or v1 files, in one vocabulary.

Seconds, bytes and counts; ``None`` where this kernel or hierarchy has no such number, never a
made-up zero.  File formats: cgroup-v2.rst and cgroup-v1/*.rst of the kernel's documentation.
Out of scope: setting limits (the OCI runtime does, in the agent's own cgroup).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.events import Event, Guarantee

THROTTLE_EVERY = 10.0  # seconds between two limits.throttled events: it may go on for hours
PRESSURE_EVERY = 2.0  # seconds between two looks: the kernel averages over ten
PRESSED = 10.0  # percent of the time in which nothing inside could go on: worth an event


@dataclass(frozen=True)
class Pressure:
    """Pressure stall information (accounting/psi.rst): percent over 10 s, seconds in total.

    ``some``: at least one task waited for the resource; ``full``: all of them did.
    """

    some_avg10: float
    some_seconds: float
    full_avg10: float
    full_seconds: float


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a run used so far. Seconds, bytes, counts; ``None``: not available here."""

    cpu_seconds: float | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    memory_bytes: int | None = None
    memory_peak: int | None = None
    swap: int | None = None
    pids: int | None = None
    pids_peak: int | None = None
    nr_throttled: int | None = None
    throttled_seconds: float | None = None
    io_read: int | None = None
    io_write: int | None = None
    oom_kills: int | None = None
    pids_denied: int | None = None
    psi_cpu: Pressure | None = None
    psi_memory: Pressure | None = None
    psi_io: Pressure | None = None


@dataclass(frozen=True)
class Places:
    """Where the files of one run are: its identity directory in every hierarchy."""

    unified: Path
    v1: Mapping[str, Path]  # controller → identity directory in its v1 hierarchy
    leaf: str = "agent"  # below each of them: where the processes and the limits are


def text(path: Path) -> str | None:
    """The file's content; None when it does not exist, its cgroup is gone or it is turned off."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise


def number(path: Path, scale: float = 1) -> int | None:
    """The file's one number; None as in `text`."""
    content = text(path)
    return None if content is None else int(int(content) * scale)


def table(path: Path) -> dict[str, int]:
    """A flat keyed file (``key value`` lines); empty as `text` is None."""
    pairs = (line.split() for line in (text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def pressure(path: Path) -> Pressure | None:
    """A PSI file; None where PSI is not compiled in or turned off (``psi=0``)."""
    content = text(path)
    if not content:
        return None
    rows = {}
    for line in content.splitlines():
        kind, *fields = line.split()
        rows[kind] = dict(field.split("=") for field in fields)
    some = rows["some"]
    full = rows.get("full", {"avg10": "0", "total": "0"})  # older kernels: no "full" for cpu
    return Pressure(
        float(some["avg10"]),
        int(some["total"]) / 1e6,
        float(full["avg10"]),
        int(full["total"]) / 1e6,
    )


def usage(places: Places) -> Usage:
    """Read everything there is. Cumulative numbers include processes and cgroups that ended."""
    top, v1 = places.unified, places.v1
    cpu = table(top / "cpu.stat")  # the basic part exists without the controller, since 4.15
    throttled, throttled_seconds = throttling(places)
    memory, peak, swap = _memory(places)
    read, written = _io(places)
    pids = v1.get("pids", top)
    return Usage(
        cpu_seconds=_seconds(cpu.get("usage_usec")),
        user_seconds=_seconds(cpu.get("user_usec")),
        system_seconds=_seconds(cpu.get("system_usec")),
        memory_bytes=memory,
        memory_peak=peak,
        swap=swap,
        pids=number(pids / "pids.current"),
        pids_peak=number(pids / "pids.peak"),  # newer than memory.peak
        nr_throttled=throttled,
        throttled_seconds=throttled_seconds,
        io_read=read,
        io_write=written,
        oom_kills=oom_kills(places),
        pids_denied=pids_denied(places),
        psi_cpu=pressure(top / "cpu.pressure"),
        psi_memory=pressure(top / "memory.pressure"),
        psi_io=pressure(top / "io.pressure"),
    )


def _seconds(micro: int | None) -> float | None:
    return None if micro is None else micro / 1e6


def _memory(places: Places) -> tuple[int | None, int | None, int | None]:
    if old := places.v1.get("memory"):
        used = number(old / "memory.usage_in_bytes")
        both = number(old / "memory.memsw.usage_in_bytes")  # memory + swap
        swap = None if used is None or both is None else max(0, both - used)
        return used, number(old / "memory.max_usage_in_bytes"), swap
    top = places.unified
    return (
        number(top / "memory.current"),
        number(top / "memory.peak"),  # since 5.19
        number(top / "memory.swap.current"),
    )


def _io(places: Places) -> tuple[int | None, int | None]:
    """Bytes read and written, summed over devices; v1 leaves most buffered writes out."""
    if old := places.v1.get("blkio"):
        content = text(old / "blkio.throttle.io_service_bytes_recursive")
        rows = [line.split() for line in (content or "").splitlines()]
        pairs = [(row[1].lower(), int(row[2])) for row in rows if len(row) == 3]
        names = ("read", "write")
    else:
        content = text(places.unified / "io.stat")
        words = (content or "").split()
        split = (word.partition("=") for word in words if "=" in word)
        pairs = [(name, int(value)) for name, _, value in split if value.isdecimal()]
        names = ("rbytes", "wbytes")
    if content is None:
        return None, None
    read, written = (sum(value for key, value in pairs if key == name) for name in names)
    return read, written


def throttling(places: Places) -> tuple[int | None, float | None]:
    """(periods, seconds) in which the CPU limit held the agent back.

    Counted where the limit is set, so in the agent's own cgroup, not in its parent.
    """
    if old := places.v1.get("cpu"):
        stat = table(old / places.leaf / "cpu.stat")
        nano = stat.get("throttled_time")
        return stat.get("nr_throttled"), None if nano is None else nano / 1e9
    stat = table(places.unified / places.leaf / "cpu.stat")
    return stat.get("nr_throttled"), _seconds(stat.get("throttled_usec"))


def oom_kills(places: Places) -> int | None:
    """Processes that the kernel killed at the memory limit."""
    if old := places.v1.get("memory"):  # not hierarchical in v1; the key exists since 4.13
        return table(old / places.leaf / "memory.oom_control").get("oom_kill")
    return table(places.unified / "memory.events").get("oom_kill")


def pids_denied(places: Places) -> int | None:
    """Forks that the pids limit refused.

    v1, and v2 before 6.11, count where the fork happened; later v2 counts
    where the limit is and in its ancestors.  The larger one of both places is right for either.
    """
    top = places.v1.get("pids", places.unified)
    tables = (table(top / "pids.events"), table(top / places.leaf / "pids.events"))
    return max((each["max"] for each in tables if "max" in each), default=None)


class LimitsWatch:
    """Turns growing counters into events.

    The kernel's counters only grow, so polling loses none: at worst an event is late by one poll.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._seen: dict[str, int] = {}
        self._throttle_told = -THROTTLE_EVERY
        self._pressure_seen = time.monotonic()
        self._pressure_told: dict[str, float] = {}

    def poll(self) -> list[Event]:
        """Events for what was hit since the last poll. They carry no verdict: reaching a limit
        is no act that a rule denies; what follows the profile says (`reaction`)."""
        found: list[Event] = []
        for kind, total in (
            ("limits.oom", oom_kills(self._places)),
            ("limits.pids", pids_denied(self._places)),
        ):
            found += self._grown(kind, total)
        now = time.monotonic()
        if now - self._throttle_told >= THROTTLE_EVERY:
            periods, seconds = throttling(self._places)
            grown = self._grown("limits.throttled", periods, seconds=seconds)
            if grown:
                self._throttle_told = now
            found += grown
        if now - self._pressure_seen >= PRESSURE_EVERY:
            self._pressure_seen = now
            found += self._pressed(now)
        return found

    def _pressed(self, now: float) -> list[Event]:
        """``limits.pressure`` while all of the agent waits for memory or disks: it thrashes at a
        limit, or the machine has no more to give. Want of CPU is told as throttling."""
        found = []
        for resource in ("memory", "io"):
            stall = pressure(self._places.unified / f"{resource}.pressure")
            told = self._pressure_told.get(resource, now - THROTTLE_EVERY)
            if stall and stall.full_avg10 >= PRESSED and now - told >= THROTTLE_EVERY:
                self._pressure_told[resource] = now
                subject = {
                    "resource": resource,
                    "percent": stall.full_avg10,
                    "seconds": round(stall.full_seconds, 3),
                }
                found.append(Event(kind="limits.pressure", guard=Guarantee.LIMITS, subject=subject))
        return found

    def _grown(self, kind: str, total: int | None, **facts: float | None) -> list[Event]:
        more = (total or 0) - self._seen.get(kind, 0)
        if total is None or more <= 0:
            return []
        self._seen[kind] = total
        subject = {"count": more, "total": total, **facts}
        return [Event(kind=kind, guard=Guarantee.LIMITS, subject=subject)]
