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
from mis_run.file_rules import WILD, Effect, Rule, Rules, compile_rules, expand, floats
from mis_run.guards import file_objects
from mis_run.guards.file_objects import Identity, Outlaw
from mis_run.model import Plan
from mis_run.rootfs import Root

ANY = "\x01"  # a name that no pattern means: what holds for a folder's content as such
LOADERS = ("/lib*/ld-*.so*", "/lib*/*/ld-*.so*", "/usr/lib*/ld-*.so*", "/usr/lib*/*/ld-*.so*")
"""The dynamic loader: the kernel opens it for every program, as if it were executed itself."""


@dataclass(frozen=True)
class Policy:
    """Everything a verdict needs.

    ``objects`` are denied whatever they are called, ``programs`` may not be executed; ``sizes``
    leads to denied programs by content.  ``places`` says which folders' content is the agent's.
    ``taints`` names what marks who opens it, and ``tainted`` is what of that exists.
    """

    opens: Rules
    execs: Rules
    objects: Mapping[Identity, Outlaw] = field(default_factory=dict)
    programs: Mapping[Identity, Outlaw] = field(default_factory=dict)
    sizes: Mapping[int, list[tuple[Path, Rule]]] = field(default_factory=dict)
    places: Mapping[str, bool] = field(default_factory=dict)
    taints: Rules = field(default_factory=Rules)
    tainted: Mapping[Identity, Outlaw] = field(default_factory=dict)

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
    taints, tainted = maker.tainted(files.taint, whole=plan.image is not None)
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
            (info.st_dev, info.st_ino): Outlaw(
                outlaws[path], file_objects.birth(str(maker.on_host(path)))
            )
            for path, info in facts.items()
        },
        sizes=sizes,
        places=places,
        taints=taints,
        tainted=tainted,
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
                yield from file_objects.below(source, target, opens)
            return
        patterns = [rule.pattern for rule in denied]
        for target, source in self._binds.items():
            if os.path.isdir(source):  # noqa: PTH112 - asked at every launch
                for path in masks.inside(source, target, patterns):
                    yield from file_objects.below(str(self.on_host(path)), path, opens)

    def tainted(
        self, written: Iterable[str], *, whole: bool
    ) -> tuple[Rules, dict[Identity, Outlaw]]:
        """The rules of what taints, and the files that exist under them: in what is shared and,
        since nothing hides them, in the root. ``whole``: all of that is looked at for floating
        patterns, not only where others say."""
        if not (made := self.rules(written, Effect.TAINT)):
            return Rules(), {}
        # What links lead to is tainted under its own name too.
        found = {path: rule for rule in made for path in self._places(rule.pattern)}
        led = (Rule(path, Effect.TAINT, rule.text) for path, rule in found.items())
        taints = compile_rules([*made, *led])
        anywhere = any(masks.normal(rule.pattern) is None for rule in made)
        tops = {
            target
            for target in self._binds
            if anywhere or taints.judge(target).rule or taints.judge(f"{target}/{ANY}").rule
        }
        tops |= {""} if whole and anywhere else set()
        tops |= {path for path in found if self._bind(path) not in tops}
        objects: dict[Identity, Outlaw] = {}
        for top in tops:
            births = bool(self._bind(top))
            objects |= file_objects.below(str(self.on_host(top)), top, taints, births=births)
        return taints, objects

    def _places(self, pattern: str) -> set[str]:
        """What exists of an anchored pattern in the root and in binds, links followed there; of one
        without wildcards also where the agent comes to by links from one to another."""
        if not pattern.startswith("/") or (path := masks.normal(pattern)) is None:
            return set()
        found = {path for path in self.on_disk([pattern]) if not self._bind(path)}
        for target, source in self._binds.items():
            if os.path.isdir(source):  # noqa: PTH112 - asked at every launch
                found |= masks.inside(source, target, [pattern]).keys()
        if not WILD.search(path):
            with suppress(OSError):  # a circle
                found.add(masks.resolve("", path, where=lambda one: str(self.on_host(one))))
        return {path for path in found - {"/"} if os.path.lexists(self.on_host(path))}

    def _bind(self, path: str) -> str:
        """Where the bind that a path lies in is shown; empty for the root's own."""
        return next((place for place in self._binds if masks.within(path, place)), "")

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


def with_image(policy: Policy, image: str) -> Policy:
    """The policy with what denials and taints at any depth (``**/*.key``) name in an image's root,
    which the agent may rename and link as it may in a workspace. Raises SetupError for a very large
    one."""
    top, taints = image.rstrip("/"), policy.taints
    if any(rule.effect is not Effect.ALLOW for _, rule in policy.opens.floating):
        found = dict(file_objects.below(top, "", policy.opens))
        policy = replace(policy, objects={**found, **policy.objects})
    if any(masks.normal(pattern) is None for pattern in taints.patterns()):
        found = dict(file_objects.below(top, "", taints, births=False))
        policy = replace(policy, tainted={**found, **policy.tainted})
    return policy
