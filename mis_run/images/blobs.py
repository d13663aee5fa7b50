"""Where an image's files are: a folder, or a tar that is read in place.

Whoever made them may be hostile: names are looked up, never followed out; what is not a regular
file is refused; what is read at once is bounded.  Digests are the caller's to check.
"""

from __future__ import annotations

import io
import os
import posixpath
import resource
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mis_run.errors import SetupError

MOST_TEXT = 4 << 20
"""Bytes of an index, manifest or configuration (registries take as many)."""
MOST_NAMES = 20_000  # members of an archive
MEMORY = 256 << 20  # bytes that listing them may take
UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, tarfile.TarError, ValueError, EOFError, zlib.error),
    *(OverflowError, MemoryError, RecursionError, IndexError),
)
"""What `tarfile` raises for bytes that are no tar."""


class Blobs(Protocol):
    """Files by name."""

    where: str

    def names(self) -> frozenset[str]:
        """Those of the top folder."""

    def open(self, name: str) -> BinaryIO:
        """The regular file ``name``. Raises SetupError."""


def text(blobs: Blobs, name: str, most: int = MOST_TEXT) -> bytes:
    """A whole small file. Raises SetupError."""
    with blobs.open(name) as file:
        try:
            found = file.read(most + 1)
        except UNREADABLE as error:
            raise broken(blobs, name, error) from error
    if len(found) > most:
        raise SetupError(f"{blobs.where}: {name} has more than {most} bytes")
    return found


def broken(blobs: Blobs, name: str, error: BaseException) -> SetupError:
    """The message for a file that is there and cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return SetupError(f"{blobs.where}: {name}: {reason}")


class Folder:
    """A folder's files."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def names(self) -> frozenset[str]:
        """Those of the top folder."""
        try:
            return frozenset(entry.name for entry in os.scandir(self._path))
        except OSError as error:
            raise SetupError(f"{self.where}: {error.strerror}") from error

    def open(self, name: str) -> BinaryIO:
        """The regular file ``name``; a pipe or device there is refused, not waited for."""
        try:
            fd = os.open(self._path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise SetupError(f"{self.where}: {name} is no regular file")
            return os.fdopen(fd, "rb")
        except OSError as error:
            raise broken(self, name, error) from error


class _Slice(io.RawIOBase):
    """A part of an open file, at a position of its own.

    A descriptor's position is shared with forked processes, and Python's buffers believe theirs:
    after one process had read a layer, the next would go on from where that one ended.
    """

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._start, self._size, self._at = os.dup(fd), start, size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """pread(2) within the part."""
        view = memoryview(buffer)[: max(self._size - self._at, 0)]
        count = os.preadv(self._fd, [view], self._start + self._at) if view else 0
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As any file's."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def close(self) -> None:
        """Give the descriptor back, once."""
        if not self.closed:
            os.close(self._fd)
        super().close()


class Archive:
    """A tar's members, found once and read where they are."""

    def __init__(self, path: Path, fd: int, tar: tarfile.TarFile) -> None:
        self.where = str(path)
        self._fd = fd
        self._members: dict[str, tarfile.TarInfo] = {}
        for count, member in enumerate(tar):
            if count == MOST_NAMES:
                raise SetupError(f"{path}: more than {MOST_NAMES} files: this is no saved image")
            self._members[posixpath.normpath(member.name)] = member

    def names(self) -> frozenset[str]:
        """Those of the top folder."""
        return frozenset(name.partition("/")[0] for name in self._members)

    def open(self, name: str) -> BinaryIO:
        """The regular file ``name``; `docker save` once wrote links for layers that it had."""
        member = self._members.get(name)
        if member is not None and (member.issym() or member.islnk()):
            base = posixpath.dirname(name) if member.issym() else ""
            member = self._members.get(posixpath.normpath(posixpath.join(base, member.linkname)))
        if member is None:
            raise SetupError(f"{self.where}: {name}: not in the archive")
        if not member.isreg() or member.issparse():
            raise SetupError(f"{self.where}: {name} is no regular file")
        return io.BufferedReader(_Slice(self._fd, member.offset_data, member.size))


@contextmanager
def _little_memory() -> Iterator[None]:
    """A tar may say that one header has as many bytes as the file pretends to have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == -1 else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def archive(path: Path) -> Iterator[Archive]:
    """The tar at ``path``, open. Raises SetupError."""
    with ExitStack() as stack:
        file = stack.enter_context(Folder(path.parent).open(path.name))
        compressed = file.read(4)
        if compressed[:2] == b"\x1f\x8b" or compressed == b"\x28\xb5\x2f\xfd":
            raise SetupError(
                f"{path}: the archive is compressed; its layers are read in place",
                hint=f"gunzip {path}" if compressed[:2] == b"\x1f\x8b" else f"unzstd {path}",
            )
        file.seek(0)
        try:
            with _little_memory():
                tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
                found = Archive(path, file.fileno(), tar)
        except UNREADABLE as error:
            raise SetupError(f"{path}: no archive of an image: {error}") from error
        yield found
