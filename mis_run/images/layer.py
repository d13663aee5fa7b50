"""One layer from its blob to a folder: decompressed, checked against both its digests, unpacked."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from mis_run.errors import SetupError
from mis_run.images import aside
from mis_run.images.blobs import Blobs
from mis_run.images.layout import Layer
from mis_run.images.unpack import BLOCK, MOST_BYTES, Refused, Unpacker

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Counted:
    """A stream that is hashed and bounded while it is read."""

    def __init__(self, source: BinaryIO, most: int, what: str) -> None:
        self._source, self._most, self._what = source, most, what
        self._hash = hashlib.sha256()
        self._size = 0

    def read(self, size: int = -1) -> bytes:
        """As any file's. Raises Refused for more bytes than there may be."""
        block = self._source.read(size if 0 <= size <= BLOCK else BLOCK)
        self._size += len(block)
        if self._size > self._most:
            raise Refused(f"{self._what} has more than {self._most} bytes")
        self._hash.update(block)
        return block

    def digest(self) -> str:
        """Of everything, to its end."""
        while self.read(BLOCK):
            pass
        return f"sha256:{self._hash.hexdigest()}"


def unpack(blobs: Blobs, layer: Layer, tree: Path) -> dict[str, int]:
    """Fill the empty folder ``tree``; how many members, bytes and left out devices there were.

    Raises SetupError, and then nothing in ``tree`` may be used.
    """
    what = f"{blobs.where}: layer {layer.diff}"
    with blobs.open(layer.name) as file:
        found = aside.run(what, lambda: _inside(file, layer, tree))
    if layer.digest is not None and found["blob"] != layer.digest:
        raise SetupError(f"{what}: the blob {layer.digest} has the digest {found['blob']}")
    if found["diff"] != layer.diff:
        raise SetupError(f"{what}: its tar has the digest {found['diff']}")
    return {key: found[key] for key in ("members", "size", "devices")}


def _inside(file: BinaryIO, layer: Layer, tree: Path) -> dict[str, Any]:
    """In the other process: nothing but the tree is there for it."""
    raw = Counted(file, MOST_BYTES if layer.size is None else layer.size, "the blob")
    magic = file.read(4)
    file.seek(0)
    tar = Counted(_plain(cast("BinaryIO", raw), magic), MOST_BYTES, "the tar")
    os.umask(0o022)
    os.chroot(tree)
    os.chdir("/")
    contents = Unpacker("/").all(cast("BinaryIO", tar))
    diff = tar.digest()
    return {
        "diff": diff,
        "blob": raw.digest(),
        "members": contents.members,
        "size": contents.size,
        "devices": contents.devices,
    }


def _plain(raw: BinaryIO, magic: bytes) -> BinaryIO:
    if magic.startswith(GZIP):
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb"))
    if magic == ZSTD:
        try:
            import zstandard  # late, and not required: few images are compressed so
        except ImportError:
            raise Refused(
                "it is compressed with zstd: pip install zstandard, or convert the image: "
                "skopeo copy --dest-compress-format gzip"
            ) from None
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return cast("BinaryIO", reader)
    return raw
