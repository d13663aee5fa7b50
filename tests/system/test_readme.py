"""Every command of the README's examples works as printed, in a fresh clone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from harness import ROOT
from leftovers import snapshot

pytestmark = pytest.mark.root


def commands() -> list[str]:
    """Lines of bash blocks, and what follows a prompt in console blocks."""
    text = (ROOT / "README.md").read_text()
    found = []
    for kind, block in re.findall(r"```(bash|console)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            words = line.removeprefix("$ ").removeprefix("sudo ").partition("  #")[0].strip()
            if words:
                found.append(words)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that shares this checkout's virtual environment: set up once is enough."""
    folder = tmp_path_factory.mktemp("readme") / "mis-run"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "mis_run/_built").symlink_to(ROOT / "mis_run/_built")
    (folder / "agent.py").write_text("print('agent here')\n")
    (folder / "agent").write_text("#!/bin/sh\necho agent here\n")
    (folder / "agent").chmod(0o755)
    (folder / "Makefile").write_text("test:\n\t@echo tests here\n")
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.is_file():
            os.utime(path, (1, 1))  # older than the stamp: nothing to set up again
    return folder


@pytest.mark.parametrize("line", commands())
def test_readme_command(line: str, clone: Path) -> None:
    """The command ends with code 0 and leaves nothing but the workspace's own files."""
    before = snapshot()
    if line == "./mis explain":
        line = "./mis explain --json"
    done = subprocess.run(
        shlex.split(line),
        cwd=clone,
        input="exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-800:], done.stderr[-800:])
    assert "Traceback" not in done.stderr
    assert snapshot() == before


def test_the_first_example_is_really_repaired(clone: Path) -> None:
    """The coding agent of the first example leaves a repaired file that belongs to the caller."""
    path = clone / "agent-workspace/maths.py"
    assert "a + b" in path.read_text()
    assert path.stat().st_uid == os.getuid()
