"""``mis learn``: one run writes the profile under which the same command runs without a denial."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from harness import mis, run

from mis_run import learn

pytestmark = pytest.mark.root

WORK = """
import json, os, subprocess, sqlite3, tempfile
print(open("data.txt").read())
subprocess.run(["ls", "-l"], check=True, stdout=subprocess.DEVNULL)
subprocess.run(["./tool.sh"], check=True)
subprocess.run(["git", "--version"], check=True, stdout=subprocess.DEVNULL)
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("x"); file.flush(); print(len(open(file.name).read()))
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "work.py").write_text(WORK)
    (folder / "data.txt").write_text("data")
    (folder / "tool.sh").write_text("#!/bin/sh\necho tool\n")
    (folder / "tool.sh").chmod(0o755)
    return folder


def test_the_learned_profile_is_enough_and_small(workspace: Path, tmp_path: Path) -> None:
    """Zero violations for what was learned; anything else is denied; secrets are never learned."""
    profile = tmp_path / "learned.toml"
    words = ("sh", "-c", "python3 work.py; cat /etc/shadow >/dev/null")
    done = mis("learn", "-o", str(profile), "-w", str(workspace), "--net", "none", "--", *words)
    assert done.returncode == 0, done.stderr
    text = profile.read_text()
    assert "# not learned, denied by default: /etc/shadow" in text
    found = tomllib.loads(text)
    assert "@workspace" in found["files"]["read"] and "@python" in found["exec"]["allow"]
    assert not any(name.startswith(("@system/", "/**")) for name in found["files"]["read"])
    again = run(
        *("sh", "-c", "python3 work.py"),
        cwd=workspace,
        options=("--profile", str(profile), "--net", "none"),
    )
    assert (again.code, sorted(again.out.split())) == (0, ["1", "data", "tool"]), again.err
    assert again.denied() == []
    other = run(
        *("sh", "-c", "head -c1 data.txt"),
        cwd=workspace,
        options=("--profile", str(profile), "--net", "none"),
    )
    assert other.code != 0 and other.denied("exec.run")


def test_folding() -> None:
    """Sets first, then folders of many files, then single files; nothing is lost."""
    facts = {"HOME": "/home/kim", "WORKSPACE": "/srv/work"}
    paths = {f"/usr/share/zoneinfo/Europe/{n}" for n in range(5)} | {"/etc/hosts", "/srv/work/a/b"}
    assert learn.fold(paths, ("workspace",), facts) == [
        "@workspace",
        "/etc/hosts",
        "/usr/share/zoneinfo/**",
    ]


def test_destinations() -> None:
    """Names with the ports that were used; addresses where no name was asked."""
    connect = {
        "kind": "net.connect",
        "subject": {"destination": "192.0.2.1:443", "protocol": "tcp"},
    }
    resolve = {"kind": "net.resolve", "subject": {"name": "api.example."}}
    assert learn.destinations([connect]) == ["192.0.2.1:443/tcp"]
    assert learn.destinations([resolve, connect]) == ["api.example:443/tcp"]


def test_wrong_words() -> None:
    """Without a command: exit code 2 and a hint."""
    done = mis("learn")
    assert done.returncode == 2 and "no command given" in done.stderr
