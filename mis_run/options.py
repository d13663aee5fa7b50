"""Words of the command line to `Options`: each one judged by itself, nothing decided."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mis_run import units
from mis_run.errors import UsageError
from mis_run.events import Guarantee
from mis_run.hints import TypeVar
from mis_run.model import ALWAYS, Bind, NetMode, Options, PlaneChoice

N = TypeVar("N", int, float)


def parse(
    *,
    command: tuple[str, ...],
    profile: str,
    workdir: str | None,
    binds: tuple[str, ...],
    env: tuple[str, ...],
    rootfs: str | None,
    image: str | None = None,
    entrypoint: str | None = None,
    net: str | None,
    allow_net: tuple[str, ...],
    tty: bool | None,
    allow_missing: tuple[str, ...],
    log: str | None,
    as_json: bool,
    restart: str | None = None,
    plane: str = PlaneChoice.AUTO,
    memory: str | None = None,
    cpus: str | None = None,
    pids: str | None = None,
    timeout: str | None = None,
    name: str | None = None,
    user: str | None = None,
) -> Options:
    """The words as `Options`. Raises UsageError."""
    if not command and image is None:
        raise UsageError("no command given", hint="mis-run [options] -- CMD [ARG]…")
    if image is not None and rootfs is not None:
        raise UsageError("--image and --rootfs: there is one root", hint="leave one of them out")
    if entrypoint is not None and image is None:
        raise UsageError("--entrypoint is for images", hint="--image IMAGE --entrypoint CMD")
    if any("\0" in word for word in (*command, entrypoint or "")):
        raise UsageError("a NUL byte in the command")
    if tty is None:
        tty = sys.stdin.isatty() and sys.stdout.isatty() and _in_foreground()
    elif tty and not sys.stdin.isatty():
        raise UsageError("-t needs a terminal on stdin", hint="leave -t out in scripts and pipes")
    elif tty and not _in_foreground():
        raise UsageError("-t in a background job", hint="start it in the foreground, or without -t")
    return Options(
        command=command,
        profile=profile,
        workdir=None if image and not workdir else _directory("--workdir", workdir or _cwd()),
        binds=tuple(_bind(text) for text in binds),
        env=tuple(_variable(text) for text in env),
        rootfs=_directory("--rootfs", rootfs) if rootfs else None,
        image=image,
        entrypoint=entrypoint,
        net=NetMode(net) if net else None,
        allow_net=allow_net,
        tty=tty,
        allow_missing=frozenset(Guarantee(name) for name in allow_missing),
        log=Path(log).absolute() if log else None,
        json=as_json,
        restart=_attempts(restart),
        plane=PlaneChoice(plane),
        memory=_number("--memory", units.size, memory),
        cpus=_number("--cpus", units.cores, cpus),
        pids=_number("--pids", units.count, pids),
        timeout=_number("--timeout", units.duration, timeout),
        name=name,
        user=user,
    )


def _number(option: str, parse: Callable[[str], N], text: str | None) -> N | None:
    """By one of `units`' parsers."""
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{option} {error.message}", hint=error.hint) from None


def _in_foreground() -> bool:
    from mis_run import terminal  # late: most launches have no terminal

    return terminal.in_foreground(0)


def _attempts(text: str | None) -> int:
    """New attempts after a failure: ``no`` → 0, ``on-failure`` → ALWAYS, ``on-failure:3`` → 3."""
    word, given, number = (text or "no").partition(":")
    if word in ("no", "on-failure") and not given:
        return ALWAYS if word == "on-failure" else 0
    if word == "on-failure" and number.isdecimal() and 0 < int(number) <= 1000:
        return int(number)
    raise UsageError(f"--restart {text!r}", hint="use no, on-failure or on-failure:N")


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UsageError(f"current directory: {error.strerror}", hint="cd somewhere else") from None


def _path(option: str, text: str) -> Path:
    """An existing path, symlinks resolved: the agent must not redirect what we mount."""
    try:
        return Path(text).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{option} {text!r}: {reason}") from None


def _directory(option: str, text: str) -> Path:
    path = _path(option, text)
    if not path.is_dir():
        raise UsageError(f"{option} {text!r}: not a directory")
    return path


def _bind(text: str) -> Bind:
    hint = "use --bind SRC, SRC:DST, SRC:ro or SRC:DST:ro"
    parts = text.split(":")
    readonly = len(parts) > 1 and parts[-1] in ("ro", "rw")
    mode = parts.pop() if readonly else "rw"
    if len(parts) not in (1, 2) or not all(parts):
        raise UsageError(f"--bind {text!r}: cannot be read", hint=hint)
    source = _path("--bind", parts[0])
    target = Path(parts[1]) if len(parts) == 2 else Path(parts[0]).absolute()
    if not target.is_absolute() or ".." in target.parts or target == Path("/"):
        raise UsageError(f"--bind {text!r}: the target must be absolute, below / and without '..'")
    return Bind(source, target, readonly=mode == "ro")


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if not name or "\0" in text:
        raise UsageError(f"--env {text!r}: no name", hint="use --env NAME or --env NAME=VALUE")
    if not given and name not in os.environ:
        raise UsageError(f"--env {name}: not set here", hint=f"use --env {name}=VALUE")
    return name, value if given else os.environ[name]
