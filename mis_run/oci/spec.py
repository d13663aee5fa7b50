"""A container's configuration as the engine wrote it: read with suspicion, written in one piece.

`read` refuses what is no OCI configuration; `Spec` answers what the rest needs to know of it.
Out of scope: what is changed (`edit`) and what is refused (`dangers`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.errors import SetupError, UsageError
from mis_run.hints import Any

MOST_BYTES = 16 << 20  # an engine's configuration is about 50 KiB
MOST_VALUE = 4096  # bytes of one annotation of ours

# What must be of which type where it is given at all; the OCI runtime judges the rest.
SHAPE: Mapping[str, type] = {
    "annotations": dict,
    "hooks": dict,
    "linux": dict,
    "linux.devices": list,
    "linux.maskedPaths": list,
    "linux.namespaces": list,
    "linux.readonlyPaths": list,
    "linux.resources": dict,
    "linux.resources.cpu": dict,
    "linux.resources.devices": list,
    "linux.resources.cpu.period": int,
    "linux.resources.memory": dict,
    "linux.resources.memory.reservation": int,
    "linux.resources.pids": dict,
    "linux.seccomp": dict,
    "linux.seccomp.syscalls": list,
    "mounts": list,
    "process": dict,
    "process.args": list,
    "process.capabilities": dict,
    "process.cwd": str,
    "process.env": list,
    "process.user": dict,
    "process.user.gid": int,
    "process.user.uid": int,
    "root": dict,
    "root.path": str,
}
WORDS = {dict: "an object", list: "a list", str: "a string", int: "a number"}
OBJECTS = ("linux.devices", "linux.namespaces", "linux.resources.devices", "mounts")
FIELDS: dict[str, type] = {
    "type": str,
    "path": str,
    "source": str,
    "destination": str,
    "access": str,
}
FIELDS |= {"major": int, "minor": int}
STRINGS = ("linux.maskedPaths", "linux.readonlyPaths", "process.args", "process.env")


@dataclass(frozen=True)
class Spec:
    """One bundle's configuration. ``data`` is never changed in place: `edit` copies it."""

    bundle: Path
    data: Mapping[str, Any]

    def at(self, path: str, default: Any = None) -> Any:
        """The value at ``linux.resources.memory``, or ``default`` where there is none."""
        value: Any = self.data
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations."""
        return dict(self.at("annotations", {}))

    @property
    def environment(self) -> dict[str, str]:
        """The process's variables; a later one wins, as for getenv(3) in most shells."""
        pairs = (entry.partition("=") for entry in self.at("process.env", []))
        return {key: value for key, _, value in pairs}

    @property
    def root(self) -> Path:
        """The root file system, absolute."""
        return self.bundle / str(self.at("root.path", "rootfs"))

    def shares(self, kind: str) -> bool:
        """Whether the container is in the *host's* namespace of this kind.

        By omission or by a path, as ``--network host`` is written: the same inode as ours.
        """
        for space in self.at("linux.namespaces", []):
            if space.get("type") == kind:
                path = space.get("path")
                return bool(path) and _same(str(path), kind)
        return True

    def joins(self, kind: str) -> bool:
        """Whether it enters a namespace that exists already."""
        spaces = self.at("linux.namespaces", [])
        return any(space.get("type") == kind and space.get("path") for space in spaces)


def _same(path: str, kind: str) -> bool:
    name = {"network": "net", "mount": "mnt"}.get(kind, kind)
    try:
        theirs = Path(path).stat()
    except OSError as error:
        raise SetupError(f"{kind} namespace {path}: {error.strerror}") from None
    ours = Path(f"/proc/self/ns/{name}").stat()
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def read(bundle: Path) -> Spec:
    """The bundle's config.json. Raises UsageError for what is not one."""
    return Spec(bundle, load(bundle / "config.json", SHAPE))


def load(path: Path, shape: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object of bounded size whose parts have the types of ``shape``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_mode & 0o170000 != 0o100000:
                raise UsageError(f"{path}: not a regular file")
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="is --bundle right?") from None
    data = parse(raw, MOST_BYTES, str(path))
    check(Spec(path.parent, data), path, shape)
    return data


def parse(raw: bytes, most: int, what: str) -> dict[str, Any]:
    """The JSON object in at most ``most`` bytes. Raises UsageError, which names ``what``."""
    if len(raw) > most:
        raise UsageError(f"{what}: larger than {most >> 20} MiB")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{what}: not an object")
    return data


def check(spec: Spec, path: Path, shape: Mapping[str, type]) -> None:
    """Raise UsageError for the first part of the wrong type."""
    for key, kind in shape.items():
        value = spec.at(key)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"{path}: {key} is not {WORDS[kind]}")
    for key in OBJECTS:
        for entry in spec.at(key, []):
            if not isinstance(entry, dict):
                raise UsageError(f"{path}: {key} has an entry that is no object")
            _check_entry(entry, f"{path}: {key}")
    for key in STRINGS:
        if not all(isinstance(entry, str) for entry in spec.at(key, [])):
            raise UsageError(f"{path}: {key} has an entry that is no string")
    for key, value in spec.annotations.items():
        if not isinstance(value, str):
            raise UsageError(f"{path}: annotation {key[:80]!r} is no string")
        if key.startswith("mis.") and len(value) > MOST_VALUE:
            raise UsageError(f"{path}: annotation {key[:80]!r} is longer than {MOST_VALUE} bytes")


def _check_entry(entry: Mapping[str, Any], where: str) -> None:
    for key, kind in FIELDS.items():
        if entry.get(key) is not None and not isinstance(entry[key], kind):
            raise UsageError(f"{where} has an entry whose {key} is not {WORDS[kind]}")
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UsageError(f"{where} has an entry whose options are no list of strings")


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; a reader sees the old or the new one."""
    part = path.with_name(f".{path.name}.mis")
    try:
        mode = path.stat().st_mode & 0o777
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w") as file:
            json.dump(data, file)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SetupError(f"{path}: {error.strerror}") from error
