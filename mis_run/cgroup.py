"""The cgroup of one run: its identity, its limits' numbers, its end.

``mis/<id>`` in cgroup v2 is what the guards attach to; the container lives in ``mis/<id>/agent``
below it, and in directories of the same name in every v1 hierarchy there is (the runtime makes
those and writes the limits).  Out of scope: which hierarchies there are (`cgroup_detect`), how
killing works without cgroup.kill (`cgroup_kill`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mis_run import cgroup_kill
from mis_run.cgroup_detect import PARENT, detect, supported
from mis_run.errors import SetupError
from mis_run.events import Event, Guarantee
from mis_run.model import Host

__all__ = ["Cgroup", "Usage", "create", "detect", "gc", "supported"]

LEAF = "agent"
EMPTY_WITHIN = 5.0  # seconds a killed cgroup gets to become empty
USER_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What an agent used. Seconds and bytes; None is "this machine does not tell"."""

    cpu_seconds: float | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    memory_bytes: int | None = None
    memory_peak: int | None = None
    pids: int | None = None
    pids_denied: int | None = None  # forks refused by the limit
    oom_kills: int | None = None
    throttled_seconds: float | None = None
    throttled: int | None = None  # periods in which the CPU limit stopped it


class Cgroup:
    """One run's cgroup; ``unified`` is its v2 identity directory."""

    def __init__(self, run_id: str, unified: Path, controllers: Mapping[str, Path]) -> None:
        self.unified = unified
        self.place = f"/{PARENT}/{run_id}"
        self.oci_path = f"{self.place}/{LEAF}"
        self._controllers = controllers
        self._seen: dict[str, int] = {}

    def adopt(self, pid: int) -> None:
        """Make sure that ``pid`` is inside; runtimes differ in what they do in hybrid mode."""
        leaf = self.unified / LEAF
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(pid))

    def kill(self) -> None:
        """SIGKILL everything inside at once, forks included; see `wait_empty` for the proof."""
        try:
            (self.unified / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            freezer = self._controllers.get("freezer")
            path = freezer / self.oci_path[1:] if freezer else None
            cgroup_kill.kill_by_hand(self.unified, path, self.place, EMPTY_WITHIN)

    def freeze(self, on: bool, timeout: float = 1.0) -> bool:
        """Stop or resume everything inside; whether the kernel confirmed it in time."""
        return cgroup_kill.freeze(self.unified, on=on, timeout=timeout)

    def populated(self) -> bool:
        """Whether any process is inside."""
        try:
            return "populated 1" in (self.unified / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def wait_empty(self, timeout: float) -> float:
        """Seconds until it was empty. Raises SetupError when it is not within ``timeout``."""
        began = time.monotonic()
        if not cgroup_kill.wait_for(self.unified / "cgroup.events", "populated 0", timeout):
            raise SetupError(f"processes are left in {self.unified} after {timeout:g} s")
        return time.monotonic() - began

    # ---- numbers --------------------------------------------------------------------------

    def usage(self) -> Usage:
        """What was used so far, from v2 files where the controller is there, else v1 files."""
        cpu = _keyed(self._file("cpu", "cpu.stat"))
        memory = self._file("memory", "")
        if self._is_v2("memory"):
            now, peak = _number(memory / "memory.current"), _number(memory / "memory.peak")
        else:
            now = _number(memory / "memory.usage_in_bytes")
            peak = _number(memory / "memory.max_usage_in_bytes")
        total, user, system = self._cpu(cpu)
        return Usage(
            cpu_seconds=total,
            user_seconds=user,
            system_seconds=system,
            memory_bytes=now,
            memory_peak=peak,
            pids=_number(self._file("pids", "pids.current")),
            pids_denied=_keyed(self._file("pids", "pids.events")).get("max"),
            oom_kills=self._oom_kills(),
            throttled_seconds=_scaled(cpu.get("throttled_usec"), 1e-6)
            if "throttled_usec" in cpu
            else _scaled(cpu.get("throttled_time"), 1e-9),
            throttled=cpu.get("nr_throttled"),
        )

    def _cpu(self, stat: Mapping[str, int]) -> tuple[float | None, float | None, float | None]:
        if "usage_usec" in stat:
            keys = ("usage_usec", "user_usec", "system_usec")
            total, user, system = (_scaled(stat.get(key), 1e-6) for key in keys)
            return total, user, system
        parts = _keyed(self._file("cpuacct", "cpuacct.stat"))
        total = _scaled(_number(self._file("cpuacct", "cpuacct.usage")), 1e-9)
        user, system = (_scaled(parts.get(key), 1 / USER_HZ) for key in ("user", "system"))
        return total, user, system

    def _oom_kills(self) -> int | None:
        name = "memory.events" if self._is_v2("memory") else "memory.oom_control"
        return _keyed(self._file("memory", name)).get("oom_kill")

    def poll_events(self) -> list[Event]:
        """Limits that were hit since the last call: ``limits.oom``, ``limits.pids``."""
        usage = self.usage()
        found = []
        for kind, value in (("limits.oom", usage.oom_kills), ("limits.pids", usage.pids_denied)):
            before = self._seen.get(kind, 0)
            if value is not None and value > before:
                self._seen[kind] = value
                subject = {"times": value - before, "total": value}
                found.append(Event(kind=kind, guard=Guarantee.LIMITS, subject=subject))
        return found

    def _file(self, controller: str, name: str) -> Path:
        root = self._controllers.get(controller, Path("/nonexistent"))
        return root / self.oci_path[1:] / name

    def _is_v2(self, controller: str) -> bool:
        root = self._controllers.get(controller)
        return root is not None and (root / "cgroup.controllers").exists()

    # ---- the end --------------------------------------------------------------------------

    def remove(self) -> None:
        """Kill, see it empty, remove every directory. Raises SetupError if something stays."""
        if self.populated():
            self.kill()
            self.wait_empty(EMPTY_WITHIN)
        for root in _roots(self._controllers, self.unified.parents[1]):
            _remove_tree(root / self.place[1:])
            with suppress(OSError):  # other runs are in there
                (root / PARENT).rmdir()


def _roots(controllers: Mapping[str, Path], unified: Path) -> list[Path]:
    return list(dict.fromkeys([*controllers.values(), unified]))


def _remove_tree(top: Path) -> None:
    """rmdir deepest first; the kernel says EBUSY for a moment after the last process went."""
    end = time.monotonic() + EMPTY_WITHIN
    while True:
        try:
            for folder in cgroup_kill.subtree(top):
                with suppress(FileNotFoundError):
                    folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise SetupError(f"cannot remove {top}: {error.strerror}", hint="mis gc") from error
            time.sleep(cgroup_kill.SHORT_WAIT)
        else:
            return


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _keyed(path: Path) -> dict[str, int]:
    """A flat-keyed file ("key value" lines); empty when it is not there."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if value.isdecimal():
                found[key] = int(value)
    return found


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value * unit


@contextmanager
def create(run_id: str, host: Host) -> Iterator[Cgroup]:
    """The run's identity directory, removed with everything in it on the way out.

    Raises SetupError.
    """
    if host.unified is None:
        raise SetupError("cgroup2 is not mounted", hint="mis doctor")
    unified = host.unified / PARENT / run_id
    group = Cgroup(run_id, unified, host.controllers)
    for attempt in range(10):
        try:
            unified.parent.mkdir(exist_ok=True)
            unified.mkdir()
            break
        except FileNotFoundError:  # another run's end removed the parent between the two lines
            if attempt == 9:
                raise SetupError(f"cannot make {unified}") from None
        except OSError as error:
            raise SetupError(
                f"cannot make {unified}: {error.strerror}", hint="mis doctor"
            ) from error
    try:
        yield group
    finally:
        group.remove()


def gc(live: set[str]) -> list[str]:
    """Kill and remove every run's cgroup that is not ``live``; returns their ids."""
    _, unified, controllers = detect()
    if unified is None:
        return []
    found: set[str] = set()
    for root in _roots(controllers, unified):
        with suppress(OSError):
            found.update(entry.name for entry in os.scandir(root / PARENT) if entry.is_dir())
    dead = sorted(found - live)
    for run_id in dead:
        Cgroup(run_id, unified / PARENT / run_id, controllers).remove()
    return dead
