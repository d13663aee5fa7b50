"""``mis docker … --engine podman``: our runtime and our hook in podman's configuration.

podman, and CRI-O for the hook, read drop-in files, so nothing of anybody else's is touched: we
write two files of our own and `uninstall` removes them, and the folders that were made for them.
A file that somebody has edited since is theirs: neither overwritten nor removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mis_run.docker_config import PROGRAM, find_program
from mis_run.errors import SetupError, UsageError
from mis_run.events import Guarantee
from mis_run.hints import Any

FOLDER = Path("/etc/containers")
VENDOR = Path("/usr/share/containers/containers.conf")
DROP_IN = "containers.conf.d/mis.conf"
HOOK = "oci/hooks.d/mis-oci-hook.json"
NOTE = ".mis-podman.json"  # in `FOLDER`: what was written, and which folders were made for it
HOOK_PROGRAM = "mis-oci-hook"
NAME = "mis"
TIMEOUT = 60  # seconds the engine gives the hook
SECTION = (
    '# Written by "mis docker install"; "mis docker uninstall" removes it.\n[engine.runtimes]\n'
)


def files(*, always: bool, waived: Collection[Guarantee]) -> dict[str, str]:
    """The text of each file, by its path below `FOLDER`.

    The hook is for containers that ask for something of mis-run by an annotation, or for all:
    one that was started without ``--runtime mis`` must not run unguarded.  ``waived`` are
    guarantees that its containers may lack although their profile requires them.
    """
    arguments = [HOOK_PROGRAM]
    if waived:
        arguments += ["--allow-missing", ",".join(sorted(waived))]
    # https://github.com/containers/common/blob/main/pkg/hooks/docs/oci-hooks.5.md
    hook = {
        "version": "1.0.0",
        "hook": {
            "path": str(find_program(HOOK_PROGRAM)),
            "args": arguments,
            "timeout": TIMEOUT,
        },
        "when": {"always": True} if always else {"annotations": {r"^mis\.": ".*"}},
        "stages": ["createRuntime", "poststop"],
    }
    runtime = json.dumps([str(find_program(PROGRAM))])
    return {
        DROP_IN: f"{SECTION}{NAME} = {runtime}\n",
        HOOK: json.dumps(hook, indent=2) + "\n",
    }


def install(folder: Path, *, always: bool, waived: Collection[Guarantee]) -> list[Path]:
    """Write both files; their paths.

    Raises UsageError where podman knows another runtime of our name or a file was edited.
    """
    note = _note(folder)
    wanted = files(always=always, waived=waived)
    for name in wanted:
        _check_ours(folder / name, note)
    for path, program in _others(folder):
        raise UsageError(
            f"{path}: a runtime {NAME!r} that is not ours is defined there: {program}",
            hint="rename that runtime first",
        )
    made = list(note.get("made", []))
    try:
        for name, text in wanted.items():
            path = folder / name
            missing = [str(above) for above in path.parents if not above.exists()]
            made = [*missing, *(one for one in made if one not in missing)]
            path.parent.mkdir(parents=True, exist_ok=True)
            # The note first: what it names and is not there is nothing to remove.
            note = {"made": made, "written": {**note.get("written", {}), name: _hash(text)}}
            _write(folder / NOTE, json.dumps(note), 0o600)
            _write(path, text, 0o644)
    except OSError as error:
        raise SetupError(
            f"{error.filename or folder}: {error.strerror}",
            hint="sudo mis docker install --engine podman",
        ) from error
    return [folder / name for name in wanted]


def uninstall(folder: Path) -> bool:
    """Remove both files; False when there are none. Raises UsageError for one that was edited."""
    note = _note(folder)
    present = [folder / name for name in (DROP_IN, HOOK) if (folder / name).exists()]
    for path in present:
        _check_ours(path, note)
    try:
        for path in present:
            path.unlink()
        (folder / NOTE).unlink(missing_ok=True)
        for above in sorted(note.get("made", ()), key=len, reverse=True):
            with suppress(OSError):  # somebody uses it by now
                Path(above).rmdir()
    except OSError as error:
        raise SetupError(
            f"{error.filename}: {error.strerror}", hint="sudo mis docker uninstall --engine podman"
        ) from error
    return bool(present)


def status(folder: Path) -> dict[str, Any]:
    """What of ours is there, and whether podman would use it."""
    found: dict[str, str] = {}
    for name in (DROP_IN, HOOK):
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError):
            program = _program_in(path)
            wanted = find_program(PROGRAM if name == DROP_IN else HOOK_PROGRAM)
            same = program == str(wanted)
            found[str(path)] = "installed" if same else f"of another version or place: {program}"
    other = [f"{path}: {program}" for path, program in _others(folder)]
    missing = [str(folder / n) for n in (DROP_IN, HOOK) if str(folder / n) not in found]
    return {"files": found, "missing": missing, "in the way": other}


def _program_in(path: Path) -> str:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return str(json.loads(text)["hook"]["path"])
        return str(tomllib.loads(text)["engine"]["runtimes"][NAME][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return "not readable"


def _others(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of podman's configuration that define another runtime of our name."""
    candidates = [VENDOR, folder / "containers.conf"]
    candidates += sorted((folder / "containers.conf.d").glob("*.conf"))
    for path in candidates:
        if path == folder / DROP_IN or not path.is_file():
            continue
        try:
            data = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: {error}", hint="podman cannot read it either") from None
        engine = data.get("engine")
        runtimes = engine.get("runtimes") if isinstance(engine, dict) else None
        if isinstance(runtimes, dict) and NAME in runtimes:
            yield path, json.dumps(runtimes[NAME])


def _check_ours(path: Path, note: Mapping[str, Any]) -> None:
    """Raise UsageError unless the file is missing or as we wrote it."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None
    written = note.get("written", {})
    if _hash(text) not in (written.get(DROP_IN), written.get(HOOK)):
        raise UsageError(
            f"{path}: not as mis-run wrote it", hint="it is yours now: move it away, or remove it"
        )


def _note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    whole = (
        isinstance(found, dict)
        and isinstance(found.get("made"), list)
        and isinstance(found.get("written"), dict)
    )
    return found if whole else {}


def _write(path: Path, text: str, mode: int) -> None:
    part = path.with_name(f".{path.name}.mis")
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    part.replace(path)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
