"""What an agent left in a repository for its person's next `git` to run: configuration and hooks.

`.git/config` cannot be read-only, since working with branches writes there; so it is compared
before and after, and the end of a run names what git would execute.  Looked at: the repositories at
the top of the workspace and of writable binds, with their submodules and worktrees.  Out of scope:
repositories further down, and everything else that a person may run (docs/threat-model.md).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mis_run.linux import programs
from mis_run.linux.beneath import open_beneath

MOST_BYTES = 1 << 20  # of one file; the rest is not compared
MOST_FILES = 10_000
CONFIGS = ("config", "config.worktree")
POINTERS = ("commondir", "gitdir")
"""Files that lead git to another place's configuration."""

EXECUTED = (
    r"core\.(fsmonitor|hookspath|sshcommand|pager|editor|askpass|gitproxy|alternaterefscommand)"
    r"|pager\..*|sequence\.editor|interactive\.difffilter|init\.templatedir|web\.browser"
    r"|diff\.external|(diff|merge|filter|trailer)\..*\.(command|cmd|driver|textconv|clean|smudge|process)"
    r"|(difftool|mergetool|guitool|man|browser)\..*\.(cmd|path)"
    r"|credential\.(.*\.)?helper|gpg\.(.*\.)?program|sendemail\.(.*\.)?\w*(cmd|server)"
    r"|include\.path|includeif\..*\.path|uploadpack\.packobjectshook"
    r"|remote\..*\.(uploadpack|receivepack|vcs)|(alias|submodule)\..*|(remote|url)\..*"
)
"""Settings that name a program (git-config(1)), or may: the last line's by their value.  Compiled
only where a run has changed something."""
BY_VALUE = r"(alias|submodule|remote|url)\."

Contents = Mapping[str, bytes]


def look(folders: Iterable[Path]) -> dict[Path, Contents]:
    """What git would read or run in the repositories at these folders, by path within them."""
    return {folder: dict(_files(folder)) for folder in folders}


def compare(before: Mapping[Path, Contents]) -> list[str]:
    """What is there now and was not before, one line each; made of the agent's words."""
    found = []
    for folder, old in before.items():
        for name, content in _files(folder):
            if content == old.get(name):
                continue
            if name.rpartition("/")[2] in CONFIGS:
                found += [f"{name}: {line}" for line in _settings(content, old.get(name, b""))]
            else:
                found.append(f"{name}: {'changed' if name in old else 'new'}")
    return found


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    content = _read(folder, ".git")
    if content is not None:  # a worktree's or a submodule's: it leads to the repository
        yield ".git", content
        return
    for place in _repositories(folder):
        for name in (*CONFIGS, *POINTERS):
            if (content := _read(folder, f"{place}/{name}")) is not None:
                yield f"{place}/{name}", content
        for hook in _names(folder, f"{place}/hooks"):
            if hook.endswith(".sample"):
                continue
            if (content := _read(folder, f"{place}/hooks/{hook}")) is not None:
                yield f"{place}/hooks/{hook}", content


def _repositories(folder: Path) -> Iterator[str]:
    """``.git`` and what lies in it for submodules (which may be in submodules) and worktrees."""
    places = [".git"]
    for place in places:
        yield place
        for kind in ("modules", "worktrees"):
            inner = [f"{place}/{kind}/{name}" for name in _names(folder, f"{place}/{kind}")]
            places += inner[: max(0, MOST_FILES - len(places))]


def _names(folder: Path, path: str) -> list[str]:
    try:
        fd = open_beneath(folder, Path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return sorted(os.listdir(fd))[:MOST_FILES]  # noqa: PTH208 - a descriptor
    finally:
        os.close(fd)


def _read(folder: Path, path: str) -> bytes | None:
    """A file's beginning, or where a link leads; None when there is nothing, or a folder."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = open_beneath(folder, Path(path), flags)
    except FileNotFoundError:
        return None
    except OSError:
        return _link(folder / path)
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind):
        os.close(fd)
        return None if stat.S_ISDIR(kind) else b""
    with os.fdopen(fd, "rb") as file:
        return file.read(MOST_BYTES)


def _link(path: Path) -> bytes:
    """What git would follow; b"" for what it cannot open either."""
    try:
        return os.fsencode(path.readlink())
    except OSError:
        return b""


def _settings(content: bytes, before: bytes) -> list[str]:
    """The settings that are new and name a program; git itself reads both."""
    known, found = _parsed(before) or set(), _parsed(content)
    if found is None:
        return ["changed, and git cannot read it"]
    return [f"{key} = {value}" for key, value in sorted(found - known) if _runs(key, value)]


def _runs(key: str, value: str) -> bool:
    key = key.lower()
    if not re.fullmatch(EXECUTED, key) or value.lower() in ("", "true", "false"):
        return False
    return not re.match(BY_VALUE, key) or value.startswith("!") or "::" in key + value


def _parsed(content: bytes) -> set[tuple[str, str]] | None:
    import subprocess  # late: most runs change nothing

    argv = [programs.find("git") or "git", "config", "--no-includes", "--null", "--list", "-f", "-"]
    try:
        done = subprocess.run(
            argv,
            input=content,
            capture_output=True,
            timeout=10,
            check=False,
            cwd="/",
            env=programs.environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    lines = done.stdout.decode(errors="replace").split("\0")
    return {(key, value) for key, _, value in (line.partition("\n") for line in lines) if key}
