"""How a start begins: the collector off until it is there, the environment known without `site`."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from mis_run import host, startup

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_SITE = """
import sys
sys.path.append(sys.argv[1]); import mis_run; sys.path.pop()
from mis_run import startup
print(startup.environment())
try:
    import click
except ImportError:
    print("not yet")
startup.reach_installed()
import click, mis_run
print(sys.argv[1] in sys.path)
"""


def test_the_collector_is_off_between_begin_and_settled() -> None:
    """And what was imported by then is not looked at again."""
    try:
        startup.begin()
        assert not gc.isenabled()
        startup.settled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.enable()
        gc.unfreeze()


def test_without_site_the_environment_is_the_same() -> None:
    """A start that leaves `site` out knows its environment, and reaches what is installed there
    when it wants to; the checkout is not on the path before or after."""
    if not (Path(sys.prefix) / "pyvenv.cfg").exists():
        pytest.skip("not in a virtual environment")
    argv = [sys.executable, "-I", "-S", "-c", WITHOUT_SITE, str(ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [sys.prefix, "not yet", "False"]


def test_a_launch_imports_little() -> None:
    """What takes long to import is not needed before the agent runs."""
    slow = ("typing", "dataclasses", "inspect", "subprocess", "tomllib", "click", "logging", "ssl")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        "from mis_run import command, words, host, launch, plan, profiles; "
        f"print(*sorted({{*{slow!r}}} & {{*sys.modules}}))"
    )
    argv = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_without_an_environment_it_is_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for an installation by the distribution."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    assert startup.environment() == Path(sys.prefix)
    (tmp_path / "pyvenv.cfg").touch()
    assert startup.environment() == tmp_path


def test_the_python_that_runs_us_is_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in a workspace, as the environment may."""
    monkeypatch.setattr(sys, "base_prefix", "/work/.python")
    assert {"/work/.python", str(startup.environment())} <= set(host._engine())
