"""Cgroup directories made and removed beside other runs, and the cgroups of our own processes.

Out of scope: what a run's cgroup is (`cgroup`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mis_run.cgroup_detect import places
from mis_run.errors import SetupError
from mis_run.later import Later

WATCHDOG = "-watchdog"  # after the run's id


def make(directory: Path) -> None:
    """mkdir with parents, while ends of other runs remove those parents when they look unused."""
    for _ in range(1000):
        try:
            if not directory.parent.is_dir():
                _make_parent(directory.parent)
            directory.mkdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SetupError(
                f"cannot make {directory}: {error.strerror}",
                hint="mis gc" if error.errno == errno.EEXIST else "mis doctor",
            ) from error
        else:
            return
    raise SetupError(f"cannot make {directory}: its parent vanishes again and again")


def _make_parent(directory: Path) -> None:
    if not directory.parent.is_dir():
        _make_parent(directory.parent)
    directory.mkdir(exist_ok=True)


def find(top: Path, pattern: str) -> list[Path]:
    """``top.glob(pattern)`` while directories come and go: pathlib fails where one goes between two
    of its looks (until Python 3.13)."""
    for _ in range(1000):
        try:
            return list(top.glob(pattern))
        except FileNotFoundError:
            continue
    raise SetupError(f"cannot list {top}/{pattern}: it changes again and again")


def remove_if_unused(directory: Path) -> None:
    """rmdir, unless somebody uses it or it is gone."""
    try:
        directory.rmdir()
    except OSError as error:
        # In use by another run (cgroupfs says EBUSY), already removed, or systemd's own.
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT):
            raise


def expect(root: Path) -> Later[None]:
    """A process is about to be moved to another cgroup: have the kernel wait for that beforehand.

    The first move in a while waits for an RCU grace period, 5 to 15 ms, those within 10 ms of one
    another do not (percpu_down_write; rcu_sync in kernel/rcu/sync.c).  So we move ourselves to
    where we are, which changes nothing.
    """

    def move() -> None:
        with suppress(OSError):  # somewhere we may not write: then whoever moves waits
            (_here(root) / "cgroup.procs").write_text(str(os.getpid()))

    return Later(move)


def _here(root: Path) -> Path:
    """The v2 cgroup that we are in."""
    return root / places().get("", "/")[1:]


@contextmanager
def beside(group: Path, root: Path) -> Iterator[tuple[int, int]]:
    """A v2 cgroup of the watchdog's own beside the run's, ``group``: what is done to the
    supervisor's does not concern it.  Nothing is limited there.

    Descriptors to enter it by, and to go back to where we are: the watchdog must leave before `gc`
    can remove it.  Raises SetupError.
    """
    place = group.with_name(f"{group.name}{WATCHDOG}")
    with ExitStack() as stack:
        stack.callback(remove_if_unused, place.parent)
        stack.callback(remove_if_unused, place)
        make(place)
        enter, leave = (_open_procs(stack, path) for path in (place, _here(root)))
        yield enter, leave


def _open_procs(stack: ExitStack, directory: Path) -> int:
    """The descriptor by which processes enter a cgroup. Raises SetupError."""
    path = directory / "cgroup.procs"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}", hint="mis doctor") from error
    stack.callback(os.close, fd)
    return fd
