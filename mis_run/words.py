"""The command line of ``mis-run`` as data, and the reading of it without click.

click reads the same table (`cli`) whenever it has something to say: help, completion, a mistake.
Importing it takes longer than making the agent's cgroup, network and root together with its
guards' attachment; so words without a mistake are read here (docs/decisions/start-up.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from mis_run.dataclass import dataclass
from mis_run.events import Guarantee
from mis_run.hints import Any
from mis_run.model import NetMode, PlaneChoice


@dataclass(frozen=True)
class Word:
    """One option: its parameter in `options.parse`, its spellings, and what follows it."""

    key: str
    names: tuple[str, ...]
    metavar: str = ""  # empty: nothing follows, it is said or not
    help: str = ""
    off: tuple[str, ...] = ()  # spellings that say no
    choices: tuple[str, ...] = ()
    many: bool = False
    default: str | bool | None = None

    def unsaid(self) -> Any:
        """What it means when it is not there."""
        return () if self.many else self.default


def values(kind: type[StrEnum]) -> tuple[str, ...]:
    """What an option of this kind may be."""
    return tuple(one.value for one in kind)


def _flag(key: str, *names: str, help: str) -> Word:
    return Word(key, names, help=help, default=False)


OPTIONS = (
    Word("profile", ("--profile", "-p"), "NAME|FILE", "Rules to run under.", default="default"),
    Word(
        "workdir",
        ("--workdir", "-w"),
        "DIR",
        "Workspace, read-write at the same path.  [default: .; with --image none]",
    ),
    Word("binds", ("--bind", "-b"), "SRC[:DST][:ro]", "Show a host path.", many=True),
    Word("env", ("--env", "-e"), "NAME[=VALUE]", "Set or pass a variable.", many=True),
    Word("rootfs", ("--rootfs",), "DIR", "Root file system instead of the host's."),
    Word("image", ("--image",), "IMAGE", "Root from an image: NAME, oci:DIR, archive:FILE."),
    Word("entrypoint", ("--entrypoint",), "CMD", "Instead of the image's entrypoint; '' for none."),
    Word(
        "net", ("--net",), "MODE", "Network to give.", choices=tuple(one.value for one in NetMode)
    ),
    Word(
        "allow_net",
        ("--allow-net",),
        "HOST[:PORT][/PROTO]",
        "Allow a destination: IP, CIDR or name; repeatable.",
        many=True,
    ),
    Word("memory", ("--memory",), "SIZE", "Memory limit, as 512M or 2G."),
    Word("cpus", ("--cpus",), "N", "CPU limit in cores, as 1.5."),
    Word("pids", ("--pids",), "N", "Process limit."),
    Word("timeout", ("--timeout",), "TIME", "Ask, then kill after TIME, as 30m."),
    Word("restart", ("--restart",), "no|on-failure[:N]", "Run again when the agent failed."),
    Word("name", ("--name",), "TEXT", "Name for mis ps and mis kill."),
    Word("user", ("--user", "-u"), "USER[:GID]", "Run as.  [default: who called sudo]"),
    Word(
        "tty",
        ("--tty", "-t"),
        help="Terminal.  [default: if there is one]",
        off=("--no-tty", "-T"),
    ),
    Word(
        "allow_missing",
        ("--allow-missing",),
        "GUARANTEE",
        "Start although this cannot be had here; repeatable.",
        choices=values(Guarantee),
        many=True,
    ),
    Word(
        "plane",
        ("--plane",),
        "PLANE",
        "Where files and programs are judged.  [default: auto]",
        choices=values(PlaneChoice),
        default="auto",
    ),
    Word("log", ("--log",), "FILE", "Record of the run.  [default: /var/log/mis/ID.jsonl]"),
    _flag("as_json", "--json", help="Plan and summary as JSON."),
    _flag("quiet", "--quiet", "-q", help="No summary unless something was denied."),
    _flag("dry_run", "--dry-run", help="Print the plan and what is missing, do nothing."),
)


def read(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What the words say, by `Word.key` and ``command``; None when click is to judge them."""
    if "_MIS_RUN_COMPLETE" in environ:
        return None
    spelled = {name: (one, True) for one in OPTIONS for name in one.names}
    spelled |= {name: (one, False) for one in OPTIONS for name in one.off}
    words = {one.key: one.unsaid() for one in OPTIONS}
    rest = list(reversed(argv))
    while rest and rest[-1].startswith("-") and rest[-1] != "-":
        word = rest.pop()
        if word == "--":
            break
        name, glued, value = word.partition("=")
        one, said = spelled.get(name, (None, False))
        if one is None or (glued and not name.startswith("--")):
            return None
        if not one.metavar:
            if glued:
                return None
            words[one.key] = said
            continue
        if not glued:
            if not rest:
                return None
            value = rest.pop()
        if one.choices and value not in one.choices:
            return None
        words[one.key] = (*words[one.key], value) if one.many else value
    return {**words, "command": tuple(reversed(rest))}
