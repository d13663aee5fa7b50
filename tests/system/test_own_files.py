"""What mis-run itself reads and writes in a workspace: no agent leads it elsewhere or changes it.

A record that is named with ``--log``, a profile of the project, what ``mis learn`` writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import mis, run

pytestmark = pytest.mark.root

CHANGES = """
import os, sys
name = sys.argv[1]
acts = {
    "write": lambda: open(name, "a").write("x"),
    "truncate": lambda: os.truncate(name, 0),
    "remove": lambda: os.remove(name),
    "replace": lambda: os.rename("other", name),
    "move the folder": lambda: os.rename(os.path.dirname(name), "away"),
}
open("other", "w").write("agent's")
for act, do in acts.items():
    try:
        do()
        print(act)
    except OSError:
        pass
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    (folder / "sub").mkdir(parents=True)
    (folder / "victim").write_text("")
    return folder


def changed(name: str, cwd: Path, *options: str) -> list[str]:
    """What the agent could do to a file of its workspace."""
    done = run("python3", "-c", CHANGES, name, cwd=cwd, options=options)
    assert done.code == 0, done.err
    return done.out.splitlines()


EVERYTHING = ["write", "truncate", "remove", "replace", "move the folder"]


@pytest.mark.parametrize("extends", [False, True])
def test_a_project_s_profile_cannot_be_changed_by_its_agent(workspace: Path, extends: bool) -> None:
    """The profile of this launch, and one that it extends, is as it was for the next."""
    rules = workspace / "sub/rules.toml"
    rules.write_text('extends = "default"\n')
    profile = workspace / "mine.toml" if extends else rules
    if extends:
        profile.write_text('extends = "./sub/rules.toml"\n')
    assert changed("sub/rules.toml", workspace, "--profile", str(profile)) == []
    assert rules.read_text() == 'extends = "default"\n'
    assert changed("sub/rules.toml", workspace) == EVERYTHING  # the control: another profile


def test_a_profile_behind_a_link_in_the_workspace_is_refused(workspace: Path) -> None:
    """The link could lead elsewhere at the next launch; outside of a workspace links are fine."""
    (workspace / "real.toml").write_text('extends = "default"\n')
    (workspace / "link.toml").symlink_to("real.toml")
    done = run("true", cwd=workspace, options=("--profile", "./link.toml"))
    assert done.code == 2 and "link.toml: a symbolic link" in done.err, done.err
    outside = workspace.parent / "link.toml"
    outside.symlink_to(workspace / "real.toml")
    assert changed("real.toml", workspace, "--profile", str(outside)) == []


@pytest.mark.parametrize("link", ["log", "folder", "fifo"])
def test_a_record_does_not_follow_what_an_agent_left(workspace: Path, link: str) -> None:
    """A link in place of the record or of its folder is refused and leads nowhere."""
    victim = workspace.parent / "victim.jsonl"
    victim.write_text("")
    log = workspace / "logs/victim.jsonl"
    if link == "folder":
        log.parent.symlink_to(workspace.parent)
    else:
        log.parent.mkdir()
        log.symlink_to(victim) if link == "log" else os.mkfifo(log)
    options = ("--log", "logs/victim.jsonl")
    done = run("true", cwd=workspace, options=options)
    assert done.code != 0 and "--log" in done.err and "hint:" in done.err, done.err
    assert victim.read_text() == ""
    # The control: outside of what agents write a link is the caller's own.
    other = workspace.parent / "own.jsonl"
    other.symlink_to(victim)
    assert run("true", cwd=workspace, options=("--log", str(other))).code == 0
    assert "run.exit" in victim.read_text()


def test_a_record_in_the_workspace_is_not_the_agent_s(workspace: Path) -> None:
    """It can neither be changed nor replaced while the agent runs."""
    assert changed("sub/run.jsonl", workspace, "--log", "sub/run.jsonl") == []
    assert "run.exit" in (workspace / "sub/run.jsonl").read_text()


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_learned_profile_is_written_where_it_was_said(workspace: Path, link: str) -> None:
    """A link that the learned command leaves is replaced, or left behind with its folder."""
    victim = workspace.parent / "learned.toml"
    victim.write_text("before")
    plant = {
        "file": f"ln -s {victim} sub/learned.toml",
        "folder": f"mv sub away; ln -s {workspace.parent} sub",
    }
    words = ("learn", "-o", str(workspace / "sub/learned.toml"), "-w", str(workspace))
    done = mis(*words, "--net", "none", "--", "sh", "-c", plant[link])
    assert done.returncode == 0, done.stderr
    assert victim.read_text() == "before"
    place = workspace / ("sub" if link == "file" else "away") / "learned.toml"
    assert place.read_text().startswith("# Learned from") and not place.is_symlink()
    assert [path.name for path in place.parent.iterdir()] == ["learned.toml"]
