"""fanotify(7) permission events: a group, marks on mounts, events in, verdicts out.

Out of scope: what is allowed (`guards.file`), which mounts there are (`guards.marks`).  Numbers are
those of linux/fanotify.h, part of the kernel's stable ABI.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import suppress

from mis_run.dataclass import dataclass
from mis_run.hints import Any
from mis_run.linux import libc

OPEN_PERM = 0x00010000
OPEN_EXEC_PERM = 0x00040000
BOTH = OPEN_PERM | OPEN_EXEC_PERM
Q_OVERFLOW = 0x00004000

_CLOEXEC, _NONBLOCK, _CLASS_CONTENT = 0x1, 0x2, 0x4
_UNLIMITED_QUEUE, _UNLIMITED_MARKS, _REPORT_TID = 0x10, 0x20, 0x100
_ADD, _MOUNT, _IGNORED, _FLUSH, _EVICTABLE = 0x1, 0x10, 0x20, 0x80, 0x200
_ALLOW, _DENY = 1, 2
_VERSION = 3  # FANOTIFY_METADATA_VERSION
# A descriptor for each event is opened for us: never blocking on a FIFO, never changing atime.
_EVENT_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME | 0o100000  # O_LARGEFILE

_METADATA = struct.Struct("=IBBHQii")
_RESPONSE = struct.Struct("=iI")
MOST = 128
"""Events taken at once: each holds a descriptor until it is answered."""

init = libc.function("fanotify_init", ctypes.c_uint, ctypes.c_uint)
_mark = libc.function(
    "fanotify_mark",
    *(ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p),
)


@dataclass(frozen=True)
class Opened:
    """One open(2) or execve(2) that waits for a verdict.

    ``fd`` refers to the very object; it is ours and read-only.  ``thread`` is the caller's id in
    our pid namespace, 0 when it has none there.
    """

    fd: int
    executes: bool
    thread: int


class Garbled(ValueError):
    """Bytes that are no fanotify events."""


def group() -> int:
    """A new notification group. Needs CAP_SYS_ADMIN; raises OSError.

    Unlimited: a full queue would otherwise be reported, not answered (fanotify_init(2)); for a
    permission event that cannot be queued the kernel itself denies.
    """
    flags = _CLOEXEC | _NONBLOCK | _CLASS_CONTENT | _UNLIMITED_QUEUE | _UNLIMITED_MARKS
    return int(init(flags | _REPORT_TID, _EVENT_FLAGS))


def mark_mount(group: int, path_fd: int, mask: int = BOTH) -> None:
    """Ask about every open in the mount that ``path_fd`` (O_PATH will do) lies on."""
    _mark(group, _ADD | _MOUNT, mask, -1, f"/proc/self/fd/{path_fd}".encode())


def mark_object(group: int, fd: int) -> None:
    """Ask about opens of the one object behind ``fd``."""
    _mark(group, _ADD, OPEN_PERM, fd, None)


def ignore(group: int, fd: int, mask: int) -> bool:
    """Stop asking about the object behind ``fd`` until it is modified or `forget` is called.

    The kernel may forget it under memory pressure (FAN_MARK_EVICTABLE, Linux 5.19) and then asks
    again.  False where the object cannot be marked: it is asked about each time.
    """
    for flags in (_ADD | _IGNORED | _EVICTABLE, _ADD | _IGNORED):
        with suppress(OSError):
            _mark(group, flags, mask, fd, None)
            return True
    return False


def forget(group: int) -> None:
    """Drop every `ignore`; the marks on mounts stay."""
    _mark(group, _FLUSH, 0, -1, b"/")


def receive(group: int) -> list[Opened]:
    """All that wait now, at most MOST; empty when none does.

    Raises Garbled; and OSError where the descriptor of an event could not be made (EMFILE, a
    vanished file): the kernel has denied that open (fanotify_user.c, copy_event_to_user).
    """
    try:
        data = os.read(group, MOST * _METADATA.size)
    except BlockingIOError:
        return []
    return list(parse(data))


def parse(data: bytes) -> Iterator[Opened]:
    """The events in what a read of a group returned. Raises Garbled at the first nonsense."""
    at = 0
    while at < len(data):
        if len(data) - at < _METADATA.size:
            raise Garbled(f"{len(data) - at} bytes are no event")
        length, version, _, head, mask, fd, thread = _METADATA.unpack_from(data, at)
        if version != _VERSION or head < _METADATA.size or length < head:
            raise Garbled(f"version {version}, length {length}, head {head}")
        at += length
        if fd >= 0 and mask & BOTH:
            yield Opened(fd, bool(mask & OPEN_EXEC_PERM), thread)
        elif fd >= 0:
            os.close(fd)


def answer(group: int, fd: int, *, allow: bool) -> None:
    """Let the open go on, or fail it with EPERM. ``fd`` is the number in its event.

    The number is all that counts: the descriptor itself may be closed before (an open FIFO end of
    ours would be a peer to the agent).  A caller that died meanwhile needs no answer.
    """
    with suppress(FileNotFoundError):
        os.write(group, _RESPONSE.pack(fd, _ALLOW if allow else _DENY))


def marked(group: int) -> dict[int, int]:
    """mount id → mask of every mount mark, as the kernel tells in fdinfo (proc_pid_fdinfo(5))."""
    found: dict[int, int] = {}
    with open(f"/proc/self/fdinfo/{group}") as file:
        for line in file:
            words: dict[str, Any] = dict(w.split(":", 1) for w in line.split()[1:] if ":" in w)
            if line.startswith("fanotify mnt_id"):
                found[int(words["mnt_id"], 16)] = int(words["mask"], 16)
    return found
