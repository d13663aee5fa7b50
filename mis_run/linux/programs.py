"""The system's programs that we run, as root: from the system's folders, with a clean environment.

Never by the caller's PATH. An activated virtual environment or ``node_modules/.bin`` is in that,
lies in a workspace, and an earlier agent may have left an ``nft`` there.
"""

from __future__ import annotations

import os

FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin"
"""As sudo's secure_path, and where NixOS has its programs."""


def find(name: str) -> str | None:
    """The program's path; a path is returned as it is, if it can be executed."""
    places = [name] if "/" in name else [f"{folder}/{name}" for folder in FOLDERS.split(":")]
    return next((path for path in places if os.access(path, os.X_OK) and not _folder(path)), None)


def _folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - no Path: a launch asks this a dozen times


def environment() -> dict[str, str]:
    """All that such a program gets."""
    return {"PATH": FOLDERS}
