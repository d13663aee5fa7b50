"""What the file guard and the exec gate judge by: the plan's rules and the objects they deny.

Built once, when the agent's root exists and before the agent does.  A denied object is known by
more than its path: by device and inode (a new hard link, a rename), programs also by content (a
copy).  Reads the file system; decides nothing (`judge` is pure but for hashing).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mis_run import masks, profiles, rootfs
from mis_run.bundle import INFO, SHIM
from mis_run.dataclass import dataclass, field, replace
from mis_run.file_rules import Effect, Rule, Rules, compile_rules, expand, floats
from mis_run.linux import statx
from mis_run.model import Plan
from mis_run.rootfs import Root

LOADERS = ("/lib*/ld-*.so*", "/lib*/*/ld-*.so*", "/usr/lib*/ld-*.so*", "/usr/lib*/*/ld-*.so*")
"""The dynamic loader: the kernel opens it for every program, as if it were executed itself."""
MOST_WALKED = 1_000_000  # files looked at for floating denials; a workspace of more is refused
Identity = tuple[int, int]


@dataclass(frozen=True)
class Outlaw:
    """A denied object. ``birth`` as in `statx.birth`: who deletes it frees its number, and the next
    file to get that is another one."""

    rule: Rule
    birth: int | None

    def is_at(self, fd: int) -> bool:
        """Whether what is open at ``fd``, with the same device and number, is this very object."""
        return self.birth is None or statx.birth(fd) in (None, self.birth)


@dataclass(frozen=True)
class Policy:
    """Everything a verdict needs.

    ``objects`` are denied whatever they are called, ``programs`` may not be executed; ``sizes``
    leads to denied programs by content.  ``places`` says which folders' content is the agent's.
    """

    opens: Rules
    execs: Rules
    objects: Mapping[Identity, Outlaw] = field(default_factory=dict)
    programs: Mapping[Identity, Outlaw] = field(default_factory=dict)
    sizes: Mapping[int, list[tuple[Path, Rule]]] = field(default_factory=dict)
    places: Mapping[str, bool] = field(default_factory=dict)

    def is_writable(self, path: str) -> bool:
        """Whether the agent itself may have made what is at ``path``."""
        around = [place for place in self.places if path.startswith(f"{place}/")]
        return self.places[max(around, key=len)] if around else False

    def copy_of(self, fd: int, size: int) -> Rule | None:
        """The rule of the denied program that has the same content."""
        for path, rule in self.sizes.get(size, ()):
            try:
                with path.open("rb") as original:
                    if digest(original.fileno()) == digest(fd):
                        return rule
            except OSError:  # replaced on the host meanwhile: nothing to compare with
                continue
        return None


def digest(fd: int) -> str:
    """The SHA-256 of an open file, read from its beginning without moving its position."""
    import hashlib  # late: 3 ms, and most runs never ask

    found, at = hashlib.sha256(), 0
    while block := os.pread(fd, 1 << 20, at):
        found.update(block)
        at += len(block)
    return found.hexdigest()


def build(plan: Plan, root: Root) -> Policy:
    """The policy of one run. Raises UsageError for a set or variable that does not exist."""
    maker = _Maker(plan, root)
    files, programs = plan.profile.files, plan.profile.exec
    places = dict.fromkeys((*rootfs.FRESH, "/dev/shm", *_home(plan)), True)
    if plan.image:
        places[""] = True  # who owns what in an image is its maker's choice
    places |= {target: not bind.readonly for target, bind in plan.shared().items()}
    named = [f"{bind.target}/**" for bind in plan.binds] + [str(b.target) for b in plan.binds]
    # What stands empty in place of something hidden has only what the agent put there.
    emptied = [f"{path}/**" for path, folder in root.emptied.items() if folder]
    denied = [*maker.rules(files.deny, Effect.DENY), *maker.rules(files.kill, Effect.KILL)]
    opens = compile_rules(
        [
            *maker.rules((*files.read, *files.write), Effect.ALLOW),
            *maker.given(emptied, "emptied for this run"),
            *maker.given(named, "--bind"),
            *maker.given([f"{INFO}/**"], "the agent's own rules"),
            *denied,
        ]
    )
    kept_out = maker.rules(programs.deny, Effect.DENY, are_programs=True)
    execs = [
        *maker.rules(programs.allow, Effect.ALLOW, are_programs=True),
        *maker.given(named, "--bind"),
        *maker.given([*LOADERS, SHIM], "builtin"),
        *kept_out,
    ]
    outlaws = {path: rule for rule in kept_out if "*" not in (path := rule.pattern)}
    facts = {path: info for path in outlaws if (info := maker.stat(path))}
    sizes: dict[int, list[tuple[Path, Rule]]] = {}
    for path, info in facts.items():
        sizes.setdefault(info.st_size, []).append((maker.on_host(path), outlaws[path]))
    return Policy(
        opens=opens,
        execs=compile_rules(execs),
        objects=dict(maker.objects(denied, opens)),
        programs={
            (info.st_dev, info.st_ino): Outlaw(outlaws[path], _birth(str(maker.on_host(path))))
            for path, info in facts.items()
        },
        sizes=sizes,
        places=places,
    )


def _home(plan: Plan) -> tuple[str, ...]:
    return (plan.user.home.rstrip("/"),) if rootfs.has_home(plan.user) else ()


class _Maker:
    """Patterns of one plan in one root → rules and objects."""

    def __init__(self, plan: Plan, root: Root) -> None:
        self._facts = {"HOME": plan.user.home, "WORKSPACE": str(plan.cwd)}
        self._root = str(root.path)
        self._path = dict(plan.env).get("PATH", "").split(":")
        # Longest first: where a path of the container lies on the host.
        binds = {target: str(bind.source) for target, bind in plan.shared().items()}
        self._binds = dict(sorted(binds.items(), key=lambda item: -len(item[0])))
        self._known: dict[str, str] = {}

    def on_host(self, path: str) -> Path:
        """Where we see what the agent sees at ``path``."""
        for target, source in self._binds.items():
            if path == target or path.startswith(f"{target}/"):
                return Path(f"{source}{path[len(target) :]}")
        return Path(f"{self._root}{path}")

    def stat(self, path: str) -> os.stat_result | None:
        """lstat of a regular file, None for anything else."""
        try:
            info = self.on_host(path).lstat()
        except OSError:
            return None
        return info if stat.S_ISREG(info.st_mode) else None

    def rules(
        self, written: Iterable[str], effect: Effect, *, are_programs: bool = False
    ) -> list[Rule]:
        """The rules of one profile key; of programs also under the names their links lead to."""
        made = expand(written, effect, sets=self._expand, resolve=self._resolve)
        if not are_programs:
            return made
        found: list[Rule] = []
        for rule in made:
            paths = self._program(rule.pattern, effect)
            if effect is not Effect.ALLOW or "/" in rule.pattern:
                found.append(rule)  # an allowed name is only what PATH finds
            found += [
                Rule(path, effect, rule.text, rule.explicit, rule.sha256)
                for path in paths
                if path != rule.pattern
            ]
        return found

    def given(self, patterns: Iterable[str], text: str) -> list[Rule]:
        """Rules that no profile has to name."""
        return [Rule(self._resolve_pattern(p), Effect.ALLOW, text, True) for p in patterns]

    def on_disk(self, patterns: Iterable[str]) -> list[str]:
        """What exists of anchored patterns, links followed."""
        return sorted({path for pattern in patterns for path in masks.find(self._root, pattern)})

    def objects(self, denied: Iterable[Rule], opens: Rules) -> Iterator[tuple[Identity, Outlaw]]:
        """The files that exist under a denial in what the agent shares with the host.

        Elsewhere the throw-away layer has nothing of theirs: they are hidden there.
        """
        denied = list(denied)
        if any(floats(rule.pattern) or masks.normal(rule.pattern) is None for rule in denied):
            for target, source in self._binds.items():
                yield from _denied_below(source, target, opens)
            return
        patterns = [rule.pattern for rule in denied]
        for target, source in self._binds.items():
            if os.path.isdir(source):  # noqa: PTH112 - asked at every launch
                for path in masks.inside(source, target, patterns):
                    yield from _denied_below(str(self.on_host(path)), path, opens)

    def _program(self, pattern: str, effect: Effect) -> list[str]:
        """Paths that a program's pattern means beside itself."""
        if "/" not in pattern:  # a name: what PATH finds, denied wherever it may be
            return self._in_path(pattern, first=effect is Effect.ALLOW)
        if pattern.startswith("/**/bin/") and "*" not in (name := pattern[8:]):
            return self._in_path(name, first=False)
        if floats(pattern) or "**" in pattern:
            return []
        return self.on_disk([pattern])

    def _in_path(self, name: str, *, first: bool) -> list[str]:
        found: dict[str, None] = {}
        for folder in self._path:
            path = self._resolve(f"{folder}/{name}")
            if self.stat(path):
                found[path] = None
                if first:
                    break
        return list(found)

    def _expand(self, entry: str) -> tuple[str, ...]:
        return profiles.expand((entry,), self._facts)

    def _resolve(self, path: str) -> str:
        folder, _, name = path.rpartition("/")
        if (above := self._known.get(folder)) is None:
            above = self._known[folder] = masks.resolve(self._root, folder)
        if any(path == bind or path.startswith(f"{bind}/") for bind in self._binds):
            return path
        return masks.resolve(self._root, f"{above.rstrip('/')}/{name}")

    def _resolve_pattern(self, pattern: str) -> str:
        return f"{self._resolve(pattern[:-3])}/**" if pattern.endswith("/**") else pattern


def _denied_below(source: str, target: str, opens: Rules) -> Iterator[tuple[Identity, Outlaw]]:
    """Every file at or below ``source``, which the agent sees as ``target``, that a rule denies."""
    from mis_run.errors import SetupError

    left = MOST_WALKED
    for path in _files(source):
        left -= 1
        if left < 0:
            raise SetupError(
                f"{source} has more than {MOST_WALKED} files to look at for what is denied",
                hint="name the denied places from the root, without wildcards: $WORKSPACE/NAME",
            )
        rule = opens.judge(f"{target}{path[len(source) :]}").rule
        if rule is not None and rule.effect is not Effect.ALLOW:
            try:
                info = os.lstat(path)
            except FileNotFoundError:  # gone since
                continue
            yield (info.st_dev, info.st_ino), Outlaw(rule, _birth(path))


def with_image(policy: Policy, image: str) -> Policy:
    """The policy with what denials at any depth (``**/*.key``) name in an image's root, which the
    agent may rename and link as it may in a workspace. Raises SetupError for a very large one."""
    if not any(rule.effect is not Effect.ALLOW for _, rule in policy.opens.floating):
        return policy
    found = dict(_denied_below(image.rstrip("/"), "", policy.opens))
    return replace(policy, objects={**found, **policy.objects})


def _birth(path: str) -> int | None:
    """None, which is never taken for another object, where it cannot be told."""
    with suppress(OSError):
        return statx.birth(path)
    return None


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):  # noqa: PTH112 - as cheap as it can be
        yield path
    for folder, _, names in os.walk(path):
        for name in names:
            yield f"{folder}/{name}"
