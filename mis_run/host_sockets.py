"""UNIX sockets of the host's services inside what an agent shares with the host.

Whoever may write to such a file may connect: no open, no network, so none of our guards is asked.
They are found before the start and covered by a mount.  Out of scope: one that a service binds
later, or in another network namespace (docs/threat-model.md).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cached_property

from mis_run.errors import SetupError
from mis_run.linux import mountinfo, unix_diag

MOST_WALKED = 1_000_000  # folders and files


def inside(binds: Mapping[str, str]) -> list[str]:
    """The sockets below ``binds`` (where the agent sees them → where they are), as it sees them.

    A bound socket says where it is, at no cost; one with a relative or a second name is looked for.
    Raises SetupError for a folder that cannot be read, or is too large to look through.
    """
    folders = {target: os.path.realpath(source) for target, source in binds.items()}
    folders = {target: source for target, source in folders.items() if os.path.isdir(source)}  # noqa: PTH112
    try:
        bound = unix_diag.bound()
    except OSError:  # not in this kernel: every socket may be somebody's
        return sorted(path for bind in folders.items() for path in _below(*bind))
    found: set[str] = set()
    hidden: set[unix_diag.Place] = set()
    mounts = _Mounts()
    for place, name in bound.items():
        path = _where(name, place, mounts)
        if path is None:
            hidden.add(place)
            continue
        for target, source in folders.items():
            if path.startswith(f"{source.rstrip('/')}/"):
                found.add(f"{target.rstrip('/')}{path[len(source.rstrip('/')) :]}")
    for target, source in folders.items() if hidden else ():
        devices = mounts.devices(source)
        if wanted := {place for place in hidden if place[0] in devices}:
            found |= set(_below(target, source, wanted, devices))
    return sorted(found)


class _Mounts:
    """Devices of file systems as unix_diag tells them: what os.stat says is another number for a
    subvolume of btrfs, and for the files of some overlays."""

    @cached_property
    def _seen(self) -> list[mountinfo.Mount]:
        return mountinfo.read()

    def devices(self, path: str) -> set[int]:
        """Of the file system that ``path`` lies on, and of those mounted below."""
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            here = mountinfo.id_of(fd)
        finally:
            os.close(fd)
        below = f"{path.rstrip('/')}/"
        return {
            os.makedev(*map(int, mount.device.split(":")))
            for mount in self._seen
            if mount.id == here or mount.point.startswith(below)
        }


def _where(name: str, place: unix_diag.Place, mounts: _Mounts) -> str | None:
    """The only path of a bound socket, links resolved; None when it cannot be told."""
    if not name.startswith("/"):
        return None
    folder, _, last = name.rpartition("/")
    path = f"{os.path.realpath(folder)}/{last}"
    try:
        facts = os.lstat(path)
    except OSError:  # removed, or another mount namespace's name
        return None
    if facts.st_nlink != 1 or not stat.S_ISSOCK(facts.st_mode):
        return None
    device, number = _place(facts)
    if number != place[1]:
        return None
    if device == place[0]:
        return path
    with suppress(OSError):  # removed since
        return path if place[0] in mounts.devices(path) else None
    return None


def _below(
    target: str,
    source: str,
    wanted: Collection[unix_diag.Place] = (),
    devices: Collection[int] = (),
) -> Iterator[str]:
    """The sockets in a folder that are ``wanted``, and those that cannot be told from one because
    they lie on none of ``devices``; without them all."""
    left, seen = [""], 0
    while left:
        inner = left.pop()
        for entry in _entries(f"{source}{inner}"):
            seen += 1
            if seen > MOST_WALKED:
                raise SetupError(
                    f"{source} is too large to look for sockets of the host's services in it",
                    hint="a smaller --workdir",
                )
            path = f"{inner}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                left.append(path)
            elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                with suppress(FileNotFoundError):  # gone since
                    facts = entry.stat(follow_symlinks=False)
                    known = facts.st_dev in devices
                    if stat.S_ISSOCK(facts.st_mode) and (not known or _place(facts) in wanted):
                        yield f"{target.rstrip('/')}{path}"


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):  # gone since
        return
    except OSError as error:
        raise SetupError(
            f"{folder}: cannot look for sockets of the host's services: {error.strerror}",
            hint="mis doctor",
        ) from error


def _place(facts: os.stat_result) -> unix_diag.Place:
    return facts.st_dev, facts.st_ino & 0xFFFFFFFF
