"""The end of a run names what an agent left for its person's next `git` to run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run

from mis_run import git_traps

pytestmark = pytest.mark.root
SIGN = "look before you run git: "


def git(*words: str | Path, cwd: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always")
    subprocess.run(["git", *identity, *words], cwd=cwd, env=env, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with a submodule, a worktree and an alias of its person's."""
    folder, other = tmp_path / "work", tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
        git("init", "-q", ".", cwd=place)
        git("commit", "-q", "--allow-empty", "-m", "first", cwd=place)
    git("submodule", "--quiet", "add", other, "sub", cwd=folder)
    git("worktree", "add", "-q", tmp_path / "tree", cwd=folder)
    git("config", "alias.mine", "!true", cwd=folder)
    return folder


TRAPS = {
    "git config core.fsmonitor ./evil": ".git/config: core.fsmonitor = ./evil",
    "git config core.hooksPath evil": ".git/config: core.hookspath = evil",
    "git config filter.x.clean evil": ".git/config: filter.x.clean = evil",
    "git config alias.st '!evil'": ".git/config: alias.st = !evil",
    "git config include.path ../evil": ".git/config: include.path = ../evil",
    "git config credential.https://x.helper e": ".git/config: credential.https://x.helper = e",
    "git config url.ext::evil.insteadOf https://": ".git/config: url.ext::evil.insteadof = https://",
    "printf '[core]fsmonitor=\\\\\n evil' >>.git/config": ".git/config: core.fsmonitor = evil",
    "echo '[broken' >>.git/config": ".git/config: changed, and git cannot read it",
    "git -C sub config core.sshCommand evil": ".git/modules/sub/config: core.sshcommand = evil",
    "echo evil >.git/modules/sub/hooks/post-checkout": ".git/modules/sub/hooks/post-checkout: new",
    "echo ../evil >.git/commondir": ".git/commondir: new",
    "printf '[core]\nfsmonitor=evil' >.git/config.worktree":
        ".git/config.worktree: core.fsmonitor = evil",
    "echo ../../../evil >.git/worktrees/tree/commondir": ".git/worktrees/tree/commondir: changed",
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_is_named(repository: Path, trap: str) -> None:
    """On stderr, quiet or not, and in the record."""
    done = run(
        "sh", "-c", trap, cwd=repository, options=("-q", "-p", "coding-agent", "--user", "0")
    )
    assert done.code == 0, done.err
    assert SIGN + TRAPS[trap] in done.err
    assert done.events[-1]["subject"]["git"] == [TRAPS[trap]]


WORK = """
set -e
export HOME=/tmp GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
git checkout -q -b topic; echo x >file; git add file; git commit -q -m second
git remote add origin https://git.example/x.git; git config branch.topic.remote origin
git config core.fsmonitor true; git config core.autocrlf input; git gc -q
"""


def test_ordinary_work_is_no_trap(repository: Path) -> None:
    """The control: commits, branches, remotes and plain settings end without a word."""
    options = ("-q", "-p", "coding-agent", "--user", "0")
    done = run("sh", "-c", WORK, cwd=repository, options=options)
    assert done.code == 0 and SIGN not in done.err, done.err
    assert done.events[-1]["subject"]["git"] == []


PLACES: dict[str, Callable[[Path], object]] = {
    "a new repository": lambda folder: git("init", "-q", ".", cwd=folder),
    "a file that leads elsewhere": lambda folder: (folder / ".git").write_text("gitdir: evil"),
    "a link that leads elsewhere": lambda folder: (folder / ".git").symlink_to("evil"),
    "a FIFO": lambda folder: os.mkfifo(folder / ".git"),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_there_was_no_repository(tmp_path: Path, place: str) -> None:
    """One that leads elsewhere is named; an ordinary new one is not, until it holds a trap."""
    before = git_traps.look([tmp_path])
    PLACES[place](tmp_path)
    if place == "a new repository":
        assert git_traps.compare(before) == []
        (tmp_path / ".git/hooks/pre-commit").write_text("evil")
        assert git_traps.compare(before) == [".git/hooks/pre-commit: new"]
    else:
        assert git_traps.compare(before) == [".git: new"]
