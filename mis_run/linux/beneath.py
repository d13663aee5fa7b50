"""Open a file below a folder, without following a symbolic link or leaving it: openat2(2)."""

from __future__ import annotations

import os
import struct
from ctypes import addressof, c_long, create_string_buffer
from pathlib import Path

from mis_run.linux import libc

_OPENAT2 = 437  # on every architecture
_NO_SYMLINKS, _BENEATH = 0x04, 0x08  # linux/openat2.h


def open_beneath(folder: Path, path: Path, flags: int, mode: int = 0) -> int:
    """A descriptor of ``path``, relative to ``folder``.

    Raises OSError: ELOOP for a link, EXDEV for a way out.
    """
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = create_string_buffer(os.fsencode(path))
        how = create_string_buffer(struct.pack("=QQQ", flags, mode, _NO_SYMLINKS | _BENEATH), 24)
        return libc.syscall(_OPENAT2, root, addressof(name), addressof(how), c_long(24))
    finally:
        os.close(root)
