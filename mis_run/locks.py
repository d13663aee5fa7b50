"""Locks that the kernel drops when their holder dies (flock(2)).

A module of its own, importing next to nothing: the container runtime asks on every call whether a
run is alive, which is whether its supervisor holds the lock of its folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exclusive(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> Iterator[int]:
    """Hold the lock of the file or folder at ``path``, opened with ``flags``; its descriptor.

    A process that inherits the descriptor holds the lock too, until it ends.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def held(folder: str) -> bool:
    """Whether a process holds the lock of the run directory ``folder``."""
    try:
        fd = os.open(f"{folder}/lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return True
    else:
        return False
    finally:
        os.close(fd)
