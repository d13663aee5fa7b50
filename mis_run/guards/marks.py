"""Which mounts of a container the file guard asks about, marked and seen to be marked.

A mark belongs to one mount of one mount namespace: the container's mounts are its own, so the
host's are never touched.  What mounts there are is read from the kernel, not from our own
configuration, and every mark is checked by mount id before anything relies on it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mis_run.errors import SetupError, VerifyError
from mis_run.linux import fanotify, mountinfo
from mis_run.linux.mountinfo import Mount

PSEUDO = frozenset({"proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"})
"""File systems of the kernel's own: no programs, no files of anybody's.  procfs refuses permission
marks (EINVAL); opening a terminal to judge it could make it ours.  Masked paths, the pid namespace
and mount options guard them."""
DEVICES = "/dev"
"""A tmpfs of device nodes (noexec, writable by root only): opening one to judge it would act."""


def judged(mount: Mount) -> bool:
    """Whether opens on it are asked about."""
    return mount.kind not in PSEUDO and mount.point != DEVICES


ENDED = frozenset({errno.ENOENT, errno.ESRCH, errno.EINVAL})
"""What reading the mounts of a process that ended meets; EINVAL until somebody has waited for it
(mounts_open_common, fs/proc_namespace.c)."""


def mounts(pid: int) -> list[Mount]:
    """The judged mounts of a process's mount namespace, in mount order. Raises SetupError when the
    process has ended."""
    try:
        found = mountinfo.read(pid)
    except OSError as error:
        if error.errno not in ENDED:
            raise
        raise SetupError("the container's init has ended") from error
    return [mount for mount in found if judged(mount)]


def ambiguous(found: Iterable[Mount]) -> frozenset[str]:
    """Devices of judged mounts of which an object is shown at two places: what the kernel remembers
    of it is per object, so there it must not remember anything."""
    by_device: dict[str, list[Mount]] = {}
    for mount in found:
        by_device.setdefault(mount.device, []).append(mount)
    return frozenset(
        device
        for device, mounts in by_device.items()
        if any(_differ(a, b) for a in mounts for b in mounts)
    )


def _differ(outer: Mount, inner: Mount) -> bool:
    """Whether ``inner`` shows a part of ``outer`` somewhere else than ``outer`` itself does."""
    top = outer.root.rstrip("/")
    if inner.root != outer.root and not inner.root.startswith(f"{top}/"):
        return False
    below = inner.root[len(top) :].strip("/")
    return inner.point.rstrip("/") != f"{outer.point.rstrip('/')}/{below}".rstrip("/")


class Marks:
    """The marks of one fanotify group on one container."""

    def __init__(self, group: int, pid: int) -> None:
        self._group = group
        self._pid = pid
        self._two_names: frozenset[str] = frozenset()

    def one_name(self, device: int) -> bool:
        """Whether no two mounts show the same object of ``device`` at different places."""
        return f"{os.major(device)}:{os.minor(device)}" not in self._two_names

    def update(self) -> list[Mount]:
        """Mark every mount that has no mark yet; the new ones. Raises VerifyError."""
        before = fanotify.marked(self._group)
        now = mounts(self._pid)
        new = [mount for mount in now if mount.id not in before]
        if not new:
            return []
        self._two_names = ambiguous(now)
        with _root(self._pid) as root:
            reachable = [mount for mount in new if self._mark(root, mount)]
        marked = fanotify.marked(self._group)
        for mount in reachable:
            if marked.get(mount.id, 0) & fanotify.BOTH != fanotify.BOTH:
                raise VerifyError(
                    f"file guard: the mount at {mount.point} has no mark", hint="mis doctor"
                )
        return reachable

    def _mark(self, root: int, mount: Mount) -> bool:
        """False for a mount that lies under another one, where nobody can open anything."""
        with _walk(root, mount.point) as fd:
            if fd is None or mountinfo.id_of(fd) != mount.id:
                return False
            try:
                fanotify.mark_mount(self._group, fd)
            except OSError as error:
                raise VerifyError(
                    f"file guard: the {mount.kind} mount at {mount.point} cannot be guarded: "
                    f"{error.strerror}",
                    hint="mis doctor",
                ) from error
        return True


@contextmanager
def _root(pid: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _walk(root: int, path: str) -> Iterator[int | None]:
    """An O_PATH descriptor of ``path`` below ``root``, one component at a time: no link is
    followed, so nothing in the container leads us to a mount that is not its own."""
    at = os.dup(root)
    try:
        for part in path.strip("/").split("/"):
            if not part:
                continue
            try:
                below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except OSError:  # covered by another mount, or gone
                yield None
                return
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)
