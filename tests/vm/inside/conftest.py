"""A guarded cgroup and a neighbour without guard, on a tree of files of which rules are known."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mis_run import cgroup_detect
from mis_run.guards import lsm, lsm_plane, lsm_policy
from mis_run.guards.lsm_abi import Right, RuleFlag

READ, WRITE, EXEC = Right.READ | Right.LIST, Right.WRITE, Right.EXEC
NO = Right(0)
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc")


def group() -> Path:
    """A new cgroup."""
    _, unified, _ = cgroup_detect.detect()
    assert unified is not None
    folder = unified / f"mistest-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


class Tree:
    """Folders below ``top``; `lines` are their rules.

    open: everything, the workspace. ro: read, execute. noexec: all but execute. hidden, in open:
    denied. sealed.txt, in open: denied by a rule of its own; fixed.txt: not to be written. none: no
    rule at all.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.open, self.ro, self.noexec, self.none = (
            top / name for name in ("open", "ro", "noexec", "none")
        )
        self.hidden = self.open / "deep" / "hidden"
        self.sealed, self.fixed = self.open / "sealed.txt", self.open / "fixed.txt"

    def make(self) -> None:
        """Make the folders and a file and a program in each."""
        for folder in (self.open, self.ro, self.noexec, self.none, self.hidden):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "file").write_text("content")
            shutil.copy("/bin/true", folder / "prog")
            script = folder / "script"
            script.write_text("#!/bin/true\n")
            script.chmod(0o755)
        self.sealed.write_text("secret")
        self.fixed.write_text("settings")

    def lines(self) -> list[lsm_policy.Line]:
        """The policy."""
        line, every = lsm_policy.Line, Right.ALL
        explicit, workspace = RuleFlag.EXPLICIT, RuleFlag.WORKSPACE
        return [
            *(line(path, READ | EXEC, NO, path) for path in SYSTEM),
            *(line(path, READ | WRITE, NO, path) for path in ("/proc", "/dev")),
            line(str(self.open), every, NO, "open", explicit | workspace),
            line(str(self.ro), READ | EXEC, NO, "ro", explicit),
            line(str(self.noexec), every & ~EXEC, EXEC, "noexec"),
            line(str(self.hidden), NO, every, "hidden"),
            line(str(self.sealed), NO, every, "sealed"),
            line(str(self.fixed), NO, WRITE, "fixed"),
        ]

    def policy(self, **settings: object) -> lsm.LsmPolicy:
        """The policy, compiled for what is in the tree now."""
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        try:
            device = lsm_policy.devices(os.getpid())
            rules = lsm_policy.compile(self.lines(), root, device, lsm_policy.points(os.getpid()))
        finally:
            os.close(root)
        return lsm.LsmPolicy(rules=rules, **settings)  # type: ignore[arg-type]


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of its own: a tmpfs, or an overlay of two (so that their numbers differ)."""
    with ExitStack() as stack:

        def mount(point: Path, *argv: str) -> Path:
            point.mkdir(parents=True)
            subprocess.run(["mount", *argv, str(point)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(point)], check=True)
            return point

        if kind == "tmpfs":
            yield mount(folder / "tmpfs", "-t", "tmpfs", "tmpfs")
            return
        lower = mount(folder / "lower", "-t", "tmpfs", "tmpfs")
        upper = mount(folder / "layer", "-t", "tmpfs", "tmpfs")
        Tree(lower).make()
        for name in ("upper", "work"):
            (upper / name).mkdir()
        options = f"lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work,xino=on"
        yield mount(folder / "merged", "-t", "overlay", "overlay", "-o", options)


@pytest.fixture(scope="module", params=["tmpfs", "overlay"])
def tree(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tree]:
    """The tree on a file system of each kind."""
    with mounted(request.param, tmp_path_factory.mktemp("tree")) as top:
        made = Tree(top)
        if request.param == "tmpfs":
            made.make()
        yield made


@pytest.fixture(scope="module")
def plane() -> None:
    """Loaded, which takes seconds here, before the clock of any one test runs."""
    lsm_plane.ensure().close()


@pytest.fixture(scope="module")
def cgroups() -> Iterator[Callable[[], Path]]:
    """Makes cgroups, which go with the module."""
    made: list[Path] = []

    def make() -> Path:
        made.append(group())
        return made[-1]

    yield make
    for folder in made:
        _remove(folder)


@pytest.fixture
def agent() -> Iterator[Path]:
    """The cgroup that a test guards."""
    folder = group()
    yield folder
    _remove(folder)


@pytest.fixture(scope="module")
def neighbour(cgroups: Callable[[], Path]) -> Path:
    """A cgroup that nobody guards."""
    return cgroups()


def _remove(folder: Path) -> None:
    (folder / "cgroup.kill").write_text("1")
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        _rmdir(inner)
    _rmdir(folder)


def _rmdir(folder: Path) -> None:
    for _ in range(100):
        if "populated 0" in (folder / "cgroup.events").read_text():
            break
        os.sched_yield()
        subprocess.run(["sleep", "0.05"], check=False)
    folder.rmdir()


@pytest.fixture(scope="module")
def guarded(tree: Tree, cgroups: Callable[[], Path]) -> Iterator[tuple[Path, lsm.LsmGuard]]:
    """A guarded cgroup that many tests share: levels have no effect."""
    folder = cgroups()
    with lsm.attach(folder, tree.policy(no_wx=True, defcon=lsm.Defcon(act=False))) as guard:
        yield folder, guard
