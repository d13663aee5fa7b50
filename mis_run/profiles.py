"""Profiles: TOML files that say what an agent may do, validated to the last key, merged, frozen.

Every problem is a `ProfileError` naming file, line and key, with the nearest valid name.  The keys
are a table (`schema.SECTIONS`), from which docs/profile-reference.md is generated too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mis_run import schema
from mis_run.build import BUILT, PROFILES
from mis_run.dataclass import replace
from mis_run.errors import ProfileError, UsageError, nearest
from mis_run.hints import Any
from mis_run.model import Profile
from mis_run.sets import SETS, expand

__all__ = ["SETS", "catalogue", "expand", "load", "render"]

BUILT_IN = PROFILES
SYSTEM = Path("/etc/mis/profiles")
MOST_BYTES = 1 << 20
MOST_DEPTH = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
INHERIT = "..."
"""In a list: the entries of the profile that is extended."""


def load(name: str, *, search: Sequence[Path] | None = None) -> Profile:
    """The profile called ``name``, or in the file ``name`` if it has a slash or ends in .toml.

    Raises ProfileError (a UsageError) for whatever is wrong with it.
    """
    path = _find(name, search_path() if search is None else search, Path.cwd)
    sources: list[str] = []
    data = _merged(path, search_path() if search is None else search, (), sources)
    return schema.build(data, name=path.stem, sources=sources)


def search_path() -> list[Path]:
    """Where names are looked up, first match wins: the caller's, the system's, built in."""
    home = _callers_home()
    own = [home / ".config" / "mis" / "profiles"] if home else []
    return [*own, SYSTEM, BUILT_IN]


def catalogue() -> list[tuple[str, Path, str]]:
    """(name, file, description) of every profile that can be named, broken ones included."""
    found: dict[str, tuple[str, Path, str]] = {}
    for folder in search_path():
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            if path.stem in found or not _NAME.fullmatch(path.stem):
                continue
            try:
                text = load(path.stem).description
            except UsageError as error:
                text = f"broken: {error.message}"
            found[path.stem] = (path.stem, path, text)
    return sorted(found.values())


def render(profile: Profile) -> str:
    """The profile as TOML that loads back to the same values."""
    from mis_run import profile_text

    return profile_text.render(profile)


def _callers_home() -> Path | None:
    import pwd

    uid = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    try:
        return Path(pwd.getpwuid(int(uid) if uid.isdecimal() else os.getuid()).pw_dir)
    except KeyError:
        return None


def _find(name: str, search: Sequence[Path], base: Any) -> Path:
    if "/" in name or name.endswith(".toml"):
        if "\0" in name:
            raise ProfileError(f"profile {name!r}: a NUL byte in the path")
        return Path(base(), name).absolute() if not name.startswith("/") else Path(name)
    if not _NAME.fullmatch(name):
        raise ProfileError(
            f"profile {name!r}: not a name", hint="use letters, digits, '-', '_', or a path"
        )
    for folder in search:
        path = folder / f"{name}.toml"
        if path.is_file():
            return path
    known = sorted({path.stem for folder in search for path in folder.glob("*.toml")})
    near = nearest(name, known)
    raise ProfileError(
        f"no profile {name!r}",
        hint=f"did you mean {near}?" if near else f"profiles: {', '.join(known)}",
    )


def _merged(
    path: Path, search: Sequence[Path], above: tuple[Path, ...], sources: list[str]
) -> dict[str, Any]:
    """The file's values over those of what it extends, checked file by file; each file read is
    added to ``sources``."""
    if path in above:
        chain = " → ".join(str(one) for one in (*above, path))
        raise ProfileError(f"{path}: extends goes round in a circle: {chain}")
    if len(above) >= MOST_DEPTH:
        raise ProfileError(f"{path}: extends goes deeper than {MOST_DEPTH} profiles")
    text = _read(path)
    sources += dict.fromkeys((os.path.normpath(path), os.path.realpath(path)))
    data = _parsed(path, text)
    schema.check(data, schema.Place(str(path), text))
    parent = data.pop("extends", None)
    if parent is None:
        return _without_marks(data)
    try:
        found = _find(parent, search, lambda: path.parent)
    except UsageError as error:
        line = schema.Place(str(path), text).line(("extends",))
        raise ProfileError(f"{path}:{line}: extends: {error.message}", hint=error.hint) from None
    base = _merged(found, search, (*above, path), sources)
    base.pop("description", None)
    return _over(base, data)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """The text's values; of our own profiles as `build` has left them, if it is still that text."""
    ready = BUILT / f"{path.stem}.json"
    if path.parent == BUILT_IN and ready.exists():
        made = json.loads(ready.read_text())
        if made["text"] == text:
            return dict(made["values"])
    import tomllib  # late: it takes longer to import than all of ours take to check

    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"{path}: not TOML: {error}") from None


def _over(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in data.items():
        old = merged.get(key)
        if isinstance(value, dict):
            merged[key] = _over(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list):
            inherited = old if isinstance(old, list) else []
            merged[key] = [
                item for entry in value for item in (inherited if entry == INHERIT else [entry])
            ]
        else:
            merged[key] = value
    return merged


def _without_marks(data: Mapping[str, Any]) -> dict[str, Any]:
    return _over({}, data)


def _read(path: Path) -> str:
    """The file's text; refuses what a user other than the caller and root could have written."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if (status.st_mode & 0o170000) != 0o100000:
                raise ProfileError(f"{path}: not a regular file")
            if status.st_mode & 0o002:
                raise ProfileError(f"{path}: writable for everybody", hint=f"chmod o-w {path}")
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}", hint="mis profile list") from None
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from None
    if len(raw) > MOST_BYTES:
        raise ProfileError(f"{path}: larger than {MOST_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ProfileError(f"{path}:{line}: not UTF-8") from None


def for_an_image(profile: Profile) -> Profile:
    """The named sets as they mean an image: the system is all of it, and the host's secrets are
    not in it (its /root and /var/log are its own)."""

    def widened(entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("/**" if entry == "@system" else entry for entry in entries)

    files, programs = profile.files, profile.exec
    denied = tuple(entry for entry in files.deny if entry != "@secrets")
    return replace(
        profile,
        files=replace(
            files,
            read=widened(files.read),
            write=widened(files.write),
            deny=denied,
            taint=widened(files.taint),
        ),
        exec=replace(programs, allow=widened(programs.allow)),
    )
