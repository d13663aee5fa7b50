"""Locks that the kernel drops when their holder dies (flock(2)).

A module of its own, importing next to nothing: the container runtime asks on every call whether a
run is alive, which is whether its supervisor holds the lock of its folder.
"""

from __future__ import annotations

import errno
import fcntl
import os


class Exclusive:
    """Hold the lock of the file or folder at ``path``, opened with ``flags``; its descriptor.

    A process that inherits the descriptor holds the lock too, until it ends.
    """

    def __init__(self, path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> None:
        self._path, self._flags = path, flags

    def __enter__(self) -> int:
        self._fd = os.open(self._path, self._flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


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
