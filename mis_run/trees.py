"""Removing a folder of ours without ever removing what is only mounted in it.

The supervisor's mount namespace shows whole root file systems below a run's folder, and its
watchdog, which cleans up after a SIGKILL, lives in the same namespace.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from mis_run.linux import libc, mountinfo


def remove(top: Path, keep: Collection[str] = ()) -> bool:
    """Unmount what is mounted below ``top`` (here: other namespaces keep theirs), then remove it;
    with ``keep``, what is in it but for these names.

    False when something could not be unmounted (then nothing is removed) or removed.  A mount
    that appears meanwhile is not entered: only the file system of ``top`` is.
    """
    for point in _mounts_below(str(top)):
        with suppress(OSError):  # the next lines see that it is still there
            libc.umount(point, libc.MNT_DETACH)
    if _mounts_below(str(top)):
        return False
    try:
        device = os.lstat(top).st_dev
        if not keep:
            return _remove(str(top), device)
        paths = [entry.path for entry in os.scandir(top) if entry.name not in keep]
        gone = [_remove(path, device) for path in paths]
        return all(gone)
    except FileNotFoundError:
        return True


def _mounts_below(top: str) -> list[str]:
    """Mount points at or below ``top``, last mounted first."""
    points = [mount.point for mount in reversed(mountinfo.read())]
    return [point for point in points if f"{point}/".startswith(f"{top}/")]


def _remove(path: str, device: int) -> bool:
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode):
        # An overlay shows files on other devices than their folder; what is mounted on is busy.
        os.unlink(path)  # noqa: PTH108
        return True
    if facts.st_dev != device:
        return False
    clean = True
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                clean &= _remove(entry.path, device)
            except OSError:
                clean = False
    if clean:
        os.rmdir(path)  # noqa: PTH106
    return clean
