"""The command line of an OCI runtime, read as far as we must understand it. Pure.

Grammar: runc 1.1's, which engines speak: global options, a command, its options, the container's
id.  What is not known is refused rather than passed on: a word misread could hide a ``create``.

Every ``docker run`` calls a runtime four times: `main`, `words` and `runs` import next to nothing,
since dataclasses, pathlib and json alone would take longer than runc itself.
"""

from __future__ import annotations

from mis_run.errors import UsageError

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FILE = "/etc/mis/oci.toml"

GLOBAL_VALUES = frozenset({"root", "log", "log-format", "criu", "rootless", "cgroup-manager"})
GLOBAL_FLAGS = frozenset({"debug", "systemd-cgroup", "help", "h", "version", "v"})
OURS = frozenset({"mis-profile", "mis-config"})
"""Global options that are ours alone: in daemon.json, as ``runtimeArgs``."""

PASSED = frozenset(
    {"state", "kill", "pause", "resume", "events", "update", "ps", "list", "features", "spec"}
    | {"help", "h"}
)
"""Commands that are the OCI runtime's own business."""
GUARDED = frozenset({"create", "run", "start", "exec", "delete"})

VALUES: Mapping[str, frozenset[str]] = {
    "create": frozenset(
        {"bundle", "b", "console-socket", "pid-file", "preserve-fds", "pidfd-socket"}
    ),
    "exec": frozenset(
        {"console-socket", "cwd", "env", "e", "user", "u", "additional-gids", "g", "process", "p"}
        | {"pid-file", "process-label", "apparmor", "cap", "c", "preserve-fds", "cgroup"}
        | {"pidfd-socket"}
    ),
    "start": frozenset(),
    "delete": frozenset(),
}
FLAGS: Mapping[str, frozenset[str]] = {
    "create": frozenset({"no-pivot", "no-new-keyring", "no-mount-fallback"}),
    "exec": frozenset({"tty", "t", "detach", "d", "no-new-privs", "ignore-paused"}),
    "start": frozenset(),
    "delete": frozenset({"force", "f"}),
}
RUN_FLAGS = frozenset({"detach", "d", "keep", "no-subreaper"})


class Call:
    """One call of the runtime.

    ``base`` are the global options as given, without ours; ``arguments`` everything behind the
    command, as given; ``pairs`` the command's options with their values.
    """

    def __init__(
        self,
        base: tuple[str, ...],
        globals: Mapping[str, str],
        command: str,
        arguments: tuple[str, ...],
        pairs: tuple[tuple[str, str], ...] = (),
        container: str = "",
    ) -> None:
        self.base = base
        self.globals = globals
        self.command = command
        self.arguments = arguments
        self.pairs = pairs
        self.container = container

    @property
    def options(self) -> dict[str, str]:
        """The command's options; of one given twice the last, as in Go."""
        return dict(self.pairs)

    @property
    def config(self) -> str:
        """The operator's file."""
        return self.globals.get("mis-config", FILE)

    @property
    def profile(self) -> str | None:
        """The profile that the operator's runtime definition names."""
        return self.globals.get("mis-profile")


def parse(argv: Sequence[str]) -> Call:
    """The words behind the program's name. Raises UsageError for what cannot be understood."""
    options, rest = _options(
        argv, GLOBAL_VALUES | OURS, GLOBAL_FLAGS, "a global option of mis-oci-runtime"
    )
    found = dict(options)
    base = _without_ours(argv[: len(argv) - len(rest)])
    if not rest:
        return Call(base, found, "", ())
    command, arguments = rest[0], tuple(rest[1:])
    if command in PASSED:
        return Call(base, found, command, arguments)
    if command not in GUARDED:
        raise UsageError(
            f"command {command!r} is not supported: it could make a container without guards",
            hint="use the OCI runtime itself where that is meant",
        )
    kind = "create" if command == "run" else command
    flags = FLAGS[kind] | (RUN_FLAGS if command == "run" else frozenset()) | {"help", "h"}
    own, names = _options(arguments, VALUES[kind], flags, f"an option of {command}")
    if not {"help", "h"} & {name for name, _ in own}:
        if not names or not names[0]:
            raise UsageError(f"{command}: no container id given")
        if command != "exec" and len(names) > 1:
            # runc would read options behind the id too: we must not disagree about the bundle.
            raise UsageError(
                f"{command}: {names[1]!r} behind the container's id", hint="options go first"
            )
    return Call(base, found, command, arguments, tuple(own), names[0] if names else "")


def _options(
    words: Sequence[str], values: frozenset[str], flags: frozenset[str], what: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """(options with their values, the words behind them), as Go's flag package reads them."""
    found: list[tuple[str, str]] = []
    left = list(words)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        name, given, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name in values:
            if not given:
                if not left:
                    raise UsageError(f"{word}: needs a value")
                value = left.pop(0)
        elif name not in flags:
            raise UsageError(f"{word}: not known as {what}", hint="mis-oci-runtime --help")
        elif not given:
            value = "true"
        found.append((name, value))
    return found, left


def _without_ours(words: Sequence[str]) -> tuple[str, ...]:
    kept: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, given, _ = word.removeprefix("-").removeprefix("-").partition("=")
        if word.startswith("-") and name in OURS:
            if not given:
                left.pop(0)
            continue
        kept.append(word)
        if name in GLOBAL_VALUES and not given:
            kept.append(left.pop(0))
    return tuple(kept)
