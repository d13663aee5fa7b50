"""When an inode was made, which os.stat does not tell on Linux (statx(2), since Linux 4.11)."""

from __future__ import annotations

import ctypes
import os
import struct

from mis_run.linux import libc

AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = -100, 0x100, 0x1000
STATX_BTIME = 0x800
MASK = struct.Struct("=I")  # the fields that the kernel filled in
BTIME = struct.Struct("=80xqI")  # struct statx up to stx_btime: seconds, nanoseconds
SIZE = 256

_statx = libc.function(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p
)


def birth(what: int | str) -> int | None:
    """Nanoseconds since 1970 at which the inode behind a descriptor or path (links not followed)
    was made, None where its file system does not keep that. Nobody can set it.

    With device and inode number it names an object for good: the number of a deleted file is given
    to a new one.  Raises OSError.
    """
    at, path, flags = (what, "", AT_EMPTY_PATH) if isinstance(what, int) else (AT_FDCWD, what, 0)
    buffer = ctypes.create_string_buffer(SIZE)
    _statx(at, os.fsencode(path), flags | AT_SYMLINK_NOFOLLOW, STATX_BTIME, buffer)
    if not MASK.unpack_from(buffer)[0] & STATX_BTIME:
        return None
    seconds, rest = BTIME.unpack_from(buffer)
    return int(seconds * 1_000_000_000 + rest)
