"""Lines of a profile become rules on inodes of the container, for the kernel plane.

A line names a path, as the agent sees it, and the rights it allows and denies there and below.  The
kernel knows no paths: each becomes the inode it leads to now, symbolic links followed inside the
container's root.  Out of scope: where lines come from, and how they get into the kernel (`lsm`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mis_run.dataclass import dataclass, field, replace
from mis_run.errors import SetupError
from mis_run.guards.lsm_abi import Right, RuleFlag
from mis_run.linux import mountinfo
from mis_run.linux.beneath import IN_ROOT, NO_MAGICLINKS, openat2

NOTHING, PLAIN = Right(0), RuleFlag(0)


class Line(NamedTuple):
    """One line of the policy; ``text`` is what a denial shows as its rule."""

    path: str
    allow: Right
    deny: Right
    text: str
    flags: RuleFlag = PLAIN


class Place(NamedTuple):
    """An inode as the kernel sees it. ``device`` is its file system's own (major << 20 | minor),
    which stat(2) does not show for the files of an overlay or of btrfs."""

    device: int
    inode: int


@dataclass(frozen=True)
class Entry:
    """The rule of one inode; ``number`` is the line to name, from 1."""

    allow: Right = NOTHING
    deny: Right = NOTHING
    number: int = 0
    flags: RuleFlag = PLAIN


@dataclass(frozen=True)
class Compiled:
    """Rules by inode. ``held`` are descriptors that keep those inodes: closed by `release`.

    While one is open its inode number names nothing else, and an overlay keeps the number it gave.
    ``missing`` are paths that lead nowhere, so nothing guards them: deny the directory instead.
    """

    entries: Mapping[Place, Entry]
    texts: tuple[str, ...]
    missing: tuple[str, ...] = ()
    held: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Close what `held` has."""
        while self.held:
            os.close(self.held.pop())


Device = Callable[[int], int]
"""The kernel's device number of the file system a descriptor lies on."""


def devices(pid: int) -> Device:
    """`Device` for mounts that process ``pid`` sees. Raises SetupError for others."""
    table = {}
    for seen in mountinfo.read(pid):
        major, _, minor = seen.device.partition(":")
        table[seen.id] = int(major) << 20 | int(minor)

    def device(fd: int) -> int:
        mount = mountinfo.id_of(fd)
        if mount < 0:
            raise SetupError("this kernel does not tell the mount of a descriptor")
        if mount not in table:
            raise SetupError(f"mount {mount} is not one of process {pid}")
        return table[mount]

    return device


def points(pid: int) -> list[str]:
    """Where process ``pid`` has something mounted, by its own paths."""
    return [mount.point for mount in mountinfo.read(pid)]


def compile(lines: Sequence[Line], root: int, device: Device, mounts: Iterable[str]) -> Compiled:
    """The rules of ``lines`` in the tree whose root is the descriptor ``root``.

    ``mounts`` are all of the container's mount points (`points`): each gets the rule that holds
    there, because acts whose hook knows no mount are judged within their file system.
    """
    entries: dict[Place, Entry] = {}
    missing: list[str] = []
    held: list[int] = []
    with ExitStack() as stack:

        @cache
        def place(path: str) -> Place | None:
            fd = _open(root, path)
            if fd is None:
                return None
            stack.callback(os.close, fd)
            held.append(fd)
            return Place(device(fd), os.fstat(fd).st_ino)

        for number, line in enumerate(lines, 1):
            found = place(line.path)
            if found is None:
                missing.append(line.path)
                continue
            anchor = RuleFlag.ANCHOR if line.deny else PLAIN
            entries[found] = _merge(
                entries.get(found, Entry()),
                Entry(line.allow, line.deny, number, line.flags | anchor),
            )
            for parent in Path(line.path).parents if line.deny else ():
                above = place(str(parent))
                if above is not None:
                    old = entries.get(above, Entry())
                    entries[above] = replace(old, flags=old.flags | RuleFlag.ANCHOR)
        for mount in mounts:
            found = place(mount)
            if found is not None:
                way = [place(str(parent)) for parent in (Path(mount), *Path(mount).parents)]
                here = effective(entries[one] for one in way if one in entries)
                old = entries.get(found, here)
                entries[found] = replace(here, flags=old.flags)
        stack.pop_all()  # they are the rules' from here on
    return Compiled(entries, tuple(line.text for line in lines), tuple(missing), held)


def effective(chain: Iterable[Entry]) -> Entry:
    """What holds at the first of a chain of inodes, nearest first: each right by the nearest.

    A right that none of them gives is denied in the name of the nearest, but for execution: a
    library that no rule lets be executed may be mapped, one that a rule denies may not.
    """
    allow, deny, number, flags = NOTHING, NOTHING, 0, PLAIN
    for entry in chain:
        open_ = Right.ALL & ~(allow | deny)
        if open_ & (entry.allow | entry.deny):
            number = number or entry.number
            flags = flags or entry.flags & ~RuleFlag.ANCHOR
        deny |= open_ & entry.deny
        allow |= open_ & entry.allow & ~entry.deny
    not_given = Right.ALL & ~allow & ~Right.EXEC
    return Entry(allow, not_given | deny & Right.EXEC, number, flags)


def _merge(one: Entry, other: Entry) -> Entry:
    """Two lines on one inode: both count; a denial is what gets named."""
    number = other.number if other.deny and not one.deny else one.number or other.number
    return Entry(one.allow | other.allow, one.deny | other.deny, number, one.flags | other.flags)


def _open(root: int, path: str) -> int | None:
    """``path`` below ``root``, O_PATH, never outside of it; None when it leads nowhere."""
    try:
        return openat2(root, path, os.O_PATH | os.O_CLOEXEC, IN_ROOT | NO_MAGICLINKS)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return None
        raise SetupError(f"cannot look at {path} in the container: {error.strerror}") from error
