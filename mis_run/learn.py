"""``mis learn -- CMD``: run once in audit mode, and write the smallest profile that would do.

The run is judged by a profile that allows nothing, so its record names every file, program and
destination; `fold` (pure) makes patterns of them.  What a denial of the default profile names is
never learned: it stays in the profile as a comment for a person to decide.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mis_run import host, plan, profiles, report
from mis_run.errors import SetupError, UsageError
from mis_run.file_rules import Effect, Rule, Rules, compile_rules, resolved
from mis_run.hints import Any
from mis_run.model import Options
from mis_run.quoting import pattern, printable, toml

LEARNING = """
extends = "trace"
[files]
read = []
write = []
[exec]
allow = []
[network]
allow = []
"""
FILE_SETS = ("workspace", "scratch", "python", "git", "compilers", "node", "system-libs")
PROGRAM_SETS = ("workspace", "scratch", "python", "git", "compilers", "node")
MANY = 4  # files of one folder that become a pattern
DEPTH = 3  # components of the folder that such a pattern keeps
PSEUDO = ("/proc/", "/sys/", "/dev/", "/run/mis/")


def run(options: Options, output: Path | None) -> int:
    """Run the command and write the profile to ``output`` (None: standard output).

    The exit code is the command's.  Raises SetupError when the record is not complete.
    """
    from mis_run import launch

    with (
        _replacing(output) as write,
        tempfile.TemporaryDirectory(prefix="mis-learn-", dir="/run") as folder,
    ):
        source, log = Path(folder) / "learning.toml", Path(folder) / "record.jsonl"
        source.write_text(LEARNING)
        caller = host.caller(options.user, os.environ)
        found = _with(options, str(source), log)
        made = plan.make(found, profiles.load(found.profile), host.probe(), caller)
        plan.check(made)
        code = launch.run(made, quiet=True).code
        events = list(report.read(log))
        if log.stat().st_size >= report.MAX_BYTES - 4096:
            raise SetupError(
                "the run did more than its record can hold, so not all of it would be learned",
                hint="learn from a shorter run, or start from a built-in profile",
            )
        facts = {"HOME": made.user.home, "WORKSPACE": str(made.cwd)}
        text = render(events, facts, " ".join(options.command))
        write(text)
    return code


@contextmanager
def _replacing(output: Path | None) -> Iterator[Callable[[str], None]]:
    """What writes the profile.

    The folder is looked up before the command runs, which may leave links for us; a file of that
    name is replaced, not written to.
    """
    if output is None:
        yield lambda text: print(text, end="")
        return
    try:
        folder = os.open(output.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}") from error

    def write(text: str) -> None:
        new = f".{output.name}.{secrets.token_hex(4)}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(new, flags, 0o644, dir_fd=folder), "w") as file:
                file.write(text)
            os.replace(new, output.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with suppress(OSError):
                os.unlink(new, dir_fd=folder)
            raise SetupError(f"--output {output}: {error.strerror}") from error

    try:
        yield write
    finally:
        os.close(folder)


def _with(options: Options, profile: str, log: Path) -> Options:
    from mis_run.dataclass import replace

    return replace(options, profile=profile, log=log)


def render(events: Iterable[Mapping[str, Any]], facts: Mapping[str, str], command: str) -> str:
    """The profile as TOML. Pure but for following links of named sets (``/bin``)."""
    events = list(events)
    opened: set[str] = set()
    executed: set[str] = set()
    refused: set[str] = set()
    for event in events:
        kind, path = event.get("kind"), str(event.get("subject", {}).get("path", ""))
        if kind not in ("file.open", "exec.run") or path.startswith(PSEUDO):
            continue
        if event.get("rule") != "default":
            refused.add(f"{path} ({event.get('rule')})")
        elif kind == "exec.run":
            executed.add(path)
        else:
            opened.add(path)
    lines = [f"# Learned from: {printable(command)}", 'extends = "default"', ""]
    lines += [f"# not learned, denied by default: {printable(text)}" for text in sorted(refused)]
    lines += ["[files]", _list("read", ["/proc/**", *fold(opened - executed, FILE_SETS, facts)])]
    lines += ["", "[exec]", _list("allow", fold(executed, PROGRAM_SETS, facts, many=10**9))]
    lines += ["", "[network]", _list("allow", destinations(events))]
    return "\n".join(lines) + "\n"


def fold(
    paths: Iterable[str], sets: Iterable[str], facts: Mapping[str, str], *, many: int = MANY
) -> list[str]:
    """Patterns that name all ``paths``: sets first, then folders with ``many`` of them, then
    each by itself."""
    left, found = set(paths), []
    for name in sets:
        rules = _compiled(name, facts)
        inside = {path for path in left if rules.judge(path).allowed}
        if inside:
            found.append(f"@{name}")
            left -= inside
    folders: dict[str, list[str]] = defaultdict(list)
    for path in left:
        parts = path.split("/")
        folders["/".join(parts[: min(DEPTH + 1, len(parts) - 1)])].append(path)
    for folder, inside_folder in sorted(folders.items()):
        if folder and len(inside_folder) >= many:
            found.append(f"{pattern(folder)}/**")
        else:
            found += sorted(map(pattern, inside_folder))
    return found


def _compiled(name: str, facts: Mapping[str, str]) -> Rules:
    patterns = profiles.expand((f"@{name}",), facts)
    return compile_rules(
        Rule(resolved(pattern, os.path.realpath), Effect.ALLOW, name) for pattern in patterns
    )


def destinations(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the run connected to: names it looked up, with every port it used, and addresses when
    it looked up none."""
    names: set[str] = set()
    ports: set[str] = set()
    addresses: set[str] = set()
    for event in events:
        subject = event.get("subject", {})
        if event.get("kind") == "net.resolve":
            names.add(str(subject.get("name", "")).rstrip("."))
        elif event.get("kind") in ("net.connect", "net.send"):
            where, protocol = str(subject.get("destination", "")), str(subject.get("protocol", ""))
            suffix = f"/{protocol}" if protocol in ("tcp", "udp") else ""
            addresses.add(f"{where}{suffix}")
            ports.add(f"{where.rpartition(':')[2]}{suffix}")
    if names:
        return sorted(f"{name}:{port}" for name in names for port in ports)
    return sorted(addresses)


def _list(key: str, values: Iterable[str]) -> str:
    values = list(values)
    if not values:
        return f"{key} = []"
    inner = "".join(f"    {toml(value)},\n" for value in values)
    return f"{key} = [\n{inner}]"
