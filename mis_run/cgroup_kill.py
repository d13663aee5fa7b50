"""Freezing and killing every process below a cgroup, so that no fork escapes.

Three mechanisms, the best that the kernel has: ``cgroup.kill`` (Linux 5.14, commit
661ee6281665), ``cgroup.freeze`` (5.2, commit 76f969e8948d), the v1 freezer.  Out of scope: who
decides (`defcon`, `watchdog`), and removal (`cgroup`).
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SHORT_WAIT = 0.001  # seconds between looks while the kernel holds a notification back


def write(path: Path, content: str) -> None:
    """Write to an existing file: with O_CREAT a missing one would be EACCES instead of ENOENT."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def subtree(top: Path) -> Iterator[Path]:
    """``top`` and the cgroups below it, deepest first; ones that vanish meanwhile are left out."""
    try:
        below = [Path(entry.path) for entry in os.scandir(top) if entry.is_dir()]
    except FileNotFoundError:
        return
    for directory in below:
        yield from subtree(directory)
    yield top


def procs(top: Path) -> set[int]:
    """The processes in ``top`` and below, as seen from our pid namespace; zombies may be left."""
    found: set[int] = set()
    for directory in subtree(top):
        for name in ("cgroup.procs", "cgroup.threads"):
            try:
                found.update(map(int, (directory / name).read_text().split()))
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    continue  # a threaded cgroup lists threads only (cgroup-v2.rst, "Threads")
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
            break
    found.discard(0)  # of another pid namespace: we have no name for it
    return found


def wait_for(events: Path, line: str, timeout: float) -> bool:
    """Wait until the cgroup.events file has ``line``; a cgroup that is gone counts as empty.

    The kernel announces changes by POLLPRI but at most every 10 ms per file (cgroup.c,
    CGROUP_FILE_NOTIFY_MIN_INTV), so we also look by ourselves.
    """
    gone = line == "populated 0"
    end = time.monotonic() + timeout
    try:
        fd = os.open(events, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return gone
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        while line not in os.pread(fd, 256, 0).decode().splitlines():
            left = end - time.monotonic()
            if left <= 0:
                return False
            poll.poll(min(SHORT_WAIT, left) * 1000)
            # POLLPRI stays up until the file is read again; without this we could spin.
            time.sleep(SHORT_WAIT / 4)
    except OSError as error:
        if error.errno == errno.ENODEV:  # removed while we looked
            return gone
        raise
    finally:
        os.close(fd)
    return True


def freeze(unified: Path, *, on: bool, timeout: float) -> bool:
    """Freeze or thaw by cgroup v2; whether the kernel confirmed it within ``timeout`` seconds.

    Tasks that sleep uninterruptibly (or wait for a fanotify answer) freeze only when that ends:
    they run no instruction of their own until then, but False is returned.
    """
    try:
        write(unified / "cgroup.freeze", "1" if on else "0")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return not on  # the cgroup is gone
        raise
    return wait_for(unified / "cgroup.events", f"frozen {on:d}", timeout)


def freeze_v1(freezer: Path, *, on: bool, timeout: float) -> bool:
    """The same by the v1 freezer (cgroup-v1/freezer-subsystem.rst)."""
    wanted = "FROZEN" if on else "THAWED"
    end = time.monotonic() + timeout
    state = freezer / "freezer.state"
    try:
        while True:
            # Written again on each turn: FREEZING can get stuck while tasks fork.
            write(state, wanted)
            if state.read_text().strip() == wanted:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(SHORT_WAIT)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return not on  # the cgroup is gone
        raise


def kill_member(pid: int, place: str) -> None:
    """SIGKILL ``pid`` if it is (still) in the cgroup ``place`` (``/mis/<id>``) or below it.

    By pidfd, opened before looking at the membership: a reused number is never hit.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        cgroups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        # "in": a host's cgroup namespace may show more in front than we see below our mount.
        if any(f"{place}/" in f"{line}/" for line in cgroups):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return  # ended by itself between two lines
    finally:
        os.close(fd)


def kill_by_hand(unified: Path, freezer: Path | None, place: str, timeout: float) -> None:
    """Kill everything below ``unified`` on a kernel without cgroup.kill, within ``timeout``.

    Frozen processes cannot fork, so each list read while frozen is complete; SIGKILL ends them
    frozen (v2) or as soon as they thaw (v1), before they run one more instruction.  Whatever
    could not be frozen in time is met by the next turn.
    """
    end = time.monotonic() + timeout
    native = (unified / "cgroup.freeze").exists() if freezer is None else False
    while time.monotonic() < end:
        if native:
            freeze(unified, on=True, timeout=0.1)
        elif freezer is not None:
            freeze_v1(freezer, on=True, timeout=0.1)
        for pid in procs(unified):
            kill_member(pid, place)
        if native:
            freeze(unified, on=False, timeout=0.0)
        elif freezer is not None:
            freeze_v1(freezer, on=False, timeout=0.1)
        if wait_for(unified / "cgroup.events", "populated 0", 0.02):
            return
