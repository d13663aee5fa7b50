"""``images/build``: images from a Debian mirror, with no registry, equal from build to build.

A root of a few packages is built always; the real recipes take minutes each, so they are built
where MIS_TEST_IMAGES=1 asks for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import engine as engines
import pytest
from harness import ROOT, run
from leftovers import snapshot

RECIPES = ("mis-agent", "mis-agent-node", "mis-ci")
SHOWS = {
    "mis-agent": "python3 -c 'import ssl, venv' && git --version",
    "mis-agent-node": "node -e 'process.exit(0)' && npm --version && git --version",
    "mis-ci": "echo 'int main(){return 0;}' >x.c && gcc x.c && ./a.out && echo {} | jq .",
}
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]


def build(*words: str | Path, epoch: str = "1700000000") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SOURCE_DATE_EPOCH": epoch}
    argv = [str(ROOT / "images/build"), *map(str, words)]
    return subprocess.run(
        argv, env=env, capture_output=True, text=True, timeout=1500, check=False, cwd="/"
    )


def digest(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def in_image(layout: Path, script: str, place: Path, cache: Path) -> str:
    options = ("--image", f"oci:{layout}")
    before = snapshot()
    done = run("sh", "-c", script, cwd=place, options=options, env={"MIS_CACHE": str(cache)})
    assert done.code == 0, done.err
    assert snapshot() == before
    return done.out


def test_a_small_image(tmp_path: Path, place: Path) -> None:
    """Built twice it is the same; it runs as its user, in its folder, without set-uid programs."""
    recipe = tmp_path / "tiny.packages"
    recipe.write_text("dash coreutils findutils grep # enough for the last step\n")
    small = (recipe, "--variant=extract", "--output")
    first = digest(build(*small, tmp_path / "one"))
    assert digest(build(*small, tmp_path / "two")) == first
    assert digest(build(*small, tmp_path / "three", epoch="1600000000")) != first  # the control
    script = (
        "id -u; pwd; touch mine && echo wrote; find / -xdev -perm /6000 -type f; cat /etc/group"
    )
    shown = in_image(tmp_path / "one", script, place, tmp_path / "cache")
    assert shown == "1000\n/work\nwrote\nagent:x:1000:\n"


def test_words_of_build(tmp_path: Path) -> None:
    """An unknown recipe, and a folder that holds something else, are refused by name."""
    unknown = build("no-such-image")
    assert unknown.returncode == 1
    assert "mis-agent, mis-agent-node, mis-ci" in unknown.stderr
    (tmp_path / "mine").write_text("x")
    refused = build("mis-agent", "--output", tmp_path)
    assert refused.returncode == 1
    assert "is no image" in refused.stderr
    assert (tmp_path / "mine").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("MIS_TEST_IMAGES") != "1",
    reason="each recipe takes minutes and hundreds of MB of a mirror: MIS_TEST_IMAGES=1",
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name: str, tmp_path: Path, place: Path) -> None:
    """Built twice it is the same, has what it is for, and a docker loads and runs it."""
    layout, archive = tmp_path / name, tmp_path / f"{name}.tar"
    first = digest(build(name, "--output", layout, "--archive", archive))
    assert digest(build(name, "--output", tmp_path / "again")) == first
    shutil.rmtree(tmp_path / "again")
    script = f"cd /work && {SHOWS[name]} && id -un"
    assert in_image(layout, script, place, tmp_path / "cache").endswith("agent\n")
    if (why := engines.why_not()) is not None:
        pytest.skip(f"built and run; no engine to load it into: {why}")
    given = {"mis": {"path": engines.RUNTIME}}
    with engines.running(tmp_path / "engine", given) as dockerd:
        loaded = dockerd.docker("load", "-i", str(archive), timeout=300).stdout
        assert f"{name}:latest" in loaded
        for runtime in ("runc", "mis"):
            argv = ("run", "--rm", "--runtime", runtime, name, "sh", "-c", script)
            assert dockerd.docker(*argv, timeout=120).stdout.endswith("agent\n")
        facts = json.loads(dockerd.docker("inspect", name).stdout)[0]
        assert facts["Config"]["User"] == "agent"
