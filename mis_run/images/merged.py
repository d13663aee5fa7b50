"""What an image says when its layers lie on each other: its users."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from mis_run.hints import Any
from mis_run.images import aside
from mis_run.images.accounts import Accounts
from mis_run.linux import libc

MOST = 1 << 20  # bytes of a passwd or group that are read


def accounts(name: str, layers: Sequence[Path], view: Path) -> Accounts:
    """``/etc/passwd`` and ``/etc/group`` of an image; ``layers`` are links in one folder, uppermost
    first, ``view`` is a place to see them together, made here.

    Read in a process whose root is the image, so a link there leads nowhere else.  Raises
    SetupError, also where overlayfs does not take these layers.
    """
    view.mkdir()

    def body() -> dict[str, Any]:
        libc.unshare(libc.CLONE_NEWNS)
        libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
        root = layers[0]
        if len(layers) > 1:
            os.chdir(layers[0].parent)
            data = f"lowerdir={':'.join(link.name for link in layers)}"
            libc.mount("overlay", str(view), "overlay", libc.MS_RDONLY, data)
            root = view
        os.chroot(root)
        os.chdir("/")
        return {name: _text(f"/etc/{name}") for name in ("passwd", "group")}

    found = aside.run(f"image {name}", body)
    return Accounts(found["passwd"], found["group"])


def _text(path: str) -> str:
    """A regular file's text, as far as it is read; nothing where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return file.read(MOST).decode(errors="replace")
