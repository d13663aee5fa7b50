"""``/etc/mis/oci.toml``: what the operator of this machine decided, and which profile follows.

The operator's word is final: what a container (its annotations, its image's environment) asks for
chooses among what the file allows, and never loosens it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mis_run.dataclass import dataclass
from mis_run.errors import ProfileError, UsageError, nearest
from mis_run.events import Guarantee
from mis_run.hints import Any
from mis_run.oci.words import FILE

MOST_BYTES = 64 << 10
ANNOTATION = "mis.profile"
VARIABLE = "MIS_PROFILE"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

LOOSENINGS: Mapping[str, str] = {
    "privileged": "containers with every device and capability (--privileged)",
    "devices": "disks and memory as devices (--device /dev/sda)",
    "host-pid": "the host's process ids (--pid host)",
    "host-ipc": "the host's shared memory and queues (--ipc host)",
    "host-paths": "service sockets, system folders and mis-run's own code as volumes",
    "audit": "profiles that only record ([mode] enforce = false)",
    "on-loss-open": "containers that outlive their supervisor (liveness.on_loss = 'open')",
}
"""What containers may not have unless the operator's file lists it under ``allow``."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """The file's content, or its defaults."""

    runtime: Path | None = None  # the OCI runtime to delegate to
    profile: str = "default"  # when nothing else names one
    profiles: Path | None = None  # a folder where profiles are looked up first
    allowed: tuple[str, ...] = ()  # profiles that containers may ask for, beside ``profile``
    minimum: frozenset[Guarantee] = frozenset()  # guarantees required whatever the profile says
    waived: frozenset[Guarantee] = frozenset()  # guarantees that a profile's containers may lack
    from_environment: bool = False  # whether MIS_PROFILE of the container is looked at
    allow: frozenset[str] = frozenset()  # of LOOSENINGS


def load(path: str) -> Operator:
    """The operator's file; the defaults where the usual one does not exist. Raises ProfileError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if status.st_mode & 0o170000 != 0o100000:
                raise ProfileError(f"{path}: not a regular file")
            if status.st_uid != 0 or status.st_mode & 0o022:
                raise ProfileError(
                    f"{path}: others than root can write it",
                    hint=f"chown root {path}; chmod 644 {path}",
                )
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        if error.errno == errno.ENOENT and path == FILE:
            return Operator()
        raise ProfileError(f"{path}: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise ProfileError(f"{path}: larger than {MOST_BYTES} bytes")
    import tomllib  # late: most machines have no such file, and every call asks

    try:
        return build(tomllib.loads(raw.decode()))
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not TOML: {error}") from None
    except UsageError as error:
        raise ProfileError(f"{path}: {error.message}", hint=error.hint) from None


def build(data: Mapping[str, Any]) -> Operator:
    """`Operator` from TOML values. Raises UsageError for the first that is wrong."""
    known = [
        *("runtime", "profile", "profiles", "allowed", "minimum", "allow_missing"),
        *("from_environment", "allow"),
    ]
    for key in data:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"keys: {', '.join(known)}"
            raise UsageError(f"unknown key {key!r}", hint=hint)
    environment = data.get("from_environment", False)
    if not isinstance(environment, bool):
        raise UsageError("from_environment: must be true or false")
    return Operator(
        runtime=_path(data, "runtime"),
        profiles=_path(data, "profiles"),
        profile=name(data.get("profile", "default"), "profile"),
        allowed=tuple(name(entry, "allowed") for entry in _list(data, "allowed")),
        minimum=_guarantees(data, "minimum"),
        waived=_guarantees(data, "allow_missing"),
        from_environment=environment,
        allow=frozenset(_choice(entry, [*LOOSENINGS], "allow") for entry in _list(data, "allow")),
    )


def name(value: Any, where: str) -> str:
    """``value`` if it is a profile's name, never a path. Raises UsageError."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        shown = repr(value if not isinstance(value, str) or len(value) < 80 else value[:77] + "…")
        raise UsageError(
            f"{where}: {shown} is no profile name",
            hint="letters, digits, '-' and '_', at most 64; profiles of /etc/mis/profiles "
            "and the built-in ones: mis profile list",
        )
    return value


def _path(data: Mapping[str, Any], key: str) -> Path | None:
    value = data.get(key)
    if value is not None and not (isinstance(value, str) and value.startswith("/")):
        raise UsageError(f"{key}: must be an absolute path")
    return Path(value) if value else None


def _guarantees(data: Mapping[str, Any], key: str) -> frozenset[Guarantee]:
    names = [guarantee.value for guarantee in Guarantee]
    return frozenset(Guarantee(_choice(entry, names, key)) for entry in _list(data, key))


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise UsageError(f"{key}: must be a list")
    return value


def _choice(value: Any, names: list[str], key: str) -> str:
    if value in names:
        return str(value)
    near = nearest(str(value), names)
    hint = f"did you mean {near}?" if near else f"use {', '.join(names)}"
    raise UsageError(f"{key}: {value!r} is not known", hint=hint)


def choose(
    operator: Operator,
    pinned: str | None,
    annotations: Mapping[str, str],
    environment: Mapping[str, str],
) -> str:
    """The name of the profile that a container runs under.

    First match: ``pinned`` by the runtime's definition (``--mis-profile``), the annotation
    ``mis.profile``, the variable MIS_PROFILE where the operator's file says so, the operator's
    default.  Raises UsageError for a request that is malformed, not allowed or contradicts the pin.
    """
    for key in annotations:
        if key.startswith("mis.") and key != ANNOTATION:
            shown = key if len(key) < 80 else f"{key[:77]}…"
            raise UsageError(f"annotation {shown!r}: unknown", hint=f"use {ANNOTATION}=NAME")
    wanted, where = annotations.get(ANNOTATION), f"annotation {ANNOTATION}"
    if wanted is None and operator.from_environment and VARIABLE in environment:
        wanted, where = environment[VARIABLE], f"variable {VARIABLE}"
    if wanted is not None:
        name(wanted, where)
    if pinned is not None:
        name(pinned, "--mis-profile")
        if wanted not in (None, pinned):
            raise UsageError(
                f"{where}: {wanted!r}, but this runtime is pinned to profile {pinned!r}",
                hint="leave the request out, or use another --runtime",
            )
        return pinned
    if wanted is None or wanted == operator.profile:
        return operator.profile
    if wanted not in operator.allowed:
        shown = ", ".join((operator.profile, *operator.allowed))
        raise UsageError(
            f"{where}: profile {wanted!r} is not allowed for containers here (allowed: {shown})",
            hint=f'the operator can add it to {FILE}: allowed = ["{wanted}"]',
        )
    return wanted
