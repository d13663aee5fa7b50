"""The mounts of a mount namespace, as proc_pid_mountinfo(5) tells them."""

from __future__ import annotations

import os
import re

from mis_run.dataclass import dataclass

ESCAPED = re.compile(r"\\([0-7]{3})")  # blank, tab, newline and backslash in a path


@dataclass(frozen=True)
class Mount:
    """One line."""

    id: int
    device: str  # MAJOR:MINOR of the superblock
    root: str  # what of it is mounted
    point: str
    kind: str  # file system type
    options: str  # of the superblock
    source: str = ""  # a device, or any word


def read(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees, in mount order. Raises OSError when it is gone."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return parse(os.fsdecode(file.read()))


def parse(text: str) -> list[Mount]:
    """The lines of a mountinfo file."""
    return [_mount(line) for line in text.splitlines()]


def id_of(fd: int) -> int:
    """The id of the mount that a descriptor lies on (proc_pid_fdinfo(5)), -1 where the kernel does
    not tell."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    return -1


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    number, _, device, root, point, *_ = before.split(" ")
    kind, _, rest = after.partition(" ")
    source, _, options = rest.rpartition(" ")
    return Mount(int(number), device, _plain(root), _plain(point), kind, options, _plain(source))


def _plain(text: str) -> str:
    return ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), text)
