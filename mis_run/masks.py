"""What of the host an agent must not see: patterns → paths that exist, found without being led out.

Every lookup treats ``root`` as ``/``: a link in it never leads to the host's own files.  Patterns
are plain paths with ``*``, ``?`` and ``[]`` within one component; a trailing ``/**`` means the
folder itself.  Patterns with ``**`` elsewhere, or without a leading ``/``, are the file guard's.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mis_run import file_rules as rules

MOST_LINKS = 40  # as the kernel's own limit, path_resolution(7)


Links = dict[str, str | None]
"""What was found at a path on the host: a link's target, or no link."""


def resolve(
    root: str,
    path: str,
    links: Links | None = None,
    where: Callable[[str], str] | None = None,
) -> str:
    """``path`` with every link followed inside ``root``; what does not exist is kept as written.

    The result starts with ``/`` and is relative to ``root``; what is in ``links`` is not looked at
    again.  ``where`` says, instead of ``root``, at which path of ours one of them lies.  Raises
    OSError (ELOOP) for a circle.
    """
    left = [part for part in path.split("/") if part and part != "."][::-1]
    at: list[str] = []
    known = {} if links is None else links
    followed, top = 0, root.rstrip("/")
    while left:
        part = left.pop()
        if part == "..":
            at[-1:] = []
            continue
        here = "/".join([top, *at, part])
        if where is not None:
            here = where(here)
        if here not in known:
            try:
                known[here] = os.readlink(here)  # noqa: PTH115 - no Path: asked hundreds of times
            except OSError:  # EINVAL: no link; ENOENT, ENOTDIR: nothing there
                known[here] = None
        if (link := known[here]) is None:
            at.append(part)
            continue
        followed += 1
        if followed > MOST_LINKS:
            raise OSError(40, os.strerror(40), path)
        if link.startswith("/"):
            at = []
        left += [piece for piece in link.split("/") if piece and piece != "."][::-1]
    return "/" + "/".join(at)


def within(path: str, folder: str) -> bool:
    """Whether a normalized path is the folder or lies below it."""
    return path == folder or path.startswith(f"{folder}/")


def normal(pattern: str) -> str | None:
    """The pattern without its trailing ``/**``; None when it is not one that can be masked."""
    while pattern.endswith(("/**", "/")) and pattern != "/":
        pattern = pattern.removesuffix("/**").rstrip("/")
    return pattern if pattern.startswith("/") and "**" not in pattern else None


def find(root: str, pattern: str) -> set[str]:
    """Everything in ``root`` that a `normal` pattern names, links followed; never ``/`` itself."""
    places = {"/"}
    for part in pattern.strip("/").split("/"):
        found: set[str] = set()
        for place in places:
            names = [part]
            if any(sign in part for sign in "*?["):
                names = fnmatch.filter(_names(f"{root}{place}"), part)
            for name in names:
                path = f"{place.rstrip('/')}/{name}"
                try:
                    # `place` has no links: only the last component can be one.
                    if name in ("", ".", "..") or stat.S_ISLNK(os.lstat(f"{root}{path}").st_mode):
                        path = resolve(root, path)
                        os.lstat(f"{root}{path}")
                except OSError:
                    continue  # not there: nothing to hide
                found.add(path)
        places = found
    return places - {"/"}


def _names(folder: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except OSError:  # no folder
        return []


def find_all(root: str, patterns: Iterable[str]) -> dict[str, bool]:
    """path → whether it is a folder, without what lies below another found folder."""
    found: dict[str, bool] = {}
    for text in patterns:
        if pattern := normal(text):
            for path in find(root, pattern):
                found[path] = stat.S_ISDIR(os.lstat(f"{root}{path}").st_mode)
    return {path: folder for path, folder in found.items() if not _below(path, found)}


def find_floating(root: str, patterns: Iterable[str]) -> dict[str, bool]:
    """As `find_all`, for patterns that are not `normal` (``**/.env``): everything in ``root`` is
    looked at, links are not followed."""
    left = [pattern for pattern in patterns if normal(pattern) is None]
    found: dict[str, bool] = {}
    if not left:
        return found
    as_regex = (rules.anywhere(p) if rules.floats(p) else rules.translate(p) for p in left)
    regex = re.compile("|".join(f"(?:{one})" for one in as_regex))
    for place, folders, names in os.walk(root):
        inside = place[len(root) :]
        found |= {path: False for name in names if regex.fullmatch(path := f"{inside}/{name}")}
        for name in list(folders):
            if regex.fullmatch(path := f"{inside}/{name}"):
                found[path] = not os.path.islink(f"{place}/{name}")  # noqa: PTH114
                folders.remove(name)
    return found


def _below(path: str, found: dict[str, bool]) -> bool:
    return any(found.get(str(parent)) for parent in Path(path).parents)


def inside(source: str, target: str, patterns: Sequence[str]) -> dict[str, bool]:
    """As `find_all`, for a bind of ``source`` at ``target``: only what lies inside the bind.

    What is bound was named by the user, so a pattern that covers all of it does not hide it.
    """
    where = target.strip("/").split("/")
    wanted = []
    for text in patterns:
        parts = (normal(text) or "/").strip("/").split("/")
        head, rest = parts[: len(where)], parts[len(where) :]
        if rest and all(map(fnmatch.fnmatchcase, where, head)):
            wanted.append("/" + "/".join(rest))
    return {f"{target.rstrip('/')}{path}": kind for path, kind in find_all(source, wanted).items()}
