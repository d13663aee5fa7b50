"""Every command of the README's examples works as printed, in a fresh clone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
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
    """A fresh clone, set up by its own first start, with the files that the examples speak of."""
    folder = tmp_path_factory.mktemp("readme") / "mis-run"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / "agent.py").write_text("print('agent here')\n")
    (folder / "agent").write_text("#!/bin/sh\necho agent here\n")
    (folder / "agent").chmod(0o755)
    (folder / "Makefile").write_text("test:\n\t@echo tests here\n")
    subprocess.run([folder / "mis-run", "--version"], check=True, timeout=600)
    return folder


def ran(
    argv: list[str], cwd: Path, said: str, *, timeout: float
) -> subprocess.CompletedProcess[str]:
    """A command that is told something, to its end."""
    return subprocess.run(
        argv, cwd=cwd, input=said, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize("line", commands())
def test_readme_command(line: str, clone: Path) -> None:
    """The command ends with code 0 and leaves nothing but the workspace's own files."""
    before = snapshot()
    if line == "./mis explain":
        line = "./mis explain --json"
    done = ran(shlex.split(line), clone, "exit\n", timeout=120)
    assert done.returncode == 0, (done.stdout[-800:], done.stderr[-800:])
    assert "Traceback" not in done.stderr
    assert snapshot() == before


def test_the_first_example_is_really_repaired(clone: Path) -> None:
    """The coding agent of the first example leaves a repaired file that belongs to the caller."""
    path = clone / "agent-workspace/maths.py"
    assert "a + b" in path.read_text()
    assert path.stat().st_uid == os.getuid()


def test_an_agent_in_our_checkout_cannot_change_what_root_runs_next(clone: Path) -> None:
    """With mis-run's own checkout as workspace its code is read-only, the rest is not."""
    script = (
        "for path in mis-run mis mis-oci-runtime mis-oci-hook mis_run/__init__.py scripts/setup.sh "
        ".venv/pyvenv.cfg bpf/mis.h images/build; do "
        "sh -c \"echo '#' >> $path\" 2>/dev/null && echo CHANGED $path; "
        "mv $path $path.old 2>/dev/null && echo MOVED $path; done; "
        "mv mis_run x 2>/dev/null && echo MOVED mis_run; "
        "touch agent-was-here && rm agent-was-here && echo free"
    )
    argv = [str(clone / "mis-run"), "-q", "--", "sh", "-c", script]
    done = subprocess.run(argv, cwd=clone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "free\n"), done.stderr
    status = ["git", "-C", str(clone), "status", "--porcelain", "--untracked-files=no"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == ""


MARK = "import sys\nsys.stderr.write('PLANTED ' + __name__ + '\\n')\n"
PLANTED = ("org/python/core", "json/__init__", "ctypes", "click/__init__", "dns/message", "rich")
STARTS = (
    "mis-run --dry-run -- true",
    "mis-run --frobnicate",
    "mis-run --net guarded --allow-net example.invalid:1 -- true",
    "mis ps",
    "mis doctor",
    "mis-oci-runtime --version",
    "mis-oci-runtime create x",
    "mis-oci-hook createRuntime",
)


def test_modules_that_an_agent_leaves_in_our_checkout_are_nobodys(clone: Path) -> None:
    """Beside mis_run they would be imported by root's next start: by name before the standard
    library's or the environment's, or where those try something that is not there."""
    script = "; ".join(
        f"mkdir -p $(dirname {name}); printf %s {shlex.quote(MARK)} > {name}.py" for name in PLANTED
    )
    argv = [str(clone / "mis-run"), "-q", "--", "sh", "-c", script]
    done = subprocess.run(argv, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all((clone / f"{name}.py").exists() for name in PLANTED)
    for line in STARTS:
        name, *words = line.split()
        for cwd in (clone, Path("/")):
            done = ran([str(clone / name), *words], cwd, "{}", timeout=60)
            assert "PLANTED" not in done.stderr, (line, done.stderr)
    on_path = f"import sys; sys.path.append({str(clone)!r}); import copy, mis_run.units"
    python = str(clone / ".venv/bin/python")
    done = subprocess.run(
        [python, "-I", "-S", "-c", on_path], capture_output=True, text=True, check=True
    )
    assert "PLANTED org.python.core" in done.stderr  # the control: with the checkout on the path
    for name in {name.partition("/")[0] for name in PLANTED}:
        shutil.rmtree(clone / name, ignore_errors=True)
        (clone / f"{name}.py").unlink(missing_ok=True)


def test_set_up_neither_follows_nor_builds_what_an_agent_left(clone: Path, tmp_path: Path) -> None:
    """A link in place of a file that set-up would write, and a build hook beside pyproject.toml."""
    precious, mark = tmp_path / "precious", tmp_path / "built"
    precious.write_text("mine")
    hook = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    script = (
        f"ln -s {precious} .venv.lock; "
        "printf '[build.hooks.custom]\\npath = \"evil.py\"\\n' > hatch.toml; "
        f"printf %s {shlex.quote(hook)} > evil.py"
    )
    argv = [str(clone / "mis-run"), "-q", "--", "sh", "-c", script]
    assert subprocess.run(argv, cwd=clone, check=False).returncode == 0
    os.utime(clone / "bpf/mis.h")  # set-up has something to do
    done = subprocess.run(
        [clone / "mis-run", "--version"], capture_output=True, text=True, timeout=600, check=True
    )
    assert "built net.bpf.o" in done.stderr
    assert precious.read_text() == "mine"
    assert not mark.exists()
    assert not [*clone.glob(".venv/lib/*/site-packages/mis_run-*")]  # nothing was built
    subprocess.run(["sh", "-c", f": > {clone}/.venv.lock"], check=True)
    assert precious.read_text() == ""  # the control: the link was one that root follows
    for name in (".venv.lock", "hatch.toml", "evil.py"):
        (clone / name).unlink()
