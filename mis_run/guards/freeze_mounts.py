"""DEFCON's effect ``writes``: everything but the workspace becomes read-only, while the agent runs.

A mount can only be changed from inside its own mount namespace (mount_setattr(2)), so a child of
ours enters it, changes the mounts and ends.  A mount with a file open for writing is busy and stays
as it is, which is told.  Going back to a calmer level makes no mount writable again: what the agent
was refused by its own doing it does not get back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from mis_run import masks
from mis_run.errors import SetupError
from mis_run.guards import marks
from mis_run.linux import libc

_MOUNT_SETATTR = 442  # the same number on every architecture (Linux 5.12)
_AT_FDCWD = -100
_RDONLY = 1  # MOUNT_ATTR_RDONLY

_setattr = libc.function(
    "syscall",
    *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint),
    *(ctypes.c_char_p, ctypes.c_size_t),
)


def read_only(pid: int, pidfd: int, kept: str) -> list[str]:
    """Make every judged mount of the container of ``pid`` read-only, but those in ``kept``.

    The points that could not be changed: busy with writers, or gone.
    """
    try:
        points = [m.point for m in marks.mounts(pid) if not masks.within(m.point, kept)]
    except SetupError:  # it has ended, and its mounts with it
        return []
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            libc.setns(pidfd, libc.CLONE_NEWNS)
            os.write(writer, bytes(_change(point) for point in points))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as results:
        found = results.read()
    os.waitpid(child, 0)
    if len(found) != len(points):
        return points  # it could not even enter
    return [point for point, error in zip(points, found, strict=True) if error]


def _change(point: str) -> int:
    attributes = struct.pack("=QQQQ", _RDONLY, 0, 0, 0)
    try:
        _setattr(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(point), 0, attributes, len(attributes))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
