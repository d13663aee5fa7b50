"""Whether a run is alive: its supervisor holds a lock that the kernel drops when it dies.

A module of its own, importing next to nothing: the container runtime asks on every call.
"""

from __future__ import annotations

import errno
import fcntl
import os


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
