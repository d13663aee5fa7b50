"""``mis docker install|uninstall|status``: our runtimes in Docker's daemon.json, and out again.

The file is somebody's: everything else in it stays as it is written, to the byte, and `uninstall`
gives back exactly what was there, or only takes our entries out when the file was edited since.
What was there before is kept beside it in `NOTE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType

from mis_run import json_text, profiles
from mis_run.build import ROOT
from mis_run.errors import NotFound, SetupError, UsageError
from mis_run.hints import Any
from mis_run.json_text import Member

DAEMON = Path("/etc/docker/daemon.json")
NOTE = ".mis-docker.json"  # beside the file
MOST_BYTES = 1 << 20
PROGRAM = "mis-oci-runtime"


def runtimes() -> dict[str, dict[str, Any]]:
    """Docker's name → definition: ``mis``, and one pinned to each built-in profile that denies."""
    program = str(find_program(PROGRAM))
    found: dict[str, dict[str, Any]] = {"mis": {"path": program}}
    for path in sorted(profiles.BUILT_IN.glob("*.toml")):
        if path.stem != "default" and profiles.load(str(path)).enforce:
            pin = ["--mis-profile", path.stem]
            found[f"mis-{path.stem}"] = {"path": program, "runtimeArgs": pin}
    return found


def find_program(name: str) -> Path:
    """One of our programs, which an engine will run as root. Raises SetupError, UsageError."""
    checkout = ROOT / name
    program = checkout if checkout.exists() else Path(sys.executable).with_name(name)
    if not os.access(program, os.X_OK):
        raise SetupError(f"{program}: not there, or not executable", hint="sudo pip install .")
    for path in (program, *program.parents):
        # /tmp is everybody's, but only the owner of an entry can move it there.
        if path.stat().st_mode & 0o1002 == 0o002:
            raise UsageError(
                f"{path}: writable for everybody, and an engine would run {program} as root",
                hint=f"chmod o-w {path}",
            )
    return program


def install(path: Path) -> list[str]:
    """Add our runtimes to the file; their names. Nothing is written when they are there already.

    Raises UsageError for a file that is no daemon.json, or has other runtimes of these names.
    """
    target = Path(os.path.realpath(path))
    text = _read(target)
    wanted = runtimes()
    present = _runtimes(text, target)
    for name in wanted:
        if name in present and not _is_ours(present[name]):
            raise UsageError(
                f"{target}: a runtime {name!r} that is not ours is defined there",
                hint="rename that runtime first",
            )
    if all(present.get(name) == definition for name, definition in wanted.items()):
        return sorted(wanted)
    note = _note(target)
    before = text
    if text is not None:
        text = _without_ours(text, target, keep_empty=True)
    after = _with(text, wanted, target)
    made = [str(folder) for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if note is None:
            _write_note(target, {"before": before, "made": made, "after": _hash(after)})
        else:  # installed before, by another version or place: the original is that of the first
            _write_note(target, {**note, "after": _hash(after)})
        _write(target, after)
    except OSError as error:
        raise SetupError(f"{target}: {error.strerror}", hint="sudo mis docker install") from error
    return sorted(wanted)


def uninstall(path: Path) -> bool:
    """Take our runtimes out again; False when there are none. Raises as `install`."""
    target = Path(os.path.realpath(path))
    text = _read(target)
    note = _note(target)
    try:
        if note is not None and text is not None and note.get("after") == _hash(text):
            _restore(target, note)
            return True
        ours = text is not None and any(map(_is_ours, _runtimes(text, target).values()))
        if text is not None and ours:
            had_none = note is not None and '"runtimes"' not in (note["before"] or "")
            _write(target, _without_ours(text, target, keep_empty=not had_none))
        (target.parent / NOTE).unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(f"{target}: {error.strerror}", hint="sudo mis docker uninstall") from error
    return ours


def status(path: Path) -> dict[str, Any]:
    """What of ours the file has, and whether each definition is the present one."""
    target = Path(os.path.realpath(path))
    present = _runtimes(_read(target), target)
    wanted = runtimes()
    found = {
        name: "installed" if present[name] == wanted.get(name) else "of another version or place"
        for name in sorted(present)
        if _is_ours(present[name])
    }
    missing = [name for name in wanted if name not in found]
    return {"file": str(target), "runtimes": found, "missing": sorted(missing)}


def _is_ours(definition: Any) -> bool:
    return isinstance(definition, dict) and Path(str(definition.get("path"))).name == PROGRAM


# ---- the text -------------------------------------------------------------------------------


def _top(text: str | None, target: Path) -> dict[str, Member]:
    """The file's members; none for an empty file or none at all. Raises UsageError."""
    if text is None or not text.strip():
        return {}
    try:
        found = json_text.top(text)
        member = found.get("runtimes")
        readable = member is None or isinstance(member.value, dict)
        if member is not None and readable:
            json_text.members(text, member.value_start)
    except UsageError as error:
        hint = error.hint or "Docker would not start with it either"
        raise UsageError(f"{target}: {error.message}", hint=hint) from None
    if not readable:
        raise UsageError(f"{target}: 'runtimes' is not an object")
    return found


def _runtimes(text: str | None, target: Path) -> Mapping[str, Any]:
    member = _top(text, target).get("runtimes")
    return member.value if member else {}


def _with(text: str | None, wanted: Mapping[str, Any], target: Path) -> str:
    """The text with our runtimes as the first ones."""
    if text is None or not text.strip():
        return json.dumps({"runtimes": wanted}, indent=4) + "\n"
    if member := _top(text, target).get("runtimes"):
        return json_text.put_first(text, member.value_start, wanted, 2)
    return json_text.put_first(text, text.index("{"), {"runtimes": wanted}, 1)


def _without_ours(text: str, target: Path, *, keep_empty: bool) -> str:
    """The text without our runtimes, and without a ``runtimes`` that they leave empty."""
    while member := _top(text, target).get("runtimes"):
        inner = json_text.members(text, member.value_start)
        ours = [one for one in inner.values() if _is_ours(one.value)]
        if ours:
            text = json_text.cut(text, ours[0])
        elif inner or keep_empty:
            break
        else:
            text = json_text.cut(text, member)
    return text


# ---- the files ------------------------------------------------------------------------------


def _read(target: Path) -> str | None:
    try:
        if target.exists() and not target.is_file():
            raise UsageError(f"{target}: not a regular file")
        raw = target.read_bytes()
        if len(raw) > MOST_BYTES:
            raise UsageError(f"{target}: larger than {MOST_BYTES} bytes")
        return raw.decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise NotFound(
            f"{target}: {error.strerror}", hint="run as root: sudo mis docker …"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{target}: not UTF-8 at byte {error.start}") from None


def _write(target: Path, text: str) -> None:
    """In one step, with the file's own mode and owner."""
    part = target.with_name(f".{target.name}.mis")
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        if target.exists():
            status = target.stat()
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, status.st_mode & 0o7777)
        file.write(text.encode())
        file.flush()
        os.fsync(fd)
    part.replace(target)


def _restore(target: Path, note: Mapping[str, Any]) -> None:
    before = note["before"]
    if before is None:
        target.unlink()
    else:
        _write(target, before)
    (target.parent / NOTE).unlink(missing_ok=True)
    for folder in note["made"]:
        with suppress(OSError):  # somebody uses it by now
            Path(folder).rmdir()


def _note(target: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((target.parent / NOTE).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("made"), list)
    return found if whole and isinstance(found.get("before"), (str, NoneType)) else None


def _write_note(target: Path, note: Mapping[str, Any]) -> None:
    path = target.parent / NOTE
    path.write_text(json.dumps(note))
    path.chmod(0o600)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
