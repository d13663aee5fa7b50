"""What ``--image`` may say: an engine's image, a folder or an archive. Pure."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.errors import UsageError

HINT = "use NAME[:TAG], oci:FOLDER[:TAG], archive:FILE[:TAG] or a path that begins with / or ./"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,255}(@sha256:[0-9a-f]{64})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/@:+-]{0,255}")


class Kind(Enum):
    """Where an image is."""

    ENGINE = "engine"
    LAYOUT = "oci"  # a folder: OCI image layout
    ARCHIVE = "archive"  # one file: a tar of such a folder, or what `docker save` writes


@dataclass(frozen=True)
class Wanted:
    """One reference, read. ``name`` is for an engine, ``path`` and ``tag`` for files."""

    text: str
    kind: Kind
    name: str = ""
    path: Path = Path()
    tag: str = ""


def read(text: str) -> Wanted:
    """The reference in ``text``; the file system says what a bare path is. Raises UsageError."""
    word, colon, rest = text.partition(":")
    if colon and word in ("oci", "oci-archive", "docker-archive", "archive"):
        kind = Kind.LAYOUT if word == "oci" else Kind.ARCHIVE
        return _file(text, rest, kind)
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return _file(text, text, None)
    if not _NAME.fullmatch(text) or ".." in text or "//" in text:
        raise UsageError(f"--image {text!r}: cannot be read", hint=HINT)
    return Wanted(text, Kind.ENGINE, name=text)


def _file(text: str, rest: str, kind: Kind | None) -> Wanted:
    """A path, with a tag behind the last colon unless the whole is there as it is."""
    if not rest or "\0" in rest:
        raise UsageError(f"--image {text!r}: no path", hint=HINT)
    path, tag = _path(rest), ""
    if not _exists(path) and ":" in rest:
        head, _, tag = rest.rpartition(":")
        path = _path(head)
        if not _TAG.fullmatch(tag):
            raise UsageError(f"--image {text!r}: {tag!r} is no tag", hint=HINT)
    if not _exists(path):
        raise UsageError(f"--image {text!r}: {path}: no such file or folder", hint=HINT)
    if kind is None:
        kind = Kind.LAYOUT if path.is_dir() else Kind.ARCHIVE
    if path.is_dir() != (kind is Kind.LAYOUT):
        what = "is a folder: use oci:" if path.is_dir() else "is no folder: use archive:"
        raise UsageError(f"--image {text!r}: {path} {what}{path}", hint=HINT)
    return Wanted(text, kind, path=path, tag=tag)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~nobody-of-this-name
        raise UsageError(f"--image {text!r}: {error}", hint=HINT) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that we may not enter
        return False
