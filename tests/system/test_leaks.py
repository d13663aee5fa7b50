"""Nothing stays: after every ending, after a failure behind every step, after SIGKILL any time."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import mis, run, start, wait_for
from leftovers import snapshot

pytestmark = pytest.mark.root

SEED = 20261121
KILLS = 50


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


FAIL_BEHIND = """
import sys
from pathlib import Path
from mis_run import host, plan, profiles
from mis_run.errors import SetupError
from mis_run.launch import Steps, run
from mis_run.model import Options
step, workdir = sys.argv[1:3]
def after(name):
    if name == step:
        raise SetupError(f"injected behind {name}")
Steps.after = staticmethod(after)
options = Options(command=("true",), workdir=Path(workdir))
caller = host.caller(None, {})
made = plan.make(options, profiles.load("default"), host.probe(), caller)
try:
    run(made)
except SetupError as error:
    print("failed:", error)
    sys.exit(error.exit_code)
print("never reached", step)
"""


def _steps(workspace: Path) -> list[str]:
    """The names of the steps of a launch, from a real one."""
    done = run("true", cwd=workspace)
    exit_event = next(event for event in done.events if event["kind"] == "run.exit")
    return list(exit_event["subject"]["setup"])


def test_failure_behind_every_step_leaves_nothing(workspace: Path) -> None:
    """An exception injected behind each single setup step undoes everything before it."""
    steps = _steps(workspace)
    assert len(steps) >= 7, steps
    before = snapshot()
    for step in steps:
        argv = [sys.executable, "-I", "-c", FAIL_BEHIND, step, str(workspace)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (121, f"failed: injected behind {step}\n"), (
            done.stderr
        )
        assert snapshot() == before, step


@pytest.mark.parametrize("command", ["true", "false", "exit 3", "kill -9 $$", "kill -15 $$"])
def test_every_ending_leaves_nothing(command: str, workspace: Path) -> None:
    """Normal and failing exits and deaths by signal leave no trace, without gc."""
    before = snapshot()
    run("sh", "-c", command, cwd=workspace)
    assert snapshot() == before


def test_background_children_end_with_the_agent(workspace: Path) -> None:
    """What the agent left running in the background is gone when mis-run returns."""
    before = snapshot()
    script = "for i in 1 2 3; do setsid sh -c 'setsid sleep 876 &' & done; sleep 0.2"
    run("sh", "-c", script, cwd=workspace)
    assert snapshot() == before
    assert subprocess.run(["pgrep", "-f", "^sleep 876$"], check=False).returncode == 1


def test_sigkill_at_random_moments(workspace: Path) -> None:
    """SIGKILL of mis-run anywhere between its start and its end: no live agent, and gc cleans."""
    before = snapshot()
    chance = random.Random(SEED)
    for _ in range(KILLS):
        agent = start("sleep", "543", cwd=workspace)
        time.sleep(chance.uniform(0.02, 0.35))
        agent.kill()
        agent.communicate()
        wait_for(lambda: not _sleepers(), 2)
    done = mis("gc")
    assert done.returncode == 0, done.stderr
    assert snapshot() == before


def _sleepers() -> bool:
    found = subprocess.run(["pgrep", "-f", "^sleep 543$"], capture_output=True, check=False)
    return found.returncode == 0
