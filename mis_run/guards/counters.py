"""Performance counters of one cgroup: what its tasks cost the CPU, in numbers or an honest "no".

A cgroup event counts on one CPU only (perf_event_open(2)), so there is one descriptor per event
and CPU.  Hardware events need a PMU; where there is none, each says so, and software events are
counted next to them under their own names, never in their place.  Counters watch; they deny
nothing, so there is nothing to enforce and no violation.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.errors import SetupError, UsageError, VerifyError
from mis_run.later import Later
from mis_run.linux import perf
from mis_run.model import Finding

INSTEAD = ("task-clock", "page-faults", "context-switches")
"""Counted as well when a wanted hardware event does not exist."""

PAIRS = {"instructions": "cycles", "branch-misses": "branches", "cache-misses": "cache-references"}
"""Event → leader of its group: scheduled together, so that their ratio is of the same moments.

Pairs only: a group that does not fit into the PMU at once never counts at all.
"""

RATIOS = {
    "ipc": ("instructions", "cycles"),
    "branch-miss-rate": ("branch-misses", "branches"),
    "cache-miss-rate": ("cache-misses", "cache-references"),
}

NO_PMU = "no PMU on this machine"
SPARE_FDS = 256  # descriptors that stay free for everything else we do
ONLINE = Path("/sys/devices/system/cpu/online")


@dataclass(frozen=True)
class Reading:
    """One counter. ``value`` is a count, or nanoseconds where ``unit`` is ``ns``.

    ``fraction`` is running/enabled time: below 1 the PMU was shared, ``scaled`` is true and
    ``value`` extrapolates.  ``unavailable`` is the reason why there is no value (which is 0 then).
    ``rate`` is per second since the counters were attached.  ``not_on`` lists CPUs where this
    event does not exist (mixed core types): what ran there is not in ``value``.
    """

    value: float = 0.0
    unit: str = ""
    scaled: bool = False
    fraction: float = 1.0
    rate: float = 0.0
    unavailable: str = ""
    not_on: tuple[int, ...] = ()


def supported() -> dict[str, Finding]:
    """``perf-cgroup`` (counting by cgroup at all) and ``pmu`` (hardware events).

    The probe passes a directory that is no cgroup: a kernel that can count answers EBADF after
    all its checks, and the first real event of a machine costs 15 ms, which is saved that way.
    The hardware probe is a real event where there is a PMU.
    """
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return {
            "perf-cgroup": _probe("task-clock", root),
            "pmu": _probe("cycles", root),
        }
    finally:
        os.close(root)


def _probe(name: str, not_a_cgroup: int) -> Finding:
    try:
        os.close(perf.open_cgroup(perf.EVENTS[name], not_a_cgroup, online()[0]))
    except OSError as error:
        if error.errno == errno.EBADF:
            return Finding(True, "perf_event_open with PERF_FLAG_PID_CGROUP")
        return Finding(False, _reason(error), _fix(error))
    raise AssertionError("the kernel took / for a cgroup")


def _reason(error: OSError) -> str:
    return {
        errno.ENOENT: NO_PMU,
        errno.EOPNOTSUPP: NO_PMU,
        errno.ENODEV: NO_PMU,
        errno.EINVAL: "the kernel cannot count by cgroup (CONFIG_CGROUP_PERF)",
        errno.ENOSYS: "the kernel has no performance events (CONFIG_PERF_EVENTS)",
        errno.EACCES: "not allowed (kernel.perf_event_paranoid)",
        errno.EPERM: "not allowed (CAP_PERFMON, or a seccomp filter of the container we are in)",
    }.get(error.errno or 0, error.strerror or "unknown error")


def _fix(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return "sudo mis-run …"
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return "ask for software events: " + ", ".join(INSTEAD)
    return ""


def online() -> list[int]:
    """The CPUs that are online, whatever our own affinity is: the agent's may differ."""
    found: list[int] = []
    for part in ONLINE.read_text().strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@dataclass
class _Counter:
    """One event on one CPU."""

    name: str
    cpu: int
    fd: int
    live: bool = True  # the CPU has been online ever since


class Counters:
    """The counters of one cgroup; `attach` makes and closes them."""

    def __init__(
        self, directory: Path, events: Sequence[str], cpus: Callable[[], Sequence[int]]
    ) -> None:
        for name in events:
            if name not in perf.EVENTS:
                hint = "known: " + ", ".join(perf.EVENTS)
                raise UsageError(f"[counters] events: {name!r} is unknown", hint=hint)
        self.directory = directory
        self._wanted = list(dict.fromkeys(events))
        self._cpus = cpus
        self._counters: list[_Counter] = []
        self._missing: dict[str, dict[int, str]] = {}  # event → CPU → why it does not count there
        self._began = time.monotonic()
        self._opening: Later[None] | None = None

    def open(self) -> None:
        """Open every event on every CPU that is online and does not count yet.

        A CPU that went offline took its counters along, their totals stay: when it is back, new
        ones are opened.  Raises SetupError when descriptors run out.
        """
        online_now = set(self._cpus())
        for counter in self._counters:
            counter.live = counter.live and counter.cpu in online_now
        counting = {counter.cpu for counter in self._counters if counter.live}
        cpus = sorted(online_now - counting - {cpu for m in self._missing.values() for cpu in m})
        if not cpus or not self._wanted:
            return
        _make_room(len(cpus) * (len(self._wanted) + len(INSTEAD)))
        cgroup = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in sorted(self._wanted, key=lambda name: name in PAIRS):  # leaders first
                self._open_on(cpus, name, cgroup)
            if any(perf.EVENTS[name].hardware for name in self._missing):
                extra = [name for name in INSTEAD if name not in self._wanted]
                self._wanted += extra
                for name in extra:
                    self._open_on(cpus, name, cgroup)
        finally:
            os.close(cgroup)

    def _open_on(self, cpus: Sequence[int], name: str, cgroup: int) -> None:
        leader = PAIRS.get(name)
        groups = {c.cpu: c.fd for c in self._counters if c.live and c.name == leader}
        for cpu in cpus:
            try:
                fd = perf.open_cgroup(perf.EVENTS[name], cgroup, cpu, group=groups.get(cpu, -1))
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise SetupError(
                        f"[counters] events: out of descriptors at {name} on CPU {cpu}",
                        hint="ulimit -n 65536, or ask for fewer events",
                    ) from error
                if error.errno == errno.ENODEV and cpu not in self._cpus():
                    continue  # went offline just now
                self._missing.setdefault(name, {})[cpu] = _reason(error)
            else:
                self._counters.append(_Counter(name, cpu, fd))

    def open_later(self) -> None:
        """`open` in a thread: the first cgroup event of a machine waits 15 ms for every CPU."""
        self._opening = Later(self.open)

    def ready(self) -> None:
        """Wait until everything is open. Raises what `open` raised."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.result()

    def close(self) -> None:
        """Close everything; whatever opening failed with has been or will not be raised."""
        if self._opening is not None:
            self._opening.wait()
        while self._counters:
            os.close(self._counters.pop().fd)

    # ---- numbers ----------------------------------------------------------------------------

    def read(self) -> dict[str, Reading]:
        """Each event summed over CPUs, and the ratios whose both halves were really counted.

        CPUs that came online meanwhile count from now on.  Raises SetupError as `open` does.
        """
        self.ready()
        self.open()
        seconds = max(time.monotonic() - self._began, 1e-9)
        found = {name: self._reading(name, seconds) for name in self._wanted}
        for name, (upper, lower) in RATIOS.items():
            if (up := found.get(upper)) and (low := found.get(lower)) and low.value > 0:
                found[name] = Reading(
                    value=up.value / low.value,
                    unit="ratio",
                    scaled=up.scaled or low.scaled,
                    fraction=min(up.fraction, low.fraction),
                )
        return found

    def _reading(self, name: str, seconds: float) -> Reading:
        event = perf.EVENTS[name]
        samples = [perf.read(c.fd) for c in self._counters if c.name == name]
        missing = self._missing.get(name, {})
        if not samples:
            return Reading(unit=event.unit, unavailable=next(iter(missing.values()), "no CPU"))
        enabled = sum(sample[1] for sample in samples)
        running = sum(sample[2] for sample in samples)
        if enabled and not running:
            return Reading(unit=event.unit, unavailable="the PMU was always busy with others")
        value = sum(value * on / run for value, on, run in samples if run)
        return Reading(
            value=value,
            unit=event.unit,
            scaled=running < enabled,
            fraction=running / enabled if enabled else 1.0,
            rate=value / seconds,
            not_on=tuple(sorted(missing)),
        )

    # ---- proof ------------------------------------------------------------------------------

    def verify(self, work: Callable[[], object]) -> None:
        """Prove that the cgroup is counted, and only it: ``work`` runs something inside.

        Its task-clock must grow meanwhile, and that of an empty cgroup next to it must stay 0.
        Raises VerifyError.
        """
        self.ready()
        empty = self.directory / "control"
        empty.mkdir()
        try:
            with (
                attach(self.directory, ("task-clock",), self._cpus) as inside,
                attach(empty, ("task-clock",), self._cpus) as outside,
            ):
                work()
                seen, strange = (each.read()["task-clock"] for each in (inside, outside))
        finally:
            empty.rmdir()
        if seen.unavailable:
            raise VerifyError(f"counters: task-clock unavailable: {seen.unavailable}")
        if seen.value <= 0:
            raise VerifyError("counters: work inside the cgroup was not counted")
        if strange.value > 0:
            raise VerifyError("counters: work outside a cgroup was counted for it")


def _make_room(count: int) -> None:
    """Raise our soft limit of open files if ``count`` more would not fit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = sum(1 for _ in Path("/proc/self/fd").iterdir()) + count + SPARE_FDS
    if soft >= need or soft == resource.RLIM_INFINITY:
        return
    if hard < need and hard != resource.RLIM_INFINITY:
        raise SetupError(
            f"[counters] events: {count} descriptors are needed, the hard limit is {hard}",
            hint=f"ulimit -Hn {need}, or ask for fewer events",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


@contextmanager
def attach(
    cgroup: Path,
    events: Sequence[str],
    cpus: Callable[[], Sequence[int]] = online,
    *,
    later: bool = False,
) -> Iterator[Counters]:
    """Count ``events`` (names of `perf.EVENTS`) in ``cgroup`` and below, until the way out.

    ``later`` opens them in a thread; `Counters.ready` waits for it and raises its errors.
    Raises UsageError for an unknown name, SetupError when descriptors run out.
    """
    counters = Counters(cgroup, events, cpus)
    try:
        if later:
            counters.open_later()
        else:
            counters.open()
        yield counters
    finally:
        counters.close()
