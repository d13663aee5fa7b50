"""Open a file below a folder by rules that the kernel keeps: openat2(2)."""

from __future__ import annotations

import os
import struct
from ctypes import addressof, c_long, create_string_buffer
from pathlib import Path

from mis_run.linux import libc

_OPENAT2 = 437  # on every architecture
# linux/openat2.h
NO_MAGICLINKS, NO_SYMLINKS, BENEATH, IN_ROOT = 0x02, 0x04, 0x08, 0x10


def openat2(root: int, path: str | Path, flags: int, resolve: int, mode: int = 0) -> int:
    """A descriptor of ``path`` below the folder ``root``, looked up as ``resolve`` says.

    Raises OSError.
    """
    name = create_string_buffer(os.fsencode(path))
    how = create_string_buffer(struct.pack("=QQQ", flags, mode, resolve), 24)
    return libc.syscall(_OPENAT2, root, addressof(name), addressof(how), c_long(24))


def open_beneath(folder: Path, path: Path, flags: int, mode: int = 0) -> int:
    """A descriptor of ``path``, relative to ``folder``, without following a link or leaving it.

    Raises OSError: ELOOP for a link, EXDEV for a way out.
    """
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return openat2(root, path, flags, NO_SYMLINKS | BENEATH, mode)
    finally:
        os.close(root)
