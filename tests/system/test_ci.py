"""CI: the script behind the action and the template, run as a runner would; their YAML."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

pytestmark = pytest.mark.root


def step(
    folder: Path, script: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """``ci/step`` in a checkout: how it ended, and its summary."""
    checkout, summary = folder / "checkout", folder / "summary.md"
    checkout.mkdir(exist_ok=True)
    done = subprocess.run(
        [str(ROOT / "ci/step")],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "MIS_STEP": script, "GITHUB_STEP_SUMMARY": str(summary), **variables},
    )
    return done, summary.read_text() if summary.exists() else ""


def test_a_step_works_and_its_denials_are_shown(tmp_path: Path) -> None:
    """Output, files and exit code are the step's; what it was denied is in the summary."""
    script = "echo built > out; echo hello; cat /etc/shadow || true; exit 3"
    done, summary = step(tmp_path, script)
    assert (done.returncode, done.stdout) == (3, "hello\n"), done.stderr
    assert (tmp_path / "checkout/out").read_text() == "built\n"
    assert "ended with code 3" in summary
    assert "`ci-untrusted`" in summary


def test_denials_and_what_would_allow_them(tmp_path: Path) -> None:
    """A destination that no rule has is in the summary with the flag that allows it."""
    script = "exec 3<>/dev/tcp/192.0.2.66/443"
    done, summary = step(tmp_path, script, MIS_PROFILE="default")
    assert done.returncode == 1
    assert "--allow-net 192.0.2.66:443" in summary
    done, _ = step(tmp_path, "true", MIS_ALLOW_NET="192.0.2.66:443 192.0.2.67:443")
    assert done.returncode == 0, done.stderr


def test_the_jobs_secrets_are_not_passed(tmp_path: Path) -> None:
    """Only variables that are named reach the step."""
    script = "echo ${TOKEN:-none} ${WANTED:-none}"
    done, _ = step(tmp_path, script, TOKEN="secret", WANTED="x y", MIS_PASS="WANTED MISSING")
    assert done.stdout == "none x y\n", done.stderr


def test_nothing_to_run(tmp_path: Path) -> None:
    """A missing input is a usage error, not a success."""
    done, _ = step(tmp_path, "")
    assert done.returncode == 2


def load(path: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((ROOT / path).read_text())


def test_the_action_is_a_composite_action() -> None:
    """What GitHub demands of action.yml: names, descriptions, a shell for each run."""
    action = load("ci/github/action.yml")
    assert {"name", "description", "inputs", "runs"} == {*action}
    assert all(one["description"] for one in action["inputs"].values())
    assert action["runs"]["using"] == "composite"
    for one in action["runs"]["steps"]:
        assert {"shell", "run"} <= {*one}
        named = {value.split("inputs.")[1].split(" ")[0] for value in one["env"].values()}
        assert named <= {*action["inputs"]}
    assert (ROOT / "ci/github/../step").resolve() == ROOT / "ci/step"


def test_the_template_is_a_hidden_job() -> None:
    """What GitLab demands: a hidden job with a script, variables that are strings."""
    template = load("ci/gitlab/mis-run.yml")
    assert {*template} == {".mis-run"}
    assert all(isinstance(value, str) for value in template[".mis-run"]["variables"].values())
    assert template[".mis-run"]["script"] == ["/opt/mis-run/ci/step"]
