"""``mis-run [options] -- CMD…``: words in, exit code out. Nothing is decided here.

`main` prints and exits; everything below it only raises `MisError`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from mis_run import __version__, units
from mis_run.errors import MisError, SetupError, UsageError
from mis_run.events import Guarantee
from mis_run.model import ALWAYS, Bind, NetMode, Options, PlaneChoice

EPILOG = """\b
Examples:
  mis-run -- python3 agent.py
  mis-run --profile coding-agent --allow-net api.example.com:443 -- ./agent
  mis-run --net none --memory 1G --timeout 10m -- make test
  mis-run --dry-run -- ./agent        what would happen, and what is missing

\b
The agent sees the host's programs read-only under a layer that is thrown away, the
working directory read-write, no other home, no secrets, and only the network that
its profile allows.  Exit code: the agent's own (128+N for signal N); 2 wrong usage;
119-127 mis-run's own failures (docs/exit-codes.md).

\b
See also: mis ps, mis top, mis logs, mis doctor, mis profile list."""


class _Unit(click.ParamType[Any]):
    """A click type over one of `units`' parsers."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except UsageError as error:
            self.fail(error.message + (f" ({error.hint})" if error.hint else ""), param, ctx)


SIZE = _Unit("SIZE", units.size)
DURATION = _Unit("TIME", units.duration)
CORES = _Unit("N", units.cores)
COUNT = _Unit("N", units.count)


@click.command(
    name="mis-run",
    epilog=EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": False,
        "allow_interspersed_args": False,
        "max_content_width": 100,
    },
)
@click.option("--profile", "-p", default="default", metavar="NAME|FILE", help="Rules to run under.")
@click.option(
    "--workdir",
    "-w",
    metavar="DIR",
    help="Workspace, read-write at the same path.  [default: .; with --image none]",
)
@click.option(
    "--bind", "-b", "binds", multiple=True, metavar="SRC[:DST][:ro]", help="Show a host path."
)
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]", help="Set or pass a variable.")
@click.option("--rootfs", metavar="DIR", help="Root file system instead of the host's.")
@click.option("--image", metavar="IMAGE", help="Root from an image: NAME, oci:DIR, archive:FILE.")
@click.option("--entrypoint", metavar="CMD", help="Instead of the image's entrypoint; '' for none.")
@click.option("--net", type=click.Choice([m.value for m in NetMode]), help="Network to give.")
@click.option(
    "--allow-net",
    multiple=True,
    metavar="HOST[:PORT][/PROTO]",
    help="Allow a destination: IP, CIDR or name; repeatable.",
)
@click.option("--memory", type=SIZE, help="Memory limit, as 512M or 2G.")
@click.option("--cpus", type=CORES, help="CPU limit in cores, as 1.5.")
@click.option("--pids", type=COUNT, help="Process limit.")
@click.option("--timeout", type=DURATION, help="Ask, then kill after TIME, as 30m.")
@click.option("--restart", metavar="no|on-failure[:N]", help="Run again when the agent failed.")
@click.option("--name", help="Name for mis ps and mis kill.")
@click.option("--user", "-u", metavar="USER[:GID]", help="Run as.  [default: who called sudo]")
@click.option("--tty/--no-tty", "-t/-T", default=None, help="Terminal.  [default: if there is one]")
@click.option("--allow-missing", multiple=True, type=click.Choice([g.value for g in Guarantee]))
@click.option(
    "--plane",
    type=click.Choice([p.value for p in PlaneChoice]),
    default="auto",
    help="Where files and programs are judged.  [default: auto]",
)
@click.option("--log", metavar="FILE", help="Record of the run.  [default: /var/log/mis/ID.jsonl]")
@click.option("--json", "as_json", is_flag=True, help="Plan and summary as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="No summary unless something was denied.")
@click.option("--dry-run", is_flag=True, help="Print the plan and what is missing, do nothing.")
@click.version_option(__version__, "--version", "-V", message="mis-run %(version)s")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD [ARG]…")
def command(**words: Any) -> int:
    """Run CMD as a guarded agent: own cgroup, own container, guarded network, counted,
    supervised, and nothing left behind."""
    dry_run = words.pop("dry_run")
    quiet = words.pop("quiet")
    options = parse(**words)

    # Imported late: a wrong word should not pay for the engine.
    from mis_run import host, plan, profiles

    profile = profiles.load(options.profile)
    image = None
    if options.image is None:
        caller = host.caller(options.user, os.environ)
    else:
        from mis_run.images import sources

        image, caller = sources.prepare(options, host.caller(None, os.environ), unpack=not dry_run)
    made = plan.make(options, profile, host.probe(), caller, image)
    if dry_run:
        from mis_run import show

        click.echo(json.dumps(made.json(), indent=2) if options.json else show.plan(made))
        plan.check(made)
        return 0
    plan.check(made)
    from mis_run import launch

    if not options.restart:
        return launch.run(made, quiet=quiet).code
    from mis_run import restart

    return restart.run(lambda: launch.run(made, quiet=quiet), options.restart).code


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
    **limits: Any,
) -> Options:
    """click's words as `Options`. Raises UsageError for what click cannot judge."""
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
        **limits,
    )


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


def run_command(cli: click.Command, name: str) -> NoReturn:
    """Run a click command with our error style: one message, one hint, one exit code."""
    _open_streams()
    try:
        code = cli.main(prog_name=name, standalone_mode=False)
    except MisError as error:
        complain(error)
        code = error.exit_code
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    except click.Abort:
        code = 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context else f"{name} --help"
        complain(UsageError(error.format_message(), hint=hint))
        code = UsageError.exit_code
    except BrokenPipeError:
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        failure = SetupError(f"{error}", hint="mis doctor; mis gc removes what may be left")
        complain(failure)
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is undone and written; taking the interpreter apart would cost 13 ms more.
    os._exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Standard streams that our caller has closed become /dev/null: the next file opened would get
    such a number, and the agent would get that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The lowest number that is free: this one, since those below it are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def complain(error: MisError) -> None:
    """``mis-run: message`` and ``hint: command`` on stderr, red only on a terminal."""
    head = "mis-run:"
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        head = f"\033[1;31m{head}\033[0m"
    print(f"{head} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
