"""perf_event_open(2) for cgroups: one counter on one CPU, read as a total with its two times.

Numbers from linux/perf_event.h (Linux 6.1), part of the kernel's stable ABI.  Out of scope:
sampling, ring buffers, tracepoints, and what to do without an event (`guards.counters`).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

from mis_run.dataclass import dataclass

TYPE_HARDWARE = 0
TYPE_SOFTWARE = 1

FLAG_PID_CGROUP = 1 << 2
FLAG_FD_CLOEXEC = 1 << 3

FORMAT_TOTAL_TIME_ENABLED = 1 << 0
FORMAT_TOTAL_TIME_RUNNING = 1 << 1

ATTR_SIZE = 64  # PERF_ATTR_SIZE_VER0: all we use, so every kernel since 2.6.31 takes it
EXCLUDE_USER = 1 << 4  # bits of the word after read_format
EXCLUDE_KERNEL = 1 << 5
EXCLUDE_HV = 1 << 6

_ATTR = struct.Struct("=IIQQQQQ")  # type, size, config, sample_period, sample_type, read_format, …
_READ = struct.Struct("=QQQ")  # value, time_enabled, time_running


@dataclass(frozen=True)
class Event:
    """A counter the kernel knows by number; ``unit`` is ``""`` for plain counts or ``ns``."""

    kind: int
    config: int
    unit: str = ""

    @property
    def hardware(self) -> bool:
        """Whether it needs a performance monitoring unit in the CPU."""
        return self.kind == TYPE_HARDWARE


EVENTS: Mapping[str, Event] = {
    "cycles": Event(TYPE_HARDWARE, 0),
    "instructions": Event(TYPE_HARDWARE, 1),
    "cache-references": Event(TYPE_HARDWARE, 2),
    "cache-misses": Event(TYPE_HARDWARE, 3),
    "branches": Event(TYPE_HARDWARE, 4),
    "branch-misses": Event(TYPE_HARDWARE, 5),
    "task-clock": Event(TYPE_SOFTWARE, 1, "ns"),
    "page-faults": Event(TYPE_SOFTWARE, 2),
    "context-switches": Event(TYPE_SOFTWARE, 3),
    "cpu-migrations": Event(TYPE_SOFTWARE, 4),
    "minor-faults": Event(TYPE_SOFTWARE, 5),
    "major-faults": Event(TYPE_SOFTWARE, 6),
}
"""The names that perf-list(1) uses."""

_NUMBER = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "s390x": 331, "ppc64le": 319}

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_char_p, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_ulong),
)


def attributes(event: Event, exclude: int = EXCLUDE_HV) -> bytes:
    """A ``struct perf_event_attr`` that counts ``event`` from the moment it is opened."""
    form = FORMAT_TOTAL_TIME_ENABLED | FORMAT_TOTAL_TIME_RUNNING
    packed = _ATTR.pack(event.kind, ATTR_SIZE, event.config, 0, 0, form, exclude)
    return packed.ljust(ATTR_SIZE, b"\0")


def open_cgroup(
    event: Event, cgroup: int, cpu: int, *, group: int = -1, exclude: int = EXCLUDE_HV
) -> int:
    """Count ``event`` on ``cpu`` while tasks of the cgroup or below it run there; a descriptor.

    ``cgroup`` is a descriptor of the cgroup's directory, ``group`` the leader to be scheduled
    together with.  Raises OSError: ENOENT no such event on this machine, ENODEV the CPU is
    offline, EACCES or EPERM not allowed, EBADF not a cgroup directory, EMFILE out of descriptors.
    """
    number = _NUMBER.get(os.uname().machine, 241)  # 241 is asm-generic's, of all newer machines
    flags = FLAG_PID_CGROUP | FLAG_FD_CLOEXEC
    fd = int(_syscall(number, attributes(event, exclude), cgroup, cpu, group, flags))
    if fd < 0:
        error = ctypes.get_errno()
        call = f"perf_event_open(type={event.kind}, config={event.config}, cpu={cpu})"
        raise OSError(error, f"{call}: {os.strerror(error)}")
    return fd


def read(fd: int) -> tuple[int, int, int]:
    """``(value, ns enabled, ns running)``; running < enabled means that the event had to share.

    For a cgroup event both times pass only while the cgroup's tasks run on that CPU.
    """
    raw = os.read(fd, _READ.size)
    if len(raw) != _READ.size:  # end of file: the event is in error state, perf_event_open(2)
        return 0, 0, 0
    value, enabled, running = _READ.unpack(raw)
    return value, enabled, running
