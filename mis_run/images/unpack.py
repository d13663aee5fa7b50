"""A layer's tar → a folder that overlayfs takes as a lower layer. The tar may be hostile.

- A name is taken apart: ``..`` is refused, a leading ``/`` ignored, and a folder on the way must be
  a real folder of this layer; so nothing is ever followed, and hard links stay inside too.
- Set-uid and set-gid bits of files, extended attributes (``trusted.overlay.*`` would be orders to
  overlayfs) and device nodes are left out: the agent could use none of them.
- Whiteouts (``.wh.NAME``, ``.wh..wh..opq``; image-spec layer.md) become overlayfs' own: a character
  device 0/0, an opaque folder (overlayfs.rst).
- Members, bytes and free space are bounded.

`layer` calls this as a process of its own, whose root directory is the folder itself.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from typing import BinaryIO

from mis_run.dataclass import dataclass

MOST_BYTES = 32 << 30  # of one layer, as its files say; and of its tar
MOST_MEMBERS = 2_000_000
RESERVE = 512 << 20  # bytes that stay free on the disk
WHITEOUT, OPAQUE, AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."
MOST_ID = 2**32 - 2  # -1 means "no change" to chown(2)
MOST_DEPTH, MOST_NAME = 255, 3500  # folders in each other, bytes: both can be removed again
BLOCK = 1 << 20


class Refused(Exception):
    """A layer that is not unpacked, and why."""


@dataclass
class Contents:
    """What a layer had: numbers of entries and bytes, and what was left out."""

    members: int = 0
    size: int = 0
    devices: int = 0


class Unpacker:
    """Puts members below ``top``, which nobody else writes to."""

    def __init__(self, top: str, *, most: int = MOST_BYTES) -> None:
        self.contents = Contents()
        self._top = top.rstrip("/")
        self._most = most
        self._folders: set[str] = {""}  # seen to be real folders of this layer
        self._times: dict[str, int] = {}  # folders' own, to be set when all is in them
        self._unchecked = 0

    def all(self, stream: BinaryIO) -> Contents:
        """Everything in a tar. Raises Refused, and what `tarfile` and the kernel raise."""
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK >> 2) as tar:
            for member in tar:
                vars(tar)["members"] = []  # it would keep them all
                self.add(tar, member)
        for name, nanoseconds in self._times.items():
            os.utime(f"{self._top}/{name}", ns=(nanoseconds, nanoseconds), follow_symlinks=False)
        return self.contents

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """One member."""
        self.contents.members += 1
        if self.contents.members > MOST_MEMBERS:
            raise Refused(f"more than {MOST_MEMBERS} entries")
        name = _inside(member.name)
        folder, _, base = name.rpartition("/")
        if base.startswith(WHITEOUT):
            self._whiteout(folder, base)
            return
        if not name:  # the root folder itself
            if not member.isdir():
                raise Refused("the root of the layer is no folder")
            self._like(member, name, stat.S_IMODE(member.mode))
            return
        self._real(folder)
        opaque = self._clear(name, keep_folder=member.isdir())
        make = self._maker(tar, member)
        if make is None:
            self.contents.devices += 1
            return
        mode = make(name)
        if opaque and member.isdir():
            self._make_opaque(name)
        if not member.islnk():
            self._like(member, name, mode)

    def _maker(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[str], int] | None:
        """What makes this kind of member, and returns its mode; None for what is left out."""

        def folder(name: str) -> int:
            self._folder(name)
            return stat.S_IMODE(member.mode)

        def file(name: str) -> int:
            self._file(name, tar, member)
            return member.mode & 0o1777

        def symlink(name: str) -> int:
            if not member.linkname or "\0" in member.linkname:
                raise Refused(f"{name!r} is a link to nothing")
            os.symlink(member.linkname, f"{self._top}/{name}")  # noqa: PTH211 - kept as written
            return 0

        def link(name: str) -> int:
            self._link(name, _inside(member.linkname))
            return 0

        def pipe(name: str) -> int:
            os.mkfifo(f"{self._top}/{name}", 0o600)
            return member.mode & 0o777

        if member.isdir():
            return folder
        if member.issym():
            return symlink
        if member.islnk():
            return link
        if member.isfifo():
            return pipe
        if member.isdev():
            return None
        if member.isfile():
            return file
        raise Refused(f"{member.name!r} is of an unknown kind ({member.type!r})")

    def _real(self, folder: str) -> None:
        """Make sure that every folder on this way is one, and of this layer."""
        if folder in self._folders:
            return
        parts, way = folder.split("/"), ""
        for part in parts:
            way = f"{way}/{part}" if way else part
            if way in self._folders:
                continue
            found = self._kind(way)
            if found is None or _is_whiteout(found):
                opaque = self._clear(way)
                self._folder(way)
                if opaque:
                    self._make_opaque(way)
            elif not stat.S_ISDIR(found.st_mode):
                raise Refused(f"{way!r} is no folder, and {folder!r} goes through it")
            self._folders.add(way)

    def _kind(self, name: str) -> os.stat_result | None:
        try:
            return os.lstat(f"{self._top}/{name}")
        except FileNotFoundError:
            return None

    def _clear(self, name: str, *, keep_folder: bool = False) -> bool:
        """Remove what an earlier member put there; whether that was a whiteout."""
        found = self._kind(name)
        if found is None:
            return False
        if stat.S_ISDIR(found.st_mode):
            if keep_folder:
                return False
            shutil.rmtree(f"{self._top}/{name}")
            gone = {one for one in self._folders if f"{one}/".startswith(f"{name}/")}
            self._folders -= gone
            for one in [one for one in self._times if f"{one}/".startswith(f"{name}/")]:
                del self._times[one]
            return False
        os.unlink(f"{self._top}/{name}")  # noqa: PTH108
        return _is_whiteout(found)

    def _folder(self, name: str) -> None:
        if self._kind(name) is None:
            os.mkdir(f"{self._top}/{name}", 0o755)  # noqa: PTH102
        self._folders.add(name)

    def _file(self, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.contents.size += member.size
        if member.size < 0 or self.contents.size > self._most:
            raise Refused(f"its files have more than {self._most} bytes")
        source = tar.extractfile(member)
        assert source is not None
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(f"{self._top}/{name}", flags, 0o600), "wb", buffering=0) as target:
            left = member.size
            while left:
                block = source.read(min(BLOCK, left))
                if not block:
                    raise Refused(f"{name!r} ends early")
                left -= len(block)
                if block.count(0) == len(block):  # a hole stays one
                    target.seek(len(block), os.SEEK_CUR)
                    continue
                self._room(target.fileno(), len(block))
                view = memoryview(block)
                while view:
                    view = view[target.write(view) :]
            target.truncate(member.size)

    def _room(self, fd: int, size: int) -> None:
        """Every few blocks, whether the disk has room: a layer must not fill the machine's."""
        self._unchecked -= size
        if self._unchecked < 0:
            self._unchecked = 64 * BLOCK
            disk = os.fstatvfs(fd)
            if disk.f_bavail * disk.f_frsize < RESERVE + self._unchecked:
                raise Refused(f"less than {RESERVE >> 20} MiB would stay free on the disk")

    def _link(self, name: str, target: str) -> None:
        folder, _, _ = target.rpartition("/")
        found = self._kind(target) if folder in self._folders or self._is_way(folder) else None
        if found is None or stat.S_ISDIR(found.st_mode) or _is_whiteout(found):
            raise Refused(f"{name!r} is a hard link to {target!r}, which this layer does not have")
        os.link(f"{self._top}/{target}", f"{self._top}/{name}", follow_symlinks=False)

    def _is_way(self, folder: str) -> bool:
        """Whether all of it are real folders."""
        parts = folder.split("/")
        ways = ("/".join(parts[: count + 1]) for count in range(len(parts)))
        return all((found := self._kind(way)) and stat.S_ISDIR(found.st_mode) for way in ways)

    def _whiteout(self, folder: str, base: str) -> None:
        self._real(folder)
        hidden = base.removeprefix(WHITEOUT)
        if base == OPAQUE:
            self._make_opaque(folder)
        elif base.startswith(AUFS):
            return  # notes of aufs, which no other file system has
        elif hidden in ("", ".", ".."):
            raise Refused(f"{folder}/{base} removes nothing that has a name")
        else:
            name = f"{folder}/{hidden}" if folder else hidden
            found = self._kind(name)
            if found is None:
                os.mknod(f"{self._top}/{name}", stat.S_IFCHR, os.makedev(0, 0))
            elif stat.S_ISDIR(found.st_mode):  # removed and made anew: only what is new counts
                self._make_opaque(name)

    def _make_opaque(self, name: str) -> None:
        os.setxattr(f"{self._top}/{name}", "trusted.overlay.opaque", b"y", follow_symlinks=False)

    def _like(self, member: tarfile.TarInfo, name: str, mode: int) -> None:
        path = f"{self._top}/{name}"
        if not (0 <= member.uid <= MOST_ID and 0 <= member.gid <= MOST_ID):
            raise Refused(f"{member.name!r} belongs to {member.uid}:{member.gid}")
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            os.chmod(path, mode)  # noqa: PTH101 - no link: it was just made
        # Within what every file system can keep: years 1970 to 2106.
        nanoseconds = int(min(max(member.mtime, 0), 2**32 - 1)) * 10**9
        if member.isdir():
            self._times[name] = nanoseconds
        else:
            os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)


def _inside(name: str) -> str:
    """A member's name without ``.`` and the leading ``/``. Raises Refused for ``..`` and NUL."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Refused(f"the name {name!r:.200} leads out of the layer")
    if len(parts) > MOST_DEPTH or len(os.fsencode(name)) > MOST_NAME:
        raise Refused(f"the name {name!r:.80}… is too long")
    return "/".join(parts)


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
